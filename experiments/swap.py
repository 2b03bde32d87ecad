"""Solvers in networks of today: a CNN and a ResNet with batch normalisation, a transformer.

    python -m experiments.swap --smoke
    python -m experiments.swap --dataset cifar10 --data-dir DIR --seeds 0 1

Each network is trained, then `ss.nnx.replace_layers` makes solvers of its layers, and it is finetuned; for
comparison, the network as it was is finetuned as long, with the same seed and schedule.

| arm | layers | solver |
|---|---|---|
| one | all that can be swapped | one iteration: the network as it was, but its batch statistics are frozen |
| all | the same | Prox-GD with the map A/√L, whose first iteration is the plain layer |
| paper | the same | Prox-GD with the map A as it is |
| first, last | the first, or the last, of them | as "all": which layers pay |
| sampled | the hidden layer of the CNN, the first of each MLP of the transformer | Prox-SG |

Prox-SG takes τ = (1 − p) n1 inputs, p the rate of the dropout before the layer, which is switched off, or
--rate where there is none. In the ResNet, the convolutions before an addition stay as they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp
from flax import nnx

import stochsolvers as ss
from experiments import data
from experiments.networks import MODERN_NAMES, ModernConfig, ModernName
from experiments.training import finetune, options, training_step
from experiments.training.evaluation import normalise

ArmName = Literal["one", "all", "paper", "first", "last", "sampled"]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
LABELS: dict[ArmName, str] = {
    "one": "one iteration",
    "all": "Prox-GD",
    "paper": "Prox-GD, paper's scaling",
    "first": "Prox-GD, first layer",
    "last": "Prox-GD, last layer",
    "sampled": "Prox-SG, hidden layers",
}
PLACES: dict[tuple[ModernName, ArmName], str] = {
    ("cnn", "first"): "convs.0.conv",
    ("cnn", "last"): "hidden",
    ("cnn", "sampled"): "hidden",
    ("resnet", "first"): "stem.conv",
    ("resnet", "last"): "blocks.2.first.conv",
    ("transformer", "first"): "encoders.0.expand",
    ("transformer", "last"): "encoders.1.expand",
    ("transformer", "sampled"): "encoders.*.expand",
}
"""Paths of the layers of the arms that do not take all."""
EPOCHS = (10, 4)
RATES, FINETUNE_SHARE = (1.0, 0.3, 0.1), 0.25
SAMPLE = 32


@dataclasses.dataclass(frozen=True)
class Config(options.FinetuneOptions):
    """Train networks of today, swap their layers for solvers, finetune, and print the accuracies."""

    networks: tuple[ModernName, ...] = tuple(MODERN_NAMES)
    """The networks."""
    arms: tuple[ArmName, ...] = ARMS
    """What is swapped, see the table above."""
    num_iters: int = 3
    """Iterations of Prox-GD."""
    num_samples: int = 10
    """Iterations of Prox-SG."""
    decay: float = 0.9
    """Factor of the step size of Prox-SG from one iteration to the next."""
    ridge: float = 1e-3
    """λ of the layers' problems."""
    rate: float = 0.1
    """p of a sampled layer that has no dropout before it."""
    learning_rate: float = 2e-3
    """The first learning rate of AdamW; the next ones are 0.3 and 0.1 of it."""
    weight_decay: float = 1e-2
    """The decoupled weight decay."""

    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"arms": ("one", "all", "sampled")}

    def __post_init__(self):
        super().__post_init__()
        options.check_solver(min(self.num_iters, self.num_samples), self.decay)
        self.check("rate", "a dropout rate in [0, 1)", options.is_rate)

    def defaults(self) -> dict[str, Any]:
        """The defaults that depend on the data set."""
        found = super().defaults()
        if self.dataset != "digits":
            found |= {"epochs": EPOCHS[0], "finetune_epochs": EPOCHS[1]}
        return found | {"finetune_learning_rate": FINETUNE_SHARE * self.learning_rate}

    def train_config(self, seed: int) -> training_step.TrainConfig:
        """AdamW at three rates; call `filled` first."""
        config = super().train_config(seed)
        return options.adamw(config, self.learning_rate, RATES, self.weight_decay)

    def solver(self, arm: ArmName) -> ss.Solver:
        """The solver of an arm."""
        if arm == "sampled":
            return ss.ProxSG(1.0 - self.rate, self.num_samples, decay=self.decay)
        return ss.ProxGD(1 if arm == "one" else self.num_iters)


def swap(config: Config, network: ModernName, arm: ArmName, images: Any) -> Callable[..., None]:
    """The change of a trained network that makes an arm of it.

    Args:
      config: the options.
      network: which network.
      arm: which arm.
      images: normalised images to look at the network with.
    """

    def change(model: Any, rngs: nnx.Rngs) -> None:
        model.eval()
        ss.nnx.replace_layers(
            model,
            PLACES.get((network, arm), "*"),
            solver=config.solver(arm),
            inputs=images,
            measure=False,
            normalize=arm != "paper",
            ridge=config.ridge if arm != "one" else 0.0,
            rngs=rngs,
        )

    return change


def studies(config: Config, dataset: data.Dataset) -> list[finetune.Study]:
    """A study for each network."""
    sample = dataset.train.images[:SAMPLE]
    images = jnp.asarray(normalise(sample, dataset.mean, dataset.std))

    def study(name: ModernName) -> finetune.Study:
        factor = config.width or 1.0
        network = ModernConfig(name, dataset.image_shape, len(dataset.classes), factor)
        arms = tuple(
            finetune.Arm(
                arm,
                LABELS[arm],
                swap(config, name, arm, images),
                settings={"solver": repr(config.solver(arm)), "normalize": arm != "paper"},
                scored_at_start=True,
            )
            for arm in dict.fromkeys(config.arms)
            if (name, arm) != ("resnet", "sampled")
        )
        settings = {"network": dataclasses.asdict(network)}
        return finetune.Study(name, MODERN_NAMES[name], network.build, arms, settings=settings)

    return [study(name) for name in dict.fromkeys(config.networks)]


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    finetune.main("swap", Config, studies, args, arms_of_shapes=False)


if __name__ == "__main__":
    main()
