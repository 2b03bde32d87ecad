"""Products with A and A* that know their own round-off."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import lipschitz
from stochsolvers._shards import varying
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.linear_maps import Conv, Dense, LinearMap, Matrix, Transposed, size, written_out

_BLOCK = 32  # products that are added up before their sum goes on in twice the precision
_WRITTEN_OUT = 2**22  # entries of a matrix that is small enough to be written out


class Product(NamedTuple):
    """A sum of two floats, A x = total + rest, and an entrywise bound on its error.

    Attributes:
      total: the larger float.
      rest: the smaller one.
      error: |total + rest − A x| at most.
    """

    total: Array
    rest: Array
    error: Array


@value_object
class Products:
    """A linear map with bounds on the round-off of its products.

    For maps whose entries are known, the error of an entry of A x is at most ε (|A| |x|), ε that of a block
    of the sum. For others, which are too large to be written out, it is taken to be at most
    8 log2(n) u ‖A‖ ‖x‖ in the Euclidean norm, n entries of x, which holds for sums in trees and for FFTs.

    Attributes:
      linear_map: A.
      constant: an upper bound on ‖A‖².
      batch_ndim: number of leading axes.
    """

    linear_map: LinearMap
    constant: Array
    batch_ndim: int = static_field()

    @classmethod
    def of(cls, linear_map: LinearMap, batch_ndim: int) -> "Products":
        """A itself, or by its whole matrix if it is small enough and its entries are not known."""
        if not _has_blocks(linear_map) and size(linear_map) <= _WRITTEN_OUT:
            linear_map = written_out(linear_map)
        constant = lipschitz.lipschitz_constant(linear_map, grid="padded")
        return cls(linear_map, jnp.maximum(constant, 1e-30), batch_ndim)

    def forward(self, x: Array) -> Product:
        """A x."""
        return self._product(x, adjoint=False)

    def backward(self, z: Array) -> Product:
        """A* z."""
        return self._product(z, adjoint=True)

    def spread_error(self, error: Array) -> Array:
        """An entrywise bound on |A e| for |e| ≤ error."""
        absolute = self.linear_map.absolute() if _has_blocks(self.linear_map) else None
        if absolute is not None:
            return absolute(error)
        shape = (*error.shape[: self.batch_ndim], *self.linear_map.out_shape)
        return self._everywhere(jnp.sqrt(self.constant) * self._norm(error), shape)

    def norm_of_error(self, error: Array) -> Array:
        """A bound on ‖A e‖ for each example, |e| ≤ error."""
        return 1.01 * jnp.sqrt(self.constant) * self._norm(error)

    def norm_of_round_off(self, x: Array) -> Array:
        """A bound on the norm of the round-off of A x, by ‖ |A| ‖ ≤ ‖A‖_F; +∞ if that is not known."""
        if not _has_blocks(self.linear_map):
            return jnp.full(x.shape[: self.batch_ndim], jnp.inf, x.dtype)
        A, adjoint = self.linear_map, False
        if isinstance(A, Transposed):
            A, adjoint = A.base, True
        taps, _, block, _ = _blocks_of(A, adjoint)  # pyright: ignore[reportArgumentType]
        return _round_off(block * taps + 1, x) * _frobenius(A) * self._norm(x)

    def _product(self, operand: Array, *, adjoint: bool) -> Product:
        A = self.linear_map
        if not _has_blocks(A):
            total = A.adjoint(operand) if adjoint else A(operand)
            unit = float(jnp.finfo(operand.dtype).eps) / 2
            length = math.prod(A.out_shape if adjoint else A.in_shape)
            error = 8 * math.log2(2 * length) * unit * jnp.sqrt(self.constant) * self._norm(operand)
            return Product(total, jnp.zeros_like(total), self._everywhere(error, total.shape))
        (total, rest), error = in_blocks(A, operand, adjoint=adjoint)
        absolute: Any = A.absolute()  # known for all maps with blocks
        sizes = (absolute.adjoint if adjoint else absolute)(jnp.abs(operand))
        return Product(total, rest, error * sizes)

    def _norm(self, array: Array) -> Array:
        return jnp.sqrt(jnp.sum(array**2, axis=tuple(range(self.batch_ndim, array.ndim))))

    def _everywhere(self, values: Array, shape: tuple[int, ...]) -> Array:
        axes = tuple(range(self.batch_ndim, len(shape)))
        return jnp.broadcast_to(jnp.expand_dims(values, axes), shape)


def _has_blocks(A: LinearMap) -> bool:
    base = A.base if isinstance(A, Transposed) else A
    return isinstance(base, Dense | Conv | Matrix)


def _blocks_of(A: Dense | Conv | Matrix, adjoint: bool) -> tuple[int, int, int, int]:
    """Taps of a feature, features summed over in a group, features in a block, groups."""
    kernel, groups = A.kernel, getattr(A, "feature_group_count", 1)
    count = kernel.shape[-1] // groups if adjoint else kernel.shape[-2]
    taps = kernel[..., 0, 0].size
    return taps, count, min(count, max(1, _BLOCK // max(taps, 1))), groups


def in_blocks(
    A: LinearMap, operand: Array, *, adjoint: bool = False
) -> tuple[tuple[Array, Array], float]:
    r"""A x or A* z as the sum of two floats, and ε with |error| ≤ ε |A| |x|: that of a block of the sum.

    Blocks are of some features, within each group of a convolution.
    """
    if isinstance(A, Transposed):
        return in_blocks(A.base, operand, adjoint=not adjoint)
    if isinstance(A, Matrix):
        before, after = (A.out_shape, A.in_shape) if adjoint else (A.in_shape, A.out_shape)
        batch = operand.shape[: operand.ndim - len(before)]
        pair, error = in_blocks(Dense(A.kernel), operand.reshape(*batch, -1), adjoint=adjoint)
        total, rest = (part.reshape(*batch, *after) for part in pair)
        return (total, rest), error
    assert isinstance(A, Dense | Conv)
    taps, count, block, groups = _blocks_of(A, adjoint)
    number, error = -(-count // block), _round_off(block * taps + 1, operand)

    def product(part: tuple[Array, Array]) -> Array:
        piece = dataclasses.replace(A, kernel=part[0])
        return piece.adjoint(part[1]) if adjoint else piece(part[1])

    def add(pair, part):
        total, low = two_sum(pair[0], product(part))
        return (total, pair[1] + low), None

    if number == 1:
        total = product((A.kernel, operand))
        return (total, jnp.zeros_like(total)), error
    cut = _Cut(count, block, number)
    kernel_axis, kernel_groups = (-1, groups) if adjoint else (-2, 1)
    parts = cut(A.kernel, kernel_axis, kernel_groups), cut(operand, -1, groups)
    total = product(jax.tree.map(lambda leaf: leaf[0], parts))
    others = jax.tree.map(lambda leaf: leaf[1:], parts)
    pair, _ = lax.scan(add, varying((total, jnp.zeros_like(total)), total), others)
    return pair, error


class _Cut(NamedTuple):
    """Cuts the features of every group into `number` blocks, padded with zeros."""

    features: int
    block: int
    number: int

    def __call__(self, array: Array, axis: int, groups: int) -> Array:
        axis %= array.ndim
        before, after = array.shape[:axis], array.shape[axis + 1 :]
        array = array.reshape(*before, groups, self.features, *after)
        missing = [(0, 0)] * array.ndim
        missing[axis + 1] = (0, self.number * self.block - self.features)
        array = jnp.pad(array, missing)
        array = array.reshape(*before, groups, self.number, self.block, *after)
        array = jnp.moveaxis(array, axis + 1, 0)
        return array.reshape(self.number, *before, groups * self.block, *after)


def _frobenius(A: Any) -> Array:
    """At least ‖A‖_F: every output pixel of a convolution sees each tap once at most."""
    pixels = math.prod(A.out_shape[:-1]) if isinstance(A, Conv) else 1
    return jnp.sqrt(pixels * jnp.sum(A.kernel**2))


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum of two floats, and what the rounding took away (Knuth)."""
    total = a + b
    moved = total - a
    return total, (a - (total - moved)) + (b - moved)


def _round_off(count: int, like: Array) -> float:
    """ε with |error| ≤ ε Σ|t| for a sum of `count` products t in any order: n u (Higham 2002, eq. 3.5)."""
    return (2.1 + 0.525 * count) * float(jnp.finfo(like.dtype).eps)


def tree_round_off(shape: tuple[int, ...], like: Array) -> float:
    """The same for a sum over an array of that shape, in the trees that XLA's reductions are."""
    return (8.0 + 4.0 * math.log2(max(math.prod(shape), 1))) * float(jnp.finfo(like.dtype).eps)
