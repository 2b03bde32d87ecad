r"""Two-layer networks by convex programs, as scikit-learn estimators.

With the data standardised, z = ((x − μ)/s, 1), random gates g_i and patterns D_i = diag(1[Z g_i ≥ 0]),

    minimise_V  Σ_j ℓ((Σ_i D_i Z v_i)_j, t_j) + β Σ_i ||v_i||₂,

t the targets, of regressors standardised as well. Weights and gates are mapped back with them: the network in
the data's own units is

    v_i·z = (v/s)·x + (v_0 − v·(μ/s)),        g_i·z ≥ 0  ⇔  (g/s)·x + (g_0 − g·(μ/s)) ≥ 0.

Programs are padded to a few shapes, which compile once.
"""

import abc
import numbers
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers.convex._network import GatedNetwork, Network
from stochsolvers.convex._padded import PaddedProgram, Padding, Solved
from stochsolvers.convex._training import train_network
from stochsolvers.losses import CrossEntropy, Huber, Logistic, Loss, Squares

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "the estimators of stochsolvers.convex need scikit-learn: pip install 'stochsolvers[sklearn]'"
    ) from error

LOSSES = {
    "squares": Squares(),
    "huber": Huber(),
    "logistic": Logistic(),
    "cross-entropy": CrossEntropy(),
}


class PathPoint(NamedTuple):
    """One β of a regularisation path: what `fit` sets at this β."""

    beta: float
    objective: float
    gap: float
    n_active: int
    network: GatedNetwork | Network


class _ConvexReLU(BaseEstimator, abc.ABC):
    """What the regressor and the classifier share."""

    def __init__(
        self,
        beta: float = 1.0,
        num_gates: int = 100,
        *,
        gated: bool = True,
        loss: Any = "squares",
        tol: float = 1e-4,
        random_state: Any = None,
    ):
        self.beta = beta
        self.num_gates = num_gates
        self.gated = gated
        self.loss = loss
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any):
        """Solve the program of the data (n, d) and targets (n,).

        Raises:
          ValueError: for NaN, shapes that do not fit, constant targets, one class and β ≤ 0.
        """
        X, targets = self._validated(X, y)
        scaled, loss = self._scale(X), self._loss()
        if self.gated:
            program = PaddedProgram(scaled, targets, loss, self._gates(scaled), self.beta)
            self._set(program.solved(self.beta, self.tol))
        else:
            self._set(self._trained(scaled, targets, loss))
        return self

    def regularization_path(
        self,
        X: Any,
        y: Any,
        betas: ArrayLike | None = None,
        *,
        num: int = 20,
        smallest: float = 1e-2,
    ) -> list[PathPoint]:
        r"""The program for falling β, each solve begun at the last, from β_max, where the network is zero.

        Args:
          X: data, shape (n, d).
          y: targets, shape (n,).
          betas: the values of β; by default `num` from β_max to `smallest` times it, evenly in log β.
          num: of values.
          smallest: of β, relative to β_max.

        Returns:
          One `PathPoint` for each β, in falling order. The estimator is as after `fit` for the last of them,
          but for its parameter `beta`.

        Raises:
          ValueError: as `fit`, and for `gated=False`.
        """
        if not self.gated:
            _checks.fail("gated for a regularisation path", "True", self.gated)
        num = _checks.count("num", num)
        _checks.positive("smallest", smallest)
        X, targets = self._validated(X, y)
        scaled = self._scale(X)
        program = PaddedProgram(scaled, targets, self._loss(), self._gates(scaled), 1.0)
        if betas is None:
            largest = float(np.max(program.problem.beta_max())) * (1 + 1e-5)  # above round-off
            betas = largest * np.logspace(0, np.log10(smallest), num)
        path, last = [], None
        values = np.ravel(np.asarray(betas, np.float64))
        for beta in map(float, np.sort(values)[::-1]):
            last = program.solved(beta, self.tol, None if last is None else last.value)
            self._set(last)
            path.append(PathPoint(beta, last.objective, last.gap, self.n_active_, self.network_))
        return path

    def _validated(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        """Data in float64, and targets (n,) or (C, n) for the program."""
        for name, value in (("beta", self.beta), ("tol", self.tol)):
            if not isinstance(value, numbers.Real):
                _checks.fail(name, "a number > 0", repr(value))
            _checks.positive(name, float(value))
            _checks.finite(name, float(value))
        _checks.count("num_gates", self.num_gates)
        if not isinstance(self.gated, bool | np.bool_):
            _checks.fail("gated", "True or False", repr(self.gated))
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2, **self._y_rules)
        return X, self._targets(y)

    def _scale(self, X: np.ndarray) -> np.ndarray:
        self._mean = X.mean(axis=0)
        spread = X.std(axis=0)
        constant = spread <= 10 * np.finfo(np.float64).eps * np.abs(self._mean)
        self._spread = np.where(constant, 1.0, spread)
        return self._scaled(X)

    def _scaled(self, X: np.ndarray) -> np.ndarray:
        return np.concatenate([(X - self._mean) / self._spread, np.ones((len(X), 1))], axis=1)

    def _gates(self, scaled: np.ndarray) -> np.ndarray:
        """Gaussian gates with patterns of active data."""
        random = check_random_state(self.random_state)
        gates = random.standard_normal((scaled.shape[1], self.num_gates))
        return np.where(np.any(scaled @ gates >= 0, axis=0), gates, -gates)

    def _trained(self, scaled: np.ndarray, targets: np.ndarray, loss: Loss) -> "Solved":
        seed = check_random_state(self.random_state).randint(2**31)
        padding = Padding(*scaled.shape)
        X, y = padding.data(scaled), padding.targets(targets, loss)
        result = train_network(
            jax.random.key(seed), X, y, self.beta, loss=loss, width=self.num_gates,
            num_gates=self.num_gates, tol=self.tol,
        )  # fmt: skip
        network = result.network
        active = network.active(1e-6)
        weights = {
            "hidden": np.asarray(network.hidden)[: scaled.shape[1], active],
            "output": np.asarray(network.output)[active],
        }
        objective = result.gap.objective - padding.constant(targets, loss)
        return Solved(weights, None, objective, result.gap.gap)

    def _set(self, solved: "Solved") -> None:
        """The fitted attributes, in the data's own units."""
        if solved.gap > self.tol * solved.objective:
            got = f"gap {solved.gap:.3g} of objective {solved.objective:.3g} is above tol={self.tol:g}"
            why = "out of reach in this precision" if self.gated else "searched, the rounds ended"
            warnings.warn(f"{got}: {why}", ConvergenceWarning, stacklevel=3)
        shift, factor = self._target_units()
        own = {}
        for name, bias in (("hidden", "hidden_bias"), ("gates", "gate_bias")):
            if name in solved.weights:
                matrix = np.asarray(solved.weights[name], np.float64)
                own[name] = matrix[:-1] / self._spread[:, None]
                own[bias] = matrix[-1] - self._mean @ own[name]
        own["output"] = np.asarray(solved.weights["output"], np.float64) * factor
        own["output_bias"] = np.broadcast_to(shift, own["output"].shape[1:])
        self._weights = own
        self.network_ = (GatedNetwork if self.gated else Network)(**own)
        self.gap_, self.objective_ = solved.gap, solved.objective
        self.n_active_ = len(own["output"])

    def _outputs(self, X: Any) -> np.ndarray:
        """f(X) in float64, shape (n,) or (n, C)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        own = self._weights
        hidden = X @ own["hidden"] + own["hidden_bias"]
        if "gates" in own:
            hidden = np.where(X @ own["gates"] + own["gate_bias"] >= 0, hidden, 0)
        else:
            hidden = np.maximum(hidden, 0)
        return hidden @ own["output"] + own["output_bias"]

    def _loss(self) -> Loss:
        loss = LOSSES.get(self.loss) if isinstance(self.loss, str) else self.loss
        if not isinstance(loss, Loss):
            wanted = "a Loss, or one of " + ", ".join(repr(name) for name in LOSSES)
            _checks.fail("loss", wanted, repr(self.loss))
        return self._fitting(loss)

    _y_rules: dict[str, Any] = {}  # noqa: RUF012 - not changed

    @abc.abstractmethod
    def _targets(self, y: np.ndarray) -> np.ndarray:
        """y as the program's targets, the data on the last axis."""

    def _target_units(self) -> tuple[Any, Any]:
        return 0.0, 1.0

    def _fitting(self, loss: Loss) -> Loss:
        return loss


class ConvexReLURegressor(RegressorMixin, _ConvexReLU):
    r"""Regression by a two-layer network, to a certified optimality gap.

    Args:
      beta: β > 0 of Σ_j ℓ(f(z_j), t_j) + β Σ_i ||v_i||, with data and targets standardised; no 1/n.
      num_gates: P, random gates. Of a ReLU network the most neurons.
      gated: a gated network, the convex program's optimum; else a ReLU network by `train_network`.
      loss: "squares", "huber" or a `stochsolvers.losses.Loss`.
      tol: relative gap to stop at.
      random_state: of the gates.

    Attributes:
      network_: `GatedNetwork` or `Network` in the data's own units, its active neurons alone:
        `network_(X)`, of shape (n,) or (C, n), is `predict(X)` up to the precision of JAX.
      gap_: objective_ less the optimum is at most so much; of a ReLU network a searched gap, no proof.
      objective_: of the standardised program.
      n_active_: number of neurons.
      n_features_in_: d.
    """

    _y_rules = {"multi_output": True, "y_numeric": True}  # noqa: RUF012 - not changed

    def predict(self, X: Any) -> np.ndarray:
        """f(X), shaped as the targets."""
        value = self._outputs(X)
        return value[:, None] if self._one_column else value

    def _targets(self, y: np.ndarray) -> np.ndarray:
        y = np.asarray(y, np.float64)
        self._one_column = y.ndim == 2 and y.shape[1] == 1
        y = y[:, 0] if self._one_column else y
        self._shift, self._factor = y.mean(axis=0), y.std(axis=0)
        if np.any(self._factor <= 1e-12 * np.abs(self._shift)):
            _checks.fail("y", "targets that are not all equal", f"{len(y)} equal ones")
        return ((y - self._shift) / self._factor).T

    def _target_units(self) -> tuple[Any, Any]:
        return self._shift, self._factor

    def _fitting(self, loss: Loss) -> Loss:
        if isinstance(loss, Logistic | CrossEntropy):
            _checks.fail(
                "loss of ConvexReLURegressor", "'squares', 'huber' or alike", repr(self.loss)
            )
        return loss

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _has_probabilities(estimator: Any) -> bool:
    return estimator.loss in ("logistic", "cross-entropy") or isinstance(
        estimator.loss, Logistic | CrossEntropy
    )


class ConvexReLUClassifier(ClassifierMixin, _ConvexReLU):
    r"""Classification by a two-layer network, to a certified optimality gap.

    Args:
      beta: β > 0 of Σ_j ℓ(f(z_j), t_j) + β Σ_i ||v_i||, with data standardised; no 1/n.
      num_gates: P, random gates. Of a ReLU network the most neurons.
      gated: a gated network, the convex program's optimum; else a ReLU network by `train_network`.
      loss: "cross-entropy": of two classes one output and the logistic loss, of more one program whose
        neurons all classes share. "logistic", "squares", "huber" or an elementwise `Loss` of labels ±1: one
        program for each class against the rest. Probabilities need one of the first two.
      tol: relative gap to stop at.
      random_state: of the gates.

    Attributes:
      classes_: the labels.
      network_: `GatedNetwork` or `Network` in the data's own units, its active neurons alone:
        `network_(X)`, of shape (n,) or (C, n), is `decision_function(X)` up to the precision of JAX.
      gap_: objective_ less the optimum is at most so much; of a ReLU network a searched gap, no proof.
      objective_: of the standardised program.
      n_active_: number of neurons.
      n_features_in_: d.
    """

    def __init__(
        self,
        beta: float = 1.0,
        num_gates: int = 100,
        *,
        gated: bool = True,
        loss: Any = "cross-entropy",
        tol: float = 1e-4,
        random_state: Any = None,
    ):
        super().__init__(
            beta, num_gates, gated=gated, loss=loss, tol=tol, random_state=random_state
        )

    def decision_function(self, X: Any) -> np.ndarray:
        """f(X): shape (n,) of two classes, positive for the second; else (n, C)."""
        return self._outputs(X)

    def predict(self, X: Any) -> np.ndarray:
        """The labels of largest f(X)."""
        value = self.decision_function(X)
        chosen = (value > 0).astype(int) if value.ndim == 1 else np.argmax(value, axis=1)
        return self.classes_[chosen]

    @available_if(_has_probabilities)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes, shape (n, C): softmax, or sigmoids scaled to sum to 1."""
        value = self.decision_function(X)
        if value.ndim == 1:
            return np.stack([_sigmoid(-value), _sigmoid(value)], axis=1)
        if isinstance(self._loss(), CrossEntropy):
            weights = np.exp(value - value.max(axis=1, keepdims=True))
        else:
            weights = _sigmoid(value) + 1e-300
        return weights / weights.sum(axis=1, keepdims=True)

    def _targets(self, y: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            _checks.fail("y", "labels of at least two classes", "one class")
        if len(self.classes_) == 2:
            return 2.0 * index - 1
        one_hot = (np.arange(len(self.classes_))[:, None] == index).astype(np.float64)
        return one_hot if isinstance(self._loss(), CrossEntropy) else 2 * one_hot - 1

    def _fitting(self, loss: Loss) -> Loss:
        two = len(self.classes_) == 2
        return Logistic() if two and isinstance(loss, CrossEntropy) else loss


def _sigmoid(value: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * value))
