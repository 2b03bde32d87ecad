r"""Two-layer networks by convex programs, beside Adam and SGD on networks of the same width and objective.

    python -m experiments.convex
    python -m experiments.convex --dataset cifar10 --data-dir DIR --classes 3 5
    python -m experiments.convex --dataset cifar10 --data-dir DIR --examples 5000 --components 256

    minimise  Σ_c ( Σ_j ½(f_c(x_j) − y_cj)² + (β/2) Σ_i (||w_ci||² + a_ci²) ),   f_c(x) = Σ_i a_ci φ_i(w_ci·x)

with P neurons for each of C outputs: one output ±1 for two classes, else one of 0 and 1 for each class.

| method | φ_i(u) | trained by |
|---|---|---|
| gated | 1[x·g_i ≥ 0] u | the convex program over v_ci = w_ci a_ci, to a certified relative gap |
| gated-adam | the same gates | Adam on w and a: the optimum of the convex program is the least it can reach |
| relu | max(u, 0) | `stochsolvers.convex.train_network`: gated start, polish, separation of new neurons |
| adam, sgd | max(u, 0) | minibatches, see `experiments.training.descent` |

The gates are normal. The gated program chooses β on the validation images, along a path of fractions of
β_max (of several best, the largest); it is the same for all methods. The learning rate is chosen likewise
from a grid (of several best, that of the least objective). The test images are read once, after that. Seconds
are those of compilation and of training with the rate that was chosen, without the choices and the scores.

References:
  Pilanci and Ergen, Neural networks are convex regularizers, 2020; Mishkin, Sahiner and Pilanci, Fast convex
  optimization for two-layer ReLU networks, 2022.
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import tyro

from experiments import data
from experiments.data import vectors
from experiments.output import runs, terminal
from experiments.training import loop, nonconvex, options, programs, tables, training_step

NAMES: dict[programs.Method, str] = {
    "gated": "gated program",
    "gated-adam": "gated Adam",
    "relu": "ReLU rounds",
    "adam": "Adam",
    "sgd": "SGD",
}
GATED: tuple[programs.Method, ...] = ("gated", "gated-adam")
EPOCHS, WIDTHS = {"digits": 60}, {"digits": 200}
OTHER_EPOCHS, OTHER_WIDTH = 30, 100


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Train two-layer networks by convex programs, Adam and SGD; draw gap and accuracy over seconds."""

    methods: tuple[programs.Method, ...] | None = None
    """By default all, relu for two classes only: its networks are trained one after the other."""
    classes: tuple[int, ...] | None = None
    """Numbers of the classes; by default all."""
    width: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Neurons P for each output, and gates; by default 200 on digits, else 100."""
    components: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """So many principal components in the place of the pixels."""
    fractions: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
    """β/β_max among which β is chosen, from the largest."""
    tol: float = 1e-4
    """Certified relative gap at which the convex program is solved."""
    max_iters: int = 4096
    """The most iterations for the convex program."""
    adam_rates: tuple[float, ...] = (3e-2, 1e-2, 3e-3)
    """First learning rates of Adam among which one is chosen."""
    sgd_rates: tuple[float, ...] = (2.0, 0.6, 0.2)
    """The same of SGD, times the mean of ||x||², to which the curvature of its loss is proportional."""
    rounds: int = 3
    """Rounds of the method relu: a start and a polish, then separations, each with a polish."""
    polish_iters: int = 300
    """The most L-BFGS iterations of a polish."""
    learning_rate: tyro.conf.Suppress[float] = options.LEARNING_RATES[0]
    trials: tyro.conf.Suppress[int] = 1
    normalize: tyro.conf.Suppress[bool] = False
    augment: tyro.conf.Suppress[bool] = False
    precision: tyro.conf.Suppress[training_step.Precision] = "float32"
    tensorboard: tyro.conf.Suppress[bool] = False

    unrecorded: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "trials",
        "normalize",
        "augment",
        "precision",
    )
    counts: ClassVar[tuple[str, ...]] = (
        *(*options.Options.counts, "width", "components", "max_iters", "rounds", "polish_iters"),
    )
    smoke_sizes: ClassVar[dict[str, float]] = {**options.SMOKE, "epochs": 3, "width": 20}
    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "fractions": (0.1, 0.03),
        "adam_rates": (1e-2,),
        "sgd_rates": (0.6,),
    }

    def __post_init__(self):
        super().__post_init__()
        for name in ("adam_rates", "sgd_rates"):
            self.check(name, "positive numbers", options.is_positive)
        self.check("fractions", "numbers in (0, 1)", lambda fraction: 0 < fraction < 1)
        self.check("tol", "a number in (0, 1)", lambda tol: 0 < tol < 1)

    def defaults(self) -> dict[str, Any]:
        """The defaults that depend on the data set, and those of a smoke run."""
        is_pair = self.classes is not None and len(self.classes) == 2
        return {
            **super().defaults(),
            "epochs": EPOCHS.get(self.dataset, OTHER_EPOCHS),
            "width": WIDTHS.get(self.dataset, OTHER_WIDTH),
            "methods": tuple(name for name in NAMES if name != "relu" or is_pair),
        }


def run(config: Config) -> list[tables.Row]:
    """Train what is not finished yet, write the files and return all rows."""
    config = config.filled()
    with tables.opened("convex", config, lambda _: ()) as job:
        source = job.source
        if config.classes is not None:
            source = vectors.of_classes(source, config.classes)
        for seed in config.seeds:
            task = None
            for method in wanted(config):
                if not job.stored.final(method=method, seed=seed):
                    task = prepared(source, config, seed) if task is None else task
                    job.stored.add(_train_and_test(method, task, config, job.stored))
    return job.stored.rows


def wanted(config: Config) -> list[programs.Method]:
    """The methods; the first is the gated program, which chooses β and bounds the others."""
    assert config.methods is not None
    return list(dict.fromkeys(("gated", *config.methods)))


def prepared(source: data.Source, config: Config, seed: int) -> programs.Task:
    """The data and the program of a seed.

    Raises:
      loop.ConfigurationError: a batch is larger than the data.
    """
    assert config.width is not None
    assert config.batch_size is not None
    dataset = source.dataset(seed, config.examples)
    count = len(dataset.train)
    if config.batch_size > count:
        most = f"at most {count}, the training images of {dataset.name}"
        raise loop.ConfigurationError(f"batch_size: expected {most}, got {config.batch_size}")
    return programs.prepared(dataset, seed, config.width, config.components)


def _train_and_test(
    method: programs.Method, task: programs.Task, config: Config, stored: runs.Run
) -> list[tables.Row]:
    """The rows of one method from one seed: its history, and the final row."""
    study = f"TwoLayer{config.width}"
    tags = {"dataset": task.data.name, "name": f"{study} {NAMES[method]}", "study": study}
    tags |= {"method": method, "seed": task.seed}
    count, features = task.program.X.shape
    final = {
        "family": "gated" if method in GATED else "relu",
        "paper_accuracy": None,
        "paper_std": None,
        "train_examples": count,
        "parameters": task.outputs * task.width * (features + 1),
        "schedule": _schedule(method, config),
        "config": {"network": {"outputs": task.outputs, "width": task.width, "features": features}},
        **runs.environment(),
    }
    try:
        trained = _trained(method, task, config, stored)
    except loop.DivergenceError as error:
        return tables.diverged(tags, error, final)
    final |= trained.final | {
        "train_seconds": trained.history[-1]["seconds"],
        "validation_accuracy": programs.accuracy(trained.predict, task.data.validation),
        "accuracy": programs.accuracy(trained.predict, task.data.test),
    }
    terminal.say(
        f"{tags['name']}, seed {task.seed}: {final['accuracy']:.2f} %, objective "
        f"{final['objective']:.5g} in {final['train_seconds']:.1f} s"
    )
    family = {"family": final["family"]}
    epochs = [{"kind": "epoch", **tags, **family, **row} for row in trained.history]
    return [*epochs, {"kind": "final", **tags, **final}]


def _trained(
    method: programs.Method, task: programs.Task, config: Config, stored: runs.Run
) -> programs.Trained:
    """The network of a method, with the β and, of gated networks, the bound of the gated program."""
    if method == "gated":
        return programs.train_gated(task, config.fractions, config.tol, config.max_iters)
    gated = stored.final(method="gated", seed=task.seed)
    assert gated is not None
    shared = {name: gated[name] for name in ("beta", "fraction")}
    if method in GATED:
        shared |= {name: gated[name] for name in ("lower_bound", "bound")}
    if method == "relu":
        trained = nonconvex.train_relu(task, gated["beta"], config.rounds, config.polish_iters)
    else:
        assert config.epochs is not None
        assert config.batch_size is not None
        rates = config.sgd_rates if method == "sgd" else config.adam_rates
        sizes = {"epochs": config.epochs, "batch_size": config.batch_size}
        trained = nonconvex.train_by_batches(task, gated["beta"], method, rates, **sizes)
    return trained._replace(final=shared | trained.final)


def _schedule(method: programs.Method, config: Config) -> str:
    if method == "gated":
        return f"relative gap {config.tol:g}"
    if method == "relu":
        return f"{config.rounds} rounds, polished by at most {config.polish_iters} iterations"
    return f"{config.epochs} epochs; batches of {config.batch_size}"


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    tables.main("convex", Config, run, args)


if __name__ == "__main__":
    main()
