"""A proximal step on weights after every step of an optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar
from stochsolvers.optax._leaves import moved
from stochsolvers.prox import Prior


class ProxState(NamedTuple):
    """The number of steps, for a schedule of η."""

    num_steps: Array


def prox(
    prior: Prior | Callable[[str, Array], Prior | None],
    learning_rate: Scalar | Callable[[Array], Array],
    *,
    where: Callable[[str, Array], bool] | None = None,
) -> optax.GradientTransformation:
    r"""u ← prox_{ηg}(θ + u) − θ: the proximal step for minimise f(θ) + g(θ), after a step on f.

    Behind `optax.sgd(η)` it is the proximal gradient method, θ ← prox_{ηg}(θ − η ∇f(θ)). Sparse weights are
    `L1`, `GroupL2`, those in a box `Box`, in a ball `L2Ball`, and so on. A weight that the prior sets to zero
    is exactly zero after `optax.apply_updates`; another one is θ + (prox − θ), rounded.

    Behind a preconditioner such as Adam's it is a step of length η on g, not in the preconditioner's metric.

    Args:
      prior: g, or a function from a leaf's path, as "conv/kernel", and its array to a g or None.
      learning_rate: η > 0, that of the optimiser before it; a number or a schedule of the step's number.
      where: chooses leaves by their path and array, for a single prior; all by default.

    Raises:
      ValueError: for η ≤ 0, or what is no prior; in `update`, without parameters.

    References:
      Parikh and Boyd, Proximal Algorithms, 2014, section 4.2.
    """
    if isinstance(prior, type) or not (isinstance(prior, Prior) or callable(prior)):
        _checks.fail("prior", "a Prior such as prox.L1(1e-3)", repr(prior))
    if isinstance(learning_rate, type) or not callable(learning_rate):
        _checks.positive("learning_rate", learning_rate)
    if where is not None and not isinstance(prior, Prior):
        _checks.fail("where", "None for a function of paths", where)

    def prior_of(path: str, leaf: Array) -> Prior | None:
        if isinstance(prior, Prior):
            return prior if where is None or where(path, leaf) else None
        return prior(path, leaf)

    def init(params: Any) -> ProxState:
        del params
        return ProxState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        step = learning_rate(state.num_steps) if callable(learning_rate) else learning_rate

        def applied(path, point):
            g = prior_of(path, point)
            return None if g is None else g.prox(point, step)

        return moved(applied, updates, params, "prox"), ProxState(state.num_steps + 1)

    return optax.GradientTransformation(init, update)
