"""Training of two-layer networks themselves, by minibatches and by rounds; see `experiments.convex`."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stochsolvers as ss
from experiments.training import descent, loop, programs

MOST_BOUND_FEATURES = 300
"""Beyond, ReLU networks have no lower bound: it takes eigenvalues of many d × d matrices."""


def train_by_batches(
    task: programs.Task,
    beta: float,
    method: programs.Method,
    rates: Sequence[float],
    *,
    epochs: int,
    batch_size: int,
) -> programs.Trained:
    """Train a network with each learning rate, and keep the best on the validation images.

    The rates of SGD are divided by the mean of ||x_j||², to which the curvature of the loss is proportional.

    Raises:
      loop.DivergenceError: there is no rate with finite objectives.
    """
    begun = time.perf_counter()
    mask = task.program.patterns.mask if method == "gated-adam" else None
    data = descent.Data(task.program.X, task.program.y.reshape(task.outputs, -1), mask)
    optimizer: Any = "sgd" if method == "sgd" else "adam"
    options = {"width": task.width, "optimizer": optimizer, "batch_size": batch_size}
    trainer = descent.Trainer(data, beta, **options)
    if method == "sgd":
        rates = [rate / float(jnp.mean(jnp.sum(data.X**2, axis=1))) for rate in rates]
    runs = {rate: _one_rate(task, trainer, method, rate, epochs) for rate in rates}
    ends = {rate: history[-1] for rate, (history, _) in runs.items() if history is not None}
    if not ends:
        message = f"{method}: every learning rate of {tuple(rates)} diverged"
        raise loop.DivergenceError(message, task.seed)
    rate = max(ends, key=lambda rate: (ends[rate]["validation_accuracy"], -ends[rate]["objective"]))
    history, weights = runs[rate]
    assert history is not None
    sizes = jnp.linalg.norm(weights.hidden, axis=-1) * jnp.abs(weights.output)
    final = {
        "objective": history[-1]["objective"],
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
    return programs.Trained(history, _predictor(task, weights, method), final)


def _one_rate(
    task: programs.Task, trainer: descent.Trainer, method: programs.Method, rate: float, epochs: int
) -> tuple[list[programs.Row] | None, Any]:
    """The history and the last weights; no history if the objective is not finite any more."""
    history, weights = [], None
    for epoch, seconds, weights in trainer(task.key(programs.WEIGHTS), rate, epochs):
        objective = trainer.objective(weights)
        if not math.isfinite(objective):
            return None, None
        score = programs.accuracy(_predictor(task, weights, method), task.data.validation)
        row = {"epoch": epoch, "seconds": seconds, "objective": objective}
        history.append({**row, "validation_accuracy": score})
    return history, weights


def _predictor(task: programs.Task, weights: descent.Weights, method: programs.Method) -> Any:
    """Values (n,) or (C, n) of the network on data (n, d)."""
    patterns = task.program.patterns

    def predict(X):
        mask = patterns.apply(X).mask if method == "gated-adam" else None
        values = descent.predict(weights, X, mask)
        return values[0] if task.program.y.ndim == 1 else values

    return predict


def _bound(task: programs.Task, beta: float, networks: Sequence[Any]) -> programs.Row:
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


def train_relu(
    task: programs.Task, beta: float, rounds: int, polish_iters: int
) -> programs.Trained:
    """`stochsolvers.convex.train_network` for each output: one round after the other, each timed.

    What another seed compiled is not compiled again.
    """
    y = task.program.y.reshape(task.outputs, -1)
    seconds, history = 0.0, []
    networks: list[Any] = [None] * task.outputs
    for count in range(rounds):
        start = time.perf_counter()
        for c, target in enumerate(y):
            key = jax.random.fold_in(task.key(programs.ROUNDS + count), c)
            networks[c] = ss.convex.train_network(
                key,
                task.program.X,
                target,
                beta,
                init=networks[c],
                width=task.width,
                num_gates=task.width,
                num_rounds=2 if count else 1,
                num_iters=polish_iters,
            ).network
        seconds += time.perf_counter() - start
        objective = sum(
            float(net.objective(task.program.X, target, beta))
            for net, target in zip(networks, y, strict=True)
        )
        score = programs.accuracy(_joined(task, networks), task.data.validation)
        row = {"epoch": count + 1, "seconds": seconds, "objective": objective}
        history.append({**row, "validation_accuracy": score})
    final = {
        "objective": history[-1]["objective"],
        "neurons": sum(net.width for net in networks),
        **_bound(task, beta, networks),
    }
    return programs.Trained(history, _joined(task, networks), final)


def _joined(task: programs.Task, networks: Sequence[Any]) -> Any:
    """Values (n,) or (C, n) of the networks of the outputs on data (n, d)."""
    networks = tuple(networks)

    def predict(X):
        values = [network(X) for network in networks]
        return values[0] if task.program.y.ndim == 1 else jnp.stack(values)

    return predict
