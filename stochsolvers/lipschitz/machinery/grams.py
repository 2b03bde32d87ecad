"""Gram matrices G(f) = Â(f)ᴴÂ(f) of some frequencies, from the taps, with bounds on their round-off."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.lipschitz.machinery import hermitian, spectra
from stochsolvers.lipschitz.machinery.hermitian import Symbols
from stochsolvers.lipschitz.machinery.taps import Nodes

Form: TypeAlias = Callable[[Array], tuple[Symbols, Array]]
"""From the numbers of some blocks to their Gram matrices and bounds on the round-off of those."""


def symbols(taps: Array, cosines: Array, sines: Array | None) -> Symbols:
    """Blocks (..., m, n), n ≤ m, from taps (taps, n1, n2) and phases (..., aliases, taps)."""

    def block(phases):
        product = jnp.einsum("...ap,pio->...aio", phases, taps, precision="highest")
        product = product.reshape(*phases.shape[:-2], -1, taps.shape[-1])
        narrow = product.shape[-1] <= product.shape[-2]
        return product if narrow else jnp.swapaxes(product, -1, -2)

    return Symbols(block(cosines), None if sines is None else block(sines))


def direct(taps: Array, cosines: np.ndarray, sines: np.ndarray | None, *, certify: bool) -> Form:
    """Gram matrices from their blocks; no sines for those with real phases."""
    table = jax.tree.map(lambda part: jnp.asarray(part, taps.dtype), (cosines, sines))

    def form(numbers):
        blocks = symbols(taps, *jax.tree.map(lambda part: part[numbers], table))
        zeros = varying(jnp.zeros(len(numbers), taps.dtype), blocks)
        errors = hermitian.gram_error(blocks) if certify else zeros
        return hermitian.grams(blocks, sliced=certify), errors

    return form


def interpolated(taps: Array, nodes: Nodes, *, certify: bool) -> Form:
    r"""Gram matrices from those at the nodes, G(f) = Σ_g D(f − g) G(g).

    Round-off: that of the G(g) and 20 more roundings of every term are multiplied by Σ_g |D(f − g)|; D itself
    is known to 2^-48.
    """
    cosines, sines, real, imaginary, absolute = (jnp.asarray(part, taps.dtype) for part in nodes)
    blocks = symbols(taps, cosines, sines)
    grams = hermitian.grams(blocks, sliced=certify)
    count, n = grams.re.shape[:2]
    pairs = tuple(zip((real, imaginary), jax.tree.leaves(grams), strict=True))
    errors = varying(jnp.zeros(len(real), taps.dtype), taps)
    if certify:
        known = 2.0**-48 / (32 * spectra.unit_round_off(taps.dtype))
        errors = (absolute + known) @ hermitian.gram_error(blocks, extra=20)

    def form(numbers):
        re, im = (
            jnp.matmul(weights[numbers], part.reshape(count, n * n), precision="highest")
            for weights, part in pairs
        )
        return Symbols(re.reshape(-1, n, n), im.reshape(-1, n, n)), errors[numbers]

    return form


def mirrored(form: Form, level: Array | None) -> Form:
    """c I − G in place of every Gram matrix G, for a level c."""
    if level is None:
        return form

    def form_mirrored(numbers):
        grams, errors = form(numbers)
        diagonal = level * jnp.eye(grams.re.shape[-1], dtype=level.dtype)
        im = None if grams.im is None else -grams.im
        sizes = level + jnp.max(jnp.abs(grams.re), axis=(-2, -1))  # of what is rounded
        rounding = 2 * spectra.unit_round_off(level.dtype) * sizes
        return Symbols(diagonal[None] - grams.re, im), errors + rounding

    return form_mirrored
