"""Scale and size of the blocks, and all of their eigenvalues where they are small."""

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _linalg
from stochsolvers._typing import Array
from stochsolvers.lipschitz.machinery import hermitian
from stochsolvers.lipschitz.machinery.grams import symbols
from stochsolvers.lipschitz.machinery.search import Found, search
from stochsolvers.lipschitz.machinery.taps import Phases

DIRECT = 16
"""Up to this order, all eigenvalues of all blocks are the fastest."""
# two blocks whose largest eigenvalues are closer than this, relatively, need not be told apart
_CONSTANT_GAP, _BRACKET_GAP, _FLOAT64_GAP = 2.0**-18, 2.0**-12, 2.0**-33


def scale_of(taps: Array, axes: tuple[int, ...] | None = None) -> Array:
    """A power of two, by which division is exact, that brings the largest entry near 1.

    With axes, which are kept, that of the entries along them.
    """
    largest = jnp.max(jnp.abs(lax.stop_gradient(taps)), axis=axes, keepdims=axes is not None)
    scale = largest / jnp.frexp(largest)[0]
    return jnp.where(largest > 0, scale, 1.0)


def block_size(taps: Array, phases: Phases) -> int:
    """Order of the Gram matrices."""
    return min(phases.cosines.shape[1] * taps.shape[2], taps.shape[3])


def all_eigenvalues(taps: Array, phases: Phases) -> tuple[Array, Array]:
    """Those of the Gram matrix of every block, ascending, (blocks, n), and the round-off of that matrix."""
    values, errors = [], []
    real, rest = slice(0, phases.num_real), slice(phases.num_real, len(phases.cosines))
    for part, sines in ((real, None), (rest, jnp.asarray(phases.sines[rest], taps.dtype))):
        if part.start == part.stop:
            continue
        cosines = jnp.asarray(phases.cosines[part], taps.dtype)
        blocks = jax.vmap(symbols, (0, None, None))(taps, cosines, sines)
        grams = hermitian.grams(blocks, sliced=True).joined
        if grams.shape[-1] == 1:
            values.append(jnp.real(grams).reshape(-1, 1))
        else:
            values.append(_linalg.eigvalsh(grams).reshape(-1, grams.shape[-1]))
        errors.append(hermitian.gram_error(blocks).ravel())
    return jnp.concatenate(values), jnp.concatenate(errors)


def best_of_all(taps: Array, phases: Phases) -> Found:
    """The block with the largest of all eigenvalues, and its eigenvector."""
    values = all_eigenvalues(taps, phases)[0][:, -1]
    # as they come: all groups of the real frequencies, then of the others
    at, groups, num_real = jnp.argmax(values), len(taps), phases.num_real
    first, rest = num_real * groups, max(len(phases.cosines) - num_real, 1)
    of_real, of_rest = jnp.divmod(at, max(num_real, 1)), jnp.divmod(at - first, rest)
    group = jnp.where(at < first, of_real[0], of_rest[0])
    frequency = jnp.where(at < first, of_real[1], num_real + of_rest[1])
    cosines, sines = (jnp.asarray(part, taps.dtype)[frequency] for part in phases[:2])
    gram = hermitian.grams(symbols(taps[group], cosines, sines), sliced=True).joined
    vector = jnp.linalg.eigh(gram)[1][:, -1]
    value = values[at]
    return Found(
        *(value, value, jnp.zeros_like(value), frequency, group),
        jnp.stack([jnp.real(vector), jnp.imag(vector)], axis=-1),
    )


def search_for(
    taps: Array, phases: Phases, *, certify: bool = False, mirror: Array | None = None
) -> Found:
    """`search` with the gap that goes with the dtype, and one kernel after another under `vmap`."""
    narrow = _BRACKET_GAP if certify else _CONSTANT_GAP
    gap = _FLOAT64_GAP if taps.dtype == jnp.float64 else narrow

    def find(taps, mirror):
        return search(taps, phases, gap=gap, certify=certify, mirror=mirror)

    # `vmap` would run both sides of every decision
    return jax.custom_batching.sequential_vmap(find)(taps, mirror)
