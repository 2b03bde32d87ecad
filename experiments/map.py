"""The map of where a solver layer pays: its gain over both controls, against its time.

    python -m experiments.map --smoke
    python -m experiments.map --dataset cifar10 --data-dir DIR --seeds 0 1

Table 2's LeNet, its hidden layers plain, with dropout, or solved, is trained at several widths and schedules:

| method | parameter | role |
|---|---|---|
| no dropout | none | control |
| dropout | rate p | control, at its best rate |
| Prox-SG, mS2GD | sampled fraction τ/n1 | solver |
| Prox-GD, p = 0 | none | solver, full gradients of all inputs |

In each cell of the map, a width and a schedule, the mean validation accuracy over the seeds chooses the rate
of dropout, the τ of each solver, whether a network that samples is tested so or along the full gradient, and
the solver that the cell reports. The test images are read once for each network and choose nothing. A solver
pays where it is ahead of both controls in every seed. Seconds of an epoch are measured in the same run. A run
that was stopped is resumed by the same command; further widths, schedules, rates, τ, methods and seeds can be
added to a folder.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import tyro

from experiments import data, networks
from experiments.networks import LeNet, LeNetConfig, Method, Variant
from experiments.training import options, tables

SCHEDULES = {"digits": (5, 20)}
CIFAR_SCHEDULES = (15, 60)


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Train LeNets over width, schedule and sampled fraction; draw the solvers' gains over both controls."""

    methods: tuple[Method, ...] = ("none", "dropout", "prox-sg", "ms2gd", "prox-gd-no-dropout")
    """What the marked layers are; without none and dropout there is nothing to compare with."""
    widths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Factors on the numbers of channels and hidden units; 1 is table 2's network."""
    schedules: tuple[int, ...] | None = None
    """Epochs, a third of them at each learning rate; by default 5 and 20 on digits, else 15 and 60."""
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    """Dropout rates p among which the validation images choose."""
    taus: tuple[float, ...] = (0.5, 0.9)
    """Fractions τ/n1 of the inputs that a solver samples in an iteration."""
    variant: Variant = "D-D"
    """Which of the two hidden layers, penultimate-last, are marked."""
    num_iters: int = 10
    """Iterations of the solvers."""
    decay: float = 0.9
    """Factor of the step size of Prox-SG, 1/L at first, from one iteration to the next."""
    epochs: tyro.conf.Suppress[int | None] = None

    unrecorded: ClassVar[tuple[str, ...]] = ("epochs",)
    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "methods": ("none", "dropout", "prox-sg"),
        "widths": (0.5,),
        "schedules": (2,),
        "rates": (0.1, 0.5),
        "taus": (0.5,),
    }

    def __post_init__(self):
        super().__post_init__()
        options.check_solver(self.num_iters, self.decay)
        self.check("widths", "positive factors", options.is_positive)
        self.check("schedules", "at least 1 epoch", lambda epochs: epochs >= 1)
        self.check("rates", "dropout rates in [0, 1)", options.is_rate)
        self.check("taus", "fractions in (0, 1]", lambda tau: 0 < tau <= 1)

    def defaults(self) -> dict[str, Any]:
        """The defaults that depend on the data set."""
        schedules = SCHEDULES.get(self.dataset, CIFAR_SCHEDULES)
        return {**super().defaults(), "schedules": schedules}

    def lenets(self, dataset: data.Dataset) -> Iterator[LeNetConfig]:
        """The networks of one schedule, for images of this shape."""
        shape, count = dataset.image_shape, len(dataset.classes)
        pairs = itertools.product(dict.fromkeys(self.widths), dict.fromkeys(self.methods))
        for width, method in pairs:
            for rate in self._rates_of(method):
                block = options.block(self, method, rate)
                yield LeNetConfig(shape, count, self.variant, block, width)

    def _rates_of(self, method: Method) -> Sequence[float]:
        if method in ("dropout", *networks.BEHIND_DROPOUT):
            return tuple(dict.fromkeys(self.rates))
        if method in (*networks.PLAIN, *networks.FULL):
            return (0.0,)
        return tuple(options.rounded(1 - tau) for tau in dict.fromkeys(self.taus))


def network(config: Config, lenet: LeNetConfig, epochs: int) -> tables.Network:
    """What is trained in the cell of a width and a schedule."""
    method, rate = lenet.block.method, lenet.block.rate
    arm, label = method, networks.NAMES[method]
    final: tables.Row = {"width": lenet.width, "method": method, "dropout_rate": None, "tau": None}
    if method in ("dropout", *networks.BEHIND_DROPOUT):
        final["dropout_rate"], label, arm = rate, f"{label} p = {rate:g}", f"{arm}-{rate:g}"
    elif method not in (*networks.PLAIN, *networks.FULL):
        tau = final["tau"] = options.rounded(1 - rate)
        label, arm = f"{label} τ = {tau:g} n", f"{arm}-{tau:g}"
    return tables.Network(
        f"LeNet ×{lenet.width:g}, {epochs} epochs {label}",
        {"study": f"width{lenet.width:g}-epochs{epochs}", "arm": arm},
        lambda rngs: LeNet(lenet, rngs=rngs),
        dataclasses.replace(config, epochs=epochs).train_config,
        {"network": dataclasses.asdict(lenet)},
        final=final,
    )


def run(config: Config) -> list[tables.Row]:
    """Train the networks that are not finished yet, write the files and return all rows."""

    def all_networks(config: Config, dataset: data.Dataset) -> Iterator[tables.Network]:
        assert config.schedules is not None
        for epochs in dict.fromkeys(config.schedules):
            for lenet in config.lenets(dataset):
                yield network(config, lenet, epochs)

    return tables.run("map", config, all_networks)


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    tables.main("map", Config, run, args)


if __name__ == "__main__":
    main()
