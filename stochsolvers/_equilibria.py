"""What the Flax equilibrium layers share: from a layer's arrays and options to a problem and its solution."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar, at_least_float32, value_object
from stochsolvers.equilibrium import (
    DeepProblem,
    EquilibriumProblem,
    Regularized,
    normalized,
    normalized_refresh,
)
from stochsolvers.equilibrium._solve import with_derivative
from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz import LipschitzState, lipschitz_state
from stochsolvers.lipschitz.machinery.search import Found
from stochsolvers.problems import FixedPointProblem
from stochsolvers.prox import Prior
from stochsolvers.solvers import Solution, Solver

TOLERANCE = 0.05
"""Of a kept norm: how far its square may be above the certified one before it is computed afresh."""


@value_object
class Unit:
    """What one equilibrium layer is besides its parameters.

    Attributes:
      prior: g, whose prox at step 1 is the activation.
      bound: ω, the most that ||W|| may be.
    """

    prior: Prior
    bound: Scalar

    def check(self, layer: str) -> "Unit":
        """Refuse what is no prior and no bound, at construction."""
        if not isinstance(self.prior, Prior):
            wanted = "a Prior such as prox.NonNegative()"
            _checks.fail(f"prior of {layer}", wanted, repr(self.prior))
        _checks.positive(f"bound of {layer}", self.bound)
        _checks.at_most(f"bound of {layer}", self.bound, 1.0, "ω of a layer with an equilibrium")
        _checks.rank(f"bound of {layer}", self.bound, 0)
        return self

    def problem(
        self, input_map: LinearMap | None, linear_map: LinearMap, inputs: Array, bias: Array | None
    ) -> EquilibriumProblem:
        """The problem with the drive U x + b.

        Args:
          input_map: U; None for the identity.
          linear_map: W, its norm within the bound.
          inputs: x.
          bias: b, one number for each hidden feature.
        """
        drive = inputs if input_map is None else input_map(inputs)
        if bias is not None:
            drive = drive + jnp.expand_dims(bias, range(drive.ndim - 1))
        return EquilibriumProblem(linear_map, drive, prior=self.prior)


Kept: TypeAlias = dict[str, Array]
"""The state of a norm as a layer's variable holds it, in arrays by name."""


def norm_of(linear_map: LinearMap) -> Kept | None:
    """The state of the norm of W, from the full computation; None if its singular values are not known."""
    state = lipschitz_state(linear_map, grid="padded")
    return None if state.anchor is None else _kept(state)


def within_bound(
    linear_map: LinearMap, bound: Scalar, kept: Kept | None
) -> tuple[LinearMap, Kept | None]:
    """W with ||W|| ≤ bound, from the kept state of its norm where there is one, and the next state."""
    # not below float32, where the division would round the norm up again
    linear_map = linear_map.astype(at_least_float32(linear_map.dtype))
    if kept is None or kept["anchor"].dtype != linear_map.dtype:
        return normalized(linear_map, bound), kept
    best = Found(**{name: kept[f"top_{name}"] for name in Found._fields})
    state = LipschitzState(kept["anchor"], kept["scale"], kept["ceiling"], best, grid="padded")
    linear_map, state = normalized_refresh(linear_map, state, bound, tolerance=TOLERANCE)
    return linear_map, _kept(state)


def _kept(state: Any) -> Kept:
    best = {f"top_{name}": array for name, array in state.best._asdict().items()}
    return {"anchor": state.anchor, "scale": state.scale, "ceiling": state.ceiling, **best}


def conv_maps(
    inputs: Array,
    input_kernel: Array | None,
    kernel: Array,
    strides: Any,
    padding: Any,
    spatial_shape: tuple[int, ...] | None,
) -> tuple[Conv | None, Conv]:
    """U on the inputs' pixels, and W of unit stride on the pixels of U x.

    Args:
      inputs: x, or an array of its shape.
      input_kernel: of U; None for the identity.
      kernel: of W.
      strides: of U.
      padding: "SAME" or "CIRCULAR", of both.
      spatial_shape: of the inputs where it is fixed.
    """
    rank = kernel.ndim - 2
    if inputs.ndim < rank + 1:
        names = {1: "W", 2: "H, W", 3: "D, H, W"}.get(rank, "spatial")
        wanted = f"(..., {names}, features)"
        _checks.fail("shape of EquilibriumConv's inputs", wanted, inputs.shape)
    pixels = inputs.shape[-rank - 1 : -1]
    if spatial_shape not in (None, pixels):
        _checks.fail("spatial shape of the inputs", spatial_shape, pixels)
    if input_kernel is None:
        return None, Conv(kernel, pixels, padding=padding)
    input_map = Conv(input_kernel, pixels, strides=strides, padding=padding)
    return input_map, Conv(kernel, input_map.out_shape[:-1], padding=padding)


def kernel_sizes(size: Any, input_size: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the kernels of W and U, the second like the first by default; a number of W is for one axis."""
    size = (size,) if isinstance(size, int) else tuple(size)
    if input_size is None:
        return size, size
    return size, (input_size,) * len(size) if isinstance(input_size, int) else tuple(input_size)


def check_padding(layer: str, padding: Any) -> None:
    """Require that z has the pixels of the hidden units."""
    _checks.member(f"padding of {layer}", padding, ("SAME", "CIRCULAR"))


def check_solver(layer: str, solver: Any, regularizer: Any) -> None:
    """Refuse what is no solver that samples nothing, and no prior of the equilibrium, at construction."""
    if solver is not None and (not isinstance(solver, Solver) or solver.stochastic):
        wanted = "a Solver that does not sample, such as Anderson(50)"
        _checks.fail(f"solver of {layer}", wanted, repr(solver))
    if regularizer is not None and not isinstance(regularizer, Regularized):
        _checks.fail(f"regularizer of {layer}", "a Regularized or None", repr(regularizer))


def result_type(dtype: Any, inputs: Array, parameters: Sequence[Array]) -> Any:
    """The dtype of a layer's output: its own, or the widest of its inputs and parameters."""
    kinds = [leaf.dtype for leaf in parameters if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.result_type(inputs.dtype, *kinds) if dtype is None else dtype


def composed(
    layers: list[EquilibriumProblem], alpha: Scalar, regularizer: Regularized | None
) -> DeepProblem | EquilibriumProblem:
    """The layers one after the other, and the prior of the equilibrium; one plain layer as it is."""
    if regularizer is None and len(layers) == 1 and isinstance(alpha, int | float) and alpha == 1:
        return layers[0]
    maps = [*layers] if regularizer is None else [*layers, regularizer]
    return DeepProblem(maps, alpha)  # pyright: ignore[reportArgumentType]


def starting_point(problem: FixedPointProblem, init: Array | None, kept: Array | None) -> Any:
    """z_0: the caller's, else the kept one where it is of this batch's shape, else None."""
    if init is not None or kept is None or kept.shape != problem.shape:
        return init
    return lax.stop_gradient(kept)


def next_start(value: Array, kept: Array) -> Array:
    """What is kept of a solution for the next call; zero where it is not finite."""
    if value.shape != kept.shape:
        return kept
    value = lax.stop_gradient(value).astype(kept.dtype)
    return jnp.where(jnp.isfinite(value), value, 0)


def run(
    solver: Solver | None,
    derivative: Any,
    problem: FixedPointProblem | Any,
    *,
    init: Array | None,
    precision: Any,
    dtype: Any,
    certify: bool = False,
    record: Callable[[Any], object] | None = None,
) -> Solution:
    """Solve, and give the value the dtype that a plain layer's output would have.

    Args:
      solver: of the layer; None for the default.
      derivative: of the layer.
      problem: of the layer at its inputs.
      init: z_0, or None for zero.
      precision: of the layer's matrix products.
      dtype: of the value.
      certify: fill in the certificate, of the value as returned.
      record: takes the measurements of the solve; None measures nothing.
    """
    resolved = with_derivative(solver, derivative, problem.dtype)
    with _layers.precision_context(precision):
        solution = resolved.solve(None, problem, init=init)
    certify = certify or solution.certificate is not None
    solution = dataclasses.replace(solution, value=jnp.asarray(solution.value, dtype))
    observe = _layers.observer() if record is not None else None
    if observe is None and not certify:
        return solution
    gap = problem.certifier()(solution.value) if problem.has_objective or certify else None
    if record is not None and observe is not None:
        record(observe(resolved, problem, solution, gap, None, True))
    return dataclasses.replace(solution, certificate=gap) if certify else solution
