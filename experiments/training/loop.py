"""Training of a network: the paper's schedule, one compiled step in a Python loop."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

import stochsolvers as ss
from experiments.data import Dataset
from experiments.networks import Network, set_mode
from experiments.output import terminal
from experiments.training import checkpoints, parallel, training_step
from experiments.training.checkpoints import Progress
from experiments.training.evaluation import evaluate
from experiments.training.training_step import State, TrainConfig

Record = dict[str, float]
Watch = Callable[[Sequence[Record]], None]
"""Called with the records of all epochs so far: when training begins or resumes, after each epoch."""


class DivergenceError(RuntimeError):
    """The loss of a seed is infinite or NaN."""

    def __init__(self, message: str, seed: int):
        super().__init__(message)
        self.seed = seed


class ConfigurationError(ValueError):
    """A configuration that does not fit the data, the devices, or the stored results."""


class Trained(NamedTuple):
    """A trained model, one record for each epoch, and the seconds of training per seed."""

    model: Any
    history: list[Record]
    seconds: float


def train(
    build: Callable[[nnx.Rngs], Network],
    data: Dataset,
    config: TrainConfig,
    *,
    watch: Watch | None = None,
    **options: Any,
) -> Trained:
    """Train a network from one seed; see `train_together`."""
    watches = [] if watch is None else [watch]
    (trained,) = train_together(build, {config.seed: data}, config, watches=watches, **options)
    return trained


def train_together(
    build: Callable[[nnx.Rngs], Network],
    data: dict[int, Dataset],
    config: TrainConfig,
    *,
    label: str,
    checkpoint: Path | None = None,
    mesh: Mesh | None = None,
    watches: Sequence[Watch] = (),
) -> list[Trained]:
    """Train a network from several seeds at once; each as if trained alone, up to round-off.

    The seeds' networks and data are stacked, and one step is vmapped over them; a single seed is not.

    Args:
      build: makes the network from random streams; for finetuning, one that is trained already.
      data: for each seed, its data; the validation split is scored after every epoch.
      config: configuration of the optimiser; its seed is not used.
      label: name of the network in the progress bar and in errors.
      checkpoint: a folder, saved to after every epoch, and on SIGTERM or Ctrl-C, which then end the
        program with status 143 or 130. A run is resumed from its own checkpoint to the same results.
      mesh: devices that share each batch; by default one.
      watches: one for each seed, or none.

    Raises:
      DivergenceError: the loss is not finite; names the seed and the step.
      ConfigurationError: the batch does not fit the training split or the devices, or there is
        nothing to do.
      checkpoints.CheckpointError: of another run, corrupt, or impossible to write.
    """
    mesh, seeds = mesh or parallel.data_mesh(), tuple(data)
    (count,) = {steps_per_epoch(each, config, mesh) for each in data.values()}
    total = config.epochs * count
    graph, state = _initial(build, seeds, config)
    progress, store = Progress(history=((),) * len(seeds)), None
    if checkpoint is not None:
        store = checkpoints.Checkpoints(checkpoint, _identity(graph, state, data, config))
        state, progress = store.restore(state) or (state, progress)
    _show(watches, progress)
    state = parallel.replicate(state, mesh)
    epoch_steps = _epoch_steps(graph, data, config, mesh)
    refresh = training_step.compiled_refresh(graph, together=len(seeds) > 1)

    start = time.perf_counter() - progress.seconds
    word = "seeds" if len(seeds) > 1 else "seed"
    about = f"{label}, {word} {' '.join(map(str, seeds))}"
    hidden = None if terminal.is_first() else True  # None shows the bar in a terminal only
    bar = tqdm(total=total, initial=progress.step, desc=about, leave=False, disable=hidden)
    with bar, checkpoints.deferred_termination() as terminated:
        while progress.step < total:
            epoch, history = progress.step // count, progress.history
            state, metrics = epoch_steps(state, epoch, progress.metrics, bar, terminated)
            _check_finite(metrics, label, seeds, epoch * count)
            done, partial = epoch * count + len(metrics), metrics.tolist()
            if len(metrics) == count:
                state = state._replace(rest=refresh(state.params, state.rest))
                scores = _validate(graph, state, data, mesh)
                rate = training_step.staged(config.learning_rates, done - 1, total)
                about_epoch = {"epoch": epoch + 1, "learning_rate": rate}
                elapsed = {"seconds": time.perf_counter() - start}
                history = tuple(
                    (*records, {**about_epoch, **_means(metrics[:, k]), **scores[k], **elapsed})
                    for k, records in enumerate(history)
                )
                partial = []
                bar.set_postfix(_postfix(history))
            progress = Progress(done, tuple(partial), history, time.perf_counter() - start)
            if store is not None:
                store.save(state, progress)
            _show(watches, progress)
            if parallel.anywhere(terminated):
                _stop(bar, progress.step, terminated, saved=store is not None)
    if store is not None:
        store.close()
    states = training_step.unstack(parallel.gather((state.params, state.rest)), len(seeds))
    return [
        Trained(nnx.merge(graph, *each), list(records), progress.seconds / len(seeds))
        for each, records in zip(states, progress.history, strict=True)
    ]


def _initial(
    build: Callable[[nnx.Rngs], Network], seeds: Sequence[int], config: TrainConfig
) -> tuple[Any, State]:
    """The networks before the first step: their common structure and their stacked states."""
    parts = []
    for seed in seeds:
        model: Any = build(nnx.Rngs(params=seed, dropout=seed + 1))
        training_step.set_precision(model, config.precision)
        set_mode(model, "train")
        ss.nnx.refresh_lipschitz(model)  # kept for an epoch, as in the paper
        parts.append(nnx.split(model, nnx.Param, ...))
    optimiser = training_step.optimizer(_rates(config, 0.0), config.optimizer)
    states = [State(params, rest, optimiser.init(params)) for _, params, rest in parts]
    return parts[0][0], training_step.stack(states)


def steps_per_epoch(data: Dataset, config: TrainConfig, mesh: Mesh) -> int:
    """Number of full batches in an epoch; raises a `ConfigurationError` if there is none."""
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


def _identity(
    graph: Any, state: State, data: dict[int, Dataset], config: TrainConfig
) -> dict[str, Any]:
    """The settings that a checkpoint must share with a run to be resumed by it."""
    splits = (split for each in data.values() for split in (each.train, each.validation))
    arrays = (array for split in splits for array in (split.images, split.labels))
    seeds = list(data)
    return {
        "training": {
            **config.settings(),
            "seed": seeds if len(seeds) > 1 else seeds[0],
        },
        "data": {
            "name": next(iter(data.values())).name,
            "sha256": checkpoints.digest(arrays),
        },
        "network": {"sha256": checkpoints.structure(graph, state)},
    }


def _epoch_steps(
    graph: Any, data: dict[int, Dataset], config: TrainConfig, mesh: Mesh
) -> Callable[..., tuple[State, np.ndarray]]:
    """(state, epoch, metrics so far) -> state and metrics after the epoch, or at a signal to stop.

    The metrics are loss and accuracy, shape (steps, seeds, 2).
    """
    together = len(data) > 1
    step = training_step.compiled_step(
        graph, augment=config.augment, together=together, optimizer_kind=config.optimizer
    )
    replicated = parallel.replicate(
        training_step.stack([_examples(data[seed], seed) for seed in data]), mesh
    )
    examples = len(next(iter(data.values())).train)
    count = examples // config.batch_size

    def run(state, epoch, metrics, bar, terminated):
        found = [np.asarray(values, np.float32) for values in metrics]
        orders = [
            np.random.default_rng([seed, 1, epoch]).permutation(examples)[
                : count * config.batch_size
            ]
            for seed in data
        ]
        batches = np.stack(orders, -1).reshape(count, config.batch_size, len(data))
        for k in range(len(found), count):
            number = epoch * count + k
            rate = training_step.staged(config.learning_rates, number, config.epochs * count)
            batch = batches[k].T if together else batches[k, :, 0]
            state, values = step(
                state,
                replicated,
                parallel.shard(batch, mesh, axis=batch.ndim - 1),
                np.uint32(number),
                training_step.Rates(*map(np.float32, _rates(config, rate))),
            )
            found.append(values)
            bar.update()
            if parallel.stop_now(terminated, number + 1):
                break
        return state, np.stack([np.reshape(v, (len(data), 2)) for v in jax.device_get(found)])

    return run


def _rates(config: TrainConfig, learning_rate: float) -> training_step.Rates:
    """The parameters of the optimiser at one step."""
    return training_step.Rates(
        learning_rate, config.momentum, config.weight_decay, config.second_decay
    )


def _examples(data: Dataset, seed: int) -> training_step.Examples:
    return training_step.Examples(
        data.train.images, data.train.labels, data.mean, data.std, jax.random.key(seed + 2)
    )


def _validate(graph: Any, state: State, data: dict[int, Dataset], mesh: Mesh) -> list[Record]:
    """The validation accuracy of each seed."""
    scores = []
    for each, part in zip(data.values(), training_step.unstack(state, len(data)), strict=True):
        model = nnx.merge(graph, part.params, part.rest, copy=True)
        accuracy = float(evaluate(model, each.validation, each, mesh=mesh)[0])
        scores.append({"validation_accuracy": accuracy})
    return scores


def _means(metrics: np.ndarray) -> Record:
    loss, accuracy = map(float, metrics.mean(axis=0))
    return {"train_loss": loss, "train_accuracy": accuracy}


def _check_finite(metrics: np.ndarray, label: str, seeds: Sequence[int], first_step: int) -> None:
    broken = np.argwhere(~np.isfinite(metrics[..., 0]))
    if broken.size:
        step, k = broken[0]
        raise DivergenceError(
            f"{label}, seed {seeds[k]}: the loss is {metrics[step, k, 0]} at step "
            f"{first_step + step + 1}. "
            "Try a smaller --learning-rate or, with a solver, a smaller --decay.",
            seeds[k],
        )


def _stop(bar: tqdm, step: int, received: Sequence[int], *, saved: bool) -> None:
    """End the program with the status of the signal that this or another process received."""
    if terminal.is_first():
        there = "; the same command goes on from there" if saved else ""
        bar.write(f"stopped at step {step}{there}", file=sys.stderr)
    sys.exit(128 + (received[0] if received else signal.SIGTERM))


def _postfix(history: Sequence[Sequence[Record]]) -> dict[str, str]:
    """Loss and validation accuracy of the last epoch, mean over the seeds, for the progress bar."""
    loss, accuracy = (
        np.mean([records[-1][key] for records in history])
        for key in ("train_loss", "validation_accuracy")
    )
    return {"loss": f"{loss:.3f}", "validation": f"{accuracy:.2f}%"}


def _show(watches: Sequence[Watch], progress: Progress) -> None:
    for watch, records in zip(watches, progress.history, strict=False):
        watch(records)


def count_parameters(model: Any) -> int:
    """Number of trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
