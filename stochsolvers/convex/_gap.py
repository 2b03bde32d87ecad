"""How far a two-layer network is from the global optimum of its training problem."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._corrective import corrected_gradient
from stochsolvers.convex._enumeration import enumerate_patterns
from stochsolvers.convex._network import Network
from stochsolvers.convex._recover import as_network
from stochsolvers.convex._responses import bounded_response, exact_response
from stochsolvers.convex._separate import distinct, search_responses
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

    def tightened(self, other: "NetworkGap") -> "NetworkGap":
        """With the larger of the two lower bounds."""
        lower = max(self.lower_bound, other.lower_bound)
        return dataclasses.replace(self, gap=self.objective - lower, lower_bound=lower)

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
    num_rounds: int = 0,
) -> NetworkGap:
    r"""The gap of any two-layer ReLU network to the global optimum over all widths.

        Σ_k ℓ(f(x_k), y_k) + (β/2)(||W||² + ||b||² + ||a||²)  −  max_{t ≤ β/M(Θ)} −Σ_k ℓ*(−tΘ_k, y_k),

    Θ = −∂ℓ(f(X), y), or better, and M(Θ) = max_{||u|| ≤ 1} ||Θ (X u)₊||. The optimum is over W, a and, where
    the network has one, the hidden bias b; the output bias is held fixed.

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
      num_rounds: of improvements of Θ, which may be far from feasible where the objective is nearly
        optimal: the dual point of the best network whose units are the neurons and those of largest response
        so far. The largest lower bound counts; with "enumerate" and one output it tends to the optimum.

    Raises:
      ValueError: for shapes that do not fit, NaN, β ≤ 0 and a method not listed.

    References:
      Pilanci and Ergen 2020, theorem 1 and its dual.
    """
    network = as_network(network)
    _checks.real_array("X of network_gap", X)
    _checks.real_array("y of network_gap", y)
    _checks.member("method", method, ("enumerate", "bound", "search"))
    _inputs.positive_number("beta", beta)
    _inputs.loss("loss", loss)
    num_rounds = _checks.count("num_rounds", num_rounds, minimum=0)
    num_starts = _checks.count("num_starts", num_starts)
    if key is not None:
        _checks.random_key("key", key)
    point = dual_point(network, X, y, float(beta), loss)
    units = augmented_neurons(network)
    respond = _Responder(point.data, method, jax.random.key(0) if key is None else key, num_starts)
    response, found = respond(point.theta, units)
    gap = point.gap(response, respond.word(point.theta))
    for _ in range(num_rounds):
        if gap.relative <= 1e-12 or found.shape[1] == 0:
            break
        units = np.concatenate([units, found], axis=1)
        point = point.corrected(units)
        response, found = respond(point.theta, units)
        gap = gap.tightened(point.gap(response, gap.word))
    return gap


class _Responder:
    """Θ ↦ M(Θ) by one of the methods, and unit neurons of large response."""

    def __init__(self, data: np.ndarray, method: str, key: Array, num_starts: int):
        self.data, self.method, self.key, self.num_starts = data, method, key, num_starts
        if method == "enumerate":
            self.mask = np.asarray(enumerate_patterns(data).mask)

    def __call__(self, theta: np.ndarray, neurons: np.ndarray) -> tuple[float, np.ndarray]:
        """The response and units of shape (d, S)."""
        if self.method == "enumerate":
            response, units = exact_response(self.data, theta, self.mask)
            return response, units if units.shape[1] else self._searched(theta, neurons)[1]
        lower, units = self._searched(theta, neurons)
        if self.method == "search":
            return lower, units
        return bounded_response(self.data, theta), units

    def word(self, theta: np.ndarray) -> Any:
        """What the response is."""
        if self.method == "search":
            return "searched"
        return "exact" if self.method == "enumerate" and len(theta) == 1 else "bound"

    def _searched(self, theta: np.ndarray, neurons: np.ndarray) -> tuple[float, np.ndarray]:
        found = search_responses(
            self.key, self.data, theta, starts=neurons, num_starts=self.num_starts
        )
        units = np.asarray(found.units, np.float64)
        return evaluated_response(self.data, theta, units), units[:, distinct(found, 8)]


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

    def corrected(self, units: np.ndarray) -> "DualPoint":
        """With the dual point of the best network of these units, shape (d, S)."""
        args = self.data, units, self.targets, self.offset, self.beta, self.loss
        return dataclasses.replace(self, gradient=corrected_gradient(*args))

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
    _inputs.finite("X", X)
    _inputs.finite("y", y)
    _inputs.finite_fields("the network", network)
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
    _inputs.labels("y", targets, loss)
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
