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
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from experiments import data, networks
from experiments.networks import EquilibriumMethod, EquilibriumNet, EquilibriumNetConfig
from experiments.output import runs, terminal
from experiments.training import evaluation, loop, options, tables, training_step

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

    out: Path = Path("runs/opteq")
    """Folder of the results and checkpoints of one configuration; a stopped run is resumed from it."""
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
        if not self.methods or self.widths == ():
            raise ValueError("methods, widths: expected at least one of each, got none")
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
        rates = tuple(float(f"{self.learning_rate * part:.6g}") for part in RATES)
        return dataclasses.replace(
            super().train_config(seed),
            learning_rates=rates,
            optimizer="adamw",
            weight_decay=self.weight_decay,
        )

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


def run(config: Config) -> list[tables.Row]:
    """Train the networks that are not finished yet, write the files and return all rows."""
    config = config.filled()

    def builds(dataset: data.Dataset) -> Iterator[tables.Build]:
        for network in config.networks(dataset):
            yield lambda rngs, network=network: EquilibriumNet(network, rngs=rngs)

    with tables.opened("opteq", config, builds) as job:
        for seed in config.seeds:
            dataset = job.source.dataset(seed, config.examples)
            for network in config.networks(dataset):
                about = {"study": _study(network), "method": network.method}
                if not job.stored.final(seed=seed, **about):
                    _run_network(network, dataset, seed, config, job)
    if config.dataset == "cifar10":
        terminal.say(PUBLISHED)
    return job.stored.rows


def _study(network: EquilibriumNetConfig) -> str:
    """The name of all networks of a width."""
    return f"OptEq{network.width}"


def _run_network(
    network: EquilibriumNetConfig, dataset: data.Dataset, seed: int, config: Config, job: tables.Job
) -> None:
    """Train and test one network, and store its rows."""
    optimiser = config.train_config(seed)
    method, study = network.method, _study(network)
    name = f"{study} {networks.EQUILIBRIUM_NAMES[method]}"
    tags = {"dataset": dataset.name, "name": name, "study": study, "method": method, "seed": seed}
    final = {
        "paper_accuracy": None,
        "paper_std": None,
        "epochs": optimiser.epochs,
        "batch_size": optimiser.batch_size,
        "train_examples": len(dataset.train),
        "config": {"network": dataclasses.asdict(network), "training": optimiser.settings()},
        **runs.environment(),
    }
    board = job.stored.board(study, method, seed)
    try:
        trained = loop.train(
            lambda rngs: EquilibriumNet(network, rngs=rngs),
            dataset,
            optimiser,
            label=name,
            checkpoint=job.stored.checkpoint(study, method, seed),
            mesh=job.mesh,
            watch=board.show,
        )
    except loop.DivergenceError as error:
        job.stored.add(tables.diverged(tags, error, final))
        return
    scores = tables.scored(trained, dataset, config.trials, job.mesh)
    board.finish(scores["accuracy"])
    *epochs, last = tables.finished(tags, trained, scores, final)
    curves, ends = residuals(trained.model, dataset)
    rows = [
        *epochs,
        *({"kind": "residuals", **tags, **curve} for curve in curves),
        {**last, **ends},
    ]
    job.stored.add(rows)


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
    pixels = jnp.asarray(dataset.validation.images[:images])
    x = evaluation.normalise(pixels, dataset.mean, dataset.std)
    curves, taken, converged, norms = [], [], [], []
    for number, tier in enumerate(model.features.tiers):
        if not tier.is_plain:
            problem = tier.inner.problem(tier.drive(x))
            for plain in (True, False):
                solver = (ss.FixedPoint if plain else ss.Anderson)(iterations)
                limits = _relative(problem, solver)
                how = "plain iteration" if plain else "Anderson"
                about = {"layer": f"tier {number + 1}", "deterministic": plain, "how": how}
                curves.append({**about, **limits})
            solution = tier.inner.solve(tier.drive(x))
            if solution.iterations is not None:
                taken.append(int(jnp.max(solution.iterations)))
                converged.append(float(jnp.mean(solution.status == ss.Status.CONVERGED)))
            layers: Any = getattr(problem, "equilibria", (problem,))
            bounds = [ss.lipschitz_bracket(one.linear_map, grid="padded") for one in layers]
            norms += [float(bound.upper) ** 0.5 for bound in bounds]
        x = tier(x)
    if not norms:
        return curves, {}
    return curves, {"solver_iterations": taken, "converged": converged, "norms": norms}


def _relative(problem: ss.FixedPointProblem, solver: ss.Solver) -> dict[str, list[float]]:
    """Quantiles over the images of the residuals, relative to the last iterate."""

    @jax.jit
    def solved(problem):
        solution = solver.solve(None, problem)
        return solution.residuals / jnp.maximum(problem.norm(solution.value), 1e-12)[None]

    limits = np.quantile(np.asarray(solved(problem)), (0.1, 0.5, 0.9), axis=1)
    low, middle, high = ([float(f"{x:.6g}") for x in line] for line in limits)
    return {"low": low, "middle": middle, "high": high}


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    tables.main("opteq", Config, run, args)


if __name__ == "__main__":
    main()
