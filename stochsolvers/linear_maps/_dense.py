"""The dense map of a layer."""

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.linear_maps._base import LinearMap, with_kernel_scaled


@value_object
class Dense(LinearMap):
    r"""A(x) = Wᵀx for a kernel W, row-wise: `x @ kernel`.

    Args:
      kernel: shape (n1, n2), as `flax` stores it. The paper's A is its transpose.

    Raises:
      ValueError: at trace time, if the kernel is not a floating-point matrix.

    Example:
      >>> A = ss.Dense(jnp.array([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
      >>> A(jnp.array([1.0, 2.0, 3.0])).tolist()
      [3.0, 2.0]
      >>> A.adjoint(jnp.array([1.0, 1.0])).tolist()
      [3.0, 1.0, 0.0]
    """

    kernel: Array

    def __post_init__(self):
        _checks.floating("kernel of Dense", self.kernel)
        _checks.rank("kernel of Dense", self.kernel, 2)
        object.__setattr__(self, "kernel", jnp.asarray(self.kernel))

    @property
    def in_features(self) -> int:
        """n1."""
        return self.kernel.shape[0]

    @property
    def out_features(self) -> int:
        """n2."""
        return self.kernel.shape[1]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape (n1,) of one input, without batch axes."""
        return (self.in_features,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape (n2,) of one output, without batch axes."""
        return (self.out_features,)

    def __call__(self, x: Array) -> Array:
        """A(x), shape (..., n1) to (..., n2)."""
        _checks.trailing("argument of Dense", x, self.in_shape)
        return x @ self.kernel

    def adjoint(self, z: Array) -> Array:
        """A*(z), shape (..., n2) to (..., n1)."""
        _checks.trailing("argument of Dense.adjoint", z, self.out_shape)
        return z @ self.kernel.T

    def restrict(self, indices: Array) -> "Dense":
        """A on a subset S of input features, x_S ↦ Σ_{i∈S} A_i x_i.

        Args:
          indices: integer array (τ,), may be traced.
        """
        return Dense(self.kernel[indices])

    def restrict_outputs(self, indices: Array) -> "Dense":
        """x ↦ A(x)_S for a subset S of output features.

        Args:
          indices: integer array (τ,), may be traced.
        """
        return Dense(self.kernel[:, indices])

    def scaled(self, factor: Scalar) -> "Dense":
        """The map with the kernel c W."""
        return with_kernel_scaled(self, factor)

    def absolute(self) -> "Dense":
        """|A|."""
        return Dense(jnp.abs(self.kernel))
