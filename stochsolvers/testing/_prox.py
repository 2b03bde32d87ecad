"""The contract of a prior."""

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
        _check_dtypes(name, prior, shape)
        _check_entries(name, wide, shape)
        problems.check_certificate(name, problems.expand_to_map(wide, shape))


def _evaluate(name: str, prior: Prior, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """All that is asked of prox and value, at pairs of points; q are points of the domain."""
    many = (_POINTS, *shape)
    size = jnp.asarray([0.5, 2.0] * (_POINTS // 2)).reshape(-1, *(1,) * len(shape))
    v, w = (size * common.normal(seed, many) for seed in (1, 2))
    steps = jnp.asarray([0.3, 1.0, 2.0] * (_POINTS // 3))

    def norm(array):
        return jnp.sqrt(jnp.sum(array**2))

    def point(prior, v, w, q, step, domain, others):
        def h(u):
            return 0.5 * jnp.sum((u - v) ** 2) + step * prior.value(u)

        u, u_w = prior.prox(v, step), prior.prox(w, step)
        raised = jnp.stack([h(u + t * (q - u)) for t in (1.0, 0.1, 1e-2, 1e-3)])
        dual = prior.dual_projection((v - u) / step)
        other = prior.dual_projection(w)
        conjugate = prior.conjugate(dual)
        found = _search(h, others[0], domain)
        return {
            "u": u,
            "activated": prior.prox(prior.pre_activation(v, step), 1.0),
            "value": prior.value(u),
            "at v": prior.value(v),
            "h": h(u),
            "found": h(found),
            "away": norm(found - u),
            "raised": raised,
            "distance": norm(q - u),
            "firm": jnp.vdot(u - u_w, v - w) - jnp.sum((u - u_w) ** 2),
            "conjugate": conjugate,
            "product": jnp.vdot(u, dual),
            "moved": norm(dual - (v - u) / step),
            "dual size": norm(dual),
            "other conjugate": prior.conjugate(other),
            "raw conjugate": prior.conjugate(w),
            "above": jax.vmap(lambda q: prior.value(q) - jnp.vdot(q, w))(others),
            "above other": jax.vmap(lambda q: prior.value(q) - jnp.vdot(q, other))(others),
        }

    def all_points(prior, v, w, steps):
        spread = jnp.asarray([0.5, 1.5, 4.0] * 4).reshape(-1, *(1,) * len(shape))
        domain = jax.vmap(lambda v: prior.prox(v, 0.5))(spread * common.normal(3, (12, *shape)))
        args = prior, v, w, domain[:_POINTS], steps, domain, domain[_POINTS:]
        batched = prior.prox(v, 0.5), prior.value(v)
        loop = jax.vmap(lambda v: (prior.prox(v, 0.5), prior.value(v)))(v)
        seen = jax.vmap(point, (None, 0, 0, 0, 0, None, None))(*args)
        return seen | {"batched": batched, "loop": (loop[0], jnp.sum(loop[1]))}

    path = [(common.scaled(prior, f), v, w, f * steps) for f in (1.0, 1.1)]
    seen = common.traced_once(name, all_points, path)[0]
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


def _search(h: Any, start: Array, domain: Array) -> Array:
    """A low point of h: the best of steps of many sizes along differences of points of the domain."""
    ways = (domain[:, None] - domain[None]).reshape(-1, *start.shape)
    norms = jnp.sqrt(jnp.sum(ways**2, axis=tuple(range(1, ways.ndim)), keepdims=True))
    ways = ways / jnp.maximum(norms, 1e-12)
    reach = jnp.geomspace(1.0, 1e-5, 8).reshape(-1, 1, *(1,) * start.ndim)

    def improve(k, u):
        few = ways[(k * 89 + 37 * jnp.arange(8)) % len(ways)]
        steps = (reach * few[None]).reshape(-1, *start.shape)
        tried = u[None] + jnp.concatenate([steps, domain - u[None], jnp.zeros_like(u)[None]])
        values = jax.vmap(h)(tried)
        return tried[jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))]

    return lax.fori_loop(0, _SEARCH, improve, start)


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
        sides = (along(h) - along(0.0)) / h, (along(0.0) - along(-h)) / h
        return forward, reverse, *sides

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


def _check_dtypes(name: str, prior: Prior, shape: tuple[int, ...]) -> None:
    v = common.normal(8, shape)
    exact = prior.prox(v, 0.5)
    common.same_dtype(f"{name}.prox of float64", exact, jnp.float64)
    for dtype in (jnp.float32, jnp.bfloat16):
        narrow = v.astype(dtype)
        what = f"{name}.prox of {jnp.dtype(dtype).name}"
        got = common.attempt(what, prior.prox, narrow, 0.5)
        common.same_dtype(what, got, jnp.float32)
        value = prior.value(narrow)
        common.same_dtype(f"{name}.value of {jnp.dtype(dtype).name}", value, jnp.float32)
        rtol = 1e-3 if dtype == jnp.float32 else 2e-2
        common.close(what, got, exact, rtol=rtol, words="about that of float64")


def _check_entries(name: str, prior: Prior, shape: tuple[int, ...]) -> None:
    if not prior.separable:
        return
    v = common.normal(9, shape).ravel()
    both = jnp.stack([v, v.at[0].add(1.0)]).reshape(2, *shape)
    before, after = prior.prox(both, 0.5).reshape(2, -1)
    words = "those of before, as separable = True says"
    what = f"{name}.prox at the other entries after one has changed"
    if v.size > 1:
        common.close(what, after[1:], before[1:], words=words)
