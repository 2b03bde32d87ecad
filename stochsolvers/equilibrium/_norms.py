r"""Maps whose norm is at most a bound, for equilibria that exist.

    W ↦ W / max(1, u/ω),     u ≥ ||W|| certified, ω the bound

u is the upper end of `lipschitz_bracket` on the padded grid, which holds under any padding and stride, with
its round-off. The derivative of u is taken to be that of the norm on that grid at its top singular vector,
from which u differs by round-off. A map within the bound is left as it is, as in spectral normalisation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import LinearMap
from stochsolvers.linear_maps._base import check_map
from stochsolvers.lipschitz import (
    LipschitzState,
    lipschitz_bracket,
    lipschitz_refresh,
    lipschitz_state,
    remembered_constant,
)


def normalized(linear_map: LinearMap, bound: Scalar = 0.95) -> LinearMap:
    r"""W / max(1, u/ω), u ≥ ||W|| a certified upper bound: a map with ||W|| ≤ ω.

    A map that is within the bound is returned as it is. Derivatives pass through the norm.

    The bound is certified for dense maps and for convolutions of every padding and stride. It is that of the
    convolution on the padded grid, which under zero padding is above ||W||: by 1 % at 32×32 pixels, more the
    fewer there are. Of a map without a kernel, too large to be written out, it is that of its
    `squared_norm_bound`, or else one that holds with a probability; see `lipschitz_bracket`.

    Args:
      linear_map: any.
      bound: ω > 0, traced.

    References:
      Miyato et al. 2018 (spectral normalisation); Xie et al. 2023, section 4.
    """
    check_map("map of normalized", linear_map)
    _check(bound)
    state = lipschitz_state(lax.stop_gradient(linear_map), grid="padded")
    unit, state, scale = _unit(linear_map, state)
    squared = state.ceiling
    if squared is None:
        squared = lipschitz_bracket(lax.stop_gradient(linear_map), grid="padded").upper
    return _scaled(linear_map, unit, state, squared, scale, bound)


def normalized_refresh(
    linear_map: LinearMap,
    state: LipschitzState,
    bound: Scalar = 0.95,
    *,
    tolerance: Scalar = 0.05,
) -> tuple[LinearMap, LipschitzState]:
    r"""`normalized` for a kernel that has moved a little, and the state for the next time.

    u is √upper₀ + ||W − W₀||, certified, from the kernel W₀ at which the state was last computed in full;
    it is computed afresh where its square is more than (1 + tolerance) times a lower bound on ||W||².

    Args:
      linear_map: the layer's map.
      state: from `lipschitz_state(linear_map, grid="padded")`, or from the last call.
      bound: ω > 0, traced.
      tolerance: of u²/||W||² − 1, traced.

    Raises:
      ValueError: at trace time, for a state on another grid or of another layer.
    """
    check_map("map of normalized_refresh", linear_map)
    what = "state of normalized_refresh"
    _checks.instance(what, state, LipschitzState, "what lipschitz_state returns")
    _check(bound)
    if state.grid != "padded":
        _checks.fail("grid of the state of normalized_refresh", "'padded'", repr(state.grid))
    unit, state, scale = _unit(linear_map, lax.stop_gradient(state))
    bracket, state = lipschitz_refresh(lax.stop_gradient(unit), state, tolerance=tolerance)
    scaled = _scaled(linear_map, unit, state, bracket.upper, scale, bound)
    if state.scale is not None:
        state = dataclasses.replace(state, scale=state.scale * scale)
    return scaled, state


def _check(bound: Scalar) -> None:
    _checks.positive("bound", bound)
    _checks.rank("bound", bound, 0)


def _unit(
    linear_map: LinearMap, state: LipschitzState
) -> tuple[LinearMap, LipschitzState, Array | float]:
    """The map and its state in units of the state's scale, whose squares are far from overflow."""
    if state.scale is None:
        return linear_map, state, 1.0
    unit = linear_map.scaled(1 / state.scale)
    return unit, dataclasses.replace(state, scale=jnp.ones_like(state.scale)), state.scale


@jax.jit
def _scaled(
    linear_map: LinearMap,
    unit: LinearMap,
    state: LipschitzState,
    squared: Array,
    scale: Scalar,
    bound: Scalar,
) -> LinearMap:
    """W / max(1, u/ω), the derivative of u² = `squared` that of the norm at the state's vector.

    `squared` and `state` are those of `unit`, which is W / scale.
    """
    known = lax.stop_gradient(squared)
    moving = remembered_constant(unit, state)
    fixed = lax.stop_gradient(moving)
    # no derivative of the zero map
    ratio = jnp.where(fixed > 0, moving, 1) / jnp.where(fixed > 0, fixed, 1)
    norm = jnp.sqrt(known) * jnp.sqrt(ratio) * jnp.asarray(scale, known.dtype)
    allowed = jnp.asarray(bound, norm.dtype) * (1 - _round_off(linear_map, norm.dtype))
    return linear_map.scaled(jnp.where(norm > allowed, allowed / norm, 1))


def _round_off(linear_map: Any, dtype: Any) -> float:
    """By how much the norm of a map can grow, relatively, when the entries of its kernel are rounded.

    ||δW|| ≤ u Σ_taps || |W_t| || ≤ u Σ_taps sqrt(n) ||W_t|| and ||W_t|| ≤ ||W|| on the torus.
    """
    base = getattr(linear_map, "base", linear_map)
    kernel, eps = getattr(base, "kernel", None), float(jnp.finfo(dtype).eps)
    if kernel is None:
        return 4 * eps
    taps = max(kernel[..., 0, 0].size, 1)
    return eps * (4 + taps * min(kernel.shape[-2:]) ** 0.5)
