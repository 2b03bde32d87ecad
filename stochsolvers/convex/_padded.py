"""Gated programs padded to a few shapes, so that a path of data sets compiles seldom."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers.convex._network import GatedNetwork
from stochsolvers.convex._patterns import Patterns
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.convex._recover import recover
from stochsolvers.convex._solve import solve
from stochsolvers.losses import CrossEntropy, Loss


class Solved(NamedTuple):
    """A solved program: its network's weights on standardised data, and the padded program's value."""

    weights: dict[str, Any]
    value: Any
    objective: float
    gap: float


class PaddedProgram:
    """The padded gated program of data (n, d), targets (n,) or (C, n), and gates (d, P).

    Rows of zeros add a constant to the objective, columns of zeros nothing. A pattern drawn twice is all
    false the second time, so that the number of patterns does not change either.
    """

    def __init__(
        self, scaled: np.ndarray, targets: np.ndarray, loss: Loss, gates: np.ndarray, beta: float
    ):
        mask = scaled @ gates >= 0
        _, first = np.unique(np.packbits(mask, axis=0), axis=1, return_index=True)
        kept = np.isin(np.arange(mask.shape[1]), first)
        padding = Padding(*scaled.shape)
        self.features = scaled.shape[1]
        patterns = Patterns(padding.gates(gates), jnp.asarray(padding.mask(mask & kept)))
        joint = isinstance(loss, CrossEntropy)
        data, y = padding.data(scaled), padding.targets(targets, loss)
        self.problem = GatedProblem(data, y, patterns, beta, loss=loss, joint=joint)
        self.constant = padding.constant(targets, loss)

    def solved(self, beta: float, tol: float, init: Any = None) -> Solved:
        """The optimum to a gap of tol relative to the objective, its constant left out, if in reach."""
        problem, reached = self.problem.with_beta(beta), tol
        init = np.zeros(problem.shape) if init is None else init
        objective = gap = np.inf
        for _ in range(3):
            solution = solve(problem, init=init, tol=reached)
            init = solution.value
            gap = float(np.sum(np.asarray(solution.certificate)))
            objective = float(np.sum(np.asarray(solution.objectives))) - self.constant
            if gap <= tol * objective:
                break
            reached = 0.5 * tol * objective / (objective + self.constant)
        weights = {k: np.asarray(v) for k, v in _recovered(problem, init).items()}
        active = np.flatnonzero(np.any(weights["hidden"] != 0, axis=0))
        for name in ("hidden", "gates"):
            weights[name] = weights[name][: self.features, active]
        weights["output"] = weights["output"][active]
        return Solved(weights, init, objective, gap)


@jax.jit
def _recovered(problem: GatedProblem, value: Any) -> dict[str, Any]:
    network = recover(problem, value)
    assert isinstance(network, GatedNetwork)
    return {"hidden": network.hidden, "output": network.output, "gates": network.gates}


class Padding:
    """Zeros after n data and d features, up to a few sizes."""

    def __init__(self, n: int, d: int):
        self.n, self.d = _rounded_up(n, 256), _rounded_up(d, 16)

    def _rows(self, array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, self.n - len(array)), (0, 0)))

    def mask(self, array: np.ndarray) -> np.ndarray:
        """Shape (n, P), with rows that are all false."""
        return self._rows(array)

    def gates(self, array: np.ndarray) -> Any:
        return jnp.asarray(np.pad(array, ((0, self.d - len(array)), (0, 0))), _dtype())

    def data(self, scaled: np.ndarray) -> Any:
        return jnp.asarray(
            np.pad(self._rows(scaled), ((0, 0), (0, self.d - scaled.shape[1]))), _dtype()
        )

    def targets(self, targets: np.ndarray, loss: Loss) -> Any:
        """With targets that the loss has a use for: 0, 1, or those of the first class."""
        missing = self.n - targets.shape[-1]
        more = np.zeros((*targets.shape[:-1], missing))
        if isinstance(loss, CrossEntropy):
            more[0] = 1
        elif np.all(np.abs(targets) == 1):
            more[:] = 1
        return jnp.asarray(np.concatenate([targets, more], axis=-1), _dtype())

    def constant(self, targets: np.ndarray, loss: Loss) -> float:
        """What the rows of zeros add to the objective."""
        y = self.targets(targets, loss)
        terms = np.asarray(_at_zero(loss, y), np.float64)
        return float(np.sum(terms[..., targets.shape[-1] :]))


@jax.jit
def _at_zero(loss: Loss, y: Any) -> Any:
    return loss.value(jnp.zeros_like(y), y)


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _dtype() -> Any:
    return jnp.zeros(0).dtype
