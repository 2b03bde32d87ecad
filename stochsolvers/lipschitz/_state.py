r"""A Lipschitz constant that follows a kernel through its training.

Singular values move no faster than the map: |σ(A) − σ(A₀)| ≤ ||A − A₀||. A certified upper end at A₀
therefore stays one for a while, and a few products with the block of the top frequency keep the lower
end up to date.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import replicated
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz._bracket import lipschitz_bracket
from stochsolvers.lipschitz._constant import lipschitz_constant
from stochsolvers.lipschitz._types import (
    Bracket,
    Grid,
    check_grid,
    of_map,
    of_map_and_state,
    rescaled,
)
from stochsolvers.lipschitz.machinery import spectra
from stochsolvers.lipschitz.machinery.blocks import scale_of
from stochsolvers.lipschitz.machinery.search import Found, frobenius_bounds
from stochsolvers.lipschitz.machinery.taps import Phases, taps_and_phases
from stochsolvers.lipschitz.machinery.top import (
    certified,
    image,
    rayleigh,
    top_square,
    widened,
)
from stochsolvers.lipschitz.machinery.written import has_blocks

_POWER_STEPS = 2


@value_object
class LipschitzState:
    """What `lipschitz_refresh` remembers.

    All is None for a map without a kernel that is too large to be written out.

    Attributes:
      anchor: the taps at which the upper end was certified, divided by `scale`.
      scale: a power of two.
      ceiling: that upper end, divided by scale².
      best: the block with the largest singular value, and its vector.
      grid: as in `lipschitz_constant`.
    """

    anchor: Array | None
    scale: Array | None
    ceiling: Array | None
    best: Found | None
    grid: Grid = static_field(default="layer", kw_only=True)


@of_map
@replicated
@functools.partial(jax.jit, static_argnames="grid")
def lipschitz_state(linear_map: LinearMap, *, grid: Grid = "layer") -> LipschitzState:
    """The state for a kernel, from `lipschitz_bracket`'s full computation."""
    check_grid(grid)
    if not has_blocks(linear_map):
        return LipschitzState(None, None, None, None, grid=grid)
    taps, phases = taps_and_phases(linear_map, grid)
    scale = scale_of(taps)
    _, upper, best = certified(taps / scale, phases)
    return LipschitzState(taps / scale, scale, upper, best, grid=grid)


@of_map_and_state(LipschitzState, "lipschitz_state")
@replicated
@jax.jit
def lipschitz_refresh(
    linear_map: LinearMap, state: LipschitzState, *, tolerance: Scalar = 0.05
) -> tuple[Bracket, LipschitzState]:
    r"""The bracket of L after the kernel has moved, and the state for the next time.

        upper = (√upper₀ + ||A − A₀||)²,    ||A − A₀|| ≤ max_f ||Â(f) − Â₀(f)||_F,

    from the scalar products of the taps, or from their absolute values, whichever is smaller. The lower
    end is the Rayleigh quotient of the remembered vector after two power steps. If upper > (1 + tolerance)
    lower everything is computed afresh, as in `lipschitz_state`. Under `vmap` it always is, and so is
    `lipschitz_bracket` of a map without a kernel too large to be written out.

    Args:
      linear_map: the same layer with another kernel.
      state: from `lipschitz_state` or from the last refresh; its kernel is never more than a
        tolerance away.
      tolerance: of upper / lower − 1, traced.

    Returns:
      (bracket, state). `bracket.upper` is the constant for a safe step.

    Raises:
      ValueError: at trace time, if the layer's shape is not the state's.
    """
    if state.anchor is None or not has_blocks(linear_map):
        if state.anchor is not None or has_blocks(linear_map):
            _checks.fail("state of lipschitz_refresh", "that of the same layer", "another's")
        return lipschitz_bracket(linear_map, grid=state.grid), state
    taps, phases = taps_and_phases(linear_map, state.grid)
    if taps.shape != state.anchor.shape or taps.dtype != state.anchor.dtype:
        _checks.fail("taps of the layer", (state.anchor.shape, state.anchor.dtype), taps.shape)
    return _refreshed(linear_map, taps, phases, state, tolerance)


@of_map_and_state(LipschitzState, "lipschitz_state")
@replicated
@jax.jit
def remembered_constant(linear_map: LinearMap, state: LipschitzState) -> Array:
    """||Â(f) v||² / ||v||² at the state's block f and vector v: L at the state's kernel, and differentiable.

    Derivatives are those of L where v is its singular vector, as in `lipschitz_constant`, which it is of maps
    without a kernel that are too large to be written out.
    """
    if state.best is None or state.scale is None:
        return lipschitz_constant(linear_map, grid=state.grid)
    scale, best = lax.stop_gradient((state.scale, state.best))
    taps, phases = taps_and_phases(linear_map, state.grid)
    return top_square(taps / scale, phases, best) * scale * scale


def _refreshed(
    linear_map: LinearMap, taps: Array, phases: Phases, state: Any, tolerance: Scalar
) -> tuple[Bracket, LipschitzState]:
    """`lipschitz_refresh` for the taps of the map."""
    taps = taps / state.scale
    drift = _norm_bound(taps - state.anchor, phases)
    if phases.error:  # of the new taps; that of the anchor is within the ceiling
        drift = drift + 1.01 * phases.error * jnp.sqrt(jnp.sum(taps**2))
    best = state.best._replace(vector=_power_steps(taps, phases, state.best))
    lower, _ = widened(rayleigh(taps, phases, best), state.ceiling, taps, phases)
    few = 1 + 16 * spectra.unit_round_off(taps.dtype)
    upper = (jnp.sqrt(state.ceiling) + drift) ** 2 * few

    def keep():
        kept = LipschitzState(state.anchor, state.scale, state.ceiling, best, grid=state.grid)
        return rescaled(lower, upper, state.scale), kept

    def renew():
        fresh: Any = lipschitz_state(linear_map, grid=state.grid)
        quotient = rayleigh(fresh.anchor, phases, fresh.best)
        lower, _ = widened(quotient, fresh.ceiling, fresh.anchor, phases)
        return rescaled(lower, fresh.ceiling, fresh.scale), fresh

    return lax.cond(upper <= (1 + tolerance) * lower, keep, renew)


def _norm_bound(taps: Array, phases: Phases) -> Array:
    """An upper bound on the spectral norm of a circular convolution without any of its blocks."""
    scale = scale_of(taps)
    taps = taps / scale
    frobenius = jnp.sqrt(jnp.max(frobenius_bounds(taps, phases)))
    entrywise = jnp.sqrt(jnp.max(spectra.perron(jnp.sum(jnp.abs(taps), axis=1))))
    return jnp.minimum(frobenius, entrywise) * scale * (1 + 16 * spectra.unit_round_off(taps.dtype))


def _power_steps(taps: Array, phases: Phases, best: Found) -> Array:
    """v ← Â*Â v / ||·||, the gradient of ½ ||Â v||², a few times over."""

    def energy(vector):
        return 0.5 * jnp.sum(image(taps, phases, best._replace(vector=vector)) ** 2)

    vector = best.vector
    for _ in range(_POWER_STEPS):
        step = jax.grad(energy)(vector)
        norm = jnp.linalg.norm(step)
        vector = jnp.where(norm > 0, step / jnp.where(norm > 0, norm, 1.0), vector)
    return vector
