"""Proximal backpropagation against backpropagation: an MLP and a ConvNet.

    python -m experiments.proxprop --smoke
    python -m experiments.proxprop --dataset cifar10 --data-dir DIR --epochs 3 --seeds 0 1 2
    python -m experiments.proxprop --dataset cifar10 --data-dir DIR --network convnet --epochs 3

The parameters of the hidden layers take the implicit step d = (AᵀA + I/τ)⁻¹ Aᵀ G in the place of their
gradient AᵀG, exactly or by 3 or 10 conjugate-gradient steps; the last layer and the optimiser are ordinary.
Pixels are in [0, 1], a tenth of the training images is held out for validation. The defaults are those of the
paper at its batch of 500: the MLP with Nesterov's momentum of 0.95, τ = 0.05 and rate 1 (backpropagation:
rate 0.05), the ConvNet with Adam at rate 1e-3, τ = 1. At another batch size B, τ is 500/B times as large and
the MLP's rates B/500 times, so that rate · τ stays what it is. Each rate is constant.

The paper has curves only, and those of its conjugate gradients come from code in which the search direction
and the residual share memory, so that from the second step on its directions are not conjugate: its cg3 is
far from conjugate gradients, and these curves are not to be compared with them.

References:
  Frerix, Möllenhoff, Moeller and Cremers, Proximal Backpropagation, ICLR 2018, section 4.
"""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import tyro
from threadpoolctl import threadpool_limits

import stochsolvers as ss
from experiments import data
from experiments.networks.proxprop import (
    BATCH_SIZE,
    DEFAULTS,
    LABELS,
    Init,
    Kind,
    ProxPropConfig,
    ProxPropNet,
)
from experiments.training import options, tables, training_step

Method = Literal["backpropagation", "exact", "cg3", "cg5", "cg10"]
EPOCHS = {"digits": 20}
PAPER_EPOCHS = 50
SMOKE_METHODS: tuple[Method, ...] = ("backpropagation", "exact", "cg3")


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Train a network by backpropagation and by implicit steps; draw loss and accuracy."""

    network: Kind = "mlp"
    """mlp (4000, 1000 and 4000 hidden units) or convnet (5×5 convolutions of 16, 20 and 20 channels)."""
    methods: tuple[Method, ...] = ("backpropagation", "exact", "cg3", "cg10")
    """backpropagation, exact steps, or so many steps of conjugate gradients."""
    tau: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Step size τ of the implicit steps."""
    rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Learning rate of the optimiser for the implicit steps."""
    plain_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Learning rate of the optimiser for backpropagation."""
    width: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Factor on the numbers of channels and hidden units; by default 1."""
    init: Init = "uniform"
    """Of the kernels: uniform in ±1/√inputs, as in the paper's code, or lecun, Flax's, wider by 1.7."""
    learning_rate: tyro.conf.Suppress[float] = options.LEARNING_RATES[0]
    trials: tyro.conf.Suppress[int] = 1
    normalize: tyro.conf.Suppress[bool] = False

    unrecorded: ClassVar[tuple[str, ...]] = ("learning_rate", "trials", "normalize")
    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"methods": SMOKE_METHODS}

    def __post_init__(self):
        super().__post_init__()
        for name in ("tau", "rate", "plain_rate", "width"):
            self.check(name, "a positive number", options.is_positive)

    def defaults(self) -> dict[str, Any]:
        """Those of the paper, scaled from its batch to another one."""
        small = options.BATCH_SIZE.get(self.dataset)
        smoke = options.SMOKE["batch_size"] if self.smoke else None
        batch = self.batch_size or smoke or small or BATCH_SIZE
        paper = DEFAULTS[self.network]
        scale = batch / BATCH_SIZE if self.network == "mlp" else 1.0
        return {
            "epochs": EPOCHS.get(self.dataset, PAPER_EPOCHS),
            "batch_size": batch,
            "tau": options.rounded(paper["tau"] * BATCH_SIZE / batch),
            "rate": options.rounded(paper["rate"] * scale),
            "plain_rate": paper["plain"],
            "width": 1.0,
        }

    def train_config(self, seed: int, method: Method = "exact") -> training_step.TrainConfig:
        """The configuration of the optimiser for a method; call `filled` first."""
        paper = DEFAULTS[self.network]
        rate = self.plain_rate if method == "backpropagation" else self.rate
        return dataclasses.replace(
            super().train_config(seed),
            learning_rates=(rate,),
            momentum=paper["momentum"],
            weight_decay=0.0,
            optimizer=paper["optimizer"],
        )

    def step(self, method: Method) -> ss.proxprop.ImplicitStep | None:
        """The step of the hidden layers; call `filled` first."""
        if method == "backpropagation":
            return None
        tau = self.tau or 1.0
        if method == "exact":
            return ss.proxprop.Exact(tau)
        return ss.proxprop.ConjugateGradients(tau, int(method.removeprefix("cg")))


def in_unit_interval(dataset: data.Dataset) -> data.Dataset:
    """The data set whose pixels are divided by the largest of the training images, not standardised."""
    largest = np.float32(dataset.train.images.max() or 1)
    mean, std = np.zeros_like(dataset.mean), np.full_like(dataset.std, largest)
    return dataclasses.replace(dataset, mean=mean, std=std)


def network(config: Config, method: Method, dataset: data.Dataset) -> tables.Network:
    """What is trained by a method."""
    shape, count, step = dataset.image_shape, len(dataset.classes), config.step(method)
    width = config.width or 1.0
    net = ProxPropConfig(config.network, shape, count, step, width, config.init)
    described = dataclasses.asdict(dataclasses.replace(net, step=None))
    return tables.Network(
        f"{LABELS[config.network]} {method}",
        {"method": method},
        lambda rngs: ProxPropNet(net, rngs=rngs),
        lambda seed: config.train_config(seed, method),
        {"network": described | {"step": None if step is None else repr(step)}},
    )


def run(config: Config) -> list[tables.Row]:
    """Train the networks that are not finished yet, write the files and return all rows."""

    def networks(config: Config, dataset: data.Dataset) -> Iterator[tables.Network]:
        return (network(config, method, dataset) for method in dict.fromkeys(config.methods))

    # OpenBLAS's threads, in which Cholesky factorisations run on CPU, fight with those of XLA
    with threadpool_limits(1, "blas"):
        return tables.run("proxprop", config, networks, prepare=in_unit_interval)


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    tables.main("proxprop", Config, run, args)


if __name__ == "__main__":
    main()
