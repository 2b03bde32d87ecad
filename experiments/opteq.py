"""Equilibrium networks against a plain network and four unrolled iterations of the same parameters.

    python -m experiments.opteq
    python -m experiments.opteq --dataset cifar10 --data-dir DIR --epochs 10 --widths 32 49

Two tiers of a convolution with stride 2, a normalisation, and z = Wᵀ ReLU(W z + c), a convolution W whose
norm is at most 0.95: solved to a tolerance by Anderson acceleration and differentiated implicitly; the same
with four iterations, unrolled; or a plain convolution W between two ReLUs. On CIFAR-10 width 32 has 76,010
parameters, width 49 168,864. AdamW; the validation images are a tenth of the training images, and the test
images are read once, after the last epoch. A run that was stopped is resumed by the same command.

References:
  Xie, Wang, Ling, Li, Liu and Lin, Optimization induced equilibrium networks, IEEE TPAMI 45(3), 2023; Winston
  and Kolter, Monotone operator equilibrium networks, NeurIPS 2020.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

import stochsolvers as ss
from experiments import data, networks
from experiments.networks import EquilibriumMethod, EquilibriumNet, EquilibriumNetConfig
from experiments.output import terminal
from experiments.training import evaluation, options, tables, training_step

PUBLISHED = (
    "Published, CIFAR-10 without augmentation, 40 epochs: monDEQ (Winston and Kolter 2020) 74.0 % with 172k "
    "parameters, 72.0 % with 170k."
)
RATES = (1.0, 1 / 3, 0.1)
WIDTHS = {"digits": (8,)}
CIFAR_WIDTHS = (32, 49)
DIGIT_EPOCHS, CIFAR_EPOCHS = 4, 10
SMOKE_METHODS: tuple[EquilibriumMethod, ...] = ("plain", "equilibrium")


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Train an equilibrium network, its plain twin and its unrolled one, and print their accuracy."""

    methods: tuple[EquilibriumMethod, ...] = ("plain", "unrolled", "equilibrium")
    """What a tier is: plain layers, four iterations, or the equilibrium."""
    widths: tuple[int, ...] | None = None
    """Channels of the first tier; by default 8 on digits, else 32 and 49."""
    depth: int = 1
    """Layers in each equilibrium, one after the other."""
    bound: float = 0.95
    """The most that the norm of W may be."""
    tol: float = 1e-2
    """Relative tolerance of the forward solve."""
    max_iters: int = 40
    """The cap of its iterations."""
    learning_rate: float = 2e-3
    """The first learning rate of AdamW; the next ones are a third and a tenth of it."""
    weight_decay: float = 1e-3
    """The decoupled weight decay."""

    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {"methods": SMOKE_METHODS}

    def __post_init__(self):
        super().__post_init__()
        EquilibriumNetConfig(
            depth=self.depth, bound=self.bound, tol=self.tol, max_iters=self.max_iters
        )

    def defaults(self) -> dict[str, Any]:
        """The defaults that depend on the data set."""
        is_digits = self.dataset == "digits"
        return {
            **super().defaults(),
            "epochs": DIGIT_EPOCHS if is_digits else CIFAR_EPOCHS,
            "widths": WIDTHS.get(self.dataset, CIFAR_WIDTHS),
        }

    def train_config(self, seed: int) -> training_step.TrainConfig:
        """AdamW at three rates; call `filled` first."""
        config = super().train_config(seed)
        return options.adamw(config, self.learning_rate, RATES, self.weight_decay)

    def networks(self, dataset: data.Dataset) -> Iterator[EquilibriumNetConfig]:
        """The networks for images of this shape."""
        assert self.widths is not None
        pairs = itertools.product(dict.fromkeys(self.widths), dict.fromkeys(self.methods))
        for width, method in pairs:
            yield EquilibriumNetConfig(
                dataset.image_shape,
                len(dataset.classes),
                method,
                width,
                self.depth,
                self.bound,
                self.tol,
                self.max_iters,
            )


def network(config: Config, net: EquilibriumNetConfig) -> tables.Network:
    """What is trained; the networks of a width are one study."""
    study = f"OptEq{net.width}"
    return tables.Network(
        f"{study} {networks.EQUILIBRIUM_NAMES[net.method]}",
        {"study": study, "method": net.method},
        lambda rngs: EquilibriumNet(net, rngs=rngs),
        config.train_config,
        {"network": dataclasses.asdict(net)},
        measure=residuals,
    )


def run(config: Config) -> list[tables.Row]:
    """Train the networks that are not finished yet, write the files and return all rows."""

    def all_networks(config: Config, dataset: data.Dataset) -> Iterator[tables.Network]:
        return (network(config, net) for net in config.networks(dataset))

    rows = tables.run("opteq", config, all_networks)
    if config.dataset == "cifar10":
        terminal.say(PUBLISHED)
    return rows


def residuals(
    model: EquilibriumNet, dataset: data.Dataset, *, images: int = 256, iterations: int = 12
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """How the equilibria of a network converge on the first validation images.

    Returns:
      for each tier ||z_k − z_{k−1}|| / ||z_K||, its median over the images and its quantiles 0.1 and 0.9, of
      plain iterations (dashed in the picture) and Anderson's; and what the solves of the network end with:
      the largest number of iterations, the share that met the tolerance, the norms of W.
    """
    networks.set_mode(model, "test")
    x = evaluation.first_images(dataset, images)
    rows, taken, converged, norms = [], [], [], []
    for number, tier in enumerate(model.features.tiers):
        if not tier.is_plain:
            problem = tier.inner.problem(tier.drive(x))
            for plain in (True, False):
                solver = (ss.FixedPoint if plain else ss.Anderson)(iterations)
                limits = _relative(problem, solver)
                how = "plain iteration" if plain else "Anderson"
                about = {"layer": f"tier {number + 1}", "deterministic": plain, "how": how}
                rows.append({**about, **limits})
            solution = tier.inner.solve(tier.drive(x))
            if solution.iterations is not None:
                taken.append(int(jnp.max(solution.iterations)))
                converged.append(float(jnp.mean(solution.status == ss.Status.CONVERGED)))
            layers: Any = getattr(problem, "equilibria", (problem,))
            bounds = [ss.lipschitz_bracket(one.linear_map, grid="padded") for one in layers]
            norms += [float(bound.upper) ** 0.5 for bound in bounds]
        x = tier(x)
    if not norms:
        return rows, {}
    return rows, {"solver_iterations": taken, "converged": converged, "norms": norms}


def _relative(problem: ss.FixedPointProblem, solver: ss.Solver) -> dict[str, list[float]]:
    """Quantiles over the images of the residuals, relative to the last iterate."""

    @jax.jit
    def solved(problem):
        solution = solver.solve(None, problem)
        return solution.residuals / jnp.maximum(problem.norm(solution.value), 1e-12)[None]

    return evaluation.quantiles(solved(problem))


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    tables.main("opteq", Config, run, args)


if __name__ == "__main__":
    main()
