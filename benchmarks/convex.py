"""Gated and ReLU programs: time to a relative accuracy, against pyscnn, adelie and an interior point.

    python -m benchmarks.convex

The peers need environments of their own, a Python with pyscnn and cvxpy, and one with adelie; without them,
their rows are left out. The digits are those of scikit-learn.

    SCNN_PYTHON=.../bin/python ADELIE_PYTHON=.../bin/python python -m benchmarks.convex --rounds 3

Beyond 8000 data the reference is accurate to 1e-5, and 1e-6 is not measured.
"""

import functools
import importlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import record
from benchmarks.record import Figure, Goal, Options
from stochsolvers import convex

SIZES = ((1000, 50, 200), (5000, 100, 500), (1797, 61, 1000), (20000, 50, 300))
SHARES = (0.1, 0.03, 0.01)
FEW = 1000
"""Beyond so many data every side is timed once, since one run takes minutes."""
MANY = 8000
CAP, LONG_CAP = 30.0, 120.0
"""Seconds that a peer has, for up to `FEW` data and for more."""
SLOW_SHARE = 0.03
"""LandmarkADMM is not timed below: it takes minutes."""
PEER = pathlib.Path(__file__).with_name("_convex_peer.py")
PYTHONS = {"pyscnn": "SCNN_PYTHON", "adelie": "ADELIE_PYTHON"}
THREADS = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
ONE_THREAD = {**THREADS, "XLA_FLAGS": FLAGS}


class Process:
    """A process that answers lines of JSON, by default with one thread."""

    def __init__(self, *command: str, environment: Mapping[str, str] = ONE_THREAD):
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ask(self, **question: Any) -> Any:
        """The answer to one question; None where the process has ended."""
        if self.process.poll() is not None:
            return None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        return None

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def instance(n: int, d: int, num: int) -> dict[str, np.ndarray]:
    """Gaussian data of condition number 10 with unit columns, labels of 100 neurons; or the digits."""
    rng = np.random.default_rng(0)
    if (n, d) == (1797, 61):
        digits: Any = importlib.import_module("sklearn.datasets").load_digits()
        X = digits.data[:, digits.data.std(0) > 0]
        X, y = X - X.mean(0), np.where(digits.target < 5, 1.0, -1.0)
    else:
        Q, _ = np.linalg.qr(rng.standard_normal((d, d)))
        X = rng.standard_normal((n, d)) @ (Q * np.sqrt(np.logspace(0, -1, d))) @ Q.T
        values = np.maximum(X @ rng.standard_normal((d, 100)), 0) @ rng.standard_normal(100)
        y = np.where(values > np.median(values), 1.0, -1.0)
    X = (X / np.linalg.norm(X, axis=0)).astype(np.float32)
    gates = rng.standard_normal((d, num)).astype(np.float32)
    return {"X": X, "y": y.astype(np.float32), "gates": gates, "mask": X @ gates >= 0}


def beta_of(data: dict[str, np.ndarray], share: float) -> np.float32:
    """β_max times the share."""
    images = np.where(data["mask"].T, data["y"].astype(float), 0.0) @ data["X"].astype(float)
    return np.float32(share * np.linalg.norm(images, axis=1).max())


def problem_of(data: dict[str, np.ndarray], beta: Any, kind: Any = convex.GatedProblem) -> Any:
    """The program."""
    patterns = convex.Patterns(jnp.asarray(data["gates"]), jnp.asarray(data["mask"]))
    return kind(jnp.asarray(data["X"]), jnp.asarray(data["y"]), patterns, beta)


def reference(data: dict[str, np.ndarray], beta: Any) -> tuple[float, float]:
    """A lower bound on the optimum and the relative gap, in float64."""
    with jax.enable_x64(True):
        wide = {k: v if v.dtype == bool else v.astype(float) for k, v in data.items()}
        problem = problem_of(wide, float(beta))
        many = len(data["y"]) > MANY
        solution: Any = convex.solve(problem, tol=1e-5 if many else 1e-7, certify=True)
        objective, gap = float(solution.objectives[-1]), float(solution.certificate)
    return objective - gap, gap / objective


def objective64(data: dict[str, np.ndarray], beta: Any, V: Any) -> float:
    """Of weights (P, d), in float64."""
    X, V = data["X"].astype(float), np.asarray(V, float)
    residual = np.where(data["mask"].T, V @ X.T, 0.0).sum(0) - data["y"]
    return 0.5 * residual @ residual + float(beta) * np.linalg.norm(V, axis=1).sum()


def benchmark(options: Options) -> Sequence[Figure]:
    """Seconds to a relative accuracy of 1e-4 and 1e-6 of the optimum, one thread each, for three β."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1, "blas"):
        file = pathlib.Path(folder) / "instance.npz"
        for size in ((200, 10, 20),) if options.quick else SIZES:
            figures += _gated(size, options, file)
        size = (40, 3, 5) if options.quick else (1000, 20, 100)
        figures += _cones(size, options, file)
    return figures


def _peers(options: Options) -> dict[str, Process]:
    return {
        name: Process(os.environ[variable], str(PEER), name)
        for name, variable in PYTHONS.items()
        if variable in os.environ and not options.quick
    }


def _gated(size: tuple[int, int, int], options: Options, file: pathlib.Path) -> list[Figure]:
    data, figures = instance(*size), []
    n = size[0]
    goals = {"pyscnn": Goal("≥", 10 if n <= 5000 else 5), "adelie": Goal("≥", 4)}
    rounds = options.rounds if n <= FEW else 1
    for share in SHARES[:1] if options.quick else SHARES:
        beta = beta_of(data, share)
        lower, gap = reference(data, beta)
        target_file = file.with_name(f"{'-'.join(map(str, size))}-{share}.npz")
        arrays: dict[str, Any] = {"beta": beta, **data}
        np.savez(target_file, **arrays)
        what = f"gated program, (n, d, P) = {size}, β = {share:g} β_max"
        if n <= MANY:
            goal = Goal("≤", 1e-6)
            figures.append(Figure(f"{what}, gap in float64", "the objective", gap, "", goal))
        peers = _peers(options)
        cold = _cold(target_file) if peers else 0.0
        for tol in (1e-4, 1e-6) if n <= MANY else (1e-4,):
            target = (1 + tol) * lower
            ours, theirs, reached = _interleaved(
                data, beta, tol, target, peers, rounds, target_file
            )
            for name, samples in theirs.items():
                label = f"{what}, to {tol:g}"
                if samples is None:
                    figures.append(_late(label, name, _cap(n), ours, goals[name]))
                    continue
                if isinstance(samples, str):
                    print(f"{label}: no figure of {name}, {samples}", flush=True)
                    continue
                ratio = statistics.median(a / b for a, b in zip(samples, ours, strict=True))
                detail: dict[str, Any] = {
                    "seconds": {"ours": statistics.median(ours), name: statistics.median(samples)}
                }
                detail["relative accuracy"] = reached
                figures.append(Figure(label, name, ratio, goal=goals[name], detail=detail))
                if name == "pyscnn" and tol == 1e-4:
                    first = statistics.median(samples) / cold
                    detail = {"seconds": {"ours": cold, name: statistics.median(samples)}}
                    cold_goal = Goal("≥", 1) if n >= 1000 else None
                    figures.append(
                        Figure(
                            f"{label}, first call with its compilation",
                            name,
                            first,
                            goal=cold_goal,
                            detail=detail,
                        )
                    )
            if n > MANY and share >= SLOW_SHARE:
                figures.append(_landmarks(data, beta, tol, what, rounds))
            for name, samples in theirs.items():
                print(what, tol, name, samples, "ours", ours, "cold", cold, reached, flush=True)
        for peer in peers.values():
            peer.close()
    return figures


def _landmarks(
    data: dict[str, np.ndarray], beta: Any, tol: float, what: str, rounds: int
) -> Figure:
    """LandmarkADMM beside FISTA, the default for many data, interleaved."""
    problem = problem_of(data, beta)
    samples: dict[str, list[float]] = {}
    for count in range(rounds + 1):
        for solver in (convex.LandmarkADMM(), convex.FISTA()):
            start = time.perf_counter()
            jax.block_until_ready(convex.solve(problem, solver=solver, tol=tol))
            if count:  # the first compiles
                seconds = time.perf_counter() - start
                samples.setdefault(type(solver).__name__, []).append(seconds)
    ratio = statistics.median(
        a / b for a, b in zip(samples["FISTA"], samples["LandmarkADMM"], strict=True)
    )
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    label = f"{what}, to {tol:g}, LandmarkADMM"
    return Figure(label, "FISTA", ratio, detail={"seconds": seconds})


def _cap(n: int) -> float:
    return CAP if n <= FEW else LONG_CAP


def _late(label: str, name: str, cap: float, ours: list[float], goal: Goal) -> Figure:
    """At least so many times faster, for a peer that did not get there in time."""
    ratio = cap / statistics.median(ours)
    detail = {"seconds": {"ours": statistics.median(ours)}}
    return Figure(
        f"{label}, at least", f"{name}, not in {cap:g} s", ratio, goal=goal, detail=detail
    )


def _interleaved(
    data: dict[str, np.ndarray],
    beta: Any,
    tol: float,
    target: float,
    peers: dict[str, Process],
    rounds: int,
    file: pathlib.Path,
) -> tuple[list[float], dict[str, Any], float]:
    """Seconds of each side, one sample a round; how far ours is from the lower bound, relative."""
    problem = problem_of(data, beta)
    solve = functools.partial(convex.solve, problem, tol=tol)
    value = jax.block_until_ready(solve()).value
    reached = objective64(data, beta, value) / (target / (1 + tol)) - 1
    ours: list[float] = []
    theirs: dict[str, Any] = {name: [] for name in peers}
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(solve())
        ours.append(time.perf_counter() - start)
        for name, peer in peers.items():
            if not isinstance(theirs[name], list):
                continue
            answer = peer.ask(file=str(file), target=target, cap=_cap(len(data["y"])))
            if answer is None or "error" in answer:
                theirs[name] = None if answer is None else answer["error"]
            else:
                theirs[name].append(answer["seconds"])
    return ours, theirs, reached


COLD = """
import sys, time
import jax, numpy as np, jax.numpy as jnp
from stochsolvers import convex
data = dict(np.load(sys.argv[1]))
jax.block_until_ready(jnp.ones(2) + 1)
start = time.perf_counter()
patterns = convex.Patterns(jnp.asarray(data["gates"]), jnp.asarray(data["mask"]))
problem = convex.GatedProblem(jnp.asarray(data["X"]), jnp.asarray(data["y"]), patterns, data["beta"])
jax.block_until_ready(convex.solve(problem, tol=1e-4))
print(time.perf_counter() - start)
"""


def _cold(file: pathlib.Path) -> float:
    """Seconds of the first call in a new process, from arrays to the certified optimum, after the imports."""
    environment = {**os.environ, **THREADS, "XLA_FLAGS": FLAGS}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", COLD, str(file)],
                env=environment, check=True, capture_output=True, text=True,
            ).stdout
        )
        for _ in range(3)
    ]  # fmt: skip
    return statistics.median(seconds)


def _cones(size: tuple[int, int, int], options: Options, file: pathlib.Path) -> list[Figure]:
    """The ReLU program of sampled patterns to a certified gap of 1e-4."""
    data = instance(*size)
    beta = beta_of(data, 0.03)
    arrays: dict[str, Any] = {"beta": beta, **data}
    np.savez(file, **arrays)
    problem = problem_of(data, beta, convex.ReLUProblem)
    solve = functools.partial(convex.solve, problem, tol=1e-4)
    first: Any = jax.block_until_ready(solve())
    ours: list[float] = []
    start = time.perf_counter()
    jax.block_until_ready(solve())
    ours.append(time.perf_counter() - start)
    what = f"ReLU program, (n, d, P) = {size}, β = 0.03 β_max, to a certified gap of 1e-4"
    gap = float(first.certificate / first.objectives[-1])
    figures = [Figure(f"{what}, gap", "the objective", gap, "", Goal("≤", 1.2e-4))]
    if "SCNN_PYTHON" in os.environ and not options.quick:
        peer = Process(os.environ["SCNN_PYTHON"], str(PEER), "clarabel")
        answer = peer.ask(file=str(file), target=0.0, cap=CAP)
        peer.close()
        if answer is not None and "seconds" in answer:
            detail: dict[str, Any] = {"seconds": {"ours": ours[0], "clarabel": answer["seconds"]}}
            detail["objectives"] = {
                "ours": float(first.objectives[-1]), "clarabel": answer["objective"]
            }  # fmt: skip
            ratio = answer["seconds"] / statistics.median(ours)
            print(what, detail, flush=True)
            figures.append(
                Figure(what, "Clarabel, an interior point", ratio, goal=Goal("≥", 5), detail=detail)
            )
    return figures


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    record.main("convex", benchmark, None)
