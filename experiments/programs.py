"""Training of two-layer networks by convex programs and by minibatches; see `experiments.convex`."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from experiments import descent, vectors
from experiments.data import Dataset

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
      curve: seconds, objective, validation accuracy after each epoch or number of iterations.
      predict: of data (n, d), values (n,) or (C, n).
      final: the objective, a lower bound of it and how it is known, the number of neurons that are not zero,
        and what was chosen.
      path: validation accuracy and neurons for each β.
    """

    curve: list[Row]
    predict: Callable[[jax.Array], jax.Array]
    final: Row
    path: list[Row] = []


class DivergenceError(RuntimeError):
    """Every learning rate of the grid diverged."""


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


# ---- the gated program ----


def train_gated(task: Task, fractions: Sequence[float], tol: float, max_iters: int) -> Trained:
    """Choose β along a path with warm starts, then solve the program for it from zero.

    The curve is of runs from zero that are stopped after 1, 2, 4, … iterations: each is timed as a whole, and
    the seconds of compilation are added, those of the first call beyond a second one.
    """
    validation = task.data.validation
    begun, largest = time.perf_counter(), float(task.program.beta)
    path, best, V = [], None, None
    for fraction in sorted(fractions, reverse=True):
        program = task.program.with_beta(fraction * largest)
        solution = ss.convex.solve(program, solver=_solver(task, max_iters), init=V, tol=tol)
        V = solution.value
        score = accuracy(functools.partial(program.predict, V), validation)
        row = _measured(program, solution) | {"fraction": fraction, "validation_accuracy": score}
        path.append(row)
        if best is None or score > best[0]["validation_accuracy"]:
            best = row, program
    assert best is not None
    row, program = best
    chosen = {"path_seconds": time.perf_counter() - begun}
    curve, V = _timed(task, program, tol, max_iters)
    return Trained(curve, functools.partial(program.predict, V), row | chosen, path)


def _solver(task: Task, max_iters: int) -> Any:
    """The solver that `stochsolvers.convex.solve` takes by default, with a cap."""
    small = len(task.data.train[0]) <= MOST_KERNEL_DATA
    kind = ss.convex.KernelADMM if small else ss.convex.FISTA
    return kind(max_iters=jnp.asarray(max_iters))


def _measured(program: Any, solution: ss.Solution) -> Row:
    """Objective, lower bound, neurons and iterations, all outputs together."""
    assert solution.certificate is not None
    assert solution.iterations is not None
    objective = float(jnp.sum(program.objective(solution.value)))
    return {
        "beta": float(program.beta),
        "objective": objective,
        "lower_bound": objective - float(jnp.sum(solution.certificate)),
        "bound": "exact",
        "neurons": int(jnp.sum(program.num_active(solution.value))),
        "iterations": int(jnp.max(solution.iterations)),
    }


def _timed(task: Task, program: Any, tol: float, max_iters: int) -> tuple[list[Row], jax.Array]:
    """Runs from zero stopped after 1, 2, 4, … iterations, up to the one that stops by itself."""

    def solved(cap):
        start = time.perf_counter()
        solution = ss.convex.solve(program, solver=_solver(task, cap), tol=tol, certify=False)
        jax.block_until_ready(solution.value)
        return solution, time.perf_counter() - start

    compilation = solved(1)[1] - solved(1)[1]
    curve, cap = [], 1
    while True:
        solution, seconds = solved(cap)
        assert solution.iterations is not None
        score = accuracy(functools.partial(program.predict, solution.value), task.data.validation)
        row = {"epoch": int(jnp.max(solution.iterations)), "seconds": compilation + seconds}
        row["objective"] = float(jnp.sum(program.objective(solution.value)))
        curve.append({**row, "validation_accuracy": score})
        if cap >= max_iters or bool(jnp.all(solution.status == ss.Status.CONVERGED)):
            return curve, solution.value
        cap = min(2 * cap, max_iters)


# ---- minibatches ----


def train_by_batches(
    task: Task,
    beta: float,
    method: Method,
    rates: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
) -> Trained:
    """Train a network with each learning rate, and keep the best on the validation images.

    Raises:
      DivergenceError: there is no rate with finite objectives.
    """
    begun = time.perf_counter()
    X, y = task.program.X, task.program.y.reshape(task.outputs, -1)
    mask = task.program.patterns.mask if method == "gated-adam" else None
    data, runs = descent.Data(X, y, mask), {}
    for rate in rates:
        run = _one_rate(task, data, beta, method, rate, epochs, batch_size)
        if run is not None:
            runs[rate] = run
    if not runs:
        raise DivergenceError(f"{method}: every learning rate of {tuple(rates)} diverged")
    scores = {rate: curve[-1]["validation_accuracy"] for rate, (curve, _) in runs.items()}
    rate = max(runs, key=lambda rate: (scores[rate], -runs[rate][0][-1]["objective"]))
    curve, weights = runs[rate]
    predict = _predictor(task, weights, method)
    objective = curve[-1]["objective"]
    final = {
        "objective": objective,
        "neurons": int(jnp.sum(_sizes(weights) > 1e-3 * jnp.max(_sizes(weights)))),
        "learning_rate": rate,
        "validation_of_rates": {f"{r:g}": scores.get(r) for r in rates},
        "search_seconds": time.perf_counter() - begun,
    }
    if mask is None:
        final |= _bounded(task, beta, weights)
    return Trained(curve, predict, final)


def _one_rate(
    task: Task,
    data: descent.Data,
    beta: float,
    method: Method,
    rate: float,
    epochs: int,
    batch_size: int,
) -> tuple[list[Row], descent.Weights] | None:
    """The curve and the last weights; None if the objective is not finite any more."""
    jax.clear_caches()  # so that the seconds of every rate have a compilation in them
    descent.compiled_epoch.cache_clear()
    curve: list[Row] = []
    optimizer: Any = "sgd" if method == "sgd" else "adam"
    options = {"width": task.width, "epochs": epochs, "batch_size": batch_size, "rate": rate}
    records = descent.train(task.key(WEIGHTS), data, beta, optimizer=optimizer, **options)
    weights = None
    for epoch, seconds, weights in records:
        objective = float(descent.objective(weights, data, jnp.asarray(beta, jnp.float32)))
        if not math.isfinite(objective):
            return None
        score = accuracy(_predictor(task, weights, method), task.data.validation)
        row = {"epoch": epoch, "seconds": seconds, "objective": objective}
        curve.append({**row, "validation_accuracy": score})
    assert weights is not None
    return curve, weights


def _predictor(task: Task, weights: descent.Weights, method: Method) -> Any:
    """Values (n,) or (C, n) of the network on data (n, d)."""
    patterns = task.program.patterns

    def predict(X):
        mask = patterns.apply(X).mask if method == "gated-adam" else None
        values = descent.predict(weights, X, mask)
        return values[0] if task.program.y.ndim == 1 else values

    return predict


def _sizes(weights: descent.Weights) -> jax.Array:
    return jnp.linalg.norm(weights.hidden, axis=-1) * jnp.abs(weights.output)


# ---- ReLU networks: bounds, and training by rounds ----


def _bounded(task: Task, beta: float, weights: descent.Weights) -> Row:
    """A lower bound on the objective of every ReLU network of the task, proved; one network an output."""
    y = task.program.y.reshape(task.outputs, -1)
    begun, bound = time.perf_counter(), 0.0
    for hidden, output, target in zip(weights.hidden, weights.output, y, strict=True):
        network = ss.convex.Network(hidden.T, output).balanced()
        gap = ss.convex.network_gap(network, task.program.X, target, beta, method="bound")
        bound += gap.lower_bound
    seconds = time.perf_counter() - begun
    return {"lower_bound": bound, "bound": "bound", "bound_seconds": seconds}


def train_relu(task: Task, beta: float, rounds: int) -> Trained:
    """`stochsolvers.convex.train_network` for each output: one round after the other, each timed."""
    y = task.program.y.reshape(task.outputs, -1)
    seconds, curve = 0.0, []
    networks: list[Any] = [None] * task.outputs
    for count in range(rounds):
        start = time.perf_counter()
        for c, target in enumerate(y):
            key = jax.random.fold_in(task.key(ROUNDS + count), c)
            networks[c] = ss.convex.train_network(
                key,
                task.program.X,
                target,
                beta,
                init=networks[c],
                width=task.width,
                num_gates=task.width,
                num_rounds=2 if count else 1,
            ).network
        seconds += time.perf_counter() - start
        objective = sum(
            float(net.objective(task.program.X, target, beta))
            for net, target in zip(networks, y, strict=True)
        )
        score = accuracy(_joined(task, networks), task.data.validation)
        row = {"epoch": count + 1, "seconds": seconds, "objective": objective}
        curve.append({**row, "validation_accuracy": score})
    gaps = [
        ss.convex.network_gap(net, task.program.X, target, beta, method="bound")
        for net, target in zip(networks, y, strict=True)
    ]
    final = {
        "objective": curve[-1]["objective"],
        "lower_bound": sum(gap.lower_bound for gap in gaps),
        "bound": "bound",
        "neurons": sum(net.width for net in networks),
    }
    return Trained(curve, _joined(task, networks), final)


def _joined(task: Task, networks: Sequence[Any]) -> Any:
    """Values (n,) or (C, n) of the networks of the outputs on data (n, d)."""
    networks = tuple(networks)

    def predict(X):
        values = [network(X) for network in networks]
        return values[0] if task.program.y.ndim == 1 else jnp.stack(values)

    return predict
