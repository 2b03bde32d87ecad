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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._shards import varying
from stochsolvers._typing import Array
from stochsolvers.lipschitz.machinery import hermitian, spectra
from stochsolvers.lipschitz.machinery.grams import Form, direct, interpolated, mirrored
from stochsolvers.lipschitz.machinery.hermitian import Symbols
from stochsolvers.lipschitz.machinery.taps import Phases

_LANCZOS_STEPS = 32
_LARGE = 256
_CHUNK = 2**18  # entries of the blocks formed at once


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
    slack = spectra.gamma(2 * roundings, taps.dtype) * jnp.sum(norms, axis=1) ** 2
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
    vector = jnp.stack([spectra.fixed_start(n, taps.dtype), jnp.zeros(n, taps.dtype)], axis=-1)
    found = varying(Found(zero, zero, zero, origin, origin, vector), taps)
    # a second program for the few real blocks of a grid is worth its compilation if they are large
    num_real = phases.num_real if n >= _LARGE or phases.num_real == num_frequencies else 0

    def visit(group, found):
        group = group.astype(jnp.int32)
        own = taps[group]
        if phases.nodes is not None:
            form = mirrored(interpolated(own, phases.nodes, certify=certify), mirror)
            return _Sweep(form, bounds[group], n * n, gap, certify)(found, 0, group)
        parts = ((slice(0, num_real), None), (slice(num_real, None), phases.sines[num_real:]))
        for part, sines in parts:
            if len(phases.cosines[part]):
                form = direct(own, phases.cosines[part], sines, certify=certify)
                form = mirrored(form, mirror)
                sweep = _Sweep(form, bounds[group, part], aliases * own[0].size, gap, certify)
                found = sweep(found, part.start, group)
        return found

    return lax.fori_loop(0, taps.shape[0], visit, found)


class _Sweep(NamedTuple):
    """Some blocks of one group, of `size` entries each."""

    form: Form
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
        work = _Work(grams, slacks, numbers + first, group, self.gap, self.certify)
        bounds = jnp.where(fresh, hermitian.norm_bounds(grams), -jnp.inf)
        trial = _Trial(found, bounds, *work.fresh_start(found))
        trial = lax.while_loop(_is_unsettled, work.step, trial)
        skipped = jnp.max(jnp.where(trial.bounds > -jnp.inf, slacks, 0))
        slack = jnp.maximum(trial.found.slack, skipped)
        return trial.found._replace(slack=slack)


def _is_unsettled(trial: _Trial) -> Array:
    return jnp.max(trial.bounds) > trial.found.ceiling


class _Work(NamedTuple):
    """A few blocks, and the three ways to make progress with one of them.

    Attributes:
      grams: their Gram matrices, (blocks, n, n).
      slacks: round-off of those.
      frequencies: their numbers in the full table.
      group: of all of them.
      gap, certify: as in `search`.
    """

    grams: Symbols
    slacks: Array
    frequencies: Array
    group: Array
    gap: float
    certify: bool

    @property
    def parts(self) -> int:
        """Of a vector: real and imaginary, or real alone."""
        return 1 if self.grams.im is None else 2

    def fresh_start(self, found: Found) -> tuple[Array, Array]:
        """θ = 0 and the vector that Lanczos begins with on every block."""
        order, dtype = self.grams.re.shape[-1], found.value.dtype
        start = spectra.fixed_start(self.parts * order, dtype)
        return varying((jnp.zeros((), dtype), start), found)

    def block(self, at: Array) -> Symbols:
        """One Gram matrix."""
        return jax.tree.map(lambda part: part[at], self.grams)

    def step(self, trial: _Trial) -> _Trial:
        """A Cholesky factorisation of the block with the largest bound; where it breaks down, a larger L."""
        at = jnp.argmax(trial.bounds)
        level = trial.found.ceiling
        zero, no = varying((jnp.zeros_like(level), jnp.zeros((), bool)), trial.found)
        certificate = functools.partial(
            hermitian.cholesky_certificate, self.block(at), level, certify=self.certify
        )
        holds, error = lax.cond(level > 0, certificate, lambda: (no, zero))
        return lax.cond(holds, self._settled, self._improved, trial, at, error)

    def _settled(self, trial: _Trial, at: Array, error: Array) -> _Trial:
        """λ_max ≤ τ + slack: this block is done."""
        slack = jnp.maximum(trial.found.slack, error + self.slacks[at])
        found = trial.found._replace(slack=slack)
        return _Trial(found, trial.bounds.at[at].set(-jnp.inf), *self.fresh_start(found))

    def _improved(self, trial: _Trial, at: Array, _: Array) -> _Trial:
        """Lanczos steps, or all eigenvalues if these have stalled."""
        matrix = self.block(at).doubled
        theta, vector = spectra.lanczos(lambda x: matrix @ x, trial.vector, _LANCZOS_STEPS)
        stalled = theta <= trial.theta * (1 + self.gap / 8)
        return lax.cond(stalled, self._decomposed, self._accepted, trial, at, theta, vector)

    def _accepted(self, trial: _Trial, at: Array, theta: Array, vector: Array) -> _Trial:
        """A pair (θ, v) of this block; L and τ if it is the best so far."""
        found = trial.found
        better = theta > found.value
        pair = jnp.pad(vector.reshape(self.parts, -1).T, [(0, 0), (0, 2 - self.parts)])
        best = Found(
            jnp.maximum(theta, found.value),
            jnp.maximum(theta * (1 + self.gap), found.ceiling),
            found.slack,
            jnp.where(better, self.frequencies[at], found.frequency),
            jnp.where(better, self.group, found.group),
            jnp.where(better, pair, found.vector),
        )
        return _Trial(best, trial.bounds, theta, vector)

    def _decomposed(self, trial: _Trial, at: Array, *_: Array) -> _Trial:
        """The top eigenpair of this block."""
        matrix = self.block(at).joined
        vector = jnp.linalg.eigh(matrix)[1][:, -1]
        theta = jnp.real(jnp.vdot(vector, matrix @ vector))
        halves = hermitian.split(vector)
        vector = jnp.concatenate([part for part in halves if part is not None])
        trial = self._accepted(trial, at, theta, vector)
        # a Cholesky factorisation that still fails is at the limit of round-off
        ceiling = trial.found.ceiling * (1 + self.gap)
        return trial._replace(found=trial.found._replace(ceiling=ceiling))
