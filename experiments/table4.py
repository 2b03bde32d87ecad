"""Table 4: VGG16 with solvers in the place of its fully-connected dropout layers, finetuned.

    python -m experiments.table4 --smoke
    python -m experiments.table4 --dataset cifar100 --data-dir DIR

The network has two fully-connected ReLU layers with dropout, p = 0.5, before each. It is trained, then
the last layer (ND-D) or both (D-D) become Prox-SG with τ = n1/2, or lose their dropout ("none", a
control that the paper lacks), or both become Prox-GD behind the dropout that stays; then it is finetuned.
For comparison, the plain network is finetuned as long.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019, section 4, table 4.
"""

import dataclasses
from typing import Any, ClassVar, Literal

from flax import nnx

from experiments import data
from experiments.networks import FULL, NAMES, VGG16, Method, VGG16Config, swap_hidden
from experiments.training import finetune, options

Marks = Literal["ND-D", "D-D"]

PAPER: dict[str, dict[str, finetune.Accuracy]] = {
    "cifar10": {
        "baseline": (92.56, None),
        "prox-sg-ND-D": (92.44, 0.028),
        "prox-sg-D-D": (92.57, 0.029),
        "prox-gd-D-D": (92.80, None),
    },
    "cifar100": {
        "baseline": (70.27, None),
        "prox-sg-ND-D": (70.95, 0.042),
        "prox-sg-D-D": (70.44, 0.077),
        "prox-gd-D-D": (71.10, None),
    },
}
"""Accuracy in percent, and standard deviation over 20 trials; the paper does not
state which layers Prox-GD replaces; here both."""
SMOKE_VARIANTS: tuple[Marks, ...] = ("D-D",)
SMOKE_METHODS: tuple[Method, ...] = ("prox-sg",)  # a program of VGG16 takes ten seconds to compile


@dataclasses.dataclass(frozen=True)
class Config(options.FinetuneOptions):
    """Train VGG16, swap its hidden layers for solvers, finetune, and print the accuracies."""

    num_iters: int = 30
    """Iterations of the solvers."""
    decay: float = 0.9
    """Factor of the step size, 1/L at first, from one iteration to the next."""
    variants: tuple[Marks, ...] = ("ND-D", "D-D")
    """Whether the last hidden layer or both become solvers that sample."""
    batch_norm: bool = True
    """Batch normalisation after every convolution; the paper does not say whether it has any."""
    methods: tuple[Method, ...] = ("prox-sg", "prox-gd")
    """The solvers; prox-gd and fista keep the dropout. none is the plain layer without dropout."""

    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "variants": SMOKE_VARIANTS,
        "methods": SMOKE_METHODS,
    }

    def __post_init__(self):
        super().__post_init__()
        options.check_methods(self.methods)
        options.check_solver(self.num_iters, self.decay)


def arms(config: Config, paper: dict[str, finetune.Accuracy]) -> list[finetune.Arm]:
    """Solvers that sample, and plain layers, in the last layer or in both; full gradients in both."""

    def arm(method: Method, marks: Marks) -> finetune.Arm:
        block = options.block(config, method)

        def swap(model: VGG16, rngs: nnx.Rngs) -> None:
            if marks == "D-D":
                model.penultimate = swap_hidden(model.penultimate, block, rngs=rngs)
            model.last = swap_hidden(model.last, block, rngs=rngs)

        name = f"{method}-{marks}"
        settings = {"block": dataclasses.asdict(block), "marks": marks}
        return finetune.Arm(name, f"{NAMES[method]} {marks}", swap, paper.get(name), settings)

    return [
        arm(method, marks)
        for method in dict.fromkeys(config.methods)
        for marks in (dict.fromkeys(config.variants) if method not in FULL else ("D-D",))
    ]


def studies(config: Config, dataset: data.Dataset) -> list[finetune.Study]:
    """The one study of this table."""
    network = VGG16Config(
        dataset.image_shape, len(dataset.classes), config.width or 1.0, config.batch_norm
    )
    paper = PAPER.get(config.dataset, {}) if config.width == 1.0 else {}
    return [
        finetune.Study(
            "vgg16",
            "VGG16",
            lambda rngs: VGG16(network, rngs=rngs),
            tuple(arms(config, paper)),
            paper.get("baseline"),
            {"network": dataclasses.asdict(network)},
        )
    ]


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    finetune.main("table4", Config, studies, args)


if __name__ == "__main__":
    main()
