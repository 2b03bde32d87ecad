"""The base class of linear maps, and what holds for all of them."""

import abc
import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stochsolvers import _checks
from stochsolvers._shards import automatic, batch_spec, is_explicit
from stochsolvers._typing import Array, Scalar, static_field, value_object

_Map = TypeVar("_Map", bound="LinearMap")


class LinearMap(abc.ABC):
    r"""A linear map A from activations of shape `in_shape` to activations of shape `out_shape`.

    Leading axes of an argument are batch axes. The last axis is that of the features: n1 of them go in,
    n2 come out; axes between are spatial. For every x and z

        <A(x), z> = <x, A.adjoint(z)>.

    A map of your own is a subclass under `stochsolvers.value_object` with attributes `in_shape` and
    `out_shape` (fields or properties) and a method `__call__` that takes (*batch, *in_shape) to
    (*batch, *out_shape) and is linear for JAX (`jax.linear_transpose` accepts it). All else has a
    default, which a map that knows better overrides:

    | method | default | override it |
    |---|---|---|
    | `adjoint` | the transpose that JAX derives | for speed |
    | `restrict`, `restrict_outputs` | the whole map, zeros elsewhere | if columns, rows can be gathered |
    | `squared_norm_bound` | None | if an upper bound on ‖A‖² is known: the steps then use it |
    | `scaled` | A, and a product by c | if c can be taken into its arrays |

    Certificates write a matrix of up to four million entries out. For a larger one they take the round-off
    of a product to be 8 log2(n) u ‖A‖ ‖x‖, as of sums in trees and of FFTs, and are looser by √n.

    Its arrays are fields of the value object, so that derivatives reach them.
    """

    in_shape: Any  # tuple[int, ...], as a field or as a property
    out_shape: Any

    def __post_init__(self) -> None:
        for name in ("in_shape", "out_shape"):
            shape = getattr(self, name, None)
            if not isinstance(shape, tuple) or not all(
                isinstance(n, int | np.integer) for n in shape
            ):
                wanted = "a tuple of integers, as a property or a static_field()"
                _checks.fail(f"{name} of {type(self).__name__}", wanted, repr(shape))

    @abc.abstractmethod
    def __call__(self, x: Array) -> Array:
        """A(x), shape (*batch, *in_shape) to (*batch, *out_shape)."""

    def adjoint(self, z: Array) -> Array:
        """A*(z), shape (*batch, *out_shape) to (*batch, *in_shape)."""
        _checks.trailing(f"argument of {type(self).__name__}.adjoint", z, self.out_shape)
        z = jnp.asarray(z)
        batch = z.shape[: z.ndim - len(self.out_shape)]
        spec = batch_spec(z, len(batch)) if is_explicit() else None
        return automatic(_transposed, spec, self, z)

    @property
    def T(self) -> "LinearMap":  # noqa: N802 - as in numpy
        """The adjoint as a map; of a convolution, the transposed convolution."""
        return Transposed(self)

    def restrict(self, indices: Array) -> "LinearMap":
        """A on a subset S of input features, x_S ↦ Σ_{i∈S} A_i x_i.

        Args:
          indices: integer array (τ,), may be traced.
        """
        return _Restricted(self, indices)

    def restrict_outputs(self, indices: Array) -> "LinearMap":
        """A followed by the choice of a subset of output features, x ↦ A(x)_S.

        Args:
          indices: integer array (τ,), may be traced.
        """
        return _Restricted(Transposed(self), indices).T

    def absolute(self) -> "LinearMap | None":
        """The map |A| whose matrix has the absolute values of A's entries, or None if they are not known."""
        return None

    def squared_norm_bound(self) -> Array | None:
        """An upper bound on ‖A‖² = λ_max(A A*), or None if none is known."""
        return None

    def scaled(self, factor: Scalar) -> "LinearMap":
        """The map c A, also written c * A and A / (1/c); of a map with a kernel, one with the kernel c W."""
        return _Scaled(self, jnp.asarray(factor, self.dtype))

    def __mul__(self, factor: Scalar) -> "LinearMap":
        if not _is_number(factor):
            return NotImplemented
        return self.scaled(factor)

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy's numbers leave the product to the map

    def __truediv__(self, divisor: Scalar) -> "LinearMap":
        if not _is_number(divisor):
            return NotImplemented
        return self.scaled(1 / jnp.asarray(divisor, self.dtype))

    @property
    def in_features(self) -> int:
        """n1."""
        return self.in_shape[-1]

    @property
    def out_features(self) -> int:
        """n2."""
        return self.out_shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        """The widest real floating-point dtype among the map's arrays; float32 if it has none."""
        kinds = [jnp.finfo(leaf.dtype).dtype for leaf in jax.tree.leaves(self) if _is_inexact(leaf)]
        return jnp.result_type(*kinds) if kinds else jnp.dtype(jnp.float32)

    def astype(self: _Map, dtype: DTypeLike) -> _Map:
        """The map with its floating-point arrays in another real dtype; integers stay."""

        def cast(leaf):
            if not _is_inexact(leaf):
                return leaf
            is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
            return leaf.astype(jnp.result_type(dtype, jnp.complex64) if is_complex else dtype)

        return jax.tree.map(cast, self)


def _transposed(A: LinearMap, z: Array) -> Array:
    batch = z.shape[: z.ndim - len(A.out_shape)]
    dtype = jnp.promote_types(z.dtype, A.dtype)
    x = jax.ShapeDtypeStruct((*batch, *A.in_shape), dtype)
    z = z.astype(jax.eval_shape(A.__call__, x).dtype)
    return jax.linear_transpose(A.__call__, x)(z)[0]


def with_kernel_scaled(linear_map: Any, factor: Scalar) -> Any:
    """The map with the kernel c W."""
    kernel = linear_map.kernel
    return dataclasses.replace(linear_map, kernel=jnp.asarray(factor, kernel.dtype) * kernel)


def _is_number(factor: Any) -> bool:
    return _checks.is_real(factor) and not (jnp.shape(factor) or jnp.iscomplexobj(factor))


def _is_inexact(leaf: object) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)  # pyright: ignore


@value_object
class Transposed(LinearMap):
    """A* as a map, z ↦ A.adjoint(z): the transposed convolution of a `Conv`.

    Args:
      base: A.
    """

    base: LinearMap

    def __post_init__(self):
        check_map("base of Transposed", self.base)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of A's outputs."""
        return self.base.out_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of A's inputs."""
        return self.base.in_shape

    def __call__(self, x: Array) -> Array:
        """A*(x)."""
        return self.base.adjoint(x)

    def adjoint(self, z: Array) -> Array:
        """A(z)."""
        return self.base(z)

    @property
    def T(self) -> LinearMap:  # noqa: N802
        """A itself."""
        return self.base

    def restrict(self, indices: Array) -> LinearMap:
        """A* on a subset of A's output features."""
        return self.base.restrict_outputs(indices).T

    def restrict_outputs(self, indices: Array) -> LinearMap:
        """A* followed by the choice of a subset of A's input features."""
        return self.base.restrict(indices).T

    def absolute(self) -> LinearMap | None:
        """|A|*."""
        absolute = self.base.absolute()
        return None if absolute is None else absolute.T

    def squared_norm_bound(self) -> Array | None:
        """That of A."""
        return self.base.squared_norm_bound()

    def scaled(self, factor: Scalar) -> LinearMap:
        """(c A)*."""
        return self.base.scaled(factor).T


@value_object
class _Scaled(LinearMap):
    """c A, of a map that has no kernel."""

    base: LinearMap
    factor: Array

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.base.in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.base.out_shape

    def __call__(self, x: Array) -> Array:
        return self.factor * self.base(x)

    def adjoint(self, z: Array) -> Array:
        return self.factor * self.base.adjoint(z)

    def restrict(self, indices: Array) -> LinearMap:
        return self.base.restrict(indices).scaled(self.factor)

    def restrict_outputs(self, indices: Array) -> LinearMap:
        return self.base.restrict_outputs(indices).scaled(self.factor)

    def absolute(self) -> LinearMap | None:
        absolute = self.base.absolute()
        return None if absolute is None else absolute.scaled(jnp.abs(self.factor))

    def squared_norm_bound(self) -> Array | None:
        bound = self.base.squared_norm_bound()
        return None if bound is None else self.factor**2 * bound

    def scaled(self, factor: Scalar) -> LinearMap:
        return _Scaled(self.base, self.factor * jnp.asarray(factor, self.factor.dtype))


@value_object
class _Restricted(LinearMap):
    """x_S ↦ A(x with zeros outside S)."""

    base: LinearMap
    indices: Array

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (*self.base.in_shape[:-1], self.indices.shape[0])

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.base.out_shape

    def __call__(self, x: Array) -> Array:
        whole = jnp.zeros((*x.shape[:-1], self.base.in_features), x.dtype)
        return self.base(whole.at[..., self.indices].set(x))

    def adjoint(self, z: Array) -> Array:
        return self.base.adjoint(z)[..., self.indices]


@value_object
class Matrix(LinearMap):
    """A map given by its whole matrix: x ↦ vec(x) M, reshaped.

    Args:
      kernel: M, shape (inputs, outputs) with the axes of an activation flattened.
      in_shape: of one input; its product is the number of rows.
      out_shape: of one output; its product is the number of columns.

    Raises:
      ValueError: at trace time, if the kernel is not a floating-point matrix of that shape.
    """

    kernel: Array
    in_shape: tuple[int, ...] = static_field()
    out_shape: tuple[int, ...] = static_field()

    def __post_init__(self):
        _checks.floating("kernel of Matrix", self.kernel)
        for name in ("in_shape", "out_shape"):
            object.__setattr__(self, name, _checks.shape(f"{name} of Matrix", getattr(self, name)))
        size = math.prod(self.in_shape), math.prod(self.out_shape)
        if jnp.shape(self.kernel) != size:
            _checks.fail("shape of kernel of Matrix", size, jnp.shape(self.kernel))
        object.__setattr__(self, "kernel", jnp.asarray(self.kernel))

    def __call__(self, x: Array) -> Array:
        """A(x)."""
        _checks.trailing("argument of Matrix", x, self.in_shape)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        return (x.reshape(*batch, self.kernel.shape[0]) @ self.kernel).reshape(
            *batch, *self.out_shape
        )

    def adjoint(self, z: Array) -> Array:
        """A*(z)."""
        _checks.trailing("argument of Matrix.adjoint", z, self.out_shape)
        batch = z.shape[: z.ndim - len(self.out_shape)]
        return (z.reshape(*batch, self.kernel.shape[1]) @ self.kernel.T).reshape(
            *batch, *self.in_shape
        )

    def scaled(self, factor: Scalar) -> "Matrix":
        """The map with the kernel c W."""
        return with_kernel_scaled(self, factor)

    def absolute(self) -> "Matrix":
        """|A|."""
        return Matrix(jnp.abs(self.kernel), self.in_shape, self.out_shape)


def check_map(what: str, value: Any) -> None:
    """Require a linear map."""
    _checks.instance(what, value, LinearMap, "a LinearMap such as Dense(W) or Conv(W, shape)")


def size(linear_map: LinearMap) -> int:
    """The number of entries of the map's matrix."""
    check_map("linear_map of size", linear_map)
    return math.prod(linear_map.in_shape) * math.prod(linear_map.out_shape)


def written_out(linear_map: LinearMap) -> Matrix:
    """The map by its whole matrix, from its products with the unit vectors."""
    check_map("linear_map of written_out", linear_map)
    inputs = math.prod(linear_map.in_shape)
    units = jnp.eye(inputs, dtype=linear_map.dtype).reshape(inputs, *linear_map.in_shape)
    with jax.default_matmul_precision("highest"):
        matrix = linear_map(units).reshape(inputs, -1)
    return Matrix(matrix, linear_map.in_shape, linear_map.out_shape)
