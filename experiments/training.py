"""Training and evaluation of a network: the paper's schedule, one compiled step in a Python loop."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from tqdm import tqdm

import stochsolvers as ss
from experiments.data import Dataset, Split
from experiments.networks import LeNet, set_mode

STAGES = 3


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The paper's optimiser.

    Attributes:
      epochs: in all; a third of the steps at each learning rate.
      batch_size: examples a step.
      learning_rate: of the first stage; a tenth of it in the second, a hundredth in the third.
      momentum: of SGD.
      weight_decay: of the weights and biases, added to the gradient before the momentum.
      seed: of the initialisation, the order of the examples and the sampling.
    """

    epochs: int = 300
    batch_size: int = 128
    learning_rate: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0


class DivergenceError(RuntimeError):
    """The loss stopped being finite."""


class ConfigurationError(ValueError):
    """A configuration that does not fit the data."""


class Trained(NamedTuple):
    """A trained model, one record for each epoch, and the seconds that training took."""

    model: LeNet
    history: list[dict[str, float]]
    seconds: float


def staged_learning_rate(initial: float, total_steps: int) -> Callable[[Any], Any]:
    """k -> initial · 10^−s, s = 0, 1, 2 in the first, second and last third of the steps."""
    rates = initial * 10.0 ** -np.arange(STAGES)

    def schedule(step):
        stage = jnp.minimum(STAGES * jnp.asarray(step) // total_steps, STAGES - 1)
        return jnp.asarray(rates, jnp.float32)[stage]

    return schedule


def optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """SGD with momentum on the loss plus (weight_decay/2) ||w||²."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(
            staged_learning_rate(config.learning_rate, total_steps), momentum=config.momentum
        ),
    )


def normalise(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Stored pixels as float32 of zero mean and unit variance."""
    return (jnp.asarray(images, jnp.float32) - mean) / std


def train(
    build: Callable[[nnx.Rngs], LeNet], data: Dataset, config: TrainConfig, *, label: str
) -> Trained:
    """Train a network from scratch.

    Args:
      build: makes the network from random streams.
      data: its training split is learned, its validation split watched once an epoch.
      config: of the optimiser.
      label: for the progress bar and for errors.

    Raises:
      DivergenceError: the loss is not finite; names the step.
      ConfigurationError: the batch is larger than the training split, or there is nothing to do.
    """
    steps = _steps_per_epoch(data, config)
    model = build(nnx.Rngs(params=config.seed, dropout=config.seed + 1))
    transform = optimizer(config, config.epochs * steps)
    set_mode(model, "train")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    step = _compile_step(graph, transform, jnp.asarray(data.mean), jnp.asarray(data.std))
    refresh = jax.jit(lambda params, rest: _refreshed(graph, params, rest))
    opt_state = jax.jit(transform.init)(params)
    images, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.labels)

    history, start = [], time.perf_counter()
    with tqdm(total=config.epochs * steps, desc=label, disable=None, leave=False) as bar:
        for epoch in range(config.epochs):
            order = np.random.default_rng([config.seed, 1, epoch]).permutation(len(labels))
            losses = []
            for k in range(steps):
                batch = order[k * config.batch_size : (k + 1) * config.batch_size]
                params, rest, opt_state, loss = step(params, rest, opt_state, images, labels, batch)
                losses.append(loss)
                bar.update()
            train_loss = _finite_mean(losses, label, epoch * steps)
            rest = refresh(params, rest)
            model = nnx.merge(graph, params, rest, copy=True)
            accuracy = float(evaluate(model, data.validation, data)[0])
            seconds = time.perf_counter() - start
            history.append(
                {
                    "epoch": epoch + 1,
                    "train_loss": train_loss,
                    "validation_accuracy": accuracy,
                    "seconds": seconds,
                }
            )
            bar.set_postfix(loss=f"{train_loss:.3f}", validation=f"{accuracy:.2f}%")
    return Trained(model, history, time.perf_counter() - start)


def _steps_per_epoch(data: Dataset, config: TrainConfig) -> int:
    if config.epochs < 1:
        raise ConfigurationError(f"epochs: expected at least 1, got {config.epochs}")
    if not 1 <= config.batch_size <= len(data.train):
        raise ConfigurationError(
            f"batch_size: expected 1 to {len(data.train)}, the training images of {data.name}, "
            f"got {config.batch_size}"
        )
    return len(data.train) // config.batch_size


def _compile_step(
    graph: Any, transform: optax.GradientTransformation, mean: jax.Array, std: jax.Array
) -> Callable[..., Any]:
    def loss_of(params, rest, images, labels):
        model = nnx.merge(graph, params, rest, copy=True)
        logits = model(normalise(images, mean, std))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def step(params, rest, opt_state, images, labels, batch):
        (loss, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, rest, images[batch], labels[batch]
        )
        updates, opt_state = transform.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), rest, opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


def _refreshed(graph: Any, params: Any, rest: Any) -> Any:
    """The state with every Lipschitz constant recomputed."""
    model = nnx.merge(graph, params, rest, copy=True)
    ss.nnx.refresh_lipschitz(model)
    return nnx.state(model, nnx.Not(nnx.Param))


def _finite_mean(losses: list[jax.Array], label: str, first_step: int) -> float:
    values = np.asarray(jax.device_get(losses))
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        raise DivergenceError(
            f"{label}: the loss is {values[broken[0]]} at step {first_step + broken[0] + 1}. "
            "Try a smaller learning rate or, with a solver, a smaller decay."
        )
    return float(values.mean())


def evaluate(
    model: LeNet,
    split: Split,
    data: Dataset,
    *,
    trials: int = 1,
    deterministic: bool = False,
    batch_size: int = 500,
) -> np.ndarray:
    """Accuracy in percent, once for each trial.

    The convolutional features are computed once; the trials repeat the part that is stochastic,
    with the model's own random streams.

    Args:
      model: its random streams are not advanced; its mode is set.
      split: to classify.
      data: whose statistics normalise the pixels.
      trials: independent repetitions.
      deterministic: full gradients in the solvers instead of sampling.
      batch_size: images at a time.
    """
    set_mode(model, "deterministic" if deterministic else "test")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    mean, std = jnp.asarray(data.mean), jnp.asarray(data.std)
    correct = np.zeros(trials, np.int64)
    for start in range(0, len(split), batch_size):
        images = split.images[start : start + batch_size]
        labels = split.labels[start : start + batch_size]
        # a short last batch is filled with images of no class, so that one shape is compiled
        missing = min(batch_size, len(split)) - len(labels)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        labels = np.pad(labels, (0, missing), constant_values=-1)
        hits, rest = _count_correct(graph, params, rest, images, labels, mean, std, trials)
        correct += np.asarray(hits)
    return 100.0 * correct / len(split)


@functools.partial(jax.jit, static_argnums=(0, 7))
def _count_correct(graph, params, rest, images, labels, mean, std, trials):
    model = nnx.merge(graph, params, rest, copy=True)
    features = model.features(normalise(images, mean, std))

    def trial(rest, _):
        model = nnx.merge(graph, params, rest, copy=True)
        predicted = jnp.argmax(model.head(features), axis=-1)
        return nnx.state(model, nnx.Not(nnx.Param)), jnp.sum(predicted == labels)

    rest, correct = jax.lax.scan(trial, rest, length=trials)
    return correct, rest


def count_parameters(model: nnx.Module) -> int:
    """Numbers that training changes."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
