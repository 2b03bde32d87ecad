r"""Activation patterns D_i = diag(1[X g_i ≥ 0]), always paired with their gates g_i."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, at_least_float32, value_object
from stochsolvers.convex import _inputs


@value_object
class Patterns:
    r"""Gates g_1, …, g_P and the patterns that they make of the data, mask[j, i] = 1[x_jᵀ g_i ≥ 0].

    Args:
      gates: shape (d, P), as a Flax kernel.
      mask: booleans of shape (n, P); (n, K, P) for data of K patches each.

    Raises:
      ValueError: at trace time, for shapes and dtypes that do not fit; where values are concrete, for gates
        that are not finite, or a mask that is false everywhere: then all functions of the program are zero.
    """

    gates: Array
    mask: Array

    def __post_init__(self):
        _checks.floating("gates of Patterns", self.gates)
        _checks.rank("gates of Patterns", self.gates, 2)
        _inputs.finite("gates of Patterns", self.gates)
        kind = getattr(self.mask, "dtype", type(self.mask).__name__)
        if str(kind) != "bool":
            _checks.fail("dtype of mask of Patterns", "bool", kind)
        num = jnp.shape(self.gates)[1]
        if num == 0 or jnp.ndim(self.mask) not in (2, 3) or jnp.shape(self.mask)[-1] != num:
            wanted = f"(n, {num}) or (n, K, {num}), one for each of at least one gate"
            _checks.fail("shape of mask of Patterns", wanted, jnp.shape(self.mask))
        values = _inputs.known(self.mask)
        if values is not None and not values.any():
            _checks.fail("mask of Patterns", "a pattern with active data", "false everywhere")
        object.__setattr__(self, "gates", jnp.asarray(self.gates))
        object.__setattr__(self, "mask", jnp.asarray(self.mask))

    @property
    def num(self) -> int:
        """P."""
        return self.gates.shape[-1]

    @property
    def num_data(self) -> int:
        """n."""
        return self.mask.shape[0]

    def __getitem__(self, indices: Any) -> "Patterns":
        """Some of the pairs: a slice, or an array of integers or booleans."""
        if isinstance(indices, int | np.integer):
            if not -self.num <= indices < self.num:
                raise IndexError(f"index {indices} of {self.num} patterns")  # which ends iteration
            indices = slice(indices, indices + 1 or None)
        return self.replaced(self.gates[:, indices], self.mask[..., indices])

    def apply(self, X: ArrayLike) -> "Patterns":
        """The same gates with the patterns that they make of other data."""
        return self.replaced(self.gates, mask_of(X, self.gates))

    def concatenate(self, other: "Patterns") -> "Patterns":
        """These pairs, then those of the other, of the same data."""
        if self.mask.shape[:-1] != other.mask.shape[:-1] or len(self.gates) != len(other.gates):
            shapes = other.gates.shape, other.mask.shape
            wanted = f"gates ({len(self.gates)}, P) and a mask ({self.mask.shape[:-1]}, P)"
            _checks.fail("shapes of the patterns to concatenate", wanted, shapes)
        gates = other.gates.astype(self.gates.dtype)
        return self.replaced(
            jnp.concatenate([self.gates, gates], axis=-1),
            jnp.concatenate([self.mask, other.mask], axis=-1),
        )

    def replaced(self, gates: Array, mask: Array) -> "Patterns":
        """Patterns of other arrays, any mask among them, such as that of a few data."""
        return jax.tree.unflatten(jax.tree.structure(self), (gates, mask))

    def unique(self) -> "Patterns":
        """The first pair of each pattern, in their order, without the pattern of no active data.

        Not for traced patterns: their number depends on the values.
        """
        mask = np.asarray(self.mask)
        columns = np.packbits(mask.reshape(-1, mask.shape[-1]), axis=0).T
        _, first = np.unique(columns, axis=0, return_index=True)
        first = np.sort(first)
        return self[first[np.any(mask, axis=tuple(range(mask.ndim - 1)))[first]]]


def mask_of(X: ArrayLike, gates: Array) -> Array:
    """1[X g ≥ 0], shape (n, P) or (n, K, P)."""
    if jnp.ndim(X) not in (2, 3) or jnp.shape(X)[-1] != gates.shape[0]:
        _checks.fail("shape of the data", f"(..., {gates.shape[0]})", jnp.shape(X))
    dtype = at_least_float32(jnp.result_type(X), gates.dtype)
    products = jnp.matmul(jnp.asarray(X, dtype), gates.astype(dtype), precision="highest")
    return products >= 0


def sample_patterns(
    key: Array,
    X: ArrayLike,
    num: int,
    *,
    kind: Literal["gaussian", "sparse", "convolutional"] = "gaussian",
    num_nonzero: int = 1,
    image_shape: tuple[int, ...] | None = None,
    kernel_size: int | tuple[int, ...] = 3,
) -> Patterns:
    r"""The patterns of random gates, each of them once.

    | kind | gates |
    |---|---|
    | "gaussian" | g ~ N(0, I) |
    | "sparse" | normal on `num_nonzero` features chosen at random, zero elsewhere |
    | "convolutional" | normal on a window of `kernel_size` at a random place of `image_shape`, all channels |

    Not for traced data: how many patterns differ depends on their values.

    Args:
      key: of the random numbers.
      X: data, shape (n, d); (n, K, d) for K patches each, with one gate for all patches of a datum.
      num: of gates that are drawn; at most so many patterns are returned, those that differ and are not
        false everywhere.
      kind: see the table.
      num_nonzero: of a sparse gate, 1..d.
      image_shape: of a datum, spatial axes and then channels, with product d.
      kernel_size: of a window, along each spatial axis.

    Raises:
      ValueError: for shapes, sizes and kinds that do not fit, data that are not finite, and draws without a
        pattern that has active data.
    """
    X = _inputs.data("data of sample_patterns", X)
    if _inputs.known(X) is None:
        _checks.fail("data of sample_patterns", "known numbers", "a traced array")
    _checks.random_key("key", key)
    num = _checks.count("num", num)
    _checks.member("kind", kind, ("gaussian", "sparse", "convolutional"))
    features = X.shape[-1]
    kept = _checks.count("num_nonzero", num_nonzero, maximum=features)
    normal_key, support_key = jax.random.split(key)
    gates = jax.random.normal(normal_key, (features, num), X.dtype)
    if kind == "sparse":
        ranks = jnp.argsort(jnp.argsort(jax.random.uniform(support_key, gates.shape), 0), 0)
        gates = jnp.where(ranks < kept, gates, 0)
    elif kind == "convolutional":
        gates = jnp.where(_windows(support_key, num, features, image_shape, kernel_size), gates, 0)
    return Patterns(gates, mask_of(X, gates)).unique()  # fails if no gate is active


def _windows(key, num, features, image_shape, kernel_size) -> Array:
    """Booleans (d, num), true on a random window of each image."""
    spatial_ndim = len(image_shape or ()) - 1
    if image_shape is None or spatial_ndim < 1 or np.prod(image_shape) != features:
        wanted = f"spatial axes and channels with product {features}"
        _checks.fail("image_shape", wanted, image_shape)
    sizes = _checks.counts("kernel_size", kernel_size, spatial_ndim)
    inside = jnp.ones((1,) * spatial_ndim + (1, num), bool)
    for axis, (length, size) in enumerate(zip(image_shape[:-1], sizes, strict=True)):
        _checks.count("kernel_size", size, maximum=length)
        start = jax.random.randint(jax.random.fold_in(key, axis), (1, num), 0, length - size + 1)
        place = jnp.arange(length)[:, None]
        along = (place >= start) & (place < start + size)
        shape = [1] * (spatial_ndim + 1) + [num]
        shape[axis] = length
        inside = inside & along.reshape(shape)
    return jnp.broadcast_to(inside, (*image_shape, num)).reshape(features, num)
