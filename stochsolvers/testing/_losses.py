"""The contract of a loss."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from stochsolvers._typing import Array
from stochsolvers.losses import Loss
from stochsolvers.prox import Zero
from stochsolvers.testing import _common as common
from stochsolvers.testing import _problems as problems

_POINTS = 24
_ASCENT = 2000


def check_loss(loss: Loss, x: ArrayLike) -> None:
    r"""Hold a loss to its contract, at random arguments u.

    - ℓ(·, x) is convex, along random segments, and its derivative is that of differences;
    - ‖∂ℓ(u) − ∂ℓ(v)‖ ≤ L_ℓ ‖u − v‖, and <∂ℓ(u) − ∂ℓ(v), u − v> ≥ m ‖u − v‖² with m its `strong_convexity`;
      the derivative's own derivative is searched for its largest slope;
    - where ℓ* is known: ℓ(u) + ℓ*(r) = <r, u> for r = ∂ℓ(u), and ℓ*(r) is sup_u <r, u> − ℓ(u), found by
      gradient ascent, at random r in its domain; outside it is +∞;
    - `dual_projection` is a projection to the domain, `gap` is ℓ + ℓ* − <u, r>;
    - dtypes are kept, a path of the loss's numbers compiles once, `vmap` is a loop;
    - ∇F of a problem with it is that of differences, and its certificates are at least the gap.

    Args:
      loss: the loss.
      x: targets that it is for, shape (..., n): labels ±1 for `Logistic`, one-hot (classes, n) for
        `CrossEntropy`.

    Raises:
      AssertionError: in words, with the numbers.
    """
    name = type(loss).__name__
    common.require(isinstance(loss, Loss), name, "a Loss", repr(loss))
    common.passes_as_a_value(name, loss)
    with common.float64():
        loss, x = common.as_arrays(common.cast(loss, jnp.float64)), jnp.asarray(x, jnp.float64)
        coupled = _check_shapes(name, loss, x)
        seen = _evaluate(name, loss, x)
        _check_curvature(name, loss, seen)
        if np.any(np.isfinite(seen["conjugate"])):
            _check_conjugate(name, seen)
        _check_dtypes(name, loss, x)
        _check_problem(name, loss, x, coupled)


def _check_shapes(name: str, loss: Loss, x: Array) -> int:
    """The number of axes at the end that the loss couples; 0 if none."""
    value = common.attempt(f"{name}.value(u, x)", jax.eval_shape, loss.value, x, x)
    fits = len(value.shape) == x.ndim and all(
        m in (1, n) for m, n in zip(value.shape, x.shape, strict=True)
    )
    words = f"{x.shape}, with 1 in the axes that the loss couples"
    common.require(fits, f"shape of {name}.value(u, x)", words, value.shape)
    for method in ("derivative", "conjugate", "dual_projection"):
        what = f"{name}.{method}"
        result = common.attempt(what, jax.eval_shape, getattr(loss, method), x, x)
        if method != "conjugate":
            common.same_shape(what, result, x.shape)
    axes = [i for i, (m, n) in enumerate(zip(value.shape, x.shape, strict=True)) if m != n]
    return x.ndim - axes[0] if axes else 0


def _evaluate(name: str, loss: Loss, x: Array) -> dict[str, np.ndarray]:
    """All that is asked of the loss at pairs of points u, v; far and near, and around 0 and x."""
    shape = (_POINTS, *x.shape)
    centre = jnp.stack([jnp.zeros_like(x), x] * (_POINTS // 2))
    spread = jnp.asarray([0.1, 0.1, 1.0, 1.0, 5.0, 5.0] * (_POINTS // 6))
    spread = jnp.expand_dims(spread, range(1, len(shape)))
    u, v = (centre + spread * common.normal(seed, shape) for seed in (1, 2))
    raw = 0.3 * spread * common.normal(3, shape)

    def total(loss, u):
        return jnp.sum(loss.value(u, x))

    def point(loss, u, v, raw):
        d = loss.derivative
        r, projected = d(u, x), loss.dual_projection(raw, x)
        # from u to v: the value, and differences of it, along the segment
        along = [total(loss, u + t * (v - u)) for t in (0.0, 0.2, 0.5, 1.0)]
        way = common.normal(4, x.shape)
        terms, *_ = loss.gap(u, r, x)
        return {
            "along": jnp.stack(along),
            "slope": common.slope(lambda u: total(loss, u), u, way, 1e-6),
            "derivative": jnp.vdot(r, way),
            "difference": d(u, x) - d(v, x),
            "step": u - v,
            "stretch": _stretch(lambda u: d(u, x), u, way),
            "value": total(loss, u),
            "product": jnp.vdot(r, u),
            "conjugate": jnp.sum(loss.conjugate(r, x)),
            "gap": jnp.sum(terms),
            "kept": jnp.linalg.norm((loss.dual_projection(r, x) - r).ravel()),
            "dual size": jnp.linalg.norm(r.ravel()),
            "raw conjugate": jnp.sum(loss.conjugate(raw, x)),
            "raw supremum": _supremum(loss, raw, x),
            "projected": jnp.sum(loss.conjugate(projected, x)),
            "projected supremum": _supremum(loss, projected, x),
            "twice": jnp.linalg.norm((loss.dual_projection(projected, x) - projected).ravel()),
            "beyond": jnp.vdot(raw - projected, r - projected),
        }

    def all_points(loss, u, v, raw):
        return jax.vmap(point, (None, 0, 0, 0))(loss, u, v, raw)

    path = [(common.scaled(loss, f), u, v, raw) for f in (1.0, 1.2)]
    seen = common.traced_once(name, all_points, path)[0]
    alone = common.attempt(f"{name}.value(u, x)", loss.value, u[2], x)
    close = np.sum(alone), seen["value"][2]
    common.close(f"{name}.value(u, x) under vmap", close[1], close[0], words="that of a loop")
    return {key: np.asarray(value) for key, value in seen.items()}


def _stretch(function: Any, u: Array, v: Array) -> Array:
    """The largest ‖f′(u) d‖ / ‖d‖ that power iteration finds, f′ symmetric."""

    def grow(_, carry):
        v, _ = carry
        v = v / (jnp.linalg.norm(v.ravel()) + 1e-300)
        image = jax.jvp(function, (u,), (v,))[1]
        return image, jnp.linalg.norm(image.ravel())

    return lax.fori_loop(0, 30, grow, (v, jnp.zeros(())))[1]


def _supremum(loss: Loss, r: Array, x: Array) -> Array:
    """sup_u <r, u> − ℓ(u, x), from below, by accelerated gradient ascent from 0."""

    def dual(u):
        return jnp.vdot(r, u) - jnp.sum(loss.value(u, x))

    def climb(k, carry):
        u, before, best = carry
        y = u + k / (k + 3.0) * (u - before)
        new = y + (r - loss.derivative(y, x)) / loss.smoothness
        return new, u, jnp.maximum(best, dual(new))

    zero = jnp.zeros_like(x)
    return lax.fori_loop(0, _ASCENT, climb, (zero, zero, dual(zero)))[2]


def _check_curvature(name: str, loss: Loss, seen: dict[str, np.ndarray]) -> None:
    require = common.require
    require(np.isfinite(seen["value"]), f"{name}.value(u, x)", "numbers", seen["value"])
    start, fifth, half, end = seen["along"].T
    size = 1e-12 * (1 + np.abs(start) + np.abs(end))
    for t, middle in ((0.2, fifth), (0.5, half)):
        chord = (1 - t) * start + t * end
        at = np.argmax(middle - chord)
        what = f"{name} along a segment, {t} of the way (convexity)"
        words = f"at most that of the chord, {chord[at]:.8g}"
        require(middle <= chord + size, what, words, f"{middle[at]:.8g}")
    off = np.abs(seen["derivative"] - seen["slope"])
    at = np.argmax(off)
    allowed = 1e-6 * (1 + np.abs(seen["derivative"]) + 1e-3 * np.abs(seen["value"]))
    words = f"the slope of its value, {seen['slope'][at]:.8g}"
    got = f"{seen['derivative'][at]:.8g}"
    require(off <= allowed, f"{name}.derivative along a direction", words, got)
    axes = tuple(range(1, seen["step"].ndim))
    moved = np.sqrt(np.sum(seen["difference"] ** 2, axes))
    steps = np.sqrt(np.sum(seen["step"] ** 2, axes))
    largest = float(max(np.max(moved / steps), np.max(seen["stretch"])))
    what, bound = f"{name}.smoothness", float(loss.smoothness)
    words = f"at least {largest:.8g}, a slope of its derivative"
    require(largest <= bound * (1 + 1e-8) + 1e-12, what, words, bound)
    grown = np.sum(seen["difference"] * seen["step"], axes) / steps**2
    words = f"at most {grown.min():.8g}, the growth of its derivative between two points"
    m = float(loss.strong_convexity)
    require(grown >= m * (1 - 1e-8) - 1e-12, f"{name}.strong_convexity", words, m)


def _check_conjugate(name: str, seen: dict[str, np.ndarray]) -> None:
    require = common.require
    scale = 1 + np.abs(seen["value"]) + np.abs(seen["product"])
    expected = seen["product"] - seen["value"]
    off = np.nan_to_num(np.abs(seen["conjugate"] - expected), nan=np.inf)
    at = np.argmax(off)
    what = f"{name}.conjugate at r = ∂ℓ(u)"
    words = f"<r, u> − ℓ(u) = {expected[at]:.8g}"
    require(off <= 1e-8 * scale, what, words, f"{seen['conjugate'][at]:.8g}")
    words = "ℓ(u) + ℓ*(r) − <u, r> = 0 at r = ∂ℓ(u)"
    require(np.abs(seen["gap"]) <= 1e-8 * scale, f"{name}.gap", words, np.max(np.abs(seen["gap"])))
    for point in ("raw", "projected"):
        value = seen["projected" if point == "projected" else "raw conjugate"]
        supremum = seen[f"{point} supremum"]
        at = np.argmax(np.where(np.isfinite(value), supremum - value, -np.inf))
        what = f"{name}.conjugate at a dual point of random numbers"
        words = f"at least sup_u <r, u> − ℓ(u) >= {supremum[at]:.8g}"
        require(value >= supremum - 1e-6 * (1 + np.abs(supremum)), what, words, value[at])
        known = np.isfinite(value)
        off = np.where(known, value - supremum, 0)
        words = f"about sup_u <r, u> − ℓ(u), {supremum[np.argmax(off)]:.8g}"
        require(off <= 0.05 * (1 + np.abs(supremum)), what, words, value[np.argmax(off)])
    what = f"{name}.dual_projection(r)"
    words = "a point where ℓ* is finite"
    require(np.isfinite(seen["projected"]), what, words, "one where it is +∞")
    words = "r where r = ∂ℓ(u), a point of the domain"
    fine = seen["kept"] <= 1e-8 * (1 + seen["dual size"])
    require(fine, what, words, f"one at a distance of {seen['kept'].max():.3g}")
    require(seen["twice"] <= 1e-8, f"{what} of a projection", "the same", seen["twice"].max())
    words = "the nearest point, <r − s, q − s> <= 0 for all q of the domain"
    require(seen["beyond"] <= 1e-8, what, words, seen["beyond"].max())


def _check_dtypes(name: str, loss: Loss, x: Array) -> None:
    narrow, u = common.cast(loss, jnp.float32), jnp.ones(x.shape, jnp.float32)
    for method in ("value", "derivative", "conjugate", "dual_projection"):
        what = f"{name}.{method} of float32"
        result = jax.eval_shape(getattr(narrow, method), u, x.astype(jnp.float32))
        common.same_dtype(what, result, jnp.float32)


def _check_problem(name: str, loss: Loss, x: Array, coupled: int) -> None:
    before = x.shape[-max(coupled, 1) :]
    A = problems.map_between(before, 3)
    inputs = x.reshape(*x.shape[: x.ndim - len(before)], *A.in_shape)
    problem = problems.small_problem(linear_map=A, inputs=inputs, loss=loss, prior=Zero())
    z, way = common.normal(6, problem.shape), common.normal(7, problem.shape)
    slope = common.slope(lambda z: jnp.sum(problem.smooth(z)), z, way)
    what = f"∇F of a problem with {name} along a direction"
    words = "the slope of F"
    common.close(what, jnp.vdot(problem.gradient(z), way), slope, rtol=1e-6, words=words)
    problems.check_certificate(name, problem)
