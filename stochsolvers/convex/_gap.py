"""How far a two-layer network is from the global optimum of its training problem."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.convex._enumeration import enumerate_patterns
from stochsolvers.convex._network import Network
from stochsolvers.convex._recover import as_network
from stochsolvers.convex._responses import bounded_response, exact_response
from stochsolvers.convex._separate import search_responses
from stochsolvers.losses import Loss, Squares

_EPS = float(np.finfo(np.float64).eps)


@value_object
class NetworkGap:
    """What is known of objective − optimum, in float64.

    Attributes:
      gap: objective − lower_bound.
      objective: the network's own, with its weight decay as it stands.
      lower_bound: of the objective of every network of any width with the same output bias; a proof where
        `word` is "exact" or "bound".
      response: M(Θ), or what stands for it: the largest response of a unit neuron to Θ = −∂ℓ.
      word: "exact": M(Θ) over all patterns, the gap is that of a pair of convex programs and zero at the
        optimum. "bound": M(Θ) from above, the gap is proved and may be far above the truth, also at the
        optimum. "searched": M(Θ) from below, no proof: the gap may be below the truth.
    """

    gap: float
    objective: float
    lower_bound: float
    response: float
    word: Literal["exact", "bound", "searched"] = static_field()

    @property
    def relative(self) -> float:
        """Gap / objective."""
        return self.gap / max(abs(self.objective), float(np.finfo(np.float64).tiny))


def network_gap(
    network: Any,
    X: Any,
    y: Any,
    beta: Scalar,
    *,
    loss: Loss = Squares(),  # noqa: B008 - immutable
    method: Literal["enumerate", "bound", "search"] = "enumerate",
    key: Array | None = None,
    num_starts: int = 512,
) -> NetworkGap:
    r"""The gap of any two-layer ReLU network to the global optimum over all widths.

        Σ_k ℓ(f(x_k), y_k) + (β/2)(||W||² + ||b||² + ||a||²)  −  max_{t ≤ β/M(Θ)} −Σ_k ℓ*(−tΘ_k, y_k),

    Θ = −∂ℓ(f(X), y) and M(Θ) = max_{||u|| ≤ 1} ||Θ (X u)₊||. The optimum is over W, a and, where the network
    has one, the hidden bias b; the output bias is held fixed.

    Args:
      network: a `Network` with one output or several that share its neurons, or a Flax network, see
        `as_network`.
      X: data, shape (n, d).
      y: targets, shape (n,) or (C, n).
      beta: β > 0.
      loss: ℓ, with a conjugate.
      method: "enumerate": M(Θ) over all arrangement patterns, a few data or a few features; exact for one
        output, else a bound. "bound": a relaxation of M(Θ), any size. "search": ascent from many starts.
      key: of the starts of "search"; that of seed 0 by default.
      num_starts: of "search".

    Raises:
      ValueError: for shapes that do not fit, NaN, β ≤ 0 and a method not listed.

    References:
      Pilanci and Ergen 2020, theorem 1 and its dual.
    """
    network = as_network(network)
    _checks.member("method", method, ("enumerate", "bound", "search"))
    _checks.positive("beta", beta)
    point = dual_point(network, X, y, float(beta), loss)
    data, theta = point.data, point.theta
    word = "searched" if method == "search" else "bound"
    if method == "enumerate":
        response = exact_response(data, theta, np.asarray(enumerate_patterns(data).mask))
        word = "exact" if len(theta) == 1 else "bound"
    elif method == "bound":
        response = bounded_response(data, theta)
    else:
        key = jax.random.key(0) if key is None else key
        starts = augmented_neurons(network)
        found = search_responses(key, data, theta, starts=starts, num_starts=num_starts)
        response = evaluated_response(data, theta, np.asarray(found.units, np.float64))
    return point.gap(response, word)


def evaluated_response(X: np.ndarray, theta: np.ndarray, units: np.ndarray) -> float:
    """The largest ||Θ(X u)₊|| over the given directions, in float64."""
    norms = np.linalg.norm(units, axis=0)
    units = units[:, norms > 0] / norms[norms > 0]
    values = np.linalg.norm(theta @ np.maximum(X @ units, 0), axis=0)
    return float(values.max(initial=0.0)) * (1 - 8 * _EPS)


@dataclasses.dataclass(frozen=True)
class DualPoint:
    """A network's objective in float64 and its dual point, for data with a feature 1 where it has biases.

    Attributes:
      data: X, shape (n, d), with a last column of ones for a hidden bias.
      gradient: −Θ = ∂ℓ at the predictions, in the domain of ℓ*, shaped as y.
      targets: y.
      offset: the output bias, which broadcasts to y.
      objective: from above.
      beta: β.
      loss: ℓ.
    """

    data: np.ndarray
    gradient: np.ndarray
    targets: np.ndarray
    offset: np.ndarray
    objective: float
    beta: float
    loss: Loss

    @property
    def theta(self) -> np.ndarray:
        """Θ, shape (C, n)."""
        return -self.gradient.reshape(-1, self.gradient.shape[-1])

    def gap(self, response: float, word: Any) -> NetworkGap:
        """The gap where M(Θ) is `response`."""
        largest = self.beta / response if response > 0 else np.inf
        lower = self._dual_value(min(largest * (1 - 4 * _EPS), 1e3))
        return NetworkGap(self.objective - lower, self.objective, lower, response, word)

    def _dual_value(self, largest: float) -> float:
        """max_t −Σ ℓ*(−tΘ, y) − t <Θ, c> over 0 ≤ t ≤ largest, a concave function, from below."""
        low, high, best = 0.0, largest, 0.0
        for _ in range(10):
            steps = np.append(np.linspace(low, high, 16), min(1.0, largest))
            with jax.enable_x64(True):
                args = self.loss, self.gradient, self.targets, self.offset, steps
                values = np.asarray(_dual_values(*args))
            best = max(best, float(values.max()))
            i = int(np.argmax(values[:16]))
            low, high = steps[max(i - 1, 0)], steps[min(i + 1, 15)]
        return best


@jax.jit
def _dual_values(loss: Loss, gradient: Array, y: Array, offset: Array, steps: Array) -> Array:
    def value(t):
        terms = loss.conjugate(t * gradient, y)
        product = t * gradient * jnp.broadcast_to(offset, y.shape)
        size = jnp.sum(jnp.where(jnp.isfinite(terms), jnp.abs(terms), 0)) + jnp.sum(
            jnp.abs(product)
        )
        return -jnp.sum(terms) + jnp.sum(product) - (y.size + 16) * _EPS * size

    return jax.vmap(value)(steps)


def dual_point(network: Network, X: Any, y: Any, beta: float, loss: Loss) -> DualPoint:
    """The point of `network_gap`, without M(Θ).

    Raises:
      ValueError: for shapes that do not fit, and numbers that are not finite.
    """
    _checks.rank("X", X, 2)
    for name, value in (("X", X), ("y", y), ("hidden", network.hidden), ("output", network.output)):
        _checks.finite(name, value)
    weights = augmented_neurons(network)
    data = np.asarray(X, np.float64)
    _checks.trailing("X", X, (network.num_features,))
    if network.hidden_bias is not None:
        data = np.concatenate([data, np.ones((len(data), 1))], axis=1)
    output = np.asarray(network.output, np.float64)
    targets = np.asarray(y, np.float64)
    shape = (*output.shape[1:], len(data))
    if targets.shape != shape:
        _checks.fail("shape of y", shape, targets.shape)
    offset = np.zeros(())
    if network.output_bias is not None:
        offset = np.asarray(network.output_bias, np.float64)[..., None]
    value = (np.maximum(data @ weights, 0) @ output).T + offset
    size = (np.abs(data) @ np.abs(weights) @ np.abs(output)).T + np.abs(offset)
    with jax.enable_x64(True):
        gradient, terms = (np.asarray(a) for a in _loss_at(loss, value, targets))
    penalty = 0.5 * beta * float(np.sum(weights**2) + np.sum(output**2))
    slack = 2 * (sum(weights.shape) + 4) * float(np.sum(np.abs(gradient) * size))
    slack += (targets.size + weights.size + 16) * (float(np.sum(np.abs(terms))) + penalty)
    objective = float(np.sum(terms)) + penalty + _EPS * slack
    return DualPoint(data, gradient, targets, offset, objective, beta, loss)


@jax.jit
def _loss_at(loss: Loss, value: Array, y: Array) -> tuple[Array, Array]:
    gradient = loss.derivative(value, y)
    return loss.dual_projection(gradient, y), loss.value(value, y)


def augmented_neurons(network: Network) -> np.ndarray:
    """W, with the hidden bias as its last row, in float64."""
    weights = np.asarray(network.hidden, np.float64)
    if network.hidden_bias is None:
        return weights
    return np.concatenate([weights, np.asarray(network.hidden_bias, np.float64)[None]])
