"""Training of a network: the paper's schedule, one compiled step in a Python loop."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

import stochsolvers as ss
from experiments import checkpoints, parallel
from experiments.checkpoints import Progress
from experiments.data import Dataset
from experiments.evaluation import Model, evaluate, normalise
from experiments.networks import set_mode

Precision = Literal["float32", "bf16"]
CROP_PADDING = 4


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The paper's optimiser.

    Attributes:
      epochs: in all; an equal part of the steps at each learning rate.
      batch_size: examples a step.
      learning_rates: one after the other.
      momentum: of SGD.
      weight_decay: of the weights and biases, added to the gradient before the momentum.
      seed: of the initialisation, the order of the examples and the sampling.
      augment: crop and flip the training images at random; the paper does not say that it did.
      precision: "bf16" computes plain layers in bfloat16; parameters, solvers and loss stay float32.
    """

    epochs: int = 300
    batch_size: int = 128
    learning_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    augment: bool = False
    precision: Precision = "float32"


class DivergenceError(RuntimeError):
    """The loss stopped being finite."""


class ConfigurationError(ValueError):
    """A configuration that does not fit the data, the machine, or what is stored already."""


class Trained(NamedTuple):
    """A trained model, one record for each epoch, and the seconds that training took."""

    model: Any
    history: list[dict[str, float]]
    seconds: float


class State(NamedTuple):
    """What a step changes: parameters, the model's other state, the optimiser's."""

    params: Any
    rest: Any
    optimiser: Any


def staged_learning_rate(rates: Sequence[float], total_steps: int) -> Callable[[Any], Any]:
    """k -> the learning rate at step k: each of the rates in turn, for equal parts of the steps."""

    def schedule(step):
        stage = jnp.minimum(len(rates) * jnp.asarray(step) // total_steps, len(rates) - 1)
        return jnp.asarray(rates, jnp.float32)[stage]

    return schedule


def optimizer(config: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """SGD with momentum on the loss plus (weight_decay/2) ||w||²."""
    schedule = staged_learning_rate(config.learning_rates, total_steps)
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum),
    )


def augmented(key: jax.Array, images: jax.Array, *, padding: int = CROP_PADDING) -> jax.Array:
    """Each image, with a border of zeros, cropped to its size at random, and flipped or not."""
    border = ((padding, padding), (padding, padding), (0, 0))

    def one(key, image):
        key_crop, key_flip = jax.random.split(key)
        row, column = jax.random.randint(key_crop, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(jnp.pad(image, border), (row, column, 0), image.shape)
        return jnp.where(jax.random.bernoulli(key_flip), crop[:, ::-1], crop)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def set_precision(model: Any, precision: Precision) -> None:
    """With "bf16", plain layers compute in bfloat16; solver layers keep float32 inside."""
    if precision == "float32":
        return
    for _, module in nnx.iter_modules(model):
        plain = isinstance(module, nnx.Linear | nnx.Conv | nnx.BatchNorm)
        if plain and not isinstance(module, ss.nnx.SolverLinear | ss.nnx.SolverConv):
            module.dtype = jnp.bfloat16


def train(
    build: Callable[[nnx.Rngs], Model],
    data: Dataset,
    config: TrainConfig,
    *,
    label: str,
    checkpoint: Path | None = None,
    mesh: Mesh | None = None,
) -> Trained:
    """Train a network.

    Args:
      build: makes the network from random streams; it may be trained already, to be finetuned.
      data: its training split is learned, its validation split watched once an epoch.
      config: of the optimiser.
      label: for the progress bar and for errors.
      checkpoint: a folder, saved to once an epoch, and on SIGTERM, which then ends the program with
        status 143. A run that finds its own checkpoint there goes on as if it had not stopped.
      mesh: devices that share each batch; by default one.

    Raises:
      DivergenceError: the loss is not finite; names the step.
      ConfigurationError: the batch does not fit the training split or the devices, or there is
        nothing to do.
      checkpoints.CheckpointError: of another run, corrupt, or impossible to write.
    """
    mesh = mesh or parallel.data_mesh()
    steps = _steps_per_epoch(data, config, mesh)
    total = config.epochs * steps
    model: Any = build(nnx.Rngs(params=config.seed, dropout=config.seed + 1))
    set_precision(model, config.precision)
    set_mode(model, "train")
    ss.nnx.refresh_lipschitz(model)  # kept for an epoch, as in the paper
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    transform = optimizer(config, total)
    state = State(params, rest, jax.jit(transform.init)(params))
    progress, store = Progress(), None
    if checkpoint is not None:
        store = checkpoints.Checkpoints(checkpoint, _identity(graph, state, data, config))
        state, progress = store.restore(state) or (state, progress)
    state = parallel.replicate(state, mesh)
    epoch_steps = _epoch_steps(_compile_step(graph, transform, data, config), data, config, mesh)
    refresh = jax.jit(functools.partial(_refreshed, graph))

    start = time.perf_counter() - progress.seconds
    bar = tqdm(total=total, initial=progress.step, desc=label, leave=False, disable=_bar_off())
    with bar, checkpoints.deferred_termination() as terminated:
        while progress.step < total:
            epoch, history = progress.step // steps, progress.history
            state, losses = epoch_steps(state, epoch, progress.losses, bar, terminated)
            loss = _finite_mean(losses, label, epoch * steps)
            done = epoch * steps + len(losses)
            if len(losses) == steps:
                state = state._replace(rest=refresh(state.params, state.rest))
                model = nnx.merge(graph, state.params, state.rest, copy=True)
                accuracy = float(evaluate(model, data.validation, data, mesh=mesh)[0])
                scores = {"train_loss": loss, "validation_accuracy": accuracy}
                seconds = time.perf_counter() - start
                history, losses = (*history, {"epoch": epoch + 1, **scores, "seconds": seconds}), []
                bar.set_postfix(loss=f"{loss:.3f}", validation=f"{accuracy:.2f}%")
            seconds = time.perf_counter() - start
            progress = Progress(done, tuple(map(float, losses)), history, seconds)
            if store is not None:
                store.save(state, progress)
            if parallel.anywhere(terminated):
                sys.exit(143)
    if store is not None:
        store.close()
    params, rest = parallel.gather((state.params, state.rest))
    return Trained(nnx.merge(graph, params, rest), list(progress.history), progress.seconds)


def _steps_per_epoch(data: Dataset, config: TrainConfig, mesh: Mesh) -> int:
    if config.epochs < 1:
        raise ConfigurationError(f"epochs: expected at least 1, got {config.epochs}")
    if not 1 <= config.batch_size <= len(data.train):
        raise ConfigurationError(
            f"batch_size: expected 1 to {len(data.train)}, the training images of {data.name}, "
            f"got {config.batch_size}"
        )
    if config.batch_size % mesh.size:
        raise ConfigurationError(
            f"batch_size: expected a multiple of the {mesh.size} devices, got {config.batch_size}"
        )
    return len(data.train) // config.batch_size


def _identity(graph: Any, state: State, data: Dataset, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must agree on to be resumed."""
    splits = (data.train, data.validation)
    arrays = [array for split in splits for array in (split.images, split.labels)]
    return {
        "training": dataclasses.asdict(config),
        "data": {"name": data.name, "sha256": checkpoints.digest(arrays)},
        "network": {"sha256": checkpoints.structure(graph, state)},
    }


def _epoch_steps(step: Callable, data: Dataset, config: TrainConfig, mesh: Mesh) -> Callable:
    """(state, epoch, losses so far) -> the state and losses at its end, or when it has to stop."""
    images, labels = parallel.replicate((data.train.images, data.train.labels), mesh)
    count = len(data.train) // config.batch_size

    def run(state, epoch, losses, bar, terminated):
        losses = list(losses)
        order = np.random.default_rng([config.seed, 1, epoch]).permutation(len(data.train))
        for k in range(len(losses), count):
            batch = order[k * config.batch_size : (k + 1) * config.batch_size]
            number = np.uint32(epoch * count + k)
            state, loss = step(state, images, labels, parallel.shard(batch, mesh), number)
            losses.append(loss)
            bar.update()
            if terminated and jax.process_count() == 1:  # several stop together, after the epoch
                break
        return state, np.array(jax.device_get(losses), np.float32)

    return run


def _compile_step(
    graph: Any, transform: optax.GradientTransformation, data: Dataset, config: TrainConfig
) -> Callable[..., Any]:
    mean, std = data.mean, data.std

    def loss_of(params, rest, images, labels):
        model = nnx.merge(graph, params, rest, copy=True)
        logits = model(normalise(images, mean, std)).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    def step(state, images, labels, batch, number):
        images, labels = images[batch], labels[batch]
        if config.augment:
            key = jax.random.fold_in(jax.random.key(config.seed + 2), number)
            images = augmented(key, images)
        (loss, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.rest, images, labels
        )
        updates, optimiser = transform.update(gradients, state.optimiser, state.params)
        return State(optax.apply_updates(state.params, updates), rest, optimiser), loss

    return jax.jit(step, donate_argnums=0)


def _refreshed(graph: Any, params: Any, rest: Any) -> Any:
    """The state with every Lipschitz constant recomputed."""
    model = nnx.merge(graph, params, rest, copy=True)
    ss.nnx.refresh_lipschitz(model)
    return nnx.state(model, nnx.Not(nnx.Param))


def _finite_mean(losses: np.ndarray, label: str, first_step: int) -> float:
    broken = np.flatnonzero(~np.isfinite(losses))
    if broken.size:
        raise DivergenceError(
            f"{label}: the loss is {losses[broken[0]]} at step {first_step + broken[0] + 1}. "
            "Try a smaller learning rate or, with a solver, a smaller decay."
        )
    return float(losses.mean())


def _bar_off() -> bool | None:
    """No progress bar but the first process's, and none where there is no terminal."""
    return None if parallel.is_first() else True


def count_parameters(model: Any) -> int:
    """Numbers that training changes."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
