"""The contract of a Flax layer that solves its problem."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx, serialization

from stochsolvers import _checks, equilibrium
from stochsolvers._typing import Array
from stochsolvers.linen import Equilibrium as LinenEquilibrium
from stochsolvers.nnx import Equilibrium
from stochsolvers.testing import _common as common


class _View(NamedTuple):
    """An NNX or a Linen layer as functions of its parameters."""

    name: str
    params: Any
    call: Callable[..., Array]  # (params, x, key, deterministic) -> output
    solve: Callable[..., Any]  # (params, x) -> Solution, deterministic and certified
    restored: Callable[
        [], Callable[..., Array]
    ]  # `call` of the layer after a round trip of its state
    stochastic: bool
    dtype: Any


def check_layer(layer: Any, inputs: Any, *, variables: Any = None) -> None:
    r"""Hold a solver layer or an equilibrium layer to its contract.

    - the output has the dtype of the plain layer (of inputs and parameters, or the layer's `dtype`); leading
      axes are a batch;
    - `deterministic=True` draws nothing; where the solver samples, the same key gives the same output, and
      another one another;
    - `jit` and differentiation change no output; every parameter has a derivative that is finite and not
      zero; those in the inputs and biases are those of differences;
    - `solve(x, certify=True)` has the layer's output as its value, and a certificate of at least 0 for each
      example;
    - the state survives a round trip;
    - of an NNX layer, `problem(x)` solved by `solver` is the output, also after `refresh_lipschitz`, and when
      other parameters are put in.

    Args:
      layer: an `nnx.Module` such as `SolverLinear`, or a Linen module with `variables`.
      inputs: x, with one or more leading batch axes of at least two examples.
      variables: of a Linen module.

    Raises:
      AssertionError: in words, with the numbers.
    """
    inputs = jnp.asarray(inputs)
    view = _view(layer, variables)
    with common.own_dtypes():
        output = common.attempt(f"{view.name}(x)", view.call, view.params, inputs, None, True)
        _check_dtypes(view, inputs)
        _check_derivatives(view, inputs, output)
        _check_modes(view, inputs, output)
        _check_solution(view, inputs, output)
        restored = common.attempt(f"state of {view.name}", view.restored)
        got = restored(view.params, inputs, None, True)
        common.close(f"{view.name} after a round trip of its state", got, output)
        if isinstance(layer, nnx.Module):
            _check_problem(layer, inputs)


def _view(layer: Any, variables: Any) -> _View:
    if isinstance(layer, nnx.Module):
        return _nnx_view(layer)
    if isinstance(layer, nn.Module) and variables is not None:
        return _linen_view(layer, variables)
    wanted = "an nnx.Module, or a Linen module and its variables"
    return _checks.fail("layer", wanted, repr(layer))


def _nnx_view(layer: Any) -> _View:
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    samples_nothing = isinstance(layer, Equilibrium)

    def merged(params):
        return nnx.merge(graph, params, rest, copy=True)

    def options(key, deterministic):
        return {"deterministic": deterministic} | ({} if samples_nothing else {"rngs": key})

    def call(params, x, key, deterministic):
        return merged(params)(x, **options(key, deterministic))

    def solve(params, x):
        return merged(params).solve(x, deterministic=True, certify=True)

    def restored():
        leaves, structure = jax.tree.flatten(nnx.state(layer))
        copy = nnx.clone(layer)
        nnx.update(copy, jax.tree.unflatten(structure, [jnp.array(leaf) for leaf in leaves]))
        return lambda params, x, key, det: copy(x, **options(key, det))

    stochastic = not samples_nothing and layer.solver.stochastic
    return _View(type(layer).__name__, params, call, solve, restored, stochastic, layer.dtype)


def _linen_view(layer: Any, variables: Any) -> _View:
    samples_nothing = isinstance(layer, LinenEquilibrium)

    def apply(variables, params, x, key, **options):
        rngs = {} if key is None or samples_nothing else {layer.rng_collection: key}
        return layer.apply({**variables, "params": params}, x, rngs=rngs, **options)

    def call(params, x, key, deterministic):
        return apply(variables, params, x, key, deterministic=deterministic)

    def solve(params, x):
        return apply(variables, params, x, None, deterministic=True, certify=True, method="solve")

    def restored():
        saved = serialization.from_bytes(variables, serialization.to_bytes(variables))
        return lambda params, x, key, det: apply(saved, saved["params"], x, key, deterministic=det)

    stochastic = not samples_nothing and layer.solver.stochastic
    name, params = type(layer).__name__, variables["params"]
    return _View(name, params, call, solve, restored, stochastic, layer.dtype)


def _check_dtypes(view: _View, x: Array) -> None:
    arrays = [leaf for leaf in jax.tree.leaves(view.params) if common.is_real(leaf)]
    for dtype in (x.dtype, jnp.dtype(jnp.bfloat16)):
        expected = view.dtype or jnp.result_type(dtype, *arrays)
        what = f"output of {view.name} for inputs of {dtype.name}"
        out = common.attempt(what, jax.eval_shape, lambda p, x: view.call(p, x, None, True),
                             view.params, x.astype(dtype))  # fmt: skip
        common.same_dtype(what, out, expected)


def _batches(x: Any) -> np.ndarray:
    """x, then for each of its examples a batch that repeats it, stacked."""
    x = np.asarray(x)
    return np.stack([x, *(np.broadcast_to(row, x.shape) for row in x)])


def _check_modes(view: _View, x: Array, output: Array) -> None:
    one, again, other = (
        common.attempt(
            f"{view.name} with a key", view.call, view.params, x, jax.random.key(k), False
        )
        for k in (0, 0, 1)
    )
    same = f"{view.name} with the same key"
    common.require(np.array_equal(one, again), same, "the same output", "another")
    if view.stochastic:
        what = f"{view.name} with another key"
        common.require(not np.array_equal(one, other), what, "another output", "the same")
    else:
        what = f"{view.name} with a solver that does not sample"
        common.close(what, one, output, words="the output of deterministic=True")


def _check_solution(view: _View, x: Array, output: Array) -> None:
    what = f"{view.name}.solve"
    solution = common.attempt(what, view.solve, view.params, x)
    words = "the layer's output"
    part = "value" if solution.pre_activation is None else "pre_activation"
    common.close(f"{part} of {what}", getattr(solution, part), output, rtol=1e-4, words=words)
    gap = np.asarray(solution.certificate)
    common.same_shape(f"certificate of {what}", gap, x.shape[: gap.ndim])
    common.require(gap >= 0, f"certificate of {what}", "at least 0", gap)


def _check_derivatives(view: _View, x: Array, plain: Array) -> None:
    """Of <w, output>: every parameter counts; along directions in the inputs and the biases.

    One program gives values and derivatives, of x and of batches of each of its examples, on two batch axes.
    """

    def loss(params, x):
        output = view.call(params, x, None, True)
        return jnp.sum(output * common.normal(31, output.shape, jnp.float32)), output

    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    what = f"derivative of {view.name}(x)"
    attempt = f"{what} with two batch axes, under jit"
    (_, output), (params, _) = common.attempt(attempt, both, view.params, _batches(x))
    whole, alone = np.asarray(output)[0], np.asarray(output)[1:]
    rtol = 1e-4 if plain.dtype.itemsize >= 4 else 2e-2
    words = "that of each example (leading axes are a batch)"
    each = np.stack([np.broadcast_to(row, whole.shape) for row in whole])
    common.close(f"{view.name}(x)", alone, each, rtol=rtol, words=words)
    words = "the output without derivatives, without jit, with one batch axis"
    common.close(f"output of {view.name}(x) under grad", whole, plain, rtol=rtol, words=words)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = f"{what} in parameter {jax.tree_util.keystr(path)}"
        leaf = np.asarray(leaf)
        common.require(np.isfinite(leaf), where, "numbers", leaf)
        common.require(np.any(leaf != 0), where, "not 0 everywhere (it is used)", "0 everywhere")
    if view.dtype is not None:
        return
    with jax.enable_x64(True):
        wide, inputs = common.cast(jax.tree.map(np.asarray, (view.params, x)), jnp.float64)
        way = common.directions((wide, inputs), 3)
        # a layer's step is a constant to derivatives, so that kernels, which set it, are left out
        way = jax.tree.map(lambda d, p: d * (jnp.ndim(p) <= 1), way[0], wide), way[1]
        parts = jax.tree.map(np.vdot, both(wide, inputs)[1], way)
        got = sum(jax.tree.leaves(parts))
        slope = common.slope(lambda point: both(*point)[0][0], (wide, inputs), way, 1e-5)
        words = "that of differences"
        where = f"{what} in the inputs and biases"
        common.close(where, got, slope, rtol=1e-3, words=words)


def _check_problem(layer: Any, x: Array) -> None:
    name = type(layer).__name__

    def compare(layer, how):
        what = f"{name}(x) {how}"
        problem = common.attempt(f"{name}.problem(x)", layer.problem, x)
        if isinstance(layer, Equilibrium):
            expected = equilibrium.solve(problem, solver=layer.solver).value
        else:
            part = "value" if layer.output == "activation" else layer.output
            options = {"deterministic": True, "pre_activation": part != "value"}
            expected = getattr(layer.solver.solve(None, problem, **options), part)
        words = "the solution of its problem by its solver"
        got = layer(x, deterministic=True)
        rtol = 1e-4 if got.dtype.itemsize >= 4 else 2e-2
        common.close(what, got, np.asarray(expected), rtol=rtol, words=words)

    copy = nnx.clone(layer)
    copy.refresh_lipschitz()
    compare(copy, "after refresh_lipschitz")
    nnx.update(copy, jax.tree.map(lambda p: 3.0 * p, nnx.state(copy, nnx.Param)))
    compare(copy, "after other parameters were put in")
    copy.refresh_lipschitz()
    compare(copy, "after refresh_lipschitz with other parameters")
