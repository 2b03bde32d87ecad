"""The command lines of the tables: common options, and those that tables 3 to 5 add."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import tyro

from experiments import data
from experiments.data.datasets import name_of
from experiments.networks import BlockConfig, Method
from experiments.training import parallel, training_step

LEARNING_RATES = training_step.TrainConfig().learning_rates
FINETUNE_RATES = (1e-3, 1e-4)
EPOCHS = {"digits": (20, 8)}
PAPER_EPOCHS = (300, 200)
BATCH_SIZE = {"digits": 32}
PAPER_BATCH_SIZE = 128
SMOKE = {"epochs": 2, "finetune_epochs": 2, "batch_size": 32, "width": 0.125, "examples": 320}
SMOKE_TRIALS = 3
ADDABLE = ("seeds", "rates", "methods", "variants", "widths", "schedules", "taus")
"""Options to which values may be added when a command is repeated with the same folder."""
UNRECORDED = ("out", "data_dir", "overwrite", "smoke", "tensorboard", "machine", "seeds_at_once")
"""Options that change no result, or whose effect other options record."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of every table."""

    out: Path = Path("runs/table")
    """Folder of the results and checkpoints of one configuration; a stopped run is resumed from it."""
    dataset: Annotated[data.DatasetName, tyro.conf.arg(metavar="NAME|FILE.npz")] = "digits"
    """digits (comes with scikit-learn), cifar10 or cifar100 (read from --data-dir), or FILE.npz with
    arrays "images" and "labels"."""
    data_dir: Path = Path("runs/data")
    """Folder of the CIFAR archives, downloaded if absent, and of the prepared copies."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Epochs, a third of them at each learning rate; by default 20 on digits, else the paper's 300."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Images in a batch; by default 32 on digits, else 128."""
    learning_rate: float = LEARNING_RATES[0]
    """The first learning rate; the next ones are a tenth and a hundredth of it."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a run with its own validation split, initial weights, order of examples, sampling."""
    trials: int = 20
    """Repeated tests of a network that samples at test time; at most 3 in a smoke run."""
    normalize: bool = False
    """Solve with the map A/√L and the inputs √L x: one iteration is then the plain layer."""
    examples: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Train on this many images only; by default on all."""
    augment: bool = False
    """Crop and flip the training images at random; not in the paper."""
    precision: training_step.Precision = "float32"
    """bf16 computes plain layers in bfloat16; solvers, parameters and loss stay float32."""
    smoke: bool = False
    """A run of about a minute on few images with a narrow network, to see that everything works."""
    overwrite: bool = False
    """Remove the results and checkpoints in --out first."""
    tensorboard: bool = False
    """Write loss, accuracies and rate of each epoch for TensorBoard as well, to --out/tensorboard."""
    machine: tyro.conf.OmitArgPrefixes[parallel.Machine] = dataclasses.field(
        default_factory=parallel.Machine
    )

    counts: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "trials", "examples")
    smoke_sizes: ClassVar[dict[str, float]] = SMOKE
    """Values that a smoke run uses in place of None."""
    smoke_choices: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Values that a smoke run uses in place of the defaults."""
    unrecorded: ClassVar[tuple[str, ...]] = ()
    """Options of other commands, without effect here."""

    def __post_init__(self):
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds: expected at least one, not negative, each once, got {self.seeds}"
            )
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == ():
                raise ValueError(f"{field.name}: expected at least one, got none")
        for name in self.counts:
            self.check(name, "at least 1", lambda count: count >= 1)
        self.check("learning_rate", "a positive rate", is_positive)

    def check(self, name: str, expected: str, fits: Callable[[Any], bool]) -> None:
        """Raise a ValueError for an option that does not fit, or one of its values; None is to be filled."""
        value = getattr(self, name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(each is None or fits(each) for each in values):
            raise ValueError(f"{name}: expected {expected}, got {value}")

    def defaults(self) -> dict[str, Any]:
        """Defaults that depend on the data set; see `filled`."""
        return {
            "epochs": EPOCHS.get(self.dataset, PAPER_EPOCHS)[0],
            "batch_size": BATCH_SIZE.get(self.dataset, PAPER_BATCH_SIZE),
        }

    def filled(self) -> Self:
        """The options, with defaults of the data set or of a smoke run in the place of None."""
        defaults = self.defaults() | (self.smoke_sizes if self.smoke else {})
        names = {field.name for field in dataclasses.fields(self)}
        missing: dict[str, Any] = {
            key: value
            for key, value in defaults.items()
            if key in names and getattr(self, key) is None
        }
        if self.smoke:
            missing["trials"] = min(self.trials, SMOKE_TRIALS)
            # `is`: a value that was given is kept, even if it equals the default
            missing |= {
                name: choice
                for name, choice in self.smoke_choices.items()
                if getattr(self, name) is getattr(type(self), name)
            }
        return dataclasses.replace(self, **missing)

    def settings(self, table: str) -> dict[str, Any]:
        """The settings that all networks of a folder share; seeds, rates and methods may be added."""
        common = dataclasses.asdict(self)
        for name in (*UNRECORDED, *ADDABLE, *self.unrecorded):
            common.pop(name, None)
        if not self.normalize:
            common.pop("normalize", None)  # folders from before there was such an option
        return {"table": table, **common, "dataset": name_of(self.dataset)}

    def train_config(self, seed: int) -> training_step.TrainConfig:
        """The configuration of training from scratch; call `filled` first."""
        assert self.epochs is not None and self.batch_size is not None  # noqa: PT018
        return training_step.TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rates=_scaled(LEARNING_RATES, self.learning_rate),
            seed=seed,
            augment=self.augment,
            precision=self.precision,
        )


@dataclasses.dataclass(frozen=True)
class FinetuneOptions(Options):
    """The command line of tables 3 to 5."""

    finetune_epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Epochs of finetuning, half at each learning rate; by default 8 on digits, else 200."""
    finetune_learning_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """The first rate of finetuning, the second is a tenth of it; by default a tenth of --learning-rate."""
    width: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Factor on the numbers of channels and hidden units; by default 1."""

    counts: ClassVar[tuple[str, ...]] = (*Options.counts, "finetune_epochs")

    def __post_init__(self):
        super().__post_init__()
        self.check("width", "a positive factor", is_positive)
        self.check("finetune_learning_rate", "a positive rate", is_positive)

    def defaults(self) -> dict[str, Any]:
        """The defaults of all tables, and those of the options added here."""
        return {
            **super().defaults(),
            "finetune_epochs": EPOCHS.get(self.dataset, PAPER_EPOCHS)[1],
            "finetune_learning_rate": _scaled(LEARNING_RATES, self.learning_rate)[1],
            "width": 1.0,
        }

    def finetune_config(self, seed: int) -> training_step.TrainConfig:
        """The configuration of finetuning, for all networks alike; call `filled` first."""
        assert self.finetune_epochs is not None and self.finetune_learning_rate is not None  # noqa: PT018
        return dataclasses.replace(
            self.train_config(seed),
            epochs=self.finetune_epochs,
            learning_rates=_scaled(FINETUNE_RATES, self.finetune_learning_rate),
        )


def rounded(value: float) -> float:
    """To 12 digits: 1 − 0.9 is 0.1."""
    return float(f"{value:.12g}")


def _scaled(rates: Sequence[float], first: float) -> tuple[float, ...]:
    """The rates times a factor that makes `first` the first of them, rounded to 12 digits."""
    factor = first / rates[0]
    return tuple(rounded(rate * factor) for rate in rates)


def adamw(
    config: training_step.TrainConfig, first: float, parts: Sequence[float], weight_decay: float
) -> training_step.TrainConfig:
    """AdamW in the place of SGD, at the first rate times each of the parts."""
    rates = tuple(float(f"{first * part:.6g}") for part in parts)
    changes: dict[str, Any] = {"optimizer": "adamw", "weight_decay": weight_decay}
    return dataclasses.replace(config, learning_rates=rates, **changes)


def is_positive(value: float) -> bool:
    """Whether a number is positive and finite."""
    return 0 < value < math.inf


def is_rate(value: float) -> bool:
    """Whether a number can be a dropout rate."""
    return 0 <= value < 1


def block(config: Any, method: Method, rate: float = 0.5) -> BlockConfig:
    """The layers of a method, from a command's options: num_iters, normalize and, if it has one, decay."""
    decay = getattr(config, "decay", BlockConfig.decay)
    return BlockConfig(method, rate, config.num_iters, decay, normalize=config.normalize)


def check_methods(methods: Sequence[str]) -> None:
    """Raise a ValueError for methods that tables 3 to 5 cannot run."""
    if not methods or "dropout" in methods:
        got = ", ".join(methods) or "none"
        raise ValueError(f"methods: expected at least one solver and no dropout, got {got}")


def check_solver(num_iters: int, decay: float = 1.0) -> None:
    """Raise a ValueError for a number of iterations below 1 or a decay outside (0, 1]."""
    if num_iters < 1:
        raise ValueError(f"num_iters: expected at least 1, got {num_iters}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a factor in (0, 1], got {decay}")
