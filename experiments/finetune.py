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
from typing import Annotated, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from experiments import archive, checkpoints, comparison, data, results, training

FINETUNE_RATES = (1e-3, 1e-4)
EPOCHS = {"digits": (20, 8)}
PAPER_EPOCHS = (300, 200)
BATCH_SIZE = {"digits": 32}
PAPER_BATCH_SIZE = 128
SMOKE: dict[str, Any] = {
    "epochs": 2,
    "finetune_epochs": 2,
    "width": 0.125,
    "examples": 320,
    "trials": 3,
}
Accuracy = tuple[float, float | None]
"""In percent, with the standard deviation over trials."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of tables 3 to 5."""

    out: Path = Path("runs/finetune")
    """Folder of the results, and of checkpoints to resume from; an earlier run's results are replaced."""
    dataset: Annotated[data.DatasetName, tyro.conf.arg(metavar="NAME|FILE.npz")] = "digits"
    """digits (comes with scikit-learn), cifar10 or cifar100 (read from --data-dir), or FILE.npz with
    arrays "images" and "labels"."""
    data_dir: Path = Path("runs/data")
    """Folder of the CIFAR archives, downloaded if absent, and of the prepared copies."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Of the baseline, a third at each learning rate; by default 20 on digits, else the paper's 300."""
    finetune_epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Half at each learning rate; by default 8 on digits, else 200."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """By default 32 on digits, else 128."""
    seeds: tuple[int, ...] = (0,)
    """Each of them is a run: validation split, initial weights, order of the examples, sampling."""
    trials: int = 20
    """Tests of a network that samples at test time."""
    width: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Factor of the numbers of channels and hidden units; by default 1."""
    examples: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Train on so many images only; by default on all."""
    augment: bool = False
    """Crop and flip the training images at random; not in the paper."""
    precision: training.Precision = "float32"
    """bf16 computes plain layers in bfloat16, and solvers in float32 as ever."""
    smoke: bool = False
    """A minute's run on a narrow network and few images, without checkpoints."""

    def __post_init__(self):
        for name in ("epochs", "finetune_epochs", "batch_size", "trials", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.width is not None and not self.width > 0:
            raise ValueError(f"width: expected a positive factor, got {self.width}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds: expected at least one, not negative, each once, got {self.seeds}"
            )

    def filled(self) -> Self:
        """The options with the defaults of the data set, or of a smoke run, filled in."""
        epochs, finetune_epochs = EPOCHS.get(self.dataset, PAPER_EPOCHS)
        defaults: dict[str, Any] = {
            "epochs": epochs,
            "finetune_epochs": finetune_epochs,
            "batch_size": BATCH_SIZE.get(self.dataset, PAPER_BATCH_SIZE),
            "width": 1.0,
        }
        if self.smoke:
            defaults |= SMOKE | {"batch_size": 32}
        missing = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        if self.smoke:
            missing["trials"] = min(self.trials, SMOKE["trials"])
        return dataclasses.replace(self, **missing)

    def train_config(self, seed: int) -> training.TrainConfig:
        """Of the baseline; `filled` comes first."""
        assert self.epochs is not None and self.batch_size is not None  # noqa: PT018
        return training.TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            augment=self.augment,
            precision=self.precision,
        )

    def finetune_config(self, seed: int) -> training.TrainConfig:
        """Of what follows, swapped or not; `filled` comes first."""
        assert self.finetune_epochs is not None
        return dataclasses.replace(
            self.train_config(seed), epochs=self.finetune_epochs, learning_rates=FINETUNE_RATES
        )


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
    """A table: its name, its title, and its studies of a data set.

    Attributes:
      name: of the module and of the files.
      title: of pictures.
      studies: from the filled options and a data set.
      draw: more pictures, from the finals and the folder; None for none.
      files: the names of those pictures.
    """

    name: str
    title: str
    studies: Callable[[Any, data.Dataset], Sequence[Study]]
    draw: Callable[[list[dict[str, Any]], Path], None] | None = None
    files: tuple[str, ...] = ()


def check_methods(methods: Sequence[str], num_iters: int, decay: float = 1.0) -> None:
    """Raise a ValueError for what a table's command line cannot run."""
    if not methods or "dropout" in methods:
        got = ", ".join(methods) or "none"
        raise ValueError(f"methods: expected at least one solver and no dropout, got {got}")
    if num_iters < 1:
        raise ValueError(f"num_iters: expected at least 1, got {num_iters}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a factor in (0, 1], got {decay}")


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
    """Run all studies for all seeds, write the files, and return the final rows."""
    options = options.filled()
    data.check_name(options.dataset)
    environment = results.environment()
    rows: list[dict[str, Any]] = []

    def add(new: list[dict[str, Any]]) -> None:
        if not rows:
            comparison.clear(options.out, table.files)
        rows.extend(new)
        comparison.write(options.out, table.name, rows)

    for seed in options.seeds:
        dataset = _load(options, seed)
        for study in table.studies(options, dataset):
            _run_study(study, dataset, options, seed, environment, add)
    finals = [row for row in rows if row["kind"] == "final"]
    title = f"{table.title}, {finals[0]['dataset']}"
    comparison.draw(options.out, rows, title=title)
    if table.draw is not None:
        table.draw(finals, options.out)
    return finals


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
    environment: dict[str, Any],
    add: Callable[[list[dict[str, Any]]], None],
) -> None:
    tags = {"dataset": dataset.name, "study": study.name, "label": study.label, "seed": seed}

    def network(arm: Arm, build: Callable[[nnx.Rngs], Any], config: training.TrainConfig) -> Any:
        name = f"{study.name}-{arm.name}-seed{seed}"
        folder = None if options.smoke else options.out / "checkpoints" / name
        here = {**tags, "arm": arm.name, "arm_label": arm.label}
        after = 0 if arm.name == "baseline" else options.epochs or 0
        settings = {**study.settings, **arm.settings, "training": dataclasses.asdict(config)}
        final = {"kind": "final", **here, **_paper(arm.paper)}
        final |= {"epochs": options.epochs, "finetune_epochs": options.finetune_epochs}
        final |= {"batch_size": config.batch_size, "train_examples": len(dataset.train)}
        label = f"{study.label} {arm.label}, seed {seed}"
        try:
            trained = training.train(build, dataset, config, label=label, checkpoint=folder)
        except training.DivergenceError as error:
            if arm.swap is None:
                raise
            print(f"{error}", flush=True)
            add([{**final, "error": str(error), "config": settings, **environment}])
            return None
        scores = scored(trained, dataset, options.trials)
        print(f"{label}: {results.percent(scores['accuracy'], scores['std'])} %", flush=True)
        epochs = [
            {"kind": "epoch", **here, **record, "epoch": after + record["epoch"]}
            for record in trained.history
        ]
        add([*epochs, {**final, **scores, "config": settings, **environment}])
        return trained.model

    first = Arm("baseline", "baseline", paper=study.paper)
    baseline = network(first, study.build, options.train_config(seed))
    control = Arm("control", "baseline, finetuned")
    for arm in (control, *study.arms):
        network(arm, swapped(baseline, arm), options.finetune_config(seed))


def scored(trained: training.Trained, dataset: data.Dataset, trials: int) -> dict[str, Any]:
    """Test and validation accuracy, sampled as in the paper and along the full gradient."""
    model, scores = trained.model, {}
    for prefix, split in (("validation_", dataset.validation), ("", dataset.test)):
        sampled = model.is_stochastic
        accuracies = training.evaluate(model, split, dataset, trials=trials if sampled else 1)
        scores[f"{prefix}accuracy"] = float(accuracies.mean())
        scores[f"{prefix}std"] = float(accuracies.std()) if sampled else None
        full = training.evaluate(model, split, dataset, deterministic=True) if sampled else None
        scores[f"{prefix}full_gradient_accuracy"] = None if full is None else float(full[0])
    return {
        **scores,
        "trials": trials if model.is_stochastic else 1,
        "parameters": training.count_parameters(model),
        "train_seconds": trained.seconds,
    }


def _paper(accuracy: Accuracy | None) -> dict[str, float | None]:
    mean, std = accuracy or (None, None)
    return {"paper_accuracy": mean, "paper_std": std}


def main(table: Table, config: type[Options], args: list[str] | None) -> None:
    """Parse the command line, run, print the table."""
    with contextlib.suppress(ValueError):  # only the main thread may: so that a kill cleans up
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options: Any = tyro.cli(config, prog=f"python -m experiments.{table.name}", args=args)
    expected = (
        archive.DataError,
        checkpoints.CheckpointError,
        training.ConfigurationError,
        training.DivergenceError,
        OSError,
    )
    try:
        finals = run(table, options)
    except expected as error:
        sys.exit(f"error: {error}")
    print(f"\n{comparison.table(finals)}\nwritten to {options.out}")
