"""Table 2: LeNet with dropout layers against the same network with Prox-SG solvers in their place.

    python -m experiments.table2
    python -m experiments.table2 --dataset cifar10 --data-dir DIR --epochs 3

Two hidden layers of 120 and 84 units can be marked D: D-ND is the penultimate, ND-D the last, D-D both.
A marked layer has dropout (p = 0.5) before it, or is solved by 10 iterations of Prox-SG with
τ = n1/2. All six networks are trained from scratch and tested once at the end, those with solvers in
20 trials, since they sample at test time as well.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019, section 4, table 2.
"""

import contextlib
import dataclasses
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import tyro

import stochsolvers as ss
from experiments import archive, data, networks, plots, results, training
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

EPOCHS = {"digits": 20, "cifar10": 300}
BATCH_SIZE = {"digits": 32, "cifar10": 128}
FILES = ("results.jsonl", "table2.csv", "accuracy.png", "residual.png")
COLUMNS = (
    *("dataset", "variant", "method", "accuracy", "std", "trials", "full_gradient_accuracy"),
    *("validation_accuracy", "paper_accuracy", "paper_std", "epochs", "batch_size", "seed"),
    *("decay", "parameters", "train_seconds"),
)
NAMES = {"dropout": "dropout", "prox-sg": "Prox-SG"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Train the six LeNets of table 2 and print their accuracy beside the paper's."""

    dataset: data.DatasetName = "digits"
    """"digits" comes with scikit-learn, "cifar10" is read from --data-dir."""
    data_dir: Path = Path("runs/data")
    """Folder of cifar-10-python.tar.gz, downloaded if absent, and of the prepared copy."""
    out: Path = Path("runs/table2")
    """Folder of the results; an earlier run's files there are replaced."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """A third at each learning rate; by default 20 on digits, the paper's 300 on cifar10."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """By default 32 on digits, 128 on cifar10."""
    seed: int = 0
    """Of the validation split, initial weights, order of the examples and sampling."""
    variants: tuple[Variant, ...] = ("D-D", "D-ND", "ND-D")
    """Which of the two hidden layers, penultimate-last, are marked D."""
    methods: tuple[Method, ...] = ("dropout", "prox-sg")
    """What the mark D means."""
    trials: int = 20
    """Tests of a network that samples at test time."""
    decay: float = 0.9
    """Factor of the solver's step size, 1/L at first, from one iteration to the next."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "trials"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a factor in (0, 1], got {self.decay}")
        if not self.variants or not self.methods:
            raise ValueError("variants, methods: expected at least one of each, got none")

    def train_config(self) -> training.TrainConfig:
        """The optimiser's configuration, with the data set's defaults filled in."""
        return training.TrainConfig(
            epochs=self.epochs or EPOCHS[self.dataset],
            batch_size=self.batch_size or BATCH_SIZE[self.dataset],
            seed=self.seed,
        )


def run(config: Config) -> list[dict[str, Any]]:
    """Run the experiment, write its files and return the final rows, one for each network."""
    config.out.mkdir(parents=True, exist_ok=True)
    dataset = data.load(config.dataset, config.data_dir, seed=config.seed)
    environment = results.environment()
    optimiser = config.train_config()
    rows: list[dict[str, Any]] = []
    panels: dict[str, list[plots.Curve]] = {"penultimate": [], "last": []}
    for variant in dict.fromkeys(config.variants):
        for method in dict.fromkeys(config.methods):
            network = LeNetConfig(
                dataset.image_shape,
                len(dataset.classes),
                variant,
                BlockConfig(method, decay=config.decay),
            )
            trained, final = _train_and_test(network, dataset, optimiser, config.trials)
            tags = {"dataset": config.dataset, "variant": variant, "method": method}
            rows += [{"kind": "epoch", **tags, **record} for record in trained.history]
            settings = {"network": network, "training": optimiser}
            settings = {key: dataclasses.asdict(value) for key, value in settings.items()}
            rows.append({"kind": "final", **tags, **final, "config": settings, **environment})
            for layer, curves in residual_curves(trained.model, dataset, variant).items():
                panels[layer] += curves
            _write_rows(config.out, rows, first=len(rows) == len(trained.history) + 1)
    finals = [row for row in rows if row["kind"] == "final"]
    _write_pictures(config, rows, panels)
    return finals


def _train_and_test(
    network: LeNetConfig,
    dataset: data.Dataset,
    optimiser: training.TrainConfig,
    trials: int,
) -> tuple[training.Trained, dict[str, Any]]:
    label = f"{network.variant} {NAMES[network.block.method]}"
    start = time.perf_counter()
    trained = training.train(
        lambda rngs: LeNet(network, rngs=rngs), dataset, optimiser, label=label
    )
    model, split = trained.model, dataset.test
    full = float(training.evaluate(model, split, dataset, deterministic=True)[0])
    accuracies, std = np.array([full]), None
    if model.is_stochastic:
        accuracies = training.evaluate(model, split, dataset, trials=trials)
        std = float(accuracies.std())
    seconds = time.perf_counter() - start
    accuracy = float(accuracies.mean())
    print(f"{label}: {results.percent(accuracy, std)} % in {seconds:.0f} s", flush=True)
    paper_accuracy, paper_std = PAPER[network.variant, network.block.method]
    return trained, {
        "accuracy": accuracy,
        "std": std,
        "trials": len(accuracies),
        "full_gradient_accuracy": full if model.is_stochastic else None,
        "validation_accuracy": trained.history[-1]["validation_accuracy"],
        "paper_accuracy": paper_accuracy,
        "paper_std": paper_std,
        "epochs": optimiser.epochs,
        "batch_size": optimiser.batch_size,
        "seed": optimiser.seed,
        "decay": network.block.decay if model.is_stochastic else None,
        "parameters": training.count_parameters(model),
        "train_seconds": trained.seconds,
        "seconds": seconds,
    }


def residual_curves(
    model: LeNet, dataset: data.Dataset, variant: str, *, images: int = 256
) -> dict[str, list[plots.Curve]]:
    """Relative residuals of each solver of a network on the first test images, by layer.

    The lines are medians over the images, the bands hold the middle 80%.
    """
    networks.set_mode(model, "test")
    batch = training.normalise(jnp.asarray(dataset.test.images[:images]), dataset.mean, dataset.std)
    hidden, color = model.features(batch), list(PAPER).index((variant, "dropout"))
    curves = {}
    for name, layer in (("penultimate", model.penultimate), ("last", model.last)):
        if isinstance(layer, ss.nnx.SolverLinear):
            curves[name] = []
            for deterministic in (False, True):
                solution = layer.solve(hidden, deterministic=deterministic)
                scale = jnp.maximum(jnp.linalg.norm(solution.value, axis=-1), 1e-12)
                relative = np.asarray(solution.residuals / scale)
                low, middle, high = np.quantile(relative, (0.1, 0.5, 0.9), axis=1)
                label = f"{variant}, {'full gradient' if deterministic else 'τ = n₁/2'}"
                x = 1 + np.arange(len(middle))
                band = None if deterministic else (low, high)
                curves[name].append(plots.Curve(label, x, middle, color, deterministic, band))
        hidden = layer(hidden)
    return curves


def _write_rows(out: Path, rows: list[dict[str, Any]], *, first: bool) -> None:
    """Write what there is so far; a run that is stopped leaves its finished networks."""
    if first:  # an earlier run's pictures do not belong to these rows
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    results.write_jsonl(out / FILES[0], rows)
    finals = [row for row in rows if row["kind"] == "final"]
    results.write_csv(out / FILES[1], COLUMNS, finals)


def _write_pictures(
    config: Config, rows: list[dict[str, Any]], panels: dict[str, list[plots.Curve]]
) -> None:
    curves = []
    for color, variant in enumerate(dict.fromkeys(key[0] for key in PAPER)):
        for method, name in NAMES.items():
            records = [
                row
                for row in rows
                if (row["kind"], row["variant"], row["method"]) == ("epoch", variant, method)
            ]
            if records:
                x, y = (
                    np.array([row[key] for row in records])
                    for key in ("epoch", "validation_accuracy")
                )
                curves.append(plots.Curve(f"{variant} {name}", x, y, color, method == "dropout"))
    title = f"LeNet on {config.dataset}"
    results.write_figure(
        config.out / FILES[2], lambda path: plots.accuracy(path, curves, title=title)
    )
    drawn = [(f"{layer} layer", panels[layer]) for layer in panels if panels[layer]]
    if drawn:
        title = f"Prox-SG inside the trained LeNets, {config.dataset}, 256 test images"
        results.write_figure(
            config.out / FILES[3], lambda path: plots.residuals(path, drawn, title=title)
        )


def table(config: Config, finals: list[dict[str, Any]]) -> str:
    """The run's accuracies beside the paper's."""
    rows = [
        [
            f"{row['variant']} {NAMES[row['method']]}",
            results.percent(row["accuracy"], row["std"]),
            results.percent(row["full_gradient_accuracy"]),
            results.percent(row["paper_accuracy"], row["paper_std"]),
        ]
        for row in finals
    ]
    header = ["LeNet", f"{config.dataset}, test %", "full gradient", "paper, CIFAR-10"]
    optimiser = config.train_config()
    lines = [
        results.format_table(header, rows),
        f"Epochs: {optimiser.epochs} here, 300 in the paper; seed {config.seed}; "
        f"± is over {config.trials} trials of the sampling.",
    ]
    if config.dataset != "cifar10":
        lines.append(f"The paper's column is CIFAR-10: not comparable with {config.dataset}.")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Parse the command line, run, print the table."""
    with contextlib.suppress(ValueError):  # only the main thread may: so that a kill cleans up
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    config = tyro.cli(Config, prog="python -m experiments.table2", args=args)
    expected = (archive.DataError, training.ConfigurationError, training.DivergenceError, OSError)
    try:
        finals = run(config)
    except expected as error:
        sys.exit(f"error: {error}")
    print(f"\n{table(config, finals)}\nwritten to {config.out}")


if __name__ == "__main__":
    main()
