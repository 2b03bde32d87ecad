"""The Lipschitz constant of a layer, quickly, and a certified bracket of it."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks, _linalg
from stochsolvers._typing import Array
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz import _hermitian, _spectra
from stochsolvers.lipschitz._formula import lipschitz_formula
from stochsolvers.lipschitz._search import Found, search, symbols
from stochsolvers.lipschitz._taps import Grid, Phases, folded, taps_and_phases

DIRECT = 16  # up to this size, all eigenvalues of all blocks are the fastest
# two blocks whose largest eigenvalues are closer than this, relatively, need not be told apart
_CONSTANT_GAP, _BRACKET_GAP, _FLOAT64_GAP = 2.0**-18, 2.0**-12, 2.0**-33


class Bracket(NamedTuple):
    """Two numbers that hold a constant between them."""

    lower: Array
    upper: Array


@functools.partial(jax.jit, static_argnames=("grid", "method"))
def lipschitz_constant(
    linear_map: LinearMap, *, grid: Grid = "layer", method: Literal["fast", "formula"] = "fast"
) -> Array:
    r"""L = λ_max(A A*), the squared spectral norm of a layer.

    "fast" visits the frequencies in descending order of their norms, and rules most of them out without
    an eigenvalue; it agrees with "formula", which transforms the padded kernel and takes the eigenvalues
    of every block, to 1e-5 in float32 and 1e-9 in float64. Its derivative is that of ||Â(f) v||² at the
    top singular vector v of the top frequency f, the envelope theorem; a subgradient where they are
    not unique. Derivatives of higher order follow v, and exist where it is unique; in blocks of more
    than 16 channels they are as accurate as v, to about the root of the round-off.

    Args:
      linear_map: `Dense` or `Conv`.
      grid: "layer" for lemma 2 on the layer's own grid: exact for CIRCULAR padding whose strides
        divide the grid, an approximation otherwise. "padded" for an upper bound under any padding.
      method: "fast" or "formula".

    Returns:
      scalar, in float32 or the kernel's wider dtype. Differentiable, `jit`-able; `vmap` visits one
      kernel after another.

    References:
      Bibi et al. 2019, lemma 2; Sedghi et al. 2019.
    """
    _checks.member("method", method, ("fast", "formula"))
    if method == "formula":
        return lipschitz_formula(linear_map, grid)
    taps, phases = taps_and_phases(linear_map, grid)
    scale = scale_of(taps)
    taps, phases = folded(taps / scale, phases)
    find = _among_all if block_size(taps, phases) <= DIRECT else search_for
    best = find(lax.stop_gradient(taps), phases)
    return _top_square(taps, phases, best) * scale * scale


@functools.partial(jax.jit, static_argnames="grid")
def lipschitz_bracket(linear_map: LinearMap, *, grid: Grid = "layer") -> Bracket:
    r"""lower ≤ L ≤ upper for L = max_f λ_max(Â(f) Â(f)ᴴ) in exact arithmetic, all round-off included.

    The lower end is a Rayleigh quotient. The upper end is a level τ at which τ I − Â(f)ᴴÂ(f) was shown
    to be positive semi-definite for every f, with a priori bounds on the round-off of the Gram
    matrices and a posteriori ones on that of the Cholesky factors. Kernels of up to 16 channels, whose
    eigenvalues are computed, allow 16 n u for that. In float32 the ends are 1e-4 to 3e-3 apart,
    relatively, for layers of 16 to 512 channels, in float64 1e-9.

    Args:
      linear_map: `Dense` or `Conv`.
      grid: as in `lipschitz_constant`; the upper end for "padded" bounds the layer under any padding.

    Returns:
      `Bracket` of scalars, in float32 or the kernel's wider dtype. The upper end is at least the
      smallest normal number. NaN if the kernel is.

    References:
      Higham, Accuracy and Stability of Numerical Algorithms, 2002, theorem 10.3; Rump 2006,
      Verification of positive definiteness.
    """
    taps, phases = taps_and_phases(linear_map, grid)
    scale = scale_of(taps)
    taps = taps / scale
    if block_size(taps, phases) > DIRECT:
        return rescaled(certified(taps, phases)[0], scale)
    eigenvalues, errors = all_eigenvalues(taps, phases)
    eigenvalues = eigenvalues[:, -1]
    unit = _spectra.unit_round_off(taps.dtype)
    slack = errors + 16 * block_size(taps, phases) * unit * eigenvalues
    inner = Bracket(jnp.max(eigenvalues - slack), jnp.max(eigenvalues + slack))
    return rescaled(widened(inner, taps, phases), scale)


def certified(taps: Array, phases: Phases) -> tuple[Bracket, Found]:
    """The bracket for taps of modest size, and the block and the vector that its lower end is from."""
    best = search_for(taps, phases, certify=True)
    lower = rayleigh(taps, phases, best)
    return widened(Bracket(lower, best.ceiling + best.slack), taps, phases), best


def rayleigh(taps: Array, phases: Phases, best: Found) -> Array:
    """||Â(f) v||² / ||v||² with few roundings; `widened` allows for them."""
    squares = image(taps, phases, best, accurate=True).ravel() ** 2
    return _spectra.pairwise_sum(squares) / _spectra.pairwise_sum(best.vector.ravel() ** 2)


def widened(bracket: Bracket, taps: Array, phases: Phases) -> Bracket:
    """Room for the round-off of the phases and of the sums over the taps in every singular value."""
    terms, dtype = taps.shape[1] + phases.cosines.shape[1], taps.dtype
    roundings = terms + 2 * math.ceil(math.log2(taps[0].size)) + 16
    reach = jnp.sqrt(jnp.max(_spectra.perron(jnp.sum(jnp.abs(taps), axis=1))))
    shift = math.sqrt(2) * _spectra.gamma(roundings, dtype) * reach
    few = 64 * _spectra.unit_round_off(dtype)
    lower, upper = (jnp.sqrt(jnp.maximum(end, 0.0)) for end in bracket)
    return Bracket(
        jnp.maximum(lower - shift, 0.0) ** 2 * (1 - few), (upper + shift) ** 2 * (1 + few)
    )


def rescaled(bracket: Bracket, scale: Array) -> Bracket:
    """The bracket in the layer's own units; the ends stay on their sides if they over- or underflow."""
    floats = jnp.finfo(scale.dtype)
    return Bracket(
        jnp.minimum(bracket.lower * scale * scale, floats.max),
        jnp.maximum(bracket.upper * scale * scale, floats.tiny),
    )


def scale_of(taps: Array) -> Array:
    """A power of two, by which division is exact, that brings the largest entry near 1."""
    largest = jnp.max(jnp.abs(lax.stop_gradient(taps)))
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
        grams = _hermitian.grams(blocks, sliced=True).joined
        if grams.shape[-1] == 1:
            values.append(jnp.real(grams).reshape(-1, 1))
        else:
            values.append(_linalg.eigvalsh(grams).reshape(-1, grams.shape[-1]))
        errors.append(_hermitian.gram_error(blocks).ravel())
    return jnp.concatenate(values), jnp.concatenate(errors)


def _among_all(taps: Array, phases: Phases) -> Found:
    """The block with the largest of all eigenvalues, and its eigenvector."""
    values = all_eigenvalues(taps, phases)[0][:, -1]
    # as they come: all groups of the real frequencies, then of the others
    at, groups, num_real = jnp.argmax(values), len(taps), phases.num_real
    first, rest = num_real * groups, max(len(phases.cosines) - num_real, 1)
    of_real, of_rest = jnp.divmod(at, max(num_real, 1)), jnp.divmod(at - first, rest)
    group = jnp.where(at < first, of_real[0], of_rest[0])
    frequency = jnp.where(at < first, of_real[1], num_real + of_rest[1])
    cosines, sines = (jnp.asarray(part, taps.dtype)[frequency] for part in phases[:2])
    gram = _hermitian.grams(symbols(taps[group], cosines, sines), sliced=True).joined
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _top_square(taps: Array, phases: Phases, best: Found) -> Array:
    """||Â(f) v||² / ||v||² at the top singular vector."""
    return _square(taps, phases, best)


@_top_square.defjvp
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
    products = taps[..., None] * (pairs[:, :, None] if axis == 1 else pairs)
    return _spectra.pairwise_sum(jnp.moveaxis(products, axis, 0))
