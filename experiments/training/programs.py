"""The gated program of a data set: its path of β, and a timed solve; see `experiments.convex`."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from experiments.data import Dataset, vectors

Method = Literal["gated", "gated-adam", "relu", "adam", "sgd"]
Row = dict[str, Any]
MOST_KERNEL_DATA = 8000
"""Beyond, the n × n kernel of the data is not factored."""
GATES, WEIGHTS, ROUNDS = range(3)
"""What a seed's random keys are for."""


class Task(NamedTuple):
    """What all methods are given in common.

    Attributes:
      data: the splits as matrices.
      program: the gated program of the training data; its β is β_max.
      seed: of the split, the gates, the initial weights and the order of the data.
    """

    data: vectors.Vectors
    program: Any
    seed: int

    @property
    def outputs(self) -> int:
        """C."""
        return math.prod(self.program.y.shape[:-1])

    @property
    def width(self) -> int:
        """P."""
        return self.program.patterns.num

    def key(self, purpose: int) -> jax.Array:
        """A random key."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)


class Trained(NamedTuple):
    """What a method ends with.

    Attributes:
      history: seconds, objective, validation accuracy after each epoch or number of iterations.
      predict: of data (n, d), values (n,) or (C, n).
      final: the objective, a lower bound of it and how it is known, the number of neurons that are not zero,
        and what was chosen.
    """

    history: list[Row]
    predict: Callable[[jax.Array], jax.Array]
    final: Row


def prepared(dataset: Dataset, seed: int, width: int, components: int | None = None) -> Task:
    """The data as matrices, `width` normal gates, and the program at β_max."""
    data = vectors.vectors(dataset, components)
    X, labels = data.train
    y = jnp.asarray(vectors.targets(labels, len(data.classes)))
    key = jax.random.fold_in(jax.random.key(seed), GATES)
    patterns = ss.convex.sample_patterns(key, jnp.asarray(X), width)
    program = ss.convex.GatedProblem(jnp.asarray(X), y, patterns, 1.0)
    return Task(data, program.with_beta(jnp.max(program.beta_max())), seed)


def accuracy(predict: Callable[[jax.Array], jax.Array], rows: vectors.Rows) -> float:
    """Accuracy in percent on one split."""
    X, labels = rows
    return vectors.accuracy(np.asarray(predict(jnp.asarray(X))), labels)


def train_gated(task: Task, fractions: Sequence[float], tol: float, max_iters: int) -> Trained:
    """Choose β along a path with warm starts, then solve the program for it from zero.

    The history is of runs from zero that are stopped after 1, 2, 4, … iterations, each timed as a whole; as
    one with fewer iterations takes less time, the least seconds of it and of all longer ones are taken. Those
    of compilation are added.
    """
    solve, compilation = _compiled(task, tol)
    begun, validation = time.perf_counter(), task.data.validation
    path, best, V = [], None, jnp.zeros(task.program.shape)
    for fraction in sorted(fractions, reverse=True):
        program = task.program.with_beta(fraction * task.program.beta)
        solution = solve(program, V, jnp.asarray(max_iters))
        V = solution.value
        score = accuracy(functools.partial(program.predict, V), validation)
        path.append(
            {
                "fraction": fraction,
                "beta": float(program.beta),
                "objective": float(jnp.sum(program.objective(V))),
                "neurons": int(jnp.sum(program.num_active(V))),
                "iterations": _iterations(solution),
                "validation_accuracy": score,
            }
        )
        if best is None or score > best[0]["validation_accuracy"]:
            best = path[-1], program
    assert best is not None
    row, program = best
    path_seconds = time.perf_counter() - begun
    history, V = _timed(task, program, solve, max_iters)
    seconds = np.minimum.accumulate([row["seconds"] for row in reversed(history)])[::-1]
    history = [
        {**each, "seconds": compilation + float(spent)}
        for each, spent in zip(history, seconds, strict=True)
    ]
    final = {
        "beta": row["beta"],
        "fraction": row["fraction"],
        **_certified(task, program, V, tol, max_iters),
        "iterations": history[-1]["epoch"],
        "compilation_seconds": compilation,
        "path_seconds": path_seconds,
        "path": path,
    }
    return Trained(history, functools.partial(program.predict, V), final)


def _compiled(task: Task, tol: float) -> tuple[Callable[..., ss.Solution], float]:
    """The solver of (program, V_0, most iterations), and the seconds in which it was compiled."""

    def solve(program, V, max_iters):
        solver = _solver(task, max_iters)
        return ss.convex.solve(program, solver=solver, init=V, tol=tol, certify=False)

    start = time.perf_counter()
    V = jnp.zeros(task.program.shape)
    compiled = jax.jit(solve).lower(task.program, V, jnp.asarray(1)).compile()
    return compiled, time.perf_counter() - start


def _solver(task: Task, max_iters: Any) -> Any:
    """The solver that `stochsolvers.convex.solve` takes by default, with a cap."""
    small = len(task.data.train[0]) <= MOST_KERNEL_DATA
    kind = ss.convex.KernelADMM if small else ss.convex.FISTA
    return kind(max_iters=max_iters)


def _timed(
    task: Task, program: Any, solve: Callable[..., ss.Solution], max_iters: int
) -> tuple[list[Row], jax.Array]:
    """Runs from zero stopped after 1, 2, 4, … iterations, up to the one that stops by itself."""
    history, cap = [], 1
    while True:
        V, seconds, done, count = _one_run(program, solve, cap)
        score = accuracy(functools.partial(program.predict, V), task.data.validation)
        row = {"epoch": count, "seconds": seconds}
        row["objective"] = float(jnp.sum(program.objective(V)))
        history.append({**row, "validation_accuracy": score})
        if cap >= max_iters or done:
            return history, V
        cap = min(2 * cap, max_iters)


def _one_run(
    program: Any, solve: Callable[..., ss.Solution], cap: int
) -> tuple[jax.Array, float, bool, int]:
    """V from zero, seconds, whether all outputs converged, and the most iterations of an output."""
    start = time.perf_counter()
    solution = solve(program, jnp.zeros(program.shape), jnp.asarray(cap))
    V = jax.block_until_ready(solution.value)
    seconds = time.perf_counter() - start
    done = bool(jnp.all(solution.status == ss.Status.CONVERGED))
    return V, seconds, done, _iterations(solution)


def _iterations(solution: ss.Solution) -> int:
    """The most that an output took."""
    assert solution.iterations is not None
    return int(jnp.max(solution.iterations))


def _certified(task: Task, program: Any, V: jax.Array, tol: float, max_iters: int) -> Row:
    """Objective, its lower bound that allows for round-off, neurons; all outputs together."""
    solver = _solver(task, jnp.asarray(max_iters))
    solution = ss.convex.solve(program, solver=solver, init=V, tol=tol)
    assert solution.certificate is not None
    reached = float(jnp.sum(program.objective(solution.value)))
    return {
        "objective": float(jnp.sum(program.objective(V))),
        "lower_bound": reached - float(jnp.sum(solution.certificate)),
        "bound": "exact",
        "neurons": int(jnp.sum(program.num_active(V))),
    }
