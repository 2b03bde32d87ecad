"""What tables 3 to 5 share: train a network, swap a solver into it, finetune, and compare.

The paper finetunes the swapped network and compares it with the network before. More training alone
might do as much, so the unswapped network, the control, is finetuned here as well for the same
epochs. The gain of the swap is the difference between the two finetuned networks.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import data
from experiments.training import evaluation, loop, tables
from experiments.training.options import FinetuneOptions

Accuracy = tuple[float, float | None]
"""In percent, with the standard deviation over trials."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One network that is finetuned from the trained baseline.

    Attributes:
      name: name in rows and file names.
      label: name in tables and pictures.
      swap: replaces layers of a copy of the baseline, in place; None for the control.
      paper: the accuracy in the paper.
      settings: settings to store in the rows.
      scored_at_start: also store the validation accuracy after the swap, before finetuning.
    """

    name: str
    label: str
    swap: Callable[[Any, nnx.Rngs], None] | None = None
    paper: Accuracy | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scored_at_start: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """A baseline and the networks that are finetuned from it; the control is added to them.

    Attributes:
      name: name in rows and file names.
      label: name in tables and pictures.
      build: makes the baseline from random streams.
      arms: the finetuned networks, without the control.
      paper: the baseline's accuracy in the paper.
      settings: settings to store in the rows.
    """

    name: str
    label: str
    build: Callable[[nnx.Rngs], Any]
    arms: tuple[Arm, ...]
    paper: Accuracy | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Studies = Callable[[Any, data.Dataset], Sequence[Study]]
"""The studies of a table, from the filled options and a data set."""


def copied(model: Any) -> Any:
    """A copy of a model that shares no arrays with it."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def swapped(baseline: Any, arm: Arm) -> Callable[[nnx.Rngs], Any]:
    """What `loop.train` builds: a copy of the baseline, with the arm's solver in place."""

    def build(rngs: nnx.Rngs) -> Any:
        model = copied(baseline)
        if arm.swap is not None:
            arm.swap(model, rngs)
        return model

    return build


def run(
    table: str, options: FinetuneOptions, studies: Studies, *, arms_of_shapes: bool = True
) -> list[tables.Row]:
    """Train the networks that are not finished yet, write the files, and return all rows.

    Args:
      table: name of the module.
      options: the options.
      studies: makes the studies.
      arms_of_shapes: whether the swaps can be tried on shapes, before anything is trained.
    """
    options = options.filled()

    def builds(dataset: data.Dataset) -> Iterator[tables.Build]:
        for study in studies(options, dataset):
            yield study.build
            for arm in study.arms if arms_of_shapes else ():
                yield lambda rngs, study=study, arm=arm: swapped(study.build(rngs), arm)(rngs)

    with tables.opened(table, options, builds) as job:
        for seed in options.seeds:
            dataset = job.source.dataset(seed, options.examples)
            for study in studies(options, dataset):
                _run_study(study, dataset, options, seed, job)
    return job.stored.rows


def _run_study(
    study: Study, dataset: data.Dataset, options: FinetuneOptions, seed: int, job: tables.Job
) -> None:
    """Train the baseline, and finetune from it every network that is not finished yet.

    The row of a network that diverges has no accuracy; if the baseline diverges, nothing is finetuned.
    """
    first = Arm("baseline", "baseline", paper=study.paper)
    arms = (Arm("control", "baseline, finetuned"), *study.arms)
    about, stored = {"study": study.name, "seed": seed}, job.stored

    def trained(arm: Arm, build: tables.Build, config: loop.TrainConfig) -> Any:
        final = {key: getattr(options, key) for key in ("epochs", "finetune_epochs")}
        if arm.scored_at_start and not stored.final(arm=arm.name, **about):
            start = build(nnx.Rngs(params=seed, dropout=seed + 1))
            start = evaluation.evaluate(start, dataset.validation, dataset, mesh=job.mesh)
            final["start_validation_accuracy"] = float(start.mean())
        network = tables.Network(
            f"{study.label} {arm.label}",
            {"study": study.name, "arm": arm.name},
            build,
            lambda _: config,
            {**study.settings, **arm.settings},
            arm.paper,
            final,
            place=f"{study.name}-{arm.name}-seed{seed}",
            after=0 if arm.name == "baseline" else options.epochs or 0,
        )
        return tables.train_and_test(job, network, {seed: dataset}, options.trials).get(seed)

    rows = [stored.final(arm=arm.name, **about) for arm in (first, *arms)]
    if all(rows) or (rows[0] and rows[0]["accuracy"] is None):
        return
    baseline = trained(first, study.build, options.train_config(seed))
    for arm, row in zip(arms, rows[1:], strict=True):
        if baseline is not None and not row:
            trained(arm, swapped(baseline, arm), options.finetune_config(seed))


def main(
    table: str,
    config: type[FinetuneOptions],
    studies: Studies,
    args: list[str] | None,
    **options: bool,
) -> None:
    """Run a table's command, with the options of `run`."""
    tables.main(table, config, lambda config: run(table, config, studies, **options), args)
