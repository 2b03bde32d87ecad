"""Products with the block that was found, and the derivative of its norm."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array
from stochsolvers.lipschitz.machinery import spectra
from stochsolvers.lipschitz.machinery.blocks import block_size, search_for
from stochsolvers.lipschitz.machinery.grams import symbols
from stochsolvers.lipschitz.machinery.search import Found
from stochsolvers.lipschitz.machinery.taps import Phases


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def top_square(taps: Array, phases: Phases, best: Found) -> Array:
    """||Â(f) v||² / ||v||² at the top singular vector."""
    return _square(taps, phases, best)


@top_square.defjvp
def _top_square_jvp(phases: Phases, primals: Any, tangents: Any) -> tuple[Array, Array]:
    taps, best = primals
    # derivatives of this derivative see v move
    best = best._replace(vector=_top_vector(taps, phases, best))
    return jax.jvp(lambda taps: _square(taps, phases, best), (taps,), (tangents[0],))


def _square(taps: Array, phases: Phases, best: Found) -> Array:
    return jnp.sum(image(taps, phases, best) ** 2) / jnp.sum(best.vector**2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _top_vector(taps: Array, phases: Phases, best: Found) -> Array:
    """v as a function of the taps."""
    return best.vector


@_top_vector.defjvp
@jax.default_matmul_precision("highest")
def _top_vector_jvp(phases: Phases, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """dv = (L I − G + L v vᴴ)⁻¹ (I − v vᴴ) dG v for G = Âᴴ Â with the simple eigenvalue L, ||v|| = 1."""
    taps, best = primals
    vector = _top_vector(taps, phases, best)
    v = lax.complex(vector[:, 0], vector[:, 1])
    cosines, sines = (jnp.asarray(part, taps.dtype)[best.frequency] for part in phases[:2])
    M, dM = jax.jvp(
        lambda taps: symbols(taps[best.group], cosines, sines).joined, (taps,), (tangents[0],)
    )
    image = M @ v
    moved = M.conj().T @ (dM @ v) + dM.conj().T @ image
    level, projection = jnp.real(jnp.vdot(image, image)), jnp.outer(v, v.conj())
    matrix = level * (jnp.eye(len(v), dtype=level.dtype) + projection) - M.conj().T @ M
    dv = jnp.linalg.solve(matrix, moved - projection @ moved)
    return vector, jnp.stack([jnp.real(dv), jnp.imag(dv)], axis=-1)


def image(taps: Array, phases: Phases, best: Found, *, accurate: bool = False) -> Array:
    """Real and imaginary part of Â(f) v, in one of its two orders; summed in pairs if `accurate`."""
    taps = taps[best.group]
    cosines, sines = (jnp.asarray(part, taps.dtype)[best.frequency] for part in phases[:2])

    def turned(subscripts, pairs):
        re = jnp.einsum(subscripts, cosines, pairs, precision="highest")
        im = jnp.einsum(subscripts, sines, pairs, precision="highest")
        return jnp.stack([re[..., 0] - im[..., 1], re[..., 1] + im[..., 0]], axis=-1)

    if block_size(taps[None], phases) == taps.shape[-1]:
        products = best.vector  # (n2, 2)
        sums = _contract(taps, products, axis=2, accurate=accurate)  # (taps, n1, 2)
        return turned("ap,piz->aiz", sums)
    vector = best.vector.reshape(cosines.shape[0], -1, 2)  # (aliases, n1, 2)
    sums = _contract(taps, turned("ap,aiz->piz", vector), axis=1, accurate=accurate)
    return jnp.sum(sums, axis=0)


def _contract(taps: Array, pairs: Array, axis: int, *, accurate: bool) -> Array:
    """Σ over n1 (axis 1) or n2 (axis 2) of taps (taps, n1, n2) times pairs, (taps, the other, 2)."""
    if not accurate:
        subscripts = "pio,piz->poz" if axis == 1 else "pio,oz->piz"
        return jnp.einsum(subscripts, taps, pairs, precision="highest")
    products = taps[..., None] * (pairs[:, :, None] if axis == 1 else pairs[None, None])
    return spectra.pairwise_sum(jnp.moveaxis(products, axis, 0))


def certified(taps: Array, phases: Phases) -> tuple[Array, Array, Found]:
    """lower ≤ L ≤ upper for taps of modest size, and the block and the vector that the lower end is from."""
    best = search_for(taps, phases, certify=True)
    lower = rayleigh(taps, phases, best)
    return *widened(lower, best.ceiling + best.slack, taps, phases), best


def rayleigh(taps: Array, phases: Phases, best: Found) -> Array:
    """||Â(f) v||² / ||v||² with few roundings; `widened` allows for them."""
    squares = image(taps, phases, best, accurate=True).ravel() ** 2
    return spectra.pairwise_sum(squares) / spectra.pairwise_sum(best.vector.ravel() ** 2)


def widened(lower: Array, upper: Array, taps: Array, phases: Phases) -> tuple[Array, Array]:
    """Room for the errors of the phases, of the sums over the taps and of the taps in a singular value."""
    terms, dtype = taps.shape[1] + phases.cosines.shape[1], taps.dtype
    roundings = terms + 2 * math.ceil(math.log2(taps[0].size)) + 16
    reach = jnp.sqrt(jnp.max(spectra.perron(jnp.sum(jnp.abs(taps), axis=1))))
    shift = math.sqrt(2) * spectra.gamma(roundings, dtype) * reach
    if phases.error:
        shift = shift + 1.01 * phases.error * jnp.sqrt(jnp.max(jnp.sum(taps**2, axis=(1, 2, 3))))
    few = 64 * spectra.unit_round_off(dtype)
    lower, upper = (jnp.sqrt(jnp.maximum(end, 0.0)) for end in (lower, upper))
    return jnp.maximum(lower - shift, 0.0) ** 2 * (1 - few), (upper + shift) ** 2 * (1 + few)
