"""What the commands of tables 2 to 5 share: opening the data and the folder, scores, rows."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh

from experiments import data
from experiments.data import archive
from experiments.output import boards, runs, summary, terminal, views
from experiments.output.rows import name_of
from experiments.training import checkpoints, evaluation, loop, parallel
from experiments.training.options import Options

Row = dict[str, Any]
Build = Callable[[nnx.Rngs], Any]
EXPECTED = (
    *(archive.DataError, checkpoints.CheckpointError, runs.FolderError, OSError),
    *(parallel.DeviceError, loop.ConfigurationError, boards.MissingError),
)
"""Errors that a command reports in one line."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of a command.

    Attributes:
      name: name in tables and pictures.
      tags: entries of all its rows, which tell it from the others of the command.
      build: makes it from random streams.
      optimiser: how it is trained, from a seed.
      settings: what its final row says of it.
      paper: accuracy in the paper, in percent, and its standard deviation over trials.
      final: further entries of the final row.
      measure: further rows and entries of the final row, from the trained network and its data.
      place: its name in the folder; by default that of the tags and the seed.
      after: number of epochs that were trained before.
    """

    name: str
    tags: Mapping[str, Any]
    build: Build
    optimiser: Callable[[int], loop.TrainConfig]
    settings: Mapping[str, Any]
    paper: tuple[float, float | None] | None = None
    final: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Callable[[Any, data.Dataset], tuple[list[Row], Row]] = lambda *_: ([], {})
    place: str | None = None
    after: int = 0

    def parts(self, seeds: Any) -> tuple[Any, ...]:
        """The parts of its name in the folder."""
        return (*self.tags.values(), seeds) if self.place is None else (self.place,)

    def entries(self, dataset: data.Dataset, seed: int) -> tuple[Row, Row]:
        """Those of all its rows, and those of the final row that are known before the training."""
        optimiser, (accuracy, std) = self.optimiser(seed), self.paper or (None, None)
        tags = {"dataset": dataset.name, "name": self.name, **self.tags, "seed": seed}
        return tags, {
            **{"paper_accuracy": accuracy, "paper_std": std},
            **{"epochs": optimiser.epochs, "batch_size": optimiser.batch_size},
            "train_examples": len(dataset.train),
            "config": {**self.settings, "training": optimiser.settings()},
            **runs.environment(),
            **self.final,
        }


class Job(NamedTuple):
    """The data, the devices and the folder of a run."""

    source: data.Source
    mesh: Mesh
    stored: runs.Run


@contextlib.contextmanager
def opened(
    table: str, options: Options, builds: Callable[[data.Dataset], Iterable[Build]]
) -> Iterator[Job]:
    """The job of a command; at the end of the block, its page, table and pictures are written.

    The data, the devices and the networks are checked before any file is written or removed.

    Args:
      table: name of the module.
      options: the options, after `filled`.
      builds: functions that make the networks for a data set of this shape.

    Raises:
      loop.ConfigurationError: a network does not fit the images, or a batch the devices.
      checkpoints.CheckpointError: the path of the folder is not text.
      runs.FolderError: the folder belongs to another run, is damaged, or is in use.
    """
    checkpoints.check_path(options.out)
    if options.tensorboard:
        boards.check_installed()
    mesh = options.machine.mesh()
    source = data.read(options.dataset, options.data_dir)
    first = source.dataset(options.seeds[0], options.examples)
    loop.steps_per_epoch(first, options.train_config(0), mesh)
    try:
        for build in builds(first):
            nnx.eval_shape(lambda build=build: build(nnx.Rngs(0)))
    except ValueError as error:
        raise loop.ConfigurationError(f"{first.name}: {error}") from error
    with runs.locked(options.out):
        stored = runs.Run(
            options.out,
            {**options.settings(table), "data_sha256": source.sha256()},
            files=summary.FILES,
            overwrite=options.overwrite,
            tensorboard=options.tensorboard,
        )
        yield Job(source, mesh, stored)
        if terminal.is_first():
            for remark in summary.write(options.out, stored.rows):
                terminal.say(remark)


def scored(trained: loop.Trained, dataset: data.Dataset, trials: int, mesh: Mesh) -> Row:
    """Test and validation accuracy in percent, sampled as in the paper and with full gradients.

    A network that samples is tested `trials` times; its scores are the mean and the standard
    deviation over these n trials (divided by n, not n − 1).
    """
    model, scores = trained.model, {}
    sampled = model.is_stochastic
    for prefix, split in (("validation_", dataset.validation), ("", dataset.test)):
        accuracies = evaluation.evaluate(
            model, split, dataset, trials=trials if sampled else 1, mesh=mesh
        )
        scores[f"{prefix}accuracy"] = float(accuracies.mean())
        scores[f"{prefix}std"] = float(accuracies.std()) if sampled else None
        full = None
        if sampled:
            full = evaluation.evaluate(model, split, dataset, deterministic=True, mesh=mesh)
        scores[f"{prefix}full_gradient_accuracy"] = None if full is None else float(full[0])
    return {
        **scores,
        "trials": trials if sampled else 1,
        "parameters": loop.count_parameters(model),
        "train_seconds": trained.seconds,
    }


def run(
    table: str,
    options: Options,
    networks: Callable[[Any, data.Dataset], Iterable[Network]],
    *,
    prepare: Callable[[data.Dataset], data.Dataset] = lambda dataset: dataset,
    together: bool = False,
) -> list[Row]:
    """Train the networks of a command that are not finished yet, write the files, and return all rows.

    Args:
      table: name of the module.
      options: the options.
      networks: the networks, from the filled options and a data set of this shape.
      prepare: changes the data set.
      together: train the network of all seeds in one step.
    """
    options = options.filled()

    def builds(first: data.Dataset) -> Iterator[Build]:
        return (network.build for network in networks(options, first))

    with opened(table, options, builds) as job:
        for group in [options.seeds] if together else [(seed,) for seed in options.seeds]:
            datasets = {s: prepare(job.source.dataset(s, options.examples)) for s in group}
            for network in networks(options, datasets[group[0]]):
                remaining = {
                    seed: dataset
                    for seed, dataset in datasets.items()
                    if not job.stored.final(**network.tags, seed=seed)
                }
                train_and_test(job, network, remaining, options.trials)
    return job.stored.rows


def train_and_test(
    job: Job, network: Network, datasets: Mapping[int, data.Dataset], trials: int
) -> dict[int, Any]:
    """Train a network from each seed, test it, and store its rows, unless they are stored already.

    If a seed diverges, the others are trained again without it.

    Returns:
      the trained networks by their seeds, without those that diverged.
    """
    remaining = dict(datasets)
    while remaining:
        try:
            return _trained(job, network, remaining, trials)
        except loop.DivergenceError as error:
            tags, final = network.entries(remaining.pop(error.seed), error.seed)
            job.stored.add(diverged(tags, error, final))
    return {}


def _trained(
    job: Job, network: Network, datasets: Mapping[int, data.Dataset], trials: int
) -> dict[int, Any]:
    stored, seeds = job.stored, list(datasets)
    known = [seed for seed in seeds if stored.final(**network.tags, seed=seed)]
    boards = {s: stored.board(*network.parts(s), after=network.after) for s in seeds}
    options: dict[str, Any] = {
        "label": network.name,
        "checkpoint": stored.checkpoint(*network.parts("-".join(map(str, seeds)))),
        "mesh": job.mesh,
    }
    optimiser = network.optimiser(seeds[0])
    watches = [] if known else [board.show for board in boards.values()]
    if len(seeds) == 1:
        watch = watches[0] if watches else None
        one = loop.train(network.build, datasets[seeds[0]], optimiser, watch=watch, **options)
        trained = [one]
    else:
        trained = loop.train_together(
            network.build, dict(datasets), optimiser, watches=watches, **options
        )
    for (seed, dataset), one in zip(datasets.items(), trained, strict=True):
        if seed not in known:
            scores = scored(one, dataset, trials, job.mesh)
            boards[seed].finish(scores["accuracy"])
            tags, final = network.entries(dataset, seed)
            more, ends = network.measure(one.model, dataset)
            rows = finished(tags, one, scores, {**final, **ends}, after=network.after)
            stored.add([*rows[:-1], *({"kind": "residuals", **tags, **r} for r in more), rows[-1]])
    return {seed: one.model for seed, one in zip(seeds, trained, strict=True)}


def finished(
    tags: Mapping[str, Any], trained: loop.Trained, scores: Row, final: Row, *, after: int = 0
) -> list[Row]:
    """The rows of a network: one for each epoch, numbered from `after` + 1, and the final one; prints it."""
    accuracy = views.percent(scores["accuracy"], scores["std"])
    terminal.say(f"{tags['name']}, seed {tags['seed']}: {accuracy} % in {trained.seconds:.0f} s")
    epochs = [
        {"kind": "epoch", **tags, **record, "epoch": after + int(record["epoch"])}
        for record in trained.history
    ]
    return [*epochs, {"kind": "final", **tags, **scores, **final}]


def diverged(tags: Mapping[str, Any], error: loop.DivergenceError, final: Row) -> list[Row]:
    """The row of a network that diverged, without an accuracy; prints the error."""
    terminal.say(str(error))
    return [{"kind": "final", **tags, "accuracy": None, **final, "error": str(error)}]


def main(
    table: str, config: type[Any], run: Callable[[Any], list[Row]], args: list[str] | None
) -> None:
    """Parse the command line, run, print the table; fail if a network diverged."""
    default = config(out=Path("runs") / table)
    options: Any = terminal.parse(config, f"experiments.{table}", args, default=default)
    try:
        with checkpoints.termination_handled_by(_stop):
            rows = run(options)
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    terminal.say(f"\n{summary.table(rows)}\nwritten to {options.out}")
    failed = [row for row in rows if row["kind"] == "final" and row["accuracy"] is None]
    if failed:
        names = (f"{name_of(row)}, seed {row['seed']}" for row in failed)
        sys.exit(f"error: diverged: {'; '.join(names)}")


def _stop(number: int, _: Any) -> None:
    """End the program with a message; training saves a checkpoint first."""
    print("stopped; the same command goes on from what is saved", file=sys.stderr)
    sys.exit(128 + number)
