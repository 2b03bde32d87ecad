"""The contract of a prior."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._typing import Array
from stochsolvers.prox import Prior
from stochsolvers.testing import _common as common
from stochsolvers.testing import _problems as problems

_POINTS = 6
_SEARCH = 120


def check_prior(prior: Prior, shape: tuple[int, ...]) -> None:
    r"""Hold a prior to its contract, at random points v of a given shape and steps η = 0.3, 1, 2.

    - u = prox(v, η) minimises h(u) = ½‖u − v‖² + η g(u): a direct search from another point of the domain
      finds none lower, and h(q) ≥ h(u) + ½‖q − u‖² for all points q that are tried, so that a prox of half
      the function, or of η² g, does not pass;
    - prox is firmly nonexpansive; its derivatives, forward and reverse, are those of differences;
    - w = pre_activation(v, η) has prox(w, 1) = prox(v, η);
    - where g* is known: g(u) + g*(w) = <u, w> for w = (v − u)/η (with v = prox_{ηg}(v) + η prox_{g*/η}(v/η),
      Moreau's identity), and g(q) + g*(w) ≥ <q, w> elsewhere; `dual_projection` lands in its domain; the
      rise of the g* of a prior that is not separable is at most its bound;
    - leading axes are a batch; a separable prior acts on single entries;
    - float32 gives float32, float64 float64, bfloat16 float32; a path of steps and weights compiles once;
    - the certificate of a problem with it and a ridge is finite and at least the gap.

    Args:
      prior: g.
      shape: of one argument, such as (4,); (2, 2, 3) for priors on the axes of images.

    Raises:
      AssertionError: in words, with the numbers.
    """
    name = type(prior).__name__
    common.require(isinstance(prior, Prior), name, "a Prior", repr(prior))
    common.passes_as_a_value(name, prior)
    with common.float64():
        wide = common.as_arrays(common.cast(prior, jnp.float64))
        seen = _evaluate(name, wide, shape)
        _check_minimum(name, seen)
        _check_maps(name, seen)
        if np.any(np.isfinite(seen["conjugate"])):
            _check_conjugate(name, seen)
            _check_rise(name, wide, shape)
        _check_derivatives(name, wide, shape)
        _check_kinds(name, prior, seen["two"], shape)
        problems.check_certificate(name, problems.expand_to_map(wide, shape))


def _evaluate(name: str, prior: Prior, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """All that is asked of prox and value at random v, w and steps, of a path of the prior's numbers."""
    many = (_POINTS, *shape)
    v, w = (_spread([0.5, 2.0], common.normal(seed, many)) for seed in (1, 2))
    steps = jnp.asarray([0.3, 1.0, 2.0] * (_POINTS // 3))
    path = [(common.scaled(prior, f), v, w, f * steps) for f in (1.0, 1.1)]
    seen = common.traced_once(name, _at_points, path)[0]
    words = "that of each example (leading axes are a batch)"
    common.close(f"{name}.prox of a batch", seen["batched"][0], seen["loop"][0], words=words)
    finite = np.where(np.isfinite(seen["loop"][1]), seen["loop"][1], 0)
    got = np.where(np.isfinite(seen["batched"][1]), seen["batched"][1], 0)
    common.close(f"{name}.value of a batch", got, finite, words="the sum over the examples")
    what = f"{name}.prox(v, 0.5) without jit"
    eager = common.attempt(what, prior.prox, v, 0.5)
    common.close(what, eager, seen["loop"][0], words="that of jit")
    del seen["batched"], seen["loop"]
    return {key: np.asarray(value) for key, value in seen.items()}


def _at_points(prior: Prior, v: Array, w: Array, steps: Array) -> dict[str, Any]:
    """The same in one program, in which each method is compiled once, for all its points."""
    some = _spread([0.5, 1.5, 4.0], common.normal(3, (2 * _POINTS, *v.shape[1:])))
    activated = jax.vmap(prior.pre_activation)(v, steps)
    points = jnp.concatenate([some, v, w, v, activated, _two_points(v.shape[1:])])
    half, ones = jnp.full(2 * _POINTS, 0.5), jnp.ones(_POINTS)
    images = jax.vmap(prior.prox)(
        points, jnp.concatenate([half, steps, steps, half[:_POINTS], ones, half[:2]])
    )
    q, others, u, u_w, loop, activated = images[:-2].reshape(6, *v.shape)
    between = [u + t * (q - u) for t in (1.0, 0.1, 1e-2, 1e-3)]
    g = _over(prior.value, jnp.stack([u, v, others, *between]), 2)

    def h(x, g):
        return 0.5 * _squared(x - v) + steps * g

    normals = (v - u) / steps.reshape(-1, *(1,) * (v.ndim - 1))
    dual, other = _over(prior.dual_projection, jnp.stack([normals, w]), 2)
    conjugates = _over(prior.conjugate, jnp.stack([dual, other, w]), 2)
    found, lowest = jax.vmap(_search, (None, 0, 0, None, None))(
        prior, v, steps, others[0], jnp.concatenate([q, others])
    )

    def above(w):
        return g[2] - _over(lambda q: jnp.vdot(q, w), others, 1)

    return {
        "u": u,
        "two": images[-2:],
        "activated": activated,
        "value": g[0],
        "at v": g[1],
        "h": h(u, g[0]),
        "found": lowest,
        "away": jnp.sqrt(_squared(found - u)),
        "raised": jnp.stack([h(x, at) for x, at in zip(between, g[3:], strict=True)], axis=1),
        "distance": jnp.sqrt(_squared(q - u)),
        "firm": jax.vmap(jnp.vdot)(u - u_w, v - w) - _squared(u - u_w),
        "conjugate": conjugates[0],
        "product": jax.vmap(jnp.vdot)(u, dual),
        "moved": jnp.sqrt(_squared(dual - normals)),
        "dual size": jnp.sqrt(_squared(dual)),
        "other conjugate": conjugates[1],
        "raw conjugate": conjugates[2],
        "above": _over(above, w, 1),
        "above other": _over(above, other, 1),
        "batched": (prior.prox(v, 0.5), prior.value(v)),
        "loop": (loop, jnp.sum(g[1])),
    }


def _two_points(shape: tuple[int, ...]) -> np.ndarray:
    """Points that differ in their first entry."""
    points = np.stack([np.random.default_rng(8).normal(size=shape)] * 2)
    points[1].flat[0] += 1.0
    return points


def _spread(sizes: list[float], points: Array) -> Array:
    """The points times the sizes, in turn."""
    sizes = sizes * (len(points) // len(sizes))
    return jnp.asarray(sizes).reshape(-1, *(1,) * (points.ndim - 1)) * points


def _over(function: Callable[[Array], Array], points: Array, axes: int) -> Array:
    """The function at all points, of so many leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function(points)


def _squared(points: Array) -> Array:
    """‖u‖² of each point of the first axis."""
    return jnp.sum(points**2, axis=tuple(range(1, points.ndim)))


def _search(
    prior: Prior, v: Array, step: Array, start: Array, domain: Array
) -> tuple[Array, Array]:
    """A low point of ½‖u − v‖² + η g(u), and the value there.

    The best of steps of many sizes along differences of points of the domain.
    """
    ways = (domain[:, None] - domain[None]).reshape(-1, *start.shape)
    norms = jnp.sqrt(_squared(ways)).reshape(-1, *(1,) * start.ndim)
    ways = ways / jnp.maximum(norms, 1e-12)
    reach = jnp.geomspace(1.0, 1e-5, 8).reshape(-1, 1, *(1,) * start.ndim)

    def improve(k, best):
        u, _ = best
        few = ways[(k * 89 + 37 * jnp.arange(8)) % len(ways)]
        steps = (reach * few[None]).reshape(-1, *start.shape)
        tried = u[None] + jnp.concatenate([steps, domain - u[None], jnp.zeros_like(u)[None]])
        values = 0.5 * _squared(tried - v[None]) + step * jax.vmap(prior.value)(tried)
        at = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
        return tried[at], values[at]

    return lax.fori_loop(0, _SEARCH, improve, (start, jnp.full((), jnp.inf)))


def _check_minimum(name: str, seen: dict[str, np.ndarray]) -> None:
    require = common.require
    what = f"{name}.prox(v, η)"
    require(np.isfinite(seen["u"]), what, "numbers", seen["u"])
    require(np.isfinite(seen["value"]), f"{name}.value at a prox", "a number", seen["value"])
    words = "a number or +∞"
    fine = ~np.isnan(seen["at v"]) & (seen["at v"] > -np.inf)
    require(fine, f"{name}.value", words, seen["at v"])
    h, found = seen["h"], seen["found"]
    at = np.argmax(h - found)
    words = f"argmin ½‖u − v‖² + η g(u), at most {found[at]:.8g} (by direct search)"
    got = f"a point where it is {h[at]:.8g}, at a distance of {seen['away'][at]:.3g}"
    require(h <= found + 1e-8 * (1 + np.abs(found)), what, words, got)
    fractions = np.array([1.0, 0.1, 1e-2, 1e-3])
    growth = 0.5 * (fractions * seen["distance"][:, None]) ** 2
    missing = h[:, None] + growth - seen["raised"]
    row, column = np.unravel_index(np.argmax(np.nan_to_num(missing, neginf=-1)), missing.shape)
    words = (
        f"argmin ½‖u − v‖² + η g(u), so that at another point of the domain it is at least "
        f"{h[row] + growth[row, column]:.10g}"
    )
    fine = seen["raised"] >= h[:, None] + growth - 1e-9 * (1 + np.abs(h[:, None]))
    require(fine, what, words, f"{seen['raised'][row, column]:.10g} there")


def _check_maps(name: str, seen: dict[str, np.ndarray]) -> None:
    words = "<u − u′, v − v′> >= ‖u − u′‖² (firmly nonexpansive)"
    got = f"a difference of {seen['firm'].min():.3g}"
    common.require(seen["firm"] >= -1e-9, f"{name}.prox at two points", words, got)
    what = f"{name}.prox(w, 1) at w = pre_activation(v, η)"
    common.close(what, seen["activated"], seen["u"], rtol=1e-7, words="that of prox(v, η)")


def _check_conjugate(name: str, seen: dict[str, np.ndarray]) -> None:
    require = common.require
    sizes = 1 + np.abs(seen["value"]) + np.abs(seen["product"])
    what = f"{name}.dual_projection of (v − u)/η, u = prox(v, η), a point of dom g*"
    fine = seen["moved"] <= 1e-6 * (1 + seen["dual size"])
    require(fine, what, "that point", f"one at a distance of {seen['moved'].max():.3g}")
    expected = seen["product"] - seen["value"]
    off = np.nan_to_num(np.abs(seen["conjugate"] - expected), nan=np.inf, posinf=np.inf)
    at = np.argmax(off / sizes)
    words = f"<u, w> − g(u) = {expected[at]:.8g} (Moreau)"
    what = f"{name}.conjugate at w = (v − u)/η, u = prox(v, η)"
    require(off <= 1e-6 * sizes, what, words, f"{seen['conjugate'][at]:.8g}")
    what = f"{name}.dual_projection(w)"
    require(np.isfinite(seen["other conjugate"]), what, "a point of dom g*", "one where g* is +∞")
    for key, above in (("raw conjugate", "above"), ("other conjugate", "above other")):
        lowest = seen[above].min(axis=1)
        room = seen[key] + lowest
        words = "g(q) + g*(w) >= <q, w> for all q"
        got = f"a difference of {np.min(room):.3g}"
        fine = room >= -1e-8 * (1 + np.abs(lowest))
        require(fine, f"{name}.conjugate at random w", words, got)


def _check_rise(name: str, prior: Prior, shape: tuple[int, ...]) -> None:
    """The bound on g*(w + e) − g*(w) that certificates ask of priors that are not separable."""
    if prior.separable:
        return
    many = (12, *shape)
    error = jnp.abs(common.normal(8, many)) * jnp.asarray([1.0, 0.1, 0.0] * 4).reshape(
        -1, *(1,) * len(shape)
    )

    def one(w, error, signs):
        w = prior.dual_projection(w, 2 * jnp.sqrt(jnp.sum(error**2)))
        value = prior.conjugate(w)
        return prior._conjugate_rise(w, value, error), prior.conjugate(w + signs * error) - value

    signs = jnp.sign(common.normal(9, many))
    rise, seen = jax.jit(jax.vmap(one))(1.5 * common.normal(7, many), error, signs)
    seen = np.where(np.isfinite(seen), seen, -np.inf)  # beyond the domain
    at = np.argmax(seen - rise)
    what = f"{name}._conjugate_rise(w, g*(w), error)"
    words = f"at least g*(w + e) − g*(w) = {seen[at]:.8g} for an |e| <= error"
    common.require(rise >= seen - 1e-12 * (1 + np.abs(seen)), what, words, f"{rise[at]:.8g}")


def _check_derivatives(name: str, prior: Prior, shape: tuple[int, ...]) -> None:
    """Along random directions in v, η and the prior's numbers, where differences from both sides agree."""
    many = (8, *shape)
    v, way, weight = 1.5 * common.normal(4, many), common.normal(5, many), common.normal(6, many)
    real = {"η": jnp.ones(8), "v": v}

    def at(point, weight):
        return jnp.vdot(prior.prox(point["v"], point["η"]), weight)

    def one(point, way, weight):
        def along(t):
            return at(jax.tree.map(lambda p, d: p + t * d, point, way), weight)

        gradient = jax.grad(at)(point, weight)
        reverse = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, way)))
        forward = jax.jvp(lambda p: at(p, weight), (point,), (way,))[1]
        h = 1e-5
        right, middle, left = jax.vmap(along)(jnp.asarray([h, 0.0, -h]))
        return forward, reverse, (right - middle) / h, (middle - left) / h

    ways = {"η": jnp.asarray([0.0, 0.3] * 4), "v": way}
    function = jax.jit(jax.vmap(one))
    what = f"derivative of {name}.prox"
    forward, reverse, right, left = map(
        np.asarray, common.attempt(what, function, real, ways, weight)
    )
    smooth = np.abs(right - left) <= 1e-3 * (1 + np.abs(right))
    expected = 0.5 * (right + left)
    for kind, mine in (("forward", forward), ("reverse", reverse)):
        off = np.where(smooth, np.abs(mine - expected), 0.0)
        i = np.argmax(off)
        common.require(
            np.isfinite(mine) & (off <= 1e-4 * (1 + np.abs(expected))),
            f"{what} in v and η, in {kind} mode",
            f"that of differences, {expected[i]:.8g}",
            f"{mine[i]:.8g}",
        )


def _check_kinds(name: str, prior: Prior, two: np.ndarray, shape: tuple[int, ...]) -> None:
    """Narrow dtypes, in one program; and of a separable prior the entries that have not changed."""
    point = _two_points(shape)[0]

    @jax.jit
    def narrow(v):
        kinds = {kind: v.astype(kind) for kind in ("float32", "bfloat16")}
        return {kind: (prior.prox(v, 0.5), prior.value(v)) for kind, v in kinds.items()}

    common.same_dtype(f"{name}.prox of float64", two, jnp.float64)
    seen = common.attempt(f"{name}.prox of float32 and bfloat16", narrow, point)
    for kind, rtol in (("float32", 1e-3), ("bfloat16", 2e-2)):
        (u, value), what = seen[kind], f"{name}.prox of {kind}"
        common.same_dtype(what, u, jnp.float32)
        common.same_dtype(f"{name}.value of {kind}", value, jnp.float32)
        common.close(what, u, two[0], rtol=rtol, words="about that of float64")
    if prior.separable and point.size > 1:
        before, after = two.reshape(2, -1)
        words = "those of before, as separable = True says"
        what = f"{name}.prox at the other entries after one has changed"
        common.close(what, after[1:], before[1:], words=words)
