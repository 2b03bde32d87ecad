"""Gram matrices and Cholesky certificates in real arithmetic, from real and imaginary parts.

Complex products take up to twice as long as the real ones they consist of, and the LAPACK that comes with JAX
starts threads of its own at order 64, which fight with those of the products: a matrix of an order below
1024 is factored in blocks, and LAPACK sees no more than the small ones on the diagonal, one at a time.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._typing import Array
from stochsolvers.lipschitz.machinery.spectra import gamma, perron, unit_round_off

_SLICE = 128  # length of one inner product of a Gram matrix; the worst round-off grows with it
_LEAF, _HALF_LEAF = 32, 16  # orders of a factor that has to be inverted, and of a triangular solve
_THREADS = 64  # LAPACK factors complex matrices of this order with threads of its own
_WHOLE = 1024  # where those are worth it, and the tree of halves takes long to compile


class Symbols(NamedTuple):
    """A stack of matrices re + i im, shape (..., m, n); im is None if they are real."""

    re: Array
    im: Array | None

    @property
    def modulus(self) -> Array:
        """Entrywise absolute values."""
        return jnp.abs(self.re) if self.im is None else jnp.sqrt(self.re**2 + self.im**2)

    @property
    def joined(self) -> Array:
        """The matrices as one array."""
        return self.re if self.im is None else lax.complex(self.re, self.im)

    @property
    def doubled(self) -> Array:
        """[[re, −im], [im, re]], which does to (Re x, Im x) what the matrix does to x; re if it is real."""
        if self.im is None:
            return self.re
        return jnp.block([[self.re, -self.im], [self.im, self.re]])

    def cut(self, rows: slice, columns: slice = slice(None)) -> "Symbols":
        """A part of every matrix."""
        return jax.tree.map(lambda part: part[..., rows, columns], self)


def split(array: Array) -> Symbols:
    """Real and imaginary part of an array."""
    return Symbols(jnp.real(array), jnp.imag(array) if jnp.iscomplexobj(array) else None)


def grams(symbols: Symbols, *, sliced: bool) -> Symbols:
    r"""MᴴM of every matrix, shape (..., n, n), with inner products in slices if the round-off matters.

    Three real products: PᵀP + QᵀQ and PᵀQ, whose transpose makes up the imaginary part.
    """
    rows = symbols.re.shape[-2]
    slices = -(-rows // _SLICE)
    if slices == 1 or not sliced:
        return _gram(symbols)
    pad = [(0, 0)] * (symbols.re.ndim - 2) + [(0, slices * _SLICE - rows), (0, 0)]
    padded = jax.tree.map(lambda part: jnp.pad(part, pad), symbols)

    def add(k, total):
        part = jax.tree.map(
            lambda part: lax.dynamic_slice_in_dim(part, k * _SLICE, _SLICE, axis=-2), padded
        )
        return jax.tree.map(jnp.add, total, _gram(part))

    return lax.fori_loop(1, slices, add, _gram(padded.cut(slice(_SLICE))))


def gram_error(symbols: Symbols, extra: int = 0) -> Array:
    r"""Bound on the round-off of sliced `grams` in the spectral norm, √2 γ || |M|ᵀ|M| ||₂ per matrix.

    With `extra` roundings of every entry on top.
    """
    rows, dtype = symbols.re.shape[-2], symbols.re.dtype
    length = min(rows, _SLICE) + -(-rows // _SLICE) + 3 + extra
    return math.sqrt(2) * gamma(length, dtype) * perron(symbols.modulus)


def norm_bounds(gram: Symbols) -> Array:
    """min(||G||_F, ||G||_∞) ≥ λ_max(G) of Hermitian matrices (..., n, n), rounded up."""
    squares = gram.re**2 if gram.im is None else gram.re**2 + gram.im**2
    frobenius = jnp.sqrt(jnp.sum(squares, axis=(-2, -1)))
    rows = jnp.max(jnp.sum(jnp.sqrt(squares), axis=-1), axis=-1)
    n = gram.re.shape[-1]
    return jnp.minimum(
        frobenius * (1 + gamma(n * n + 8, squares.dtype)), rows * (1 + gamma(n + 8, squares.dtype))
    )


def cholesky_certificate(gram: Symbols, level: Array, *, certify: bool) -> tuple[Array, Array]:
    r"""Whether τ I − G has a Cholesky factorisation, and e with λ_max(G) ≤ τ + e if it has.

    The factor satisfies RᴴR = τ I − G + E. Substitution in any order and any blocks contributes
    |E| ≤ 4 γ |R|ᴴ|R| (Higham 2002, theorem 10.3; a complex product of three real ones has error √10 γ).
    Beside a block R_kk on the diagonal, R_k = W P_k with its inverse W instead of a solution, which
    contributes |R_kkᴴ R_k − P_k| ≤ 8 γ |R_kk|ᴴ|W||P_k|, and 8 γ || |R_kk|ᴴ|W| || ||P_k|| in the Frobenius
    norm. e bounds both, and the rounding of the diagonal, after the fact; it is 0 if not `certify`.

    Args:
      gram: one matrix, (n, n).
      level: τ.
      certify: whether to bound the round-off.
    """
    n, dtype = gram.re.shape[-1], level.dtype
    shifted = Symbols(level * jnp.eye(n, dtype=dtype) - gram.re, _negative(gram.im))
    factor = _factor(shifted, last=True)
    succeeded = factor.rows.re[-1, -1] > 0  # NaN in all blocks from the one that breaks down
    if not certify:
        return succeeded, jnp.zeros_like(level)
    constant = 1 if gram.im is None else 4
    substitution = gamma(constant * (n + 16), dtype) * perron(factor.rows.modulus)
    inverses = gamma(8 * (_LEAF + 8), dtype) * jnp.sqrt(2 * factor.squares)
    return succeeded, substitution + inverses + 4 * unit_round_off(dtype) * level


class _Factor(NamedTuple):
    """R with RᴴR = A, as the tree of its halves.

    Attributes:
      rows: R, upper triangular.
      halves: factors of the two halves of the diagonal and the block between them; () for a leaf.
      inverse: R⁻¹ of a leaf, or None if nothing is beside it.
      condition: || |R_kk|ᴴ|W| ||₂² of a leaf, or a bound on it.
      squares: Σ || |R_kk|ᴴ|W| ||² ||P_k||² over the leaves whose inverse was used.
    """

    rows: Symbols
    halves: tuple
    inverse: Symbols | None
    condition: Array
    squares: Array


def _factor(matrix: Symbols, *, last: bool) -> _Factor:
    """The Cholesky factor of one matrix; the `last` block has nothing to its right."""
    n, zero = matrix.re.shape[-1], jnp.zeros((), matrix.re.dtype)
    if n <= _LEAF or (last and not _THREADS <= n < _WHOLE):
        lower = lax.linalg.cholesky(matrix.joined, symmetrize_input=False)
        rows = split(lower.conj().T)
        if last:
            return _Factor(rows, (), None, zero, zero)
        inverse = _inverse(lower)
        product = jnp.matmul(jnp.abs(lower), jnp.abs(inverse), precision="highest")
        norms = jnp.max(jnp.sum(product, axis=0)) * jnp.max(jnp.sum(product, axis=1))
        return _Factor(rows, (), split(inverse.conj().T), norms, zero)
    top, bottom = slice(n // 2), slice(n // 2, None)
    first = _factor(matrix.cut(top, top), last=False)
    across, squares = _solve(first, matrix.cut(top, bottom))
    rest = jax.tree.map(jnp.subtract, matrix.cut(bottom, bottom), _gram(across))
    second = _factor(rest, last=last)
    below = jax.tree.map(lambda part: jnp.zeros_like(part.T), across)
    return _Factor(
        _stack(_stack(first.rows, across, -1), _stack(below, second.rows, -1), -2),
        (first, across, second),
        None,
        zero,
        first.squares + second.squares + squares,
    )


def _solve(factor: _Factor, right: Symbols) -> tuple[Symbols, Array]:
    """R⁻ᴴ B by substitution from leaf to leaf, and the sum of `squares` over the leaves."""
    if factor.inverse is not None:
        squares = factor.condition * jnp.sum(right.modulus**2)
        return _adjoint_product(factor.inverse, right), squares
    first, across, second = factor.halves
    h = across.re.shape[0]
    top, above = _solve(first, right.cut(slice(h)))
    rest = jax.tree.map(jnp.subtract, right.cut(slice(h, None)), _adjoint_product(across, top))
    bottom, below = _solve(second, rest)
    return _stack(top, bottom, -2), above + below


def _inverse(lower: Array) -> Array:
    """L⁻¹ by substitution, so that |L W − I| ≤ c γ |L||W|."""
    solve = functools.partial(lax.linalg.triangular_solve, left_side=True, lower=True)
    n = len(lower)
    if n <= _HALF_LEAF:
        return solve(lower, jnp.eye(n, dtype=lower.dtype))
    h = n // 2
    first, second = _inverse(lower[:h, :h]), _inverse(lower[h:, h:])
    corner = solve(lower[h:, h:], -jnp.matmul(lower[h:, :h], first, precision="highest"))
    return jnp.block([[first, jnp.zeros((h, n - h), lower.dtype)], [corner, second]])


def _gram(symbols: Symbols) -> Symbols:
    """MᴴM."""
    p, q = symbols
    if q is None:
        return Symbols(_product(p, p), None)
    mixed = _product(p, q)
    return Symbols(_product(p, p) + _product(q, q), mixed - jnp.swapaxes(mixed, -1, -2))


def _adjoint_product(left: Symbols, right: Symbols) -> Symbols:
    """AᴴB by three real products."""
    (a, b), (c, d) = left, right
    if b is None or d is None:
        return Symbols(_product(a, c), None)
    first, second, both = _product(a, c), _product(b, d), _product(a - b, c + d)
    return Symbols(first + second, both - first + second)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(jnp.swapaxes(left, -1, -2), right, precision="highest")


def _stack(one: Symbols, other: Symbols, axis: int) -> Symbols:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), one, other)


def _negative(part: Array | None) -> Array | None:
    return None if part is None else -part
