r"""Two-layer networks by convex programs, beside Adam and SGD on networks of the same width and objective.

    python -m experiments.convex
    python -m experiments.convex --dataset cifar10 --data-dir DIR --classes 3 5
    python -m experiments.convex --dataset cifar10 --data-dir DIR --examples 5000 --components 256

    minimise  Σ_c ( Σ_j ½(f_c(x_j) − y_cj)² + (β/2) Σ_i (||w_ci||² + a_ci²) ),     f_c(x) = Σ_i a_ci φ_i(w_ci·x)

with P neurons for each of C outputs: one output ±1 for two classes, else one of 0 and 1 for each class.

| method | φ_i(u) | trained by |
|---|---|---|
| gated | 1[x·g_i ≥ 0] u | the convex program over v_ci = w_ci a_ci, to a certified relative gap |
| gated-adam | the same gates | Adam on w and a: the optimum of the convex program is the least it can reach |
| relu | max(u, 0) | `stochsolvers.convex.train_network`: gated start, polish, separation of new neurons |
| adam, sgd | max(u, 0) | minibatches, see `experiments.descent` |

The gates are normal. β is chosen on the validation images by the gated program, along a path of fractions of
β_max (of several best, the largest), and is the same for all methods; the learning rate is chosen likewise from
a grid (of several best, the one of the least objective). The test images are read once, after that. Seconds are
of compilation and training, of the rate that was chosen; choosing β and rates, and scoring, is not in them.

References:
  Pilanci and Ergen, Neural networks are convex regularizers, 2020; Mishkin, Sahiner and Pilanci, Fast convex
  optimization for two-layer ReLU networks, 2022.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import stochsolvers as ss
from experiments import descent, options, results, tables, training, vectors

Method = Literal["gated", "gated-adam", "relu", "adam", "sgd"]
NAMES: dict[Method, str] = {
    "gated": "gated program",
    "gated-adam": "gated Adam",
    "relu": "ReLU rounds",
    "adam": "Adam",
    "sgd": "SGD",
}
GATED: tuple[Method, ...] = ("gated", "gated-adam")
EPOCHS, WIDTHS = {"digits": 60}, {"digits": 200}
OTHER_EPOCHS, OTHER_WIDTH = 30, 100
SMOKE = {"epochs": 3, "width": 20, "examples": 200}
MOST_KERNEL_DATA = 8000
"""Beyond, the n × n kernel of the data is not factored."""


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Train two-layer networks by convex programs, Adam and SGD; draw gap and accuracy over seconds."""

    out: Path = Path("runs/convex")
    """Folder of the results of one configuration; a stopped run goes on after the last finished method."""
    methods: tuple[Method, ...] | None = None
    """By default all, relu for two classes only: its networks are trained one after the other."""
    classes: tuple[int, ...] | None = None
    """Numbers of the classes; by default all."""
    width: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Neurons P for each output, and gates; by default 200 on digits, else 100."""
    components: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """So many principal components in the place of the pixels."""
    fractions: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    """β/β_max among which β is chosen, from the largest."""
    tol: float = 1e-4
    """Certified relative gap at which the convex program is solved."""
    max_iters: int = 4096
    """The most iterations for the convex program."""
    adam_rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3)
    """First learning rates of Adam among which one is chosen."""
    sgd_rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3)
    """First learning rates of SGD among which one is chosen."""
    rounds: int = 4
    """The most rounds of the method relu."""
    learning_rate: tyro.conf.Suppress[float] = options.LEARNING_RATES[0]
    trials: tyro.conf.Suppress[int] = 1
    normalize: tyro.conf.Suppress[bool] = False
    augment: tyro.conf.Suppress[bool] = False
    precision: tyro.conf.Suppress[str] = "float32"
    tensorboard: tyro.conf.Suppress[bool] = False

    counts: ClassVar[tuple[str, ...]] = (
        *(*options.Options.counts, "width", "components", "max_iters", "rounds"),
    )
    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "fractions": (0.1, 0.03),
        "adam_rates": (1e-2,),
        "sgd_rates": (1e-2,),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.methods == ():
            raise ValueError("methods: expected at least one, got none")
        for name in ("fractions", "adam_rates", "sgd_rates"):
            values = getattr(self, name)
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name}: expected positive numbers, got {values}")
        if max(self.fractions) >= 1:
            raise ValueError(f"fractions: expected numbers in (0, 1), got {self.fractions}")
        if not 0 < self.tol < 1:
            raise ValueError(f"tol: expected a number in (0, 1), got {self.tol}")

    def defaults(self) -> dict[str, Any]:
        """The defaults that depend on the data set, and those of a smoke run."""
        return {
            **super().defaults(),
            "epochs": EPOCHS.get(self.dataset, OTHER_EPOCHS),
            "width": WIDTHS.get(self.dataset, OTHER_WIDTH),
            "methods": tuple(name for name in NAMES if name != "relu" or self.scalar),
            **(SMOKE if self.smoke else {}),
        }

    @property
    def scalar(self) -> bool:
        """Whether there are two classes, and one output."""
        return self.classes is not None and len(self.classes) == 2

    def settings(self, table: str) -> dict[str, Any]:
        """Without the options of other commands."""
        unused = ("learning_rate", "trials", "normalize", "augment", "precision")
        every = super().settings(table).items()
        return {name: value for name, value in every if name not in unused}


class Task(NamedTuple):
    """The data of a seed, its gates, and the program at β_max.

    Attributes:
      data: the splits as matrices.
      program: the gated program of the training data, with β = β_max.
      seed: of the splits, gates, initial weights and orders.
    """

    data: vectors.Vectors
    program: Any
    seed: int

    def key(self, purpose: int) -> jax.Array:
        """A random key."""
        return jax.random.fold_in(jax.random.key(self.seed), purpose)

    def scored(self, predict: Callable[[jax.Array], jax.Array], rows: vectors.Rows) -> float:
        """Accuracy in percent of a function of data (n, d) with values (n,) or (C, n)."""
        X, labels = rows
        scores = np.asarray(predict(jnp.asarray(X)))
        return vectors.accuracy(scores, labels)


class Trained(NamedTuple):
    """What a method ends with.

    Attributes:
      curve: objective, validation accuracy and seconds after each epoch or number of iterations.
      predict: the trained network.
      final: further entries of the final row: objective, lower bound, neurons.
      rows: further rows.
    """

    curve: list[tables.Row]
    predict: Callable[[jax.Array], jax.Array]
    final: tables.Row
    rows: list[tables.Row]


def run(config: Config) -> list[tables.Row]:
    """Train what is not finished yet, write the files and return all rows."""
    config = config.filled()
    with tables.opened("convex", config, lambda _: ()) as job:
        source = job.source
        if config.classes is not None:
            source = vectors.of_classes(source, config.classes)
        for seed in config.seeds:
            missing = [m for m in wanted(config) if not job.stored.final(method=m, seed=seed)]
            if not missing:
                continue
            task = prepared(source, config, seed)
            for method in missing:
                job.stored.add(_train_and_test(method, task, config, job))
    return job.stored.rows


def wanted(config: Config) -> list[Method]:
    """The methods; the first is the gated program, which chooses β and bounds the others."""
    assert config.methods is not None
    return list(dict.fromkeys(("gated", *config.methods)))


def prepared(source: Any, config: Config, seed: int) -> Task:
    """The data and the program of a seed."""
    data = vectors.vectors(source.dataset(seed, config.examples), config.components)
    X, labels = data.train
    if config.batch_size > len(X):
        wanted = f"at most {len(X)}, the training images of {data.name}"
        raise training.ConfigurationError(
            f"batch_size: expected {wanted}, got {config.batch_size}"
        )
    y = jnp.asarray(vectors.targets(labels, len(data.classes)))
    key = jax.random.fold_in(jax.random.key(seed), 0)
    patterns = ss.convex.sample_patterns(key, jnp.asarray(X), config.width)
    program = ss.convex.GatedProblem(jnp.asarray(X), y, patterns, 1.0)
    largest = float(jnp.max(program.beta_max()))
    return Task(data, program.with_beta(largest), seed)


def _train_and_test(method: Method, task: Task, config: Config, job: tables.Job) -> list[tables.Row]:
    """The rows of one method from one seed, and a line on the screen."""
    study = f"TwoLayer{config.width}"
    tags = {"dataset": task.data.name, "name": f"{study} {NAMES[method]}", "study": study}
    tags |= {"method": method, "seed": task.seed}
    if method == "gated":
        trained = train_gated(task, config)
    else:
        gated = job.stored.final(method="gated", seed=task.seed)
        assert gated is not None
        train = {"relu": train_relu}.get(method, train_by_batches)
        trained = train(method, task, config, float(gated["beta"]))
        trained.final.update({"beta": gated["beta"], "fraction": gated["fraction"]})
        if method == "gated-adam":
            trained.final["lower_bound"] = gated["lower_bound"]
    scores = {
        "validation_accuracy": task.scored(trained.predict, task.data.validation),
        "accuracy": task.scored(trained.predict, task.data.test),
    }
    final = {
        **scores,
        "train_seconds": trained.curve[-1]["seconds"],
        "parameters": task.program.y.size // len(task.data.train[0]) * config.width * (task.data.num_features + 1),
        "train_examples": len(task.data.train[0]),
        "features": task.data.num_features,
        "family": "gated" if method in GATED else "relu",
        **trained.final,
        "config": {"network": {"width": config.width, "outputs": task.program.y.ndim}},
        **results.environment(),
    }
    objective = f"objective {final['objective']:.5g}" if final.get("objective") else ""
    tables.say(
        f"{tags['name']}, seed {task.seed}: {scores['accuracy']:.2f} %, {objective}, "
        f"{final['train_seconds']:.1f} s"
    )
    epochs = [{"kind": "epoch", **tags, "family": final["family"], **row} for row in trained.curve]
    more = [{**row, **tags} for row in trained.rows]
    return [*more, *epochs, {"kind": "final", **tags, **final}]
