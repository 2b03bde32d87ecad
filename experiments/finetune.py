"""What tables 3 to 5 share: train a network, swap a solver into it, finetune, and compare.

The paper finetunes the swapped network and compares it with the network before. More training alone
might do as much, so the unswapped network is finetuned here as well, for the same epochs: the
control. What the swap brings is the difference between the two finetuned networks.
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh

from experiments import (
    archive,
    checkpoints,
    comparison,
    curves,
    data,
    evaluation,
    parallel,
    report,
    results,
    training,
)
from experiments.options import Options

Accuracy = tuple[float, float | None]
"""In percent, with the standard deviation over trials."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to go on from the trained baseline.

    Attributes:
      name: in rows and file names.
      label: in tables and pictures.
      swap: changes a copy of the baseline in place, with random streams; None is the control.
      paper: the accuracy in the paper.
      settings: for the rows.
    """

    name: str
    label: str
    swap: Callable[[Any, nnx.Rngs], None] | None = None
    paper: Accuracy | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """A baseline and the ways to go on from it; the control is added to them.

    Attributes:
      name: in rows and file names.
      label: in tables and pictures.
      build: makes the baseline from random streams.
      arms: without the control.
      paper: the baseline's accuracy in the paper.
      settings: for the rows.
    """

    name: str
    label: str
    build: Callable[[nnx.Rngs], Any]
    arms: tuple[Arm, ...]
    paper: Accuracy | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Table(NamedTuple):
    """A table: its name, its studies of a data set, and more pictures.

    Attributes:
      name: of the module.
      studies: from the filled options and a data set.
      draw: more pictures, from the final rows and the folder; None for none.
      files: the names of those pictures.
    """

    name: str
    studies: Callable[[Any, data.Dataset], Sequence[Study]]
    draw: Callable[[list[dict[str, Any]], Path], None] | None = None
    files: tuple[str, ...] = ()


def copied(model: Any) -> Any:
    """A model with arrays of its own, so that training it leaves the first as it is."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def swapped(baseline: Any, arm: Arm) -> Callable[[nnx.Rngs], Any]:
    """What `training.train` builds: a copy of the baseline, with the arm's solver in place."""

    def build(rngs: nnx.Rngs) -> Any:
        model = copied(baseline)
        if arm.swap is not None:
            arm.swap(model, rngs)
        return model

    return build


def run(table: Table, options: Options) -> list[dict[str, Any]]:
    """Run what is not finished yet, write the files, and return all final rows."""
    options = options.filled()
    data.check_name(options.dataset)
    mesh = options.machine.mesh()
    files = (report.CSV, report.PAGE, *report.PICTURES, *table.files)
    stored = results.Run(
        options.out,
        options.settings(table.name),
        files=files,
        overwrite=options.overwrite,
        tensorboard=options.tensorboard,
    )
    for seed in options.seeds:
        dataset = _load(options, seed)
        for study in table.studies(options, dataset):
            _run_study(study, dataset, options, seed, mesh, stored)
    if parallel.is_first():
        report.write(options.out, stored.rows)
        if table.draw is not None:
            table.draw(stored.finals, options.out)
    return stored.finals


def _load(options: Options, seed: int) -> data.Dataset:
    dataset = data.load(options.dataset, options.data_dir, seed=seed)
    if options.examples is None or options.examples >= len(dataset.train):
        return dataset
    chosen = np.random.default_rng([seed, 2]).permutation(len(dataset.train))[: options.examples]
    chosen.sort()
    train = data.Split(dataset.train.images[chosen], dataset.train.labels[chosen])
    return dataclasses.replace(dataset, train=train)


def _run_study(
    study: Study,
    dataset: data.Dataset,
    options: Options,
    seed: int,
    mesh: Mesh,
    stored: results.Run,
) -> None:
    """Train the baseline, and go on from it in every way that is not finished yet."""
    first = Arm("baseline", "baseline", paper=study.paper)
    arms = (Arm("control", "baseline, finetuned"), *study.arms)
    about = {"study": study.name, "seed": seed}
    if all(stored.final(arm=arm.name, **about) for arm in (first, *arms)):
        return

    def network(arm: Arm, build: Callable[[nnx.Rngs], Any], config: training.TrainConfig) -> Any:
        name = f"{study.label} {arm.label}"
        tags = {"dataset": dataset.name, "name": name, **about, "arm": arm.name}
        final = {
            **dict(zip(("paper_accuracy", "paper_std"), arm.paper or (None, None), strict=True)),
            **{key: getattr(options, key) for key in ("epochs", "finetune_epochs", "batch_size")},
            "train_examples": len(dataset.train),
            "config": {**study.settings, **arm.settings, "training": dataclasses.asdict(config)},
            **results.environment(),
        }
        finished = stored.final(arm=arm.name, **about)
        place = f"{study.name}-{arm.name}-seed{seed}"
        after = 0 if arm.name == "baseline" else options.epochs or 0
        board = stored.board(place, after=after)
        try:
            trained = training.train(
                build,
                dataset,
                config,
                label=name,
                checkpoint=stored.checkpoint(place),
                mesh=mesh,
                watch=None if finished else board.show,
            )
        except training.DivergenceError as error:
            if arm.swap is None:
                raise
            stored.add([{"kind": "final", **tags, "accuracy": None, **final, "error": str(error)}])
            _say(f"{error}")
            return None
        if not finished:
            scores = scored(trained, dataset, options.trials, mesh)
            board.finish(scores["accuracy"])
            rows: list[dict[str, Any]] = [
                {"kind": "epoch", **tags, **record, "epoch": after + int(record["epoch"])}
                for record in trained.history
            ]
            stored.add([*rows, {"kind": "final", **tags, **scores, **final}])
            accuracy = results.percent(scores["accuracy"], scores["std"])
            _say(f"{name}, seed {seed}: {accuracy} % in {trained.seconds:.0f} s")
        return trained.model

    baseline = network(first, study.build, options.train_config(seed))
    for arm in arms:
        if not stored.final(arm=arm.name, **about):
            network(arm, swapped(baseline, arm), options.finetune_config(seed))


def _say(text: str) -> None:
    if parallel.is_first():
        print(text, flush=True)


def scored(
    trained: training.Trained, dataset: data.Dataset, trials: int, mesh: Mesh
) -> dict[str, Any]:
    """Test and validation accuracy, sampled as in the paper and along the full gradient."""
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
        "parameters": training.count_parameters(model),
        "train_seconds": trained.seconds,
    }


def main(table: Table, config: type[Options], args: list[str] | None) -> None:
    """Parse the command line, run, print the table."""
    with contextlib.suppress(ValueError):  # only the main thread may: so that a kill cleans up
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options: Any = tyro.cli(config, prog=f"python -m experiments.{table.name}", args=args)
    expected = (
        *(archive.DataError, checkpoints.CheckpointError, results.FolderError, OSError),
        *(parallel.DeviceError, training.ConfigurationError, training.DivergenceError),
        curves.MissingError,
    )
    try:
        finals = run(table, options)
    except expected as error:
        sys.exit(f"error: {error}")
    _say(f"\n{comparison.table(finals)}\nwritten to {options.out}")
