"""Our rule for a convolution's derivatives, against JAX's own of the same convolution."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import stochsolvers as ss
from stochsolvers import _convolution

CASES = {
    "same": {"pads": ((1, 1), (1, 1))},
    "odd features": {"inputs": 3, "pads": ((1, 1), (1, 1))},
    "nothing padded": {"pads": ((0, 0), (0, 0))},
    "one pixel per filter": {"shape": (1, 1), "pads": ((0, 0), (0, 0))},
    "negative": {"pads": ((-1, 2), (0, -1))},
    "wide": {"pads": ((5, 4), (3, 6))},
    "small image": {"size": (2, 3), "shape": (4, 5), "pads": ((3, 2), (2, 4))},
    "strides": {"size": (8, 9), "pads": ((1, 2), (1, 0)), "strides": (2, 3)},
    "base": {"pads": ((1, 2), (2, 0)), "base": (2, 3)},
    "dilation": {"size": (8, 9), "pads": ((2, 1), (0, 3)), "dilation": (2, 2)},
    "groups": {"inputs": 6, "pads": ((1, 1), (1, 1)), "groups": 2},
    "everything": {
        "size": (5, 6),
        "pads": ((3, 2), (1, 4)),
        "strides": (3, 2),
        "base": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
        "inputs": 6,
    },
    "one axis": {"size": (9,), "shape": (3,), "inputs": 3, "pads": ((1, 1),)},
    "one axis, everything": {
        "size": (7,),
        "shape": (2,),
        "pads": ((3, 4),),
        "strides": (2,),
        "base": (2,),
        "dilation": (3,),
        "groups": 2,
    },
    "three axes": {
        "size": (4, 3, 5),
        "shape": (3, 1, 2),
        "inputs": 3,
        "pads": ((1, 1), (0, 0), (1, 0)),
    },
    "three axes, everything": {
        "size": (3, 4, 2),
        "shape": (2, 3, 1),
        "pads": ((2, 1), (0, 3), (-1, 2)),
        "strides": (2, 1, 2),
        "base": (1, 2, 2),
        "dilation": (1, 2, 1),
        "groups": 2,
    },
}


def problem(seed, *, size=(6, 5), shape=(3, 2), inputs=4, groups=1, **geometry):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(3, *size, inputs)))
    kernel = jnp.asarray(rng.normal(size=(*shape, inputs // groups, 4)))
    axes = "DHW"[-len(size) :]

    def ours(x, kernel):
        return jnp.sin(_convolution.correlate(x, kernel, groups=groups, **geometry)).sum()

    def theirs(x, kernel):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            geometry.get("strides", (1,) * len(size)),
            geometry["pads"],
            lhs_dilation=geometry.get("base"),
            rhs_dilation=geometry.get("dilation"),
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            feature_group_count=groups,
        )
        return jnp.sin(y).sum()

    return ours, theirs, (x, kernel)


def agree(ours, theirs, *operands):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
        jax.jit(ours)(*operands),
        jax.jit(theirs)(*operands),
    )


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_jax(case):
    ours, theirs, operands = problem(0, **CASES[case])
    agree(jax.value_and_grad(ours, (0, 1)), jax.value_and_grad(theirs, (0, 1)), *operands)


@pytest.mark.parametrize("argument", [0, 1])
def test_gradient_of_one_argument(argument):
    ours, theirs, operands = problem(1, **CASES["strides"])
    agree(jax.grad(ours, argument), jax.grad(theirs, argument), *operands)


@pytest.mark.parametrize(
    "case", ["same", "everything", "one axis, everything", "three axes, everything"]
)
def test_forward_and_second_derivatives_and_batches(case):
    ours, theirs, operands = problem(2, **CASES[case])
    directions = tuple(jnp.cos(operand) for operand in operands)

    def products(f):
        def gradient(*operands):
            return jax.grad(f, (0, 1))(*operands)

        def all_of(*operands):
            forward = jax.jvp(f, operands, directions)[1]
            hessian = jax.jvp(gradient, operands, directions)[1]
            reverse = jax.vjp(gradient, *operands)[1](directions)
            stacks = [jnp.stack([operand, 2 * operand]) for operand in operands]
            images = jax.vmap(gradient, (0, None))(stacks[0], operands[1])
            kernels = jax.vmap(gradient, (None, 0))(operands[0], stacks[1])
            return forward, hessian, reverse, images, kernels

        return all_of

    agree(products(ours), products(theirs), *operands)


@pytest.mark.optimized
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_a_solver_is_differentiated_in_the_form_that_has_a_fast_routine(strides, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    x = np.ones((2, 8, 8, 3), np.float32)

    def loss(kernel, x):
        conv = ss.Conv(kernel, (8, 8), strides=strides)
        problem = ss.LayerProblem(conv, x)
        return ss.prox_gd(problem, step_size=0.1, num_iters=5, form="literal").value.sum()

    with jax.default_device(jax.devices("cpu")[0]):  # whatever else this machine has
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(np.ones((3, 3, 3, 4), np.float32), x)
        convolutions = re.findall(r" convolution\(.*", lowered.compile().as_text())
    assert len(convolutions) >= 4
    for text in convolutions:
        assert "dim_labels=b01f_01io->b01f" in text
        assert "rhs_reversal" not in text


def test_an_empty_batch_has_gradients_of_zero():
    ours, _, (x, kernel) = problem(3, **CASES["same"])
    of_x, of_kernel = jax.grad(ours, (0, 1))(x[:0], kernel)
    assert of_x.shape == (0, *x.shape[1:])
    np.testing.assert_array_equal(of_kernel, jnp.zeros_like(kernel))


def test_low_precision_stays_what_it_is():
    ours, _, (x, kernel) = problem(4, **CASES["same"])
    exact = jax.grad(ours, (0, 1))(x, kernel)
    rounded = jax.grad(ours, (0, 1))(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    for low, high in zip(rounded, exact, strict=True):
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(low.astype(high.dtype), high, atol=0.1 * jnp.max(jnp.abs(high)))


def test_solvers_differentiate_within_shard_map_and_export_for_any_batch():
    conv_shape = (6, 6)
    kernel, x = jnp.ones((3, 3, 3, 4)) / 9, jnp.linspace(-1, 1, 2 * 36 * 3).reshape(2, 6, 6, 3)

    def loss(kernel, x):
        layer = ss.LayerProblem(ss.Conv(kernel, conv_shape), x)
        return ss.prox_gd(layer, step_size=0.1, num_iters=3).value.sum()

    def sharded(kernel, x):
        rows = P("examples")
        return jax.shard_map(
            lambda kernel, x: jax.lax.psum(loss(kernel, x), "examples"),
            mesh=jax.make_mesh((1,), ("examples",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), rows),
            out_specs=P(),
        )(kernel, x)

    want = jax.jit(jax.grad(loss, (0, 1)))(kernel, x)
    got = jax.jit(jax.grad(sharded, (0, 1)))(kernel, x)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)

    (batch,) = export.symbolic_shape("batch")
    shapes = (kernel, jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype))
    saved = export.export(jax.jit(jax.grad(loss, (0, 1))))(*shapes)
    for one, other in zip(saved.call(kernel, x), want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
