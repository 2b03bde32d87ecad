"""Table 3: AlexNet with its first convolution and ReLU replaced by a Prox-GD solver, finetuned.

    python -m experiments.table3 --smoke
    python -m experiments.table3 --dataset cifar10 --data-dir DIR

The network is trained plain, then the solver takes the place of the first layer, with the same
parameters, and the network is finetuned; for comparison, so is the plain network, as long. The
solver's step is 1/L, L from lemma 2 on the unpadded grid, recomputed every epoch.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019, section 4, table 3.
"""

import dataclasses
from typing import Any, Literal

from experiments import data
from experiments.networks import NAMES, AlexNet, AlexNetConfig, ConvReLU, swap_conv
from experiments.training import finetune, options

PAPER = {"cifar10": (77.30, 78.51), "cifar100": (44.20, 45.53)}
"""Accuracy in percent of AlexNet, and of AlexNet-Prox-GD."""


@dataclasses.dataclass(frozen=True)
class Config(options.FinetuneOptions):
    """Train AlexNet, swap its first layer for a solver, finetune, and print the accuracies."""

    num_iters: int = 10
    """Iterations of the solver; the paper does not give the number."""
    methods: tuple[Literal["prox-gd", "fista"], ...] = ("prox-gd",)
    """The solvers to put in the place of the first layer."""

    def __post_init__(self):
        super().__post_init__()
        options.check_methods(self.methods)
        options.check_solver(self.num_iters)


def studies(config: Config, dataset: data.Dataset) -> list[finetune.Study]:
    """The one study of this table."""
    network = AlexNetConfig(dataset.image_shape, len(dataset.classes), config.width or 1.0)
    paper = PAPER.get(config.dataset) if config.width == 1.0 else None

    def arm(method: Literal["prox-gd", "fista"]) -> finetune.Arm:
        block = options.block(config, method)

        def swap(model: AlexNet, rngs: Any) -> None:
            del rngs  # the solver draws nothing
            features = model.features
            assert isinstance(features.first, ConvReLU)
            features.first = swap_conv(features.first, block, features.image_size)

        known = (paper[1], None) if paper and method == "prox-gd" else None
        return finetune.Arm(
            method, NAMES[method], swap, known, {"block": dataclasses.asdict(block)}
        )

    return [
        finetune.Study(
            "alexnet",
            "AlexNet",
            lambda rngs: AlexNet(network, rngs=rngs),
            tuple(arm(method) for method in dict.fromkeys(config.methods)),
            (paper[0], None) if paper else None,
            {"network": dataclasses.asdict(network)},
        )
    ]


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    finetune.main("table3", Config, studies, args)


if __name__ == "__main__":
    main()
