r"""Search for the frequency whose block has the largest singular value.

The blocks are visited a few at a time, in descending order of their Frobenius norms. A block is
settled as soon as one of these shows λ_max(G) ≤ τ = (1 + gap) L, L the largest Rayleigh quotient so far:

1. its Frobenius norm, from the scalar products of the taps, before the block is even formed;
2. the Frobenius and the row-sum norm of its Gram matrix G;
3. a Cholesky factorisation of τ I − G, at a fraction of the cost of the eigenvalues.

Where the factorisation breaks down there is something to find: Lanczos steps raise L and the block is
tried again; if they stall, all of its eigenvalues are computed. The number of such blocks is that of
the records in a sequence, the logarithm of its length for kernels without structure.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.lipschitz import _hermitian, _spectra
from stochsolvers.lipschitz._hermitian import Symbols
from stochsolvers.lipschitz._taps import Nodes, Phases

_LANCZOS_STEPS = 32
_LARGE = 256
_CHUNK = 2**18  # entries of the blocks formed at once

_Form: TypeAlias = Callable[[Array], tuple[Symbols, Array]]
"""From the numbers of some blocks to their Gram matrices and bounds on the round-off of those."""


class Found(NamedTuple):
    """The best block so far.

    Attributes:
      value: L, the largest Rayleigh quotient of a Gram matrix.
      ceiling: τ; every settled block has λ_max ≤ τ + slack.
      slack: round-off of the comparisons with τ; 0 unless it is asked for.
      frequency, group: the block with the largest quotient.
      vector: its unit vector, real and imaginary part, shape (n, 2).
    """

    value: Array
    ceiling: Array
    slack: Array
    frequency: Array
    group: Array
    vector: Array


class _Trial(NamedTuple):
    """Work on a few blocks: bounds are −inf for settled ones; θ, v of the one that is worked on."""

    found: Found
    bounds: Array
    theta: Array
    vector: Array


def symbols(taps: Array, cosines: Array, sines: Array | None) -> Symbols:
    """Blocks (..., m, n), n ≤ m, from taps (taps, n1, n2) and phases (..., aliases, taps)."""

    def block(phases):
        product = jnp.einsum("...ap,pio->...aio", phases, taps, precision="highest")
        product = product.reshape(*phases.shape[:-2], -1, taps.shape[-1])
        narrow = product.shape[-1] <= product.shape[-2]
        return product if narrow else jnp.swapaxes(product, -1, -2)

    return Symbols(block(cosines), None if sines is None else block(sines))


def frobenius_bounds(taps: Array, phases: Phases) -> Array:
    r"""||Â(f)||_F², rounded up, shape (groups, frequencies): φ(f)ᴴ C φ(f) with C_st = <K_s, K_t>."""
    flat = taps.reshape(*taps.shape[:2], -1)
    products = jnp.einsum("gsk,gtk->gst", flat, flat, precision="highest")
    squares = sum(
        jnp.einsum("fas,gst,fat->gf", part, products, part, precision="highest")
        for part in (jnp.asarray(part, taps.dtype) for part in phases[:2])
    )
    norms = jnp.sqrt(jnp.einsum("gss->gs", products))
    roundings = flat.shape[-1] + 2 * flat.shape[1] + 16
    slack = _spectra.gamma(2 * roundings, taps.dtype) * jnp.sum(norms, axis=1) ** 2
    return squares + 2 * slack[:, None]


def search(
    taps: Array, phases: Phases, *, gap: float, certify: bool, mirror: Array | None = None
) -> Found:
    """The largest singular value over all blocks, within a factor 1 + gap of its square.

    With c = `mirror`, the same of c I − G for the Gram matrices G: c less the smallest eigenvalue of all.
    All blocks are formed then, in any order, and what is found is of c I − G.

    Args:
      taps: (groups, taps, n1, n2), entries of modest size.
      phases: the table that goes with them.
      gap: relative.
      certify: whether to bound the round-off of the comparisons.
      mirror: c, above the mean of any block's eigenvalues.
    """
    bounds = frobenius_bounds(taps, phases)
    if mirror is not None:
        bounds = jnp.full_like(bounds, jnp.inf)
    num_frequencies, aliases = phases.cosines.shape[:2]
    n = min(aliases * taps.shape[2], taps.shape[3])
    zero, origin = jnp.zeros((), taps.dtype), jnp.zeros((), jnp.int32)
    vector = jnp.stack([_spectra.fixed_start(n, taps.dtype), jnp.zeros(n, taps.dtype)], axis=-1)
    found = varying(Found(zero, zero, zero, origin, origin, vector), taps)
    # a second program for the few real blocks of a grid is worth its compilation if they are large
    num_real = phases.num_real if n >= _LARGE or phases.num_real == num_frequencies else 0

    def visit(group, found):
        group = group.astype(jnp.int32)
        own = taps[group]
        if phases.nodes is not None:
            form = _mirrored(_interpolated(own, phases.nodes, certify=certify), mirror)
            return _Sweep(form, bounds[group], n * n, gap, certify)(found, 0, group)
        parts = ((slice(0, num_real), None), (slice(num_real, None), phases.sines[num_real:]))
        for part, sines in parts:
            if len(phases.cosines[part]):
                form = _direct(own, phases.cosines[part], sines, certify=certify)
                form = _mirrored(form, mirror)
                sweep = _Sweep(form, bounds[group, part], aliases * own[0].size, gap, certify)
                found = sweep(found, part.start, group)
        return found

    return lax.fori_loop(0, taps.shape[0], visit, found)


def _direct(taps: Array, cosines: np.ndarray, sines: np.ndarray | None, *, certify: bool) -> _Form:
    """Gram matrices from their blocks; no sines for those with real phases."""
    table = jax.tree.map(lambda part: jnp.asarray(part, taps.dtype), (cosines, sines))

    def form(numbers):
        blocks = symbols(taps, *jax.tree.map(lambda part: part[numbers], table))
        zeros = varying(jnp.zeros(len(numbers), taps.dtype), blocks)
        errors = _hermitian.gram_error(blocks) if certify else zeros
        return _hermitian.grams(blocks, sliced=certify), errors

    return form


def _interpolated(taps: Array, nodes: Nodes, *, certify: bool) -> _Form:
    r"""Gram matrices from those at the nodes, G(f) = Σ_g D(f − g) G(g).

    Round-off: that of the G(g) and 20 more roundings of every term are multiplied by Σ_g |D(f − g)|; D itself
    is known to 2^-48.
    """
    cosines, sines, real, imaginary, absolute = (jnp.asarray(part, taps.dtype) for part in nodes)
    blocks = symbols(taps, cosines, sines)
    grams = _hermitian.grams(blocks, sliced=certify)
    count, n = grams.re.shape[:2]
    pairs = tuple(zip((real, imaginary), jax.tree.leaves(grams), strict=True))
    errors = varying(jnp.zeros(len(real), taps.dtype), taps)
    if certify:
        known = 2.0**-48 / (32 * _spectra.unit_round_off(taps.dtype))
        errors = (absolute + known) @ _hermitian.gram_error(blocks, extra=20)

    def form(numbers):
        re, im = (
            jnp.matmul(weights[numbers], part.reshape(count, n * n), precision="highest")
            for weights, part in pairs
        )
        return Symbols(re.reshape(-1, n, n), im.reshape(-1, n, n)), errors[numbers]

    return form


def _mirrored(form: _Form, level: Array | None) -> _Form:
    """c I − G in place of every Gram matrix G, for a level c."""
    if level is None:
        return form

    def mirrored(numbers):
        grams, errors = form(numbers)
        diagonal = level * jnp.eye(grams.re.shape[-1], dtype=level.dtype)
        im = None if grams.im is None else -grams.im
        sizes = level + jnp.max(jnp.abs(grams.re), axis=(-2, -1))  # of what is rounded
        rounding = 2 * _spectra.unit_round_off(level.dtype) * sizes
        return Symbols(diagonal - grams.re, im), errors + rounding

    return mirrored


class _Sweep(NamedTuple):
    """Some blocks of one group, of `size` entries each."""

    form: _Form
    bounds: Array
    size: int
    gap: float
    certify: bool

    def __call__(self, found: Found, first: int, group: Array) -> Found:
        """Visit all blocks, the first of which has the number `first` in the full table."""
        count = len(self.bounds)
        chunk = min(count, max(1, _CHUNK // self.size))
        order = jnp.argsort(-self.bounds).astype(jnp.int32)
        order = jnp.pad(order, (0, -count % chunk), mode="edge")

        def unfinished(carry):
            k, found = carry
            beyond = self.bounds[order[jnp.minimum(k * chunk, count - 1)]] > found.ceiling
            return (k * chunk < count) & beyond

        def visit(carry):
            k, found = carry
            numbers = lax.dynamic_slice_in_dim(order, k * chunk, chunk)
            fresh = k * chunk + jnp.arange(chunk) < count  # the last few are padded
            return k + 1, self._settle(found, numbers, fresh, first, group)

        return lax.while_loop(unfinished, visit, (0, found))[1]

    def _settle(
        self, found: Found, numbers: Array, fresh: Array, first: int, group: Array
    ) -> Found:
        """Work on a few blocks until all of them are settled."""
        grams, slacks = self.form(numbers)
        n, parts = grams.re.shape[-1], 1 if grams.im is None else 2
        start = _spectra.fixed_start(parts * n, found.value.dtype)
        zero, no = jnp.zeros((), found.value.dtype), jnp.zeros((), bool)
        zero, no, start = varying((zero, no, start), found)

        def block(at):
            return jax.tree.map(lambda part: part[at], grams)

        def unsettled(trial):
            return jnp.max(trial.bounds) > trial.found.ceiling

        def work(trial):
            at = jnp.argmax(trial.bounds)
            level = trial.found.ceiling
            certificate = functools.partial(
                _hermitian.cholesky_certificate, block(at), level, certify=self.certify
            )
            holds, error = lax.cond(level > 0, certificate, lambda: (no, zero))
            return lax.cond(holds, settle, improve, trial, at, error)

        def settle(trial, at, error):
            slack = jnp.maximum(trial.found.slack, error + slacks[at])
            return _Trial(
                trial.found._replace(slack=slack), trial.bounds.at[at].set(-jnp.inf), zero, start
            )

        def improve(trial, at, _):
            matrix = block(at).doubled
            theta, vector = _spectra.lanczos(lambda x: matrix @ x, trial.vector, _LANCZOS_STEPS)
            stalled = theta <= trial.theta * (1 + self.gap / 8)
            return lax.cond(stalled, solve, accept, trial, at, theta, vector)

        def accept(trial, at, theta, vector):
            found = trial.found
            better = theta > found.value
            pair = jnp.pad(vector.reshape(parts, n).T, [(0, 0), (0, 2 - parts)])
            return _Trial(
                Found(
                    jnp.maximum(theta, found.value),
                    jnp.maximum(theta * (1 + self.gap), found.ceiling),
                    found.slack,
                    jnp.where(better, numbers[at] + first, found.frequency),
                    jnp.where(better, group, found.group),
                    jnp.where(better, pair, found.vector),
                ),
                trial.bounds,
                theta,
                vector,
            )

        def solve(trial, at, *_):
            matrix = block(at).joined
            vector = jnp.linalg.eigh(matrix)[1][:, -1]
            theta = jnp.real(jnp.vdot(vector, matrix @ vector))
            halves = _hermitian.split(vector)
            vector = jnp.concatenate([part for part in halves if part is not None])
            trial = accept(trial, at, theta, vector)
            # a Cholesky factorisation that still fails is at the limit of round-off
            ceiling = trial.found.ceiling * (1 + self.gap)
            return trial._replace(found=trial.found._replace(ceiling=ceiling))

        bounds = jnp.where(fresh, _hermitian.norm_bounds(grams), -jnp.inf)
        trial = _Trial(found, bounds, zero, start)
        trial = lax.while_loop(unsettled, work, trial)
        skipped = jnp.max(jnp.where(trial.bounds > -jnp.inf, slacks, 0))
        slack = jnp.maximum(trial.found.slack, skipped)
        return trial.found._replace(slack=slack)
