"""Products with A and A* that know their own round-off."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import lipschitz
from stochsolvers._shards import varying
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.linear_maps import Conv, Dense, LinearMap, Matrix, Transposed, size, written_out

_BLOCK = 32  # products that are added up before their sum goes on in twice the precision
_COPIED = 2**22  # entries of a kernel of which a copy may be made
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
    def of(
        cls, linear_map: LinearMap, batch_ndim: int, squared_norm: Array | None = None
    ) -> "Products":
        """A itself, or by its whole matrix if it is small enough and its entries are not known."""
        if not _has_blocks(linear_map) and size(linear_map) <= _WRITTEN_OUT:
            linear_map = written_out(linear_map)
        known = squared_norm
        if known is None:
            known = lipschitz.lipschitz_constant(linear_map, grid="padded")
        return cls(linear_map, jnp.maximum(known, 1e-30), batch_ndim)

    def forward(self, x: Array) -> Product:
        """A x."""
        return self._product(x, adjoint=False)

    def backward(self, z: Array) -> Product:
        """A* z."""
        return self._product(z, adjoint=True)

    def spread_error(self, error: Array) -> Array:
        """An entrywise bound on |A e| for |e| ≤ error."""
        if _has_blocks(self.linear_map):
            return absolute_product(self.linear_map, error)
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
        sizes = absolute_product(A, jnp.abs(operand), adjoint=adjoint)
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

    Blocks are of some features, within each group of a convolution; the kernel is not copied.
    """
    base, adjoint, operand, restore = _on_base(A, operand, adjoint)
    taps, _, block, _ = _blocks_of(base, adjoint)

    def add(pair, product):
        total, low = two_sum(pair[0], product)
        return total, pair[1] + low

    def begin(product):
        return product, jnp.zeros_like(product)

    pair = _over_blocks(base, operand, adjoint, block, begin, add)
    return jax.tree.map(restore, pair), _round_off(block * taps + 1, operand)


def absolute_product(A: LinearMap, operand: Array, *, adjoint: bool = False) -> Array:
    """|A| x or |A|* z for x, z ≥ 0; of a large kernel, |A| is not formed."""
    base, adjoint, operand, restore = _on_base(A, operand, adjoint)
    count = _blocks_of(base, adjoint)[1]
    block = max(1, min(count, count * _COPIED // base.kernel.size))
    return restore(
        _over_blocks(base, operand, adjoint, block, lambda p: p, jnp.add, kernel_function=jnp.abs)
    )


def _over_blocks(
    A: Dense | Conv,
    operand: Array,
    adjoint: bool,
    block: int,
    begin: Callable[[Array], Any],
    add: Callable[[Any, Array], Any],
    *,
    kernel_function: Callable[[Array], Array] = lambda kernel: kernel,
) -> Any:
    """The products over blocks of features, added up one after the other."""
    _, count, _, groups = _blocks_of(A, adjoint)
    features = -1 if adjoint else -2  # of the kernel
    kernel = _in_groups(A.kernel, features, groups if adjoint else 1)
    operand = _in_groups(operand, -1, groups)

    def product(start, size):
        part = _slice(kernel, features, start, size)
        piece = dataclasses.replace(A, kernel=kernel_function(part))
        given = _slice(operand, -1, start, size)
        return piece.adjoint(given) if adjoint else piece(given)

    number, rest = divmod(count, block)
    total = product(0, block)
    sums = varying(begin(total), total)
    if number > 1:
        starts = block * jnp.arange(1, number)
        sums, _ = lax.scan(lambda sums, k: (add(sums, product(k, block)), None), sums, starts)
    return add(sums, product(number * block, rest)) if rest else sums


def _in_groups(array: Array, axis: int, groups: int) -> Array:
    """The axis, counted from the end, cut into (groups, features)."""
    place = array.ndim + axis
    features = array.shape[place] // groups
    return array.reshape(*array.shape[:place], groups, features, *array.shape[place + 1 :])


def _slice(array: Array, axis: int, start: Any, size: int) -> Array:
    """Some features of every group, and the two axes as one again."""
    place = array.ndim + axis
    part = lax.dynamic_slice_in_dim(array, start, size, place)
    merged = part.shape[place - 1] * part.shape[place]
    return part.reshape(*part.shape[: place - 1], merged, *part.shape[place + 1 :])


def _on_base(A: Any, operand: Array, adjoint: bool) -> tuple[Any, bool, Array, Any]:
    """The map with a kernel that a product is of, the direction, the operand and what restores the shape."""
    if isinstance(A, Transposed):
        return _on_base(A.base, operand, not adjoint)
    if not isinstance(A, Matrix):
        return A, adjoint, operand, lambda array: array
    before, after = (A.out_shape, A.in_shape) if adjoint else (A.in_shape, A.out_shape)
    batch = operand.shape[: operand.ndim - len(before)]
    flat = operand.reshape(*batch, math.prod(before))
    return Dense(A.kernel), adjoint, flat, lambda array: array.reshape(*batch, *after)


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
