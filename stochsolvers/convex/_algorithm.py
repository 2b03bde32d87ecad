"""What the solvers of gated programs share: their options, what they return, and the stopping test."""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.convex import _inputs, _terms
from stochsolvers.convex._terms import Dual

STALLED = 500
"""After so many iterations without a smaller gap of any program, at least, a solver ends."""

MANY_PRODUCTS = 2**25
"""n P d, from which on programs take fewer iterations by longer programs."""

Progress = Callable[[Any, Any, Any], Any]
"""Called with the iteration, the objective and the gap of each program, as arrays."""


class Iterate(NamedTuple):
    """A point of every program, and how far it is known to be from optimal.

    Attributes:
      value: V, shaped as the variable.
      prediction: A* V, shaped as the targets.
      objective: P(V), shape (*batch,).
      dual: the best dual point so far.
      done: whether P(V) − D ≤ tol P(V), shape (*batch,).
      iterations: that each program took, shape (*batch,).
      moved: the length of its last step, shape (*batch,).
    """

    value: Array
    prediction: Array
    objective: Array
    dual: Dual
    done: Array
    iterations: Array
    moved: Array


@value_object
class Algorithm(abc.ABC):
    """A solver of convex programs with its options, as a value.

    Args:
      max_iters: the most iterations, traced.
    """

    max_iters: Scalar = 10_000

    def __post_init__(self):
        _inputs.iterations("max_iters", self.max_iters)

    @abc.abstractmethod
    def check(self, problem: Any) -> None:
        """Refuse programs that the algorithm is not for; called at trace time."""

    @abc.abstractmethod
    def minimise(
        self, problem: Any, init: Array | None, tol: Array, progress: Progress | None
    ) -> Any:
        """Iterate from V_0 until the gap is at most tol times the objective."""


def start(problem: Any, init: Array | None) -> Iterate:
    """V_0, zero by default, with its objective."""
    none = jnp.zeros(problem.batch_shape, problem.dtype)
    if init is None:
        V, u, penalty = (
            jnp.zeros(problem.shape, problem.dtype),
            jnp.zeros_like(problem.inputs),
            none,
        )
    else:
        V, u = init, problem.linear_map.adjoint(init)
        penalty = _terms.regularizer(problem, V)
    return Iterate(
        value=V,
        prediction=u,
        objective=objective_of(problem, u, penalty),
        dual=Dual(none - jnp.inf, jnp.zeros_like(u)),
        done=jnp.zeros(problem.batch_shape, bool),
        iterations=jnp.zeros(problem.batch_shape, int),
        moved=none,
    )


def is_large(problem: Any) -> bool:
    """Whether n P d is such that fewer iterations are worth a longer compilation."""
    X, mask = problem.gated_map._rows()
    return mask.size * X.shape[1] >= MANY_PRODUCTS


def objective_of(problem: Any, u: Array, penalty: Array) -> Array:
    """Σ ℓ(u, y) + R."""
    return problem.sum(problem.loss.value(u, problem.inputs)) + penalty


def advanced(
    problem: Any,
    before: Iterate,
    V: Array,
    u: Array,
    penalty: Array,
    dual: Dual,
    moved: Array,
    tol: Array,
) -> Iterate:
    """The next iterate; programs that had stopped stay as they were."""
    objective = objective_of(problem, u, penalty)
    dual = _terms.better(problem, before.dual, dual)
    after = Iterate(
        value=V,
        prediction=u,
        objective=objective,
        dual=dual,
        done=reached(objective, dual.value, tol),
        iterations=before.iterations + 1,
        moved=moved,
    )
    return kept(before.done, before, after)


def reached(objective: Array, lower: Array, tol: Array) -> Array:
    """Whether P − D ≤ (tol − 2ε) P: what lies within the round-off of P is no proof of a smaller gap."""
    eps = float(jnp.finfo(objective.dtype).eps)
    return objective - lower <= (tol - 2 * eps) * objective


class Search(NamedTuple):
    """The smallest gap of each program so far, and the last iteration that made one of them smaller."""

    best: Array
    found: Array

    @classmethod
    def begun(cls, problem: Any, k: Array) -> "Search":
        """Before iteration k."""
        return cls(jnp.full(problem.batch_shape, jnp.inf, problem.dtype), k)

    def after(self, k: Array, iterate: Iterate) -> "Search":
        """With the gaps of iteration k."""
        gap = iterate.objective - iterate.dual.value
        return Search(
            jnp.minimum(self.best, gap), jnp.where(jnp.any(gap < self.best), k, self.found)
        )

    def stalled(self, k: Array) -> Array:
        """Whether 500 iterations, or a fifth of all, made no gap smaller: round-off is all that is left."""
        return k - self.found > jnp.maximum(STALLED, k // 5)


def kept(done: Array, before: Any, after: Any) -> Any:
    """For each program `before` where it is done, else `after`; a single one that is done takes no step."""
    if not done.ndim:
        return after

    def choose(old, new):
        return jnp.where(_terms.expanded(done, new), old, new)

    return jax.tree.map(choose, before, after)


def report(progress: Progress | None, k: Array, iterate: Iterate) -> None:
    """Tell the caller, where asked to, of iterations k ≥ 0."""
    if progress is not None:
        gap = iterate.objective - iterate.dual.value
        jax.debug.callback(functools.partial(_tell, progress), k, iterate.objective, gap)


def _tell(progress: Progress, k: Any, objective: Any, gap: Any) -> None:
    if k >= 0:
        progress(k, objective, gap)
