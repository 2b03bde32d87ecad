"""Table 5: the dropout rate p of the last hidden layer against Prox-SG with τ = (1 − p) n1 in its place.

    python -m experiments.table5 --smoke
    python -m experiments.table5 --dataset cifar100 --data-dir DIR
    python -m experiments.table5 --dataset cifar10 --data-dir DIR --network lenet --epochs 12

For every rate a network is trained with dropout before its last hidden layer, then that layer becomes
a solver, or loses its dropout ("none"), and the network is finetuned; for comparison, the plain network
is finetuned as long. VGG16 keeps dropout, p = 0.5, before its other hidden layer; LeNet and AlexNet have
none elsewhere. --layer penultimate does the same in the layer before.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019, section 4, table 5.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from flax import nnx

from experiments import data, networks
from experiments.networks import NAMES, BlockConfig, Method, swap_hidden
from experiments.training import finetune, options

Head = Literal["vgg16", "alexnet", "lenet"]
Layer = Literal["last", "penultimate"]

PAPER: dict[float, tuple[finetune.Accuracy, finetune.Accuracy]] = {
    0.0: ((70.57, None), (70.87, None)),
    0.1: ((70.56, None), (70.51, 0.0198)),
    0.5: ((70.27, None), (70.95, 0.0419)),
    0.9: ((68.34, None), (69.19, 0.0589)),
    0.95: ((30.61, None), (67.42, 0.0774)),
}
"""For VGG16 on CIFAR-100, by dropout rate: the baseline's accuracy, and the solver's over 20 trials."""

LABELS = {"vgg16": "VGG16", "alexnet": "AlexNet", "lenet": "LeNet"}
ALEXNET_HIDDEN = 256
SMOKE_RATES = (0.95,)


@dataclasses.dataclass(frozen=True)
class Config(options.FinetuneOptions):
    """Train a network for each dropout rate, swap its last hidden layer, finetune, print accuracies."""

    network: Head = "vgg16"
    """vgg16 is the paper's; lenet is table 2's, which trains on a CPU and has no --width; alexnet is
    table 3's with a hidden layer of 256 units added."""
    layer: Layer = "last"
    """Which hidden layer; the paper's is the last. In lenet the last has 120 inputs, the penultimate 400;
    alexnet has the last only."""
    rates: tuple[float, ...] = (0.0, 0.1, 0.5, 0.9, 0.95)
    """Dropout rates p of that layer."""
    num_iters: int = 30
    """Iterations of the solvers."""
    decay: float = 0.9
    """Factor of the step size, 1/L at first, from one iteration to the next."""
    methods: tuple[Method, ...] = ("prox-sg",)
    """The solvers; prox-gd and fista keep the dropout. none is the plain layer without dropout."""

    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"rates": SMOKE_RATES}

    def __post_init__(self):
        super().__post_init__()
        options.check_methods(self.methods)
        options.check_solver(self.num_iters, self.decay)
        if self.layer == "penultimate" and self.network == "alexnet":
            raise ValueError(
                "layer: expected last for alexnet, which has no other, got penultimate"
            )
        self.check("rates", "dropout rates in [0, 1)", options.is_rate)


def builder(config: Config, dataset: data.Dataset) -> tuple[Callable[[nnx.Rngs], Any], Any]:
    """A function that builds the network with its hidden layer marked, and its configuration."""
    shape, count, width = dataset.image_shape, len(dataset.classes), config.width or 1.0
    dropout = BlockConfig("dropout")
    if config.network == "vgg16":
        network = networks.VGG16Config(shape, count, width)
        return lambda rngs: networks.VGG16(network, rngs=rngs), network
    if config.network == "alexnet":
        alexnet = networks.AlexNetConfig(shape, count, width, ALEXNET_HIDDEN, dropout)
        return lambda rngs: networks.AlexNet(alexnet, rngs=rngs), alexnet
    variant = "ND-D" if config.layer == "last" else "D-ND"
    lenet = networks.LeNetConfig(shape, count, variant, dropout)
    return lambda rngs: networks.LeNet(lenet, rngs=rngs), lenet


def studies(config: Config, dataset: data.Dataset) -> list[finetune.Study]:
    """A study for each rate."""
    make, network = builder(config, dataset)
    papers = (config.network, config.layer, config.dataset, config.width)
    known = papers == ("vgg16", "last", "cifar100", 1.0)

    def study(rate: float) -> finetune.Study:
        def with_method(method: Method) -> Callable[[Any, nnx.Rngs], None]:
            block = options.block(config, method, rate)

            def swap(model: Any, rngs: nnx.Rngs) -> None:
                twin = swap_hidden(getattr(model, config.layer), block, rngs=rngs)
                setattr(model, config.layer, twin)

            return swap

        def build(rngs: nnx.Rngs) -> Any:
            model = make(rngs)
            with_method("dropout")(model, rngs)
            return model

        paper = PAPER.get(rate, (None, None)) if known else (None, None)
        arms = tuple(
            finetune.Arm(
                method,
                NAMES[method],
                with_method(method),
                paper[1] if method == "prox-sg" else None,
                {"block": dataclasses.asdict(options.block(config, method, rate))},
            )
            for method in dict.fromkeys(config.methods)
        )
        settings = {
            **{"network": dataclasses.asdict(network), "head": config.network},
            **{"layer": config.layer, "rate": rate},
        }
        label = f"{LABELS[config.network]} p = {rate:g}"
        return finetune.Study(f"p{rate:g}", label, build, arms, paper[0], settings)

    return [study(rate) for rate in dict.fromkeys(config.rates)]


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    finetune.main("table5", Config, studies, args)


if __name__ == "__main__":
    main()
