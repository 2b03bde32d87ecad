"""Training of two-layer networks by convex programs and by minibatches; see `experiments.convex`."""

import functools
import math
import time
from collections.abc import Callable, Sequence
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
MOST_BOUND_FEATURES = 300
"""Beyond, ReLU networks have no lower bound: it takes eigenvalues of many d × d matrices."""
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
    """

    curve: list[Row]
    predict: Callable[[jax.Array], jax.Array]
    final: Row


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

    The curve is of runs from zero that are stopped after 1, 2, 4, … iterations, each timed as a whole, with
    the seconds of compilation added.
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
                "iterations": int(jnp.max(solution.iterations)),
                "validation_accuracy": score,
            }
        )
        if best is None or score > best[0]["validation_accuracy"]:
            best = path[-1], program
    assert best is not None
    row, program = best
    path_seconds = time.perf_counter() - begun
    curve, V = _timed(task, program, solve, max_iters)
    curve = [{**each, "seconds": compilation + each["seconds"]} for each in curve]
    final = {
        "beta": row["beta"],
        "fraction": row["fraction"],
        **_certified(task, program, V, tol, max_iters),
        "iterations": curve[-1]["epoch"],
        "compilation_seconds": compilation,
        "path_seconds": path_seconds,
        "path": path,
    }
    return Trained(curve, functools.partial(program.predict, V), final)


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
    curve, cap = [], 1
    while True:
        start = time.perf_counter()
        solution = solve(program, jnp.zeros(program.shape), jnp.asarray(cap))
        V = jax.block_until_ready(solution.value)
        seconds = time.perf_counter() - start
        score = accuracy(functools.partial(program.predict, V), task.data.validation)
        row = {"epoch": int(jnp.max(solution.iterations)), "seconds": seconds}
        row["objective"] = float(jnp.sum(program.objective(V)))
        curve.append({**row, "validation_accuracy": score})
        if cap >= max_iters or bool(jnp.all(solution.status == ss.Status.CONVERGED)):
            return curve, V
        cap = min(2 * cap, max_iters)


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
    mask = task.program.patterns.mask if method == "gated-adam" else None
    data = descent.Data(task.program.X, task.program.y.reshape(task.outputs, -1), mask)
    optimizer: Any = "sgd" if method == "sgd" else "adam"
    options = {"width": task.width, "optimizer": optimizer, "batch_size": batch_size}
    trainer = descent.Trainer(data, beta, **options)
    runs = {rate: _one_rate(task, trainer, method, rate, epochs) for rate in rates}
    ends = {rate: curve[-1] for rate, (curve, _) in runs.items() if curve is not None}
    if not ends:
        raise DivergenceError(f"{method}: every learning rate of {tuple(rates)} diverged")
    rate = max(ends, key=lambda rate: (ends[rate]["validation_accuracy"], -ends[rate]["objective"]))
    curve, weights = runs[rate]
    assert curve is not None
    sizes = jnp.linalg.norm(weights.hidden, axis=-1) * jnp.abs(weights.output)
    final = {
        "objective": curve[-1]["objective"],
        "neurons": int(jnp.sum(sizes > 1e-3 * jnp.max(sizes))),
        "learning_rate": rate,
        "rates": [
            {"learning_rate": r}
            | {key: ends[r][key] for key in ("validation_accuracy", "objective")}
            for r in ends
        ],
        "diverged_rates": [r for r in rates if r not in ends],
        "compilation_seconds": trainer.compilation,
        "search_seconds": time.perf_counter() - begun,
    }
    if mask is None:
        pairs = zip(weights.hidden, weights.output, strict=True)
        final |= _bound(task, beta, [ss.convex.Network(W.T, a) for W, a in pairs])
    return Trained(curve, _predictor(task, weights, method), final)


def _one_rate(
    task: Task, trainer: descent.Trainer, method: Method, rate: float, epochs: int
) -> tuple[list[Row] | None, Any]:
    """The curve and the last weights; no curve if the objective is not finite any more."""
    curve, weights = [], None
    for epoch, seconds, weights in trainer(task.key(WEIGHTS), rate, epochs):
        objective = trainer.objective(weights)
        if not math.isfinite(objective):
            return None, None
        score = accuracy(_predictor(task, weights, method), task.data.validation)
        row = {"epoch": epoch, "seconds": seconds, "objective": objective}
        curve.append({**row, "validation_accuracy": score})
    return curve, weights


def _predictor(task: Task, weights: descent.Weights, method: Method) -> Any:
    """Values (n,) or (C, n) of the network on data (n, d)."""
    patterns = task.program.patterns

    def predict(X):
        mask = patterns.apply(X).mask if method == "gated-adam" else None
        values = descent.predict(weights, X, mask)
        return values[0] if task.program.y.ndim == 1 else values

    return predict


# ---- ReLU networks: bounds, and training by rounds ----


def _bound(task: Task, beta: float, networks: Sequence[Any]) -> Row:
    """A lower bound on the objective of every ReLU network of the task, proved; a network for each output."""
    if task.data.num_features > MOST_BOUND_FEATURES:
        return {"lower_bound": None}
    y, start = task.program.y.reshape(task.outputs, -1), time.perf_counter()
    gaps = [
        ss.convex.network_gap(network.balanced(), task.program.X, target, beta, method="bound")
        for network, target in zip(networks, y, strict=True)
    ]
    lower = sum(gap.lower_bound for gap in gaps)
    seconds = time.perf_counter() - start
    return {"lower_bound": lower, "bound": "bound", "bound_seconds": seconds}


def train_relu(task: Task, beta: float, rounds: int) -> Trained:
    """`stochsolvers.convex.train_network` for each output: one round after the other, each timed."""
    jax.clear_caches()  # so that the seconds have the compilation in them
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
    final = {
        "objective": curve[-1]["objective"],
        "neurons": sum(net.width for net in networks),
        **_bound(task, beta, networks),
    }
    return Trained(curve, _joined(task, networks), final)


def _joined(task: Task, networks: Sequence[Any]) -> Any:
    """Values (n,) or (C, n) of the networks of the outputs on data (n, d)."""
    networks = tuple(networks)

    def predict(X):
        values = [network(X) for network in networks]
        return values[0] if task.program.y.ndim == 1 else jnp.stack(values)

    return predict
