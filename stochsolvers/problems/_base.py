"""What a solver needs of a problem, and problems that are equations z = h(z)."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._shards import spec_of
from stochsolvers._typing import Array, value_object
from stochsolvers.prox import Prior, Zero


class Problem(abc.ABC):
    """minimise_z F(z) + g(z) for each example of a batch, as solvers see it; or an equation of that form.

    `LayerProblem` and every `FixedPointProblem` are one.
    """

    @property
    @abc.abstractmethod
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of z: one problem for each of their entries."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the variable z, the batch axes first."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of the variable z."""

    @property
    @abc.abstractmethod
    def proximal_term(self) -> Prior:
        """g, whose proximal operator every iteration applies."""

    @abc.abstractmethod
    def gradient(self, z: Array) -> Array:
        """∇F(z), shaped as z."""

    @abc.abstractmethod
    def gradient_at_zero(self) -> Array:
        """∇F(0)."""

    @abc.abstractmethod
    def objective(self, z: Array) -> Array:
        """What is minimised, for each example, shape (*batch,)."""

    @abc.abstractmethod
    def certificate(self, z: Array) -> Array:
        """A bound on objective(z) − min objective for each example, shape (*batch,)."""

    @abc.abstractmethod
    def certifier(self) -> Any:
        """z ↦ certificate(z), with what does not depend on z computed once.

        It has two attributes: `smoothness`, a Lipschitz constant of ∇F, and `interval`, the least number
        of iterations between two certificates of a solve.
        """

    @abc.abstractmethod
    def smoothness(self, constant: Array, /) -> Array:
        """L_F, a Lipschitz constant of ∇F, given the constant that `InverseLipschitz` keeps of a problem."""

    @abc.abstractmethod
    def largest_entries(self) -> Array:
        """About the largest number that each example is made of, shape (*batch,).

        Norms are taken in units of it, so that no square overflows.
        """

    @abc.abstractmethod
    def value_spec(self) -> tuple[Any, ...]:
        """The axes of an explicit mesh over which each axis of z is split."""

    def per_example(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """`function` of unbatched variables, mapped over the batch axes."""
        for _ in self.batch_shape:
            function = jax.vmap(function)
        return function

    def sum(self, array: Array) -> Array:
        """Sum of an array with the batch axes first over everything but these."""
        return jnp.sum(array, axis=tuple(range(len(self.batch_shape), array.ndim)))

    def norm(self, array: Array, unit: Array | None = None) -> Array:
        """Euclidean norm of an array with the batch axes first, for each example.

        Args:
          array: shape (*batch, ...).
          unit: of the largest entries, shape (*batch,), so that no square overflows; 1 by default. Squares
            of far smaller entries would vanish in it: they are taken as they are.
        """
        plain = jnp.sqrt(self.sum(array**2))
        if unit is None:
            return plain
        inverse = jnp.expand_dims(1 / unit, range(unit.ndim, array.ndim))
        scaled = unit * jnp.sqrt(self.sum((array * inverse) ** 2))
        return jnp.where(scaled < 1e15, plain, scaled)

    def _variable(self, z: Array) -> Array:
        _checks.real_array("the variable z", z)
        if jnp.shape(z) != self.shape:
            _checks.fail("shape of the variable z", f"{self.shape}", jnp.shape(z))
        return jnp.asarray(z, self.dtype)


class FixedPointProblem(Problem):
    r"""The equation z = h(z) for each example of a batch, to be solved by the library's solvers.

    Where h is the gradient of a convex function whose gradient is 1-Lipschitz, its fixed points are the
    minimisers of a convex G with ∇G(z) = z − h(z), and the gradient step of size 1 is

        z − (z − h(z)) = h(z).

    Solvers take it for every h: `gradient` is z − h(z), the Lipschitz constant 1, and the prior zero.
    Solvers that sample the inputs of a layer refuse it.

    A problem of your own is a subclass under `stochsolvers.value_object` with the properties `batch_shape`,
    `shape` and `dtype` of z and the method `layer`; `objective` and `certificate` where they exist.
    Everything that derivatives should reach is a field, and examples do not depend on each other.
    For instance z = tanh(W z + c):

        @ss.value_object
        class TanhProblem(ss.FixedPointProblem):
            weights: jax.Array
            drive: jax.Array

            batch_shape = property(lambda self: self.drive.shape[:-1])
            shape = property(lambda self: self.drive.shape)
            dtype = property(lambda self: self.drive.dtype)

            def layer(self, z):
                return jnp.tanh(z @ self.weights.T + self.drive)

    Set `symmetric = True` where the Jacobian h′ is symmetric everywhere with 0 ⪯ h′ ⪯ I: its implicit
    derivatives are then solved by conjugate gradients.
    """

    symmetric: ClassVar[bool] = False
    """Whether h′(z) is symmetric with eigenvalues in [0, 1], for every z."""

    @abc.abstractmethod
    def layer(self, z: Array) -> Array:
        """h(z), shaped as z."""

    @property
    def has_objective(self) -> bool:
        """Whether it defines an objective and its certificate."""
        return type(self).certificate is not FixedPointProblem.certificate

    def objective(self, z: Array) -> Array:
        """G(z) for each example, shape (*batch,), where there is one.

        Raises:
          ValueError: at trace time, where there is none.
        """
        _checks.fail(f"objective of {type(self).__name__}", "a problem that has one", None)

    def certificate(self, z: Array) -> Array:
        """A bound on G(z) − min G for each example, shape (*batch,), inf where none is known.

        Raises:
          ValueError: at trace time, where the problem defines none.
        """
        _checks.fail(f"certificate of {type(self).__name__}", "a problem that has one", None)

    def gradient(self, z: Array) -> Array:
        """z − h(z)."""
        z = self._variable(z)
        return z - self.next_point(z)

    def next_point(self, z: Array) -> Array:
        """h(z) in the dtype of z.

        Raises:
          ValueError: at trace time, if `layer` returns another shape.
        """
        value = self.layer(z)
        if jnp.shape(value) != self.shape:
            what = f"shape of what {type(self).__name__}.layer returns"
            _checks.fail(what, f"{self.shape}", jnp.shape(value))
        return jnp.asarray(value, self.dtype)

    def gradient_at_zero(self) -> Array:
        """−h(0)."""
        return -self.next_point(jnp.zeros(self.shape, self.dtype))

    @property
    def proximal_term(self) -> Zero:
        """Zero: h is all of the step."""
        return Zero()

    def smoothness(self, constant: Array, /) -> Array:
        """The constant, which is 1."""
        return constant

    def certifier(self) -> "FixedPointCertifier":
        """The certificate, which is not differentiated."""
        return FixedPointCertifier(self)

    def largest_entries(self) -> Array:
        """Zeros: squares do not overflow."""
        return jnp.zeros(self.batch_shape, self.dtype)

    def value_spec(self) -> tuple[Any, ...]:
        """As h(0) is split."""
        return spec_of(jax.eval_shape(lambda problem: problem.gradient_at_zero(), self))


@value_object
class FixedPointCertifier:
    """z ↦ certificate(z) of a problem z = h(z)."""

    problem: FixedPointProblem
    interval: ClassVar[int] = 1

    @property
    def smoothness(self) -> Array:
        """1."""
        return jnp.ones((), self.problem.dtype)

    def __call__(self, z: Array) -> Array:
        """The certificate of z, shape (*batch,)."""
        return jax.lax.stop_gradient(self.problem.certificate(z))
