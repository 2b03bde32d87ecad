"""What the Flax skins share: from a layer's arrays and options to a problem and its solution."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks, reports
from stochsolvers._shards import automatic, varying
from stochsolvers._typing import Array, Scalar, at_least_float32
from stochsolvers.linear_maps import Contraction, Conv, LinearMap, Padding, conv_transpose
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import Prior
from stochsolvers.solvers import Solution, Solver


def conv_map(layer: Any, kernel: Array, spatial_shape: tuple[int, ...]) -> Conv:
    """A `Conv` with the options of a Flax convolution, for inputs of these pixels.

    Raises:
      ValueError: for unsupported options.
    """
    rank = _spatial_rank(layer, kernel)
    input_dilation = 1 if layer.input_dilation is None else layer.input_dilation
    if any(d != 1 for d in np.broadcast_to(input_dilation, (rank,))):
        _checks.fail("input_dilation of a solver convolution", "1", input_dilation)
    if layer.mask is not None:
        got = f"an array of shape {layer.mask.shape}"
        _checks.fail("mask of a solver convolution", "None", got)
    padding = layer.padding
    if isinstance(padding, int):
        padding = ((padding, padding),) * rank
    elif not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    return Conv(
        kernel,
        cast(Any, tuple(spatial_shape)),
        strides=cast(Any, _for_each_axis(layer.strides, rank)),
        padding=cast(Padding, padding),
        kernel_dilation=cast(Any, _for_each_axis(layer.kernel_dilation, rank)),
        feature_group_count=layer.feature_group_count,
    )


def conv_transpose_map(layer: Any, kernel: Array, inputs_shape: tuple[int, ...]) -> LinearMap:
    """The map of a Flax transposed convolution, for inputs of this shape."""
    if layer.mask is not None:
        _checks.fail("mask of a transposed convolution", "None", "an array")
    rank = _spatial_rank(layer, kernel)
    return conv_transpose(
        kernel,
        tuple(inputs_shape[-rank - 1 : -1]),
        strides=_for_each_axis(layer.strides, rank),
        padding=layer.padding,
        kernel_dilation=_for_each_axis(layer.kernel_dilation, rank),
        transpose_kernel=layer.transpose_kernel,
    )


def einsum_map(equation: str, kernel: Array, inputs_shape: tuple[int, ...]) -> LinearMap:
    """The map of a Flax einsum layer, for inputs of this shape."""
    equation = equation.replace(" ", "")
    labels = equation.split(",")[0].replace("...", "")
    return Contraction(equation, kernel, tuple(inputs_shape[len(inputs_shape) - len(labels) :]))


def _spatial_rank(layer: Any, kernel: Array) -> int:
    """The number of spatial axes of a Flax convolution."""
    size = layer.kernel_size
    rank = 1 if isinstance(size, int) else len(size)
    if kernel.ndim != rank + 2:  # of a stack of layers
        _checks.fail("kernel of a convolution", f"{rank + 2} axes", kernel.shape)
    return rank


def _for_each_axis(value: Any, rank: int) -> tuple[int, ...]:
    """One number for each spatial axis, as Flax reads it: None is 1."""
    value = 1 if value is None else value
    return (value,) * rank if isinstance(value, int) else tuple(value)


def step_constant(solver: Solver, linear_map: LinearMap, ridge: Scalar) -> Array | None:
    """The problem constant that sets the solver's step, for a layer to keep; None for a fixed step."""
    linear_map = lax.stop_gradient(linear_map)
    inputs = jnp.zeros(linear_map.in_shape, linear_map.dtype)
    return solver.step_constant(LayerProblem(linear_map, inputs, ridge=ridge))


_SAMPLES = 64  # entries of the kernel in a fingerprint
_MOVED = 0.5  # relative change above which a kernel is another one


def fingerprint(linear_map: LinearMap, xp: Any = jnp) -> Any:
    """Numbers by which a map is known again: its Euclidean norm, the shape of its inputs, some entries.

    Args:
      linear_map: A.
      xp: `jnp`, or `np` for arrays on the host.
    """
    leaves = [xp.asarray(leaf).ravel() for leaf in jax.tree.leaves(linear_map)]
    dtype = at_least_float32(linear_map.dtype)
    entries = xp.concatenate([leaf.astype(dtype) for leaf in leaves])
    norm = xp.sqrt(xp.sum(entries**2))
    few = entries[:: max(1, -(-entries.size // _SAMPLES))]
    return xp.concatenate([norm[None], xp.asarray(linear_map.in_shape, dtype), few])


def is_current(reference: Any, linear_map: LinearMap, xp: Any = jnp) -> Any:
    """Whether a map is still about the one of an earlier fingerprint.

    Training moves a kernel little from one refresh to the next. A kernel whose norm, or whose entries, have
    changed by half is another one (loaded from a checkpoint, say), and so is one for images of another
    size; zeros are the fingerprint of no map.
    """
    now, count = fingerprint(linear_map, xp), 1 + len(linear_map.in_shape)
    if now.shape != reference.shape:
        return xp.zeros((), bool)
    same_shape = xp.all(now[1:count] == reference[1:count])
    same_norm = xp.abs(now[0] - reference[0]) <= _MOVED * reference[0]
    moved, before = now[count:] - reference[count:], reference[count:]
    return same_shape & same_norm & (xp.sum(moved**2) <= _MOVED**2 * xp.sum(before**2))


def kept_if_current(kept: Any, reference: Any, linear_map: LinearMap) -> Any:
    """The kept constant if it is of about this map, else None; for arrays on the host."""
    if kept is None or reference is None:
        return None
    kept, reference, linear_map = jax.device_get((kept, reference, linear_map))
    return kept if is_current(reference, linear_map, np) else None


def current_constant(
    solver: Solver,
    linear_map: LinearMap,
    ridge: Scalar,
    kept: Array | None,
    reference: Array | None,
) -> Array | None:
    """The kept constant if it is of about this map, else one computed from the map at hand.

    So that a network into which weights have just been loaded does not run on the steps of others.
    """
    if kept is None or reference is None:
        return step_constant(solver, linear_map, ridge)

    def choose(kept, reference, linear_map):
        kept, linear_map = varying((kept, linear_map), (kept, linear_map))
        return lax.cond(
            is_current(reference, linear_map),
            lambda _: kept,
            lambda current: jnp.asarray(step_constant(solver, current, ridge), kept.dtype),
            linear_map,
        )

    everywhere = jax.sharding.PartitionSpec()
    return automatic(choose, everywhere, kept, reference, lax.stop_gradient(linear_map))


def check_factors(layer: str, solver: object, prior: object, ridge: object) -> None:
    """Refuse what is no solver, no prior and no weight, at construction."""
    if not isinstance(solver, Solver):
        _checks.fail(f"solver of {layer}", "a Solver such as ProxGD(10)", repr(solver))
    if not isinstance(prior, Prior):
        _checks.fail(f"prior of {layer}", "a Prior such as prox.NonNegative()", repr(prior))
    _checks.non_negative("ridge", ridge)
    _checks.rank("ridge", ridge, 0)


def refuse(layer: str, **options: Any) -> None:
    """An error for options of the plain layer that a solver has no use for and would ignore."""
    for name, value in options.items():
        if value is not None:
            _checks.fail(f"{name} of {layer}", "the default", value)


def make_problem(
    linear_map: LinearMap,
    inputs: Array,
    bias: Array | None,
    skip: Array | None,
    *,
    prior: Prior,
    ridge: Scalar,
) -> LayerProblem:
    """The layer's problem; `skip` joins the bias, as in a residual block."""
    if skip is not None:
        before = range(jnp.ndim(skip) - (0 if bias is None else jnp.ndim(bias)))
        bias = skip if bias is None else jnp.expand_dims(bias, before) + skip
    return LayerProblem(linear_map, inputs, bias=bias, prior=prior, ridge=ridge)


def precision_context(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """Matrix products at a layer's `precision`; None is JAX's default."""
    if precision is None:
        return contextlib.nullcontext()
    if not isinstance(precision, str | jax.lax.Precision):
        _checks.fail("precision of a solver layer", "a name or a jax.lax.Precision", precision)
    name = precision if isinstance(precision, str) else precision.name.lower()
    return jax.default_matmul_precision(name)


def run(
    solver: Solver,
    key: Array | None,
    problem: LayerProblem,
    *,
    kept: Array | None,
    reference: Array | None,
    deterministic: bool,
    precision: Any,
    dtype: Any,
    certify: bool = False,
    record: Callable[[reports.Observation], object] | None = None,
) -> Solution:
    """Solve, and give the value the dtype that the plain layer's output would have.

    Args:
      solver: the layer's configuration.
      key: random key; None where nothing is sampled.
      problem: the layer's problem.
      kept: what `step_constant` returned when the layer last computed it, or None.
      reference: the `fingerprint` of the map that it was computed from, or None.
      deterministic: sample nothing.
      precision: of the layer's matrix products.
      dtype: of the value.
      certify: fill in the certificate, of the value as returned.
      record: takes the measurements of the solve; None measures nothing.
    """
    with precision_context(precision):
        constant = current_constant(solver, problem.linear_map, problem.ridge, kept, reference)
        solution = solver.solve(key, problem, step_constant=constant, deterministic=deterministic)
    solution = dataclasses.replace(solution, value=jnp.asarray(solution.value, dtype))
    if not certify and record is None:
        return solution
    gap = problem.certificate(solution.value)
    if record is not None:
        record(reports.observe(solver, problem, solution, gap, constant, deterministic))
    return dataclasses.replace(solution, certificate=gap) if certify else solution
