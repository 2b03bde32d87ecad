"""A peer of `benchmarks.convex` in an environment of its own: answers lines of JSON with seconds.

    PYTHON benchmarks/_convex_peer.py pyscnn | adelie | cvxpy

Each question names an instance, a file of arrays made by the benchmark, and a reference optimum; the answer
is the time that the peer takes to come within the relative accuracy, or null where it does not within the
cap. Every peer is given what favours it: pyscnn the number of iterations after which it is there, adelie
the loosest of its tolerances that is accurate enough; only the run with these is timed.
"""

import importlib
import json
import signal
import sys
import time
from typing import Any

import numpy as np


def _module(name) -> Any:
    """A module that only this environment has."""
    return importlib.import_module(name)


def _objective(data, V):
    """½||Σ D_i X v_i − y||² + β Σ ||v_i||, V (P, d), in float64."""
    X, y, mask = data["X"].astype(float), data["y"].astype(float), data["mask"]
    residual = np.where(mask.T, V @ X.T, 0.0).sum(0) - y
    return 0.5 * residual @ residual + float(data["beta"]) * np.linalg.norm(V, axis=1).sum()


class PySCNN:
    """R-FISTA of the package scnn, in float32 on NumPy; λ = β/n."""

    def __init__(self, data, cap):
        import logging

        logging.disable(logging.WARNING)
        self.data, self.cap = data, cap
        self.regularizer = _module("scnn.regularizers").NeuronGL1(
            float(data["beta"]) / len(data["y"])
        )
        self._run(2)  # with its imports
        start = time.perf_counter()
        self._run(20)
        each = (time.perf_counter() - start) / 20
        self.most = max(20, int(cap / each))
        self.values = None

    def _run(self, iterations, every=10**9):
        data = self.data
        model = _module("scnn.models").ConvexGatedReLU(data["gates"])
        solver = _module("scnn.solvers").RFISTA(model, iterations, 0.0)
        metrics = _module("scnn.metrics").Metrics(metric_freq=every)
        return _module("scnn.optimize").optimize_model(
            model, solver, metrics, data["X"],
            data["y"][:, None], regularizer=self.regularizer, return_convex=True,
            unitize_data=False,
        )  # fmt: skip

    def prepare(self, target):
        """The number of iterations after which it is there, or None."""
        if self.values is None:
            _, metrics = self._run(min(self.most, 10_000), 1)
            self.values = np.asarray(metrics.objective) * len(self.data["y"])
        there = np.flatnonzero(self.values <= target)
        return int(there[0]) if len(there) else None

    def run(self, setting):
        """Solve, and the objective."""
        model, _ = self._run(setting)
        return model

    def objective(self, model):
        """Of the model that was returned, with the gates in its own order."""
        data = dict(self.data)
        data["mask"] = data["X"] @ model.G >= 0
        return _objective(data, np.asarray(model.parameters[0], float)[0])


class Adelie:
    """Block coordinate descent of adelie on the dense matrix [D_1 X … D_P X], one λ."""

    def __init__(self, data, cap):
        X, mask = data["X"].astype(float), data["mask"]
        n, d = X.shape
        self.data, self.cap, P = data, cap, mask.shape[1]
        if n * d * P > 4e8:
            raise MemoryError("the matrix of all gated data takes more than 3.2 GB")
        self.matrix = np.empty((n, P * d), order="F")
        for i in range(P):
            self.matrix[:, i * d : (i + 1) * d] = mask[:, [i]] * X
        self.groups = np.arange(0, P * d, d)

    def _run(self, tol):
        adelie = _module("adelie")
        data, n = self.data, len(self.data["y"])
        state = adelie.grpnet(
            self.matrix, adelie.glm.gaussian(data["y"].astype(float)), groups=self.groups,
            penalty=np.ones(len(self.groups)), intercept=False, tol=tol, n_threads=1,
            lmda_path=np.array([float(data["beta"]) / n]), early_exit=False, progress_bar=False,
        )  # fmt: skip
        return state.betas.toarray()[-1].reshape(len(self.groups), -1)

    def prepare(self, target):
        """The loosest tolerance that suffices; the process ends where a run takes longer than the cap."""
        for tol in 10.0 ** -np.arange(5, 15):
            signal.alarm(round(self.cap))
            V = self._run(tol)
            signal.alarm(0)
            if _objective(self.data, V) <= target:
                return float(tol)
        return None

    def run(self, setting):
        """Solve."""
        return self._run(setting)

    def objective(self, V):
        """Of the weights."""
        return _objective(self.data, V)


class Clarabel:
    """Clarabel through cvxpy on the program with cones; the time is the solver's own."""

    def __init__(self, data, cap):
        cp = _module("cvxpy")

        X, y, mask = data["X"].astype(float), data["y"].astype(float), data["mask"]
        D, S = mask.astype(float), np.where(mask, 1.0, -1.0)
        V, W = (cp.Variable((X.shape[1], mask.shape[1])) for _ in range(2))
        residual = cp.sum(cp.multiply(D, X @ (V - W)), axis=1) - y
        norms = cp.sum(cp.norm(V, axis=0)) + cp.sum(cp.norm(W, axis=0))
        self.problem = cp.Problem(
            cp.Minimize(0.5 * cp.sum_squares(residual) + float(data["beta"]) * norms),
            [cp.multiply(S, X @ V) >= 0, cp.multiply(S, X @ W) >= 0],
        )
        self.cap = cap

    def prepare(self, target):
        """Its tolerances for relative accuracy 1e-4."""
        del target
        return 1e-4

    def run(self, setting):
        """Solve."""
        cp = _module("cvxpy")

        self.problem.solve(
            solver=cp.CLARABEL, tol_gap_rel=setting, tol_gap_abs=setting, tol_feas=setting,
            time_limit=10 * self.cap, max_threads=1,
        )  # fmt: skip
        return float(self.problem.solver_stats.solve_time)

    def objective(self, result):
        """The optimal value."""
        del result
        return float(self.problem.value)


PEERS = {"pyscnn": PySCNN, "adelie": Adelie, "clarabel": Clarabel}


def main(name):
    """Answer until there are no more questions."""
    peer: Any = None
    file, settings = None, {}
    for line in sys.stdin:
        question = json.loads(line)
        answer = None
        try:
            if question["file"] != file:
                with np.load(question["file"]) as arrays:
                    peer = PEERS[name](dict(arrays), question["cap"])
                file, settings = question["file"], {}
            target = question["target"]
            if target not in settings:
                settings[target] = peer.prepare(target)
            if settings[target] is not None:
                start = time.perf_counter()
                result = peer.run(settings[target])
                seconds = time.perf_counter() - start
                seconds = result if name == "clarabel" else seconds
                answer = {"seconds": seconds, "objective": float(peer.objective(result))}
        except MemoryError as error:
            answer = {"error": str(error)}
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
