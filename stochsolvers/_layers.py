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
from stochsolvers._shards import varying
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Conv, LinearMap, Padding
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import Prior
from stochsolvers.solvers import Solution, Solver


def conv_map(layer: Any, kernel: Array, spatial_shape: tuple[int, ...]) -> Conv:
    """A `Conv` with the options of a Flax convolution, for inputs of (H, W) pixels.

    Raises:
      ValueError: for options that it has no equal for.
    """
    if kernel.ndim != 4:
        _checks.fail("kernel of a solver convolution", "4 axes (two spatial)", kernel.shape)
    input_dilation = 1 if layer.input_dilation is None else layer.input_dilation
    if tuple(np.broadcast_to(input_dilation, (2,))) != (1, 1):
        _checks.fail("input_dilation of a solver convolution", "1", input_dilation)
    if layer.mask is not None:
        got = f"an array of shape {layer.mask.shape}"
        _checks.fail("mask of a solver convolution", "None", got)
    padding = layer.padding
    if isinstance(padding, int):
        padding = ((padding, padding),) * 2
    elif not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    return Conv(
        kernel,
        cast(tuple[int, int], spatial_shape),
        strides=_checks.pair_of_counts("strides", layer.strides or 1),
        padding=cast(Padding, padding),
        kernel_dilation=_checks.pair_of_counts("kernel_dilation", layer.kernel_dilation or 1),
        feature_group_count=layer.feature_group_count,
    )


def step_constant(solver: Solver, linear_map: LinearMap, ridge: Scalar) -> Array | None:
    """What the solver's step size is read off, for a layer to keep; None where there is nothing."""
    linear_map = lax.stop_gradient(linear_map)
    inputs = jnp.zeros(linear_map.in_shape, linear_map.dtype)
    return solver.step_constant(LayerProblem(linear_map, inputs, ridge=ridge))


def current_constant(
    solver: Solver, linear_map: LinearMap, ridge: Scalar, kept: Array | None, refreshed: Any
) -> Array | None:
    """The kept constant if it has ever been refreshed, else one computed from the kernel at hand.

    So that a network into which weights have just been loaded does not run on the steps of its
    initialisation.
    """
    if kept is None:
        return step_constant(solver, linear_map, ridge)
    kept, linear_map = varying((kept, linear_map), (kept, linear_map))
    return lax.cond(
        refreshed,
        lambda _: kept,
        lambda current: jnp.asarray(step_constant(solver, current, ridge), kept.dtype),
        lax.stop_gradient(linear_map),
    )


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
        bias = skip if bias is None else bias + skip
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
    refreshed: Array | None,
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
      refreshed: whether that was ever asked for.
      deterministic: sample nothing.
      precision: of the layer's matrix products.
      dtype: of the value.
      certify: fill in the certificate, of the value as returned.
      record: takes what the solve shows of itself; None observes nothing.
    """
    with precision_context(precision):
        constant = current_constant(solver, problem.linear_map, problem.ridge, kept, refreshed)
        solution = solver.solve(key, problem, step_constant=constant, deterministic=deterministic)
    solution = dataclasses.replace(solution, value=jnp.asarray(solution.value, dtype))
    if not certify and record is None:
        return solution
    gap = problem.certificate(solution.value)
    if record is not None:
        record(reports.observe(solver, problem, solution, gap, constant, deterministic))
    return dataclasses.replace(solution, certificate=gap) if certify else solution


def split_static(tree: Any) -> tuple[list[Any], Any]:
    """The arrays of a tree, to be traced, and the rest of it as hashable structure."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
    traced = [leaf for leaf, array in zip(leaves, arrays, strict=True) if array]
    static = tuple(None if array else leaf for leaf, array in zip(leaves, arrays, strict=True))
    return traced, (structure, static)


def join_static(traced: list[Any], rest: Any) -> Any:
    """The tree of `split_static`."""
    structure, static = rest
    arrays = iter(traced)
    return jax.tree.unflatten(structure, [next(arrays) if s is None else s for s in static])
