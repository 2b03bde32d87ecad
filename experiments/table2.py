"""Table 2: LeNet with dropout layers against the same network with Prox-SG solvers in their place.

    python -m experiments.table2
    python -m experiments.table2 --dataset cifar10 --data-dir DIR --epochs 12 --seeds 0 1 2

Two hidden layers of 120 and 84 units can be marked D: D-ND is the penultimate, ND-D the last, D-D both.
A marked layer has dropout (p = 0.5) before it, or is solved by 10 iterations of Prox-SG with
τ = n1/2, or by another method. All networks are trained from scratch and tested once, after the last
epoch, those with stochastic solvers in 20 trials, since they sample at test time as well. Nothing is
chosen by the test set. A run that was stopped goes on when the same command is given again.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019, section 4, table 2.
"""

import contextlib
import dataclasses
import itertools
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from experiments import (
    archive,
    checkpoints,
    curves,
    data,
    evaluation,
    networks,
    parallel,
    report,
    results,
    steps,
    training,
)
from experiments.networks import BlockConfig, LeNet, LeNetConfig, Method, Variant

PAPER: dict[tuple[str, str], tuple[float, float | None]] = {
    ("D-D", "dropout"): (64.39, None),
    ("D-ND", "dropout"): (71.72, None),
    ("ND-D", "dropout"): (68.54, None),
    ("D-D", "prox-sg"): (72.86, 0.177),
    ("D-ND", "prox-sg"): (75.20, 0.205),
    ("ND-D", "prox-sg"): (76.23, 0.206),
}
"""Accuracy in percent on CIFAR-10 after 300 epochs, and standard deviation over 20 trials."""

EPOCHS = {"digits": 20}
BATCH_SIZE = {"digits": 32}
SMOKE_EPOCHS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the LeNets of table 2 and print their accuracy beside the paper's."""

    dataset: data.DatasetName = "digits"
    """"digits" comes with scikit-learn; "cifar10" and "cifar100" are read from --data-dir; FILE.npz."""
    data_dir: Path = Path("runs/data")
    """Folder of cifar-10-python.tar.gz, downloaded if absent, and of the prepared copy."""
    out: Path = Path("runs/table2")
    """Folder of the results and checkpoints of one configuration; a stopped run goes on there."""
    overwrite: bool = False
    """Remove the results and checkpoints in --out first."""
    smoke: bool = False
    """Two epochs and two trials, unless they are given: to see that everything works."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """A third at each learning rate; by default 20 on digits, else the paper's 300."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """By default 32 on digits, else 128."""
    seeds: tuple[int, ...] = (0,)
    """Each of the validation split, initial weights, order of the examples and sampling."""
    variants: tuple[Variant, ...] = ("D-D", "D-ND", "ND-D")
    """Which of the two hidden layers, penultimate-last, are marked D."""
    methods: tuple[Method, ...] = ("dropout", "prox-sg")
    """What the mark D means."""
    trials: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Tests of a network that samples at test time; by default 20."""
    decay: float = 0.9
    """Factor of the solver's step size, 1/L at first, from one iteration to the next."""
    augment: bool = False
    """Crop and flip the training images at random."""
    precision: steps.Precision = "float32"
    """Of the plain layers; solvers, parameters and loss are float32."""
    seeds_at_once: bool = False
    """Train a network from all --seeds in one vmapped step, at the memory of as many networks and data
    sets; meant for an accelerator that one network leaves idle, and slower on a CPU."""
    tensorboard: bool = False
    """Write the curves of each network for TensorBoard as well, to --out/tensorboard."""
    machine: tyro.conf.OmitArgPrefixes[parallel.Machine] = dataclasses.field(
        default_factory=parallel.Machine
    )

    def __post_init__(self):
        for name in ("epochs", "batch_size", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a factor in (0, 1], got {self.decay}")
        if not self.variants or not self.methods or not self.seeds:
            raise ValueError("variants, methods, seeds: expected at least one of each, got none")

    @property
    def num_trials(self) -> int:
        """Tests of a network that samples."""
        return self.trials or (2 if self.smoke else 20)

    def train_config(self, seed: int) -> training.TrainConfig:
        """The optimiser's configuration, with the data set's defaults filled in."""
        epochs = SMOKE_EPOCHS if self.smoke else EPOCHS.get(self.dataset, 300)
        return training.TrainConfig(
            epochs=self.epochs or epochs,
            batch_size=self.batch_size or BATCH_SIZE.get(self.dataset, 128),
            seed=seed,
            augment=self.augment,
            precision=self.precision,
        )

    def settings(self) -> dict[str, Any]:
        """What networks of different seeds, variants and methods have in common."""
        optimiser = dataclasses.asdict(self.train_config(0))
        del optimiser["seed"]
        common = {"dataset": self.dataset, "trials": self.num_trials, "decay": self.decay}
        return {"table": "table2", **common, "training": optimiser}


def run(config: Config) -> list[dict[str, Any]]:
    """Run what is not finished yet, write the files and return all rows."""
    mesh = config.machine.mesh()
    files = (report.CSV, report.PAGE, *report.PICTURES)
    stored = results.Run(
        config.out,
        config.settings(),
        files=files,
        overwrite=config.overwrite,
        tensorboard=config.tensorboard,
    )
    seeds = tuple(dict.fromkeys(config.seeds))
    for group in [seeds] if config.seeds_at_once else [(seed,) for seed in seeds]:
        datasets = {seed: data.load(config.dataset, config.data_dir, seed=seed) for seed in group}
        for variant, method in itertools.product(
            dict.fromkeys(config.variants), dict.fromkeys(config.methods)
        ):
            block = BlockConfig(method, decay=config.decay)
            remaining = {
                seed: dataset
                for seed, dataset in datasets.items()
                if not stored.final(variant=variant, method=method, seed=seed)
            }
            if remaining:
                stored.add(_train_and_test(variant, block, remaining, config, mesh, stored))
    if parallel.is_first():
        report.write(config.out, stored.rows)
    return stored.rows


def _train_and_test(
    variant: Variant,
    block: BlockConfig,
    datasets: dict[int, data.Dataset],
    config: Config,
    mesh: Mesh,
    stored: results.Run,
) -> list[dict[str, Any]]:
    """The rows of one network, from each seed."""
    first = next(iter(datasets.values()))
    network = LeNetConfig(first.image_shape, len(first.classes), variant, block)
    names = {seed: (variant, block.method, seed) for seed in datasets}
    boards = {seed: stored.board(*names[seed]) for seed in datasets}
    trained = training.train_together(
        lambda rngs: LeNet(network, rngs=rngs),
        datasets,
        config.train_config(config.seeds[0]),
        label=_name(network),
        checkpoint=stored.checkpoint(variant, block.method, "-".join(map(str, datasets))),
        mesh=mesh,
        watches=[board.show for board in boards.values()],
    )
    rows = []
    for (seed, dataset), one in zip(datasets.items(), trained, strict=True):
        scores = evaluation.test_scores(one.model, dataset, trials=config.num_trials)
        boards[seed].finish(scores["accuracy"])
        if parallel.is_first():
            accuracy = results.percent(scores["accuracy"], scores["std"])
            about = f"{_name(network)}, seed {seed}"
            print(f"{about}: {accuracy} % in {one.seconds:.0f} s", flush=True)
        rows += _rows(network, dataset, config, seed, one, scores)
    return rows


def _name(network: LeNetConfig) -> str:
    return f"{network.variant} {networks.NAMES[network.block.method]}"


def _rows(
    network: LeNetConfig,
    dataset: data.Dataset,
    config: Config,
    seed: int,
    trained: training.Trained,
    scores: dict[str, Any],
) -> list[dict[str, Any]]:
    """Of one trained network: its epochs, the residuals of its solvers, the final row."""
    variant, method = network.variant, network.block.method
    optimiser = config.train_config(seed)
    paper = PAPER.get((variant, method)) if config.dataset == "cifar10" else None
    paper_accuracy, paper_std = paper or (None, None)
    tags = {"dataset": dataset.name, "name": _name(network), "variant": variant}
    tags = {**tags, "method": method, "seed": seed}
    final = {
        **scores,
        "validation_accuracy": trained.history[-1]["validation_accuracy"],
        "paper_accuracy": paper_accuracy,
        "paper_std": paper_std,
        "epochs": optimiser.epochs,
        "batch_size": optimiser.batch_size,
        "parameters": training.count_parameters(trained.model),
        "train_seconds": trained.seconds,
        "config": {
            "network": dataclasses.asdict(network),
            "training": dataclasses.asdict(optimiser),
        },
        **results.environment(),
    }
    rows = [{"kind": "epoch", **tags, **record} for record in trained.history]
    rows += [{"kind": "residuals", **tags, **curve} for curve in residuals(trained.model, dataset)]
    return [*rows, {"kind": "final", **tags, **final}]


def residuals(model: LeNet, dataset: data.Dataset, *, images: int = 256) -> list[dict[str, Any]]:
    """Relative residuals of each solver of a network on the first validation images.

    Returns:
      by layer, sampled (where the solver samples) and with full gradients: for each iteration the
      median over the images and the limits of the middle 80%.
    """
    networks.set_mode(model, "test")
    pixels = jnp.asarray(dataset.validation.images[:images])
    hidden = model.features(evaluation.normalise(pixels, dataset.mean, dataset.std))
    curves = []
    for name, layer in (("penultimate", model.penultimate), ("last", model.last)):
        solver = networks.solver_of(layer)
        for deterministic in (False, True):
            if solver is None or not (deterministic or solver.solver.stochastic):
                continue
            solution = solver.solve(hidden, deterministic=deterministic)
            scale = jnp.maximum(jnp.linalg.norm(solution.value, axis=-1), 1e-12)
            relative = np.asarray(solution.residuals / scale)
            limits = np.quantile(relative, (0.1, 0.5, 0.9), axis=1)
            low, middle, high = ([float(f"{x:.6g}") for x in line] for line in limits)
            about = {"layer": name, "deterministic": deterministic}
            curves.append({**about, "low": low, "middle": middle, "high": high})
        hidden = layer(hidden)
    return curves


def main(args: list[str] | None = None) -> None:
    """Parse the command line, run, print the table."""
    with contextlib.suppress(ValueError):  # only the main thread may: so that a kill cleans up
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    config = tyro.cli(Config, prog="python -m experiments.table2", args=args)
    try:
        rows = run(config)
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    if parallel.is_first():
        print(f"\n{report.table(rows)}\nwritten to {config.out}")


EXPECTED = (
    *(archive.DataError, checkpoints.CheckpointError, results.FolderError, OSError),
    *(parallel.DeviceError, training.ConfigurationError, training.DivergenceError),
    curves.MissingError,
)


if __name__ == "__main__":
    main()
