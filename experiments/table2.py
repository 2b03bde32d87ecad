"""Table 2: LeNet with dropout layers against the same network with Prox-SG solvers in their place.

    python -m experiments.table2
    python -m experiments.table2 --dataset cifar10 --data-dir DIR --epochs 12 --seeds 0 1 2

Two hidden layers of 120 and 84 units can be marked D: D-ND is the penultimate, ND-D the last, D-D both.
A marked layer is plain ("none", a control that the paper lacks), has dropout (p = 0.5) before it, or is
solved by 10 iterations of Prox-SG with τ = n1/2, or by another method. All networks are trained from
scratch and tested once, after the last epoch; those with stochastic solvers, which sample at test time as
well, in 20 trials. Nothing is chosen by the test set. A run that was stopped is resumed by the same command.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019, section 4, table 2.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax.numpy as jnp

from experiments import data, networks
from experiments.networks import LeNet, LeNetConfig, Method, Variant
from experiments.training import evaluation, options, tables

PAPER: dict[tuple[str, str], tuple[float, float | None]] = {
    ("D-D", "dropout"): (64.39, None),
    ("D-ND", "dropout"): (71.72, None),
    ("ND-D", "dropout"): (68.54, None),
    ("D-D", "prox-sg"): (72.86, 0.177),
    ("D-ND", "prox-sg"): (75.20, 0.205),
    ("ND-D", "prox-sg"): (76.23, 0.206),
}
"""Accuracy in percent on CIFAR-10 after 300 epochs, and standard deviation over 20 trials."""
SMOKE_VARIANTS: tuple[Variant, ...] = ("D-D",)


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Train the LeNets of table 2 and print their accuracy beside the paper's."""

    variants: tuple[Variant, ...] = ("D-D", "D-ND", "ND-D")
    """Which of the two hidden layers, penultimate-last, are marked D."""
    methods: tuple[Method, ...] = ("dropout", "none", "prox-sg")
    """What a layer marked D is: plain (none), with dropout before it, or the solver."""
    num_iters: int = 10
    """Iterations of the solvers."""
    decay: float = 0.9
    """Factor of the solver's step size, 1/L at first, from one iteration to the next."""
    seeds_at_once: bool = False
    """Train a network from all --seeds in one vmapped step, which needs the memory of as many networks
    and data sets; for accelerators that one network does not occupy, and slower on a CPU."""

    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"variants": SMOKE_VARIANTS}

    def __post_init__(self):
        super().__post_init__()
        options.check_solver(self.num_iters, self.decay)

    def lenets(self, dataset: data.Dataset) -> Iterator[LeNetConfig]:
        """The networks for images of this shape."""
        pairs = itertools.product(dict.fromkeys(self.variants), dict.fromkeys(self.methods))
        for variant, method in pairs:
            block = options.block(self, method)
            yield LeNetConfig(dataset.image_shape, len(dataset.classes), variant, block)


def network(config: Config, lenet: LeNetConfig) -> tables.Network:
    """What is trained."""
    variant, method = lenet.variant, lenet.block.method
    return tables.Network(
        f"{variant} {networks.NAMES[method]}",
        {"variant": variant, "method": method},
        lambda rngs: LeNet(lenet, rngs=rngs),
        config.train_config,
        {"network": dataclasses.asdict(lenet)},
        PAPER.get((variant, method)) if config.dataset == "cifar10" else None,
        measure=lambda model, dataset: (residuals(model, dataset), {}),
    )


def run(config: Config) -> list[tables.Row]:
    """Train the networks that are not finished yet, write the files and return all rows."""

    def all_networks(config: Config, dataset: data.Dataset) -> Iterator[tables.Network]:
        return (network(config, lenet) for lenet in config.lenets(dataset))

    return tables.run("table2", config, all_networks, together=config.seeds_at_once)


def residuals(model: LeNet, dataset: data.Dataset, *, images: int = 256) -> list[dict[str, Any]]:
    """Relative residuals of each solver of a network on the first validation images.

    Returns:
      for each layer, sampled (if the solver samples) and with full gradients: for each iteration the
      median over the images and the quantiles 0.1 and 0.9.
    """
    networks.set_mode(model, "test")
    hidden = model.features(evaluation.first_images(dataset, images))
    rows = []
    for name, layer in (("penultimate", model.penultimate), ("last", model.last)):
        solver = networks.solver_of(layer)
        for deterministic in (False, True):
            if solver is None or not (deterministic or solver.solver.stochastic):
                continue
            solution = solver.solve(hidden, deterministic=deterministic)
            scale = jnp.maximum(jnp.linalg.norm(solution.value, axis=-1), 1e-12)
            about = {"layer": name, "deterministic": deterministic}
            rows.append({**about, **evaluation.quantiles(solution.residuals / scale)})
        hidden = layer(hidden)
    return rows


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    tables.main("table2", Config, run, args)


if __name__ == "__main__":
    main()
