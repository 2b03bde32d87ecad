r"""Certified distances of a point from its equilibrium, and gaps of the objective.

T with ||T(z) − T(y)|| ≤ κ ||z − y||, κ < 1, has one fixed point z*, and

    ||z − z*|| ≤ ||z − T(z)|| / (1 − κ),

for ||z − z*|| ≤ ||z − T(z)|| + ||T(z) − T(z*)||. An equilibrium layer has κ = ω², a composition the product.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers._shards import automatic, is_explicit
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.equilibrium import _round_off


@value_object
class EquilibriumCertifier:
    """z ↦ certificate(z) of an equilibrium problem, and z ↦ distance(z), with its norms computed once.

    Attributes:
      problem: a constant to derivatives.
      constants: what its certificates share: products that know their round-off, norms.
    """

    problem: Any
    constants: Any
    interval: ClassVar[int] = 1

    @property
    def smoothness(self) -> Array:
        """1."""
        return jnp.ones((), self.problem.dtype)

    def __call__(self, z: Array) -> Array:
        """The certificate of z, shape (*batch,)."""
        return self._of(_gap, z)

    def distance(self, z: Array) -> Array:
        """The certified distance of z from the equilibrium, shape (*batch,)."""
        return self._of(_distance, z)

    def _of(self, function: Callable[..., Array], z: Array) -> Array:
        z = lax.stop_gradient(self.problem._variable(z))
        spec = None
        if is_explicit():
            axes = self.problem.value_spec()[: len(self.problem.batch_shape)]
            spec = jax.sharding.PartitionSpec(*axes)
        return automatic(function, spec, self.problem, self.constants, z)


@jax.jit
def _distance(problem: Any, constants: Any, z: Array) -> Array:
    return over_slack(problem, constants, _step(problem, constants, z))


@jax.jit
def _gap(problem: Any, constants: Any, z: Array) -> Array:
    return problem._gap(constants, _step(problem, constants, z))


def _step(problem: Any, constants: Any, z: Array) -> Array:
    """A bound on ||z − T(z)||, round-off included."""
    with jax.default_matmul_precision("highest"):
        evaluation = problem._evaluate(constants, z)
    return _round_off.distance(z, evaluation, len(problem.batch_shape))


def over_slack(problem: Any, constants: Any, step: Array) -> Array:
    """step / (1 − κ), +∞ where κ is not below 1."""
    return over(step, 1 - problem._contraction(constants) * (1 + 16 * jnp.finfo(step.dtype).eps))


def over(bound: Array, slack: Array) -> Array:
    """bound / slack, +∞ where the slack is not positive."""
    few = 1 + 16 * float(jnp.finfo(bound.dtype).eps)
    quotient = few * bound / jnp.where(slack > 0, slack, 1)
    return jnp.where(slack > 0, quotient, jnp.inf)


def constants_of(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)`, constants of kernels that are not split over a mesh."""
    return automatic(function, jax.sharding.PartitionSpec(), *lax.stop_gradient(operands))


def as_known(squared_norm: Scalar | None, dtype: Any) -> Array | None:
    """A known ||W||² in the problem's dtype."""
    return None if squared_norm is None else jnp.asarray(squared_norm, dtype)
