"""The command line that tables 3 to 5 share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import tyro

from experiments import data, parallel, steps, training

FINETUNE_RATES = (1e-3, 1e-4)
EPOCHS = {"digits": (20, 8)}
PAPER_EPOCHS = (300, 200)
BATCH_SIZE = {"digits": 32}
PAPER_BATCH_SIZE = 128
SMOKE: dict[str, Any] = {
    "epochs": 2,
    "finetune_epochs": 2,
    "width": 0.125,
    "examples": 320,
    "trials": 3,
}
ADDABLE = ("seeds", "rates", "methods")
"""Options that may grow when a command is given again with the same folder."""
UNRECORDED = ("out", "data_dir", "overwrite", "smoke", "tensorboard", "machine")
"""Options that change no number, or that are filled in."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line of tables 3 to 5."""

    out: Path = Path("runs/finetune")
    """Folder of the results and checkpoints of one configuration; a stopped run goes on there."""
    dataset: Annotated[data.DatasetName, tyro.conf.arg(metavar="NAME|FILE.npz")] = "digits"
    """digits (comes with scikit-learn), cifar10 or cifar100 (read from --data-dir), or FILE.npz with
    arrays "images" and "labels"."""
    data_dir: Path = Path("runs/data")
    """Folder of the CIFAR archives, downloaded if absent, and of the prepared copies."""
    epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Of the baseline, a third at each learning rate; by default 20 on digits, else the paper's 300."""
    finetune_epochs: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Half at each learning rate; by default 8 on digits, else 200."""
    batch_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """By default 32 on digits, else 128."""
    seeds: tuple[int, ...] = (0,)
    """Each of them is a run: validation split, initial weights, order of the examples, sampling."""
    trials: int = 20
    """Tests of a network that samples at test time."""
    width: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Factor of the numbers of channels and hidden units; by default 1."""
    examples: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Train on so many images only; by default on all."""
    augment: bool = False
    """Crop and flip the training images at random; not in the paper."""
    precision: steps.Precision = "float32"
    """bf16 computes plain layers in bfloat16, and solvers in float32 as ever."""
    smoke: bool = False
    """A minute's run on a narrow network and few images: to see that everything works."""
    overwrite: bool = False
    """Remove the results and checkpoints in --out first."""
    tensorboard: bool = False
    """Write the curves of each network for TensorBoard as well, to --out/tensorboard."""
    machine: tyro.conf.OmitArgPrefixes[parallel.Machine] = dataclasses.field(
        default_factory=parallel.Machine
    )

    def __post_init__(self):
        for name in ("epochs", "finetune_epochs", "batch_size", "trials", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.width is not None and not self.width > 0:
            raise ValueError(f"width: expected a positive factor, got {self.width}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds: expected at least one, not negative, each once, got {self.seeds}"
            )

    def filled(self) -> Self:
        """The options with the defaults of the data set, or of a smoke run, filled in."""
        epochs, finetune_epochs = EPOCHS.get(self.dataset, PAPER_EPOCHS)
        defaults: dict[str, Any] = {
            "epochs": epochs,
            "finetune_epochs": finetune_epochs,
            "batch_size": BATCH_SIZE.get(self.dataset, PAPER_BATCH_SIZE),
            "width": 1.0,
        }
        if self.smoke:
            defaults |= SMOKE | {"batch_size": 32}
        missing = {key: value for key, value in defaults.items() if getattr(self, key) is None}
        if self.smoke:
            missing["trials"] = min(self.trials, SMOKE["trials"])
        return dataclasses.replace(self, **missing)

    def settings(self, table: str) -> dict[str, Any]:
        """What the networks of a folder have in common; seeds, rates and methods may be added."""
        common = dataclasses.asdict(self)
        for name in (*UNRECORDED, *ADDABLE):
            common.pop(name, None)
        return {"table": table, **common, "dataset": Path(self.dataset).stem}

    def train_config(self, seed: int) -> training.TrainConfig:
        """Of the baseline; `filled` comes first."""
        assert self.epochs is not None and self.batch_size is not None  # noqa: PT018
        return training.TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            augment=self.augment,
            precision=self.precision,
        )

    def finetune_config(self, seed: int) -> training.TrainConfig:
        """Of what follows, swapped or not; `filled` comes first."""
        assert self.finetune_epochs is not None
        return dataclasses.replace(
            self.train_config(seed), epochs=self.finetune_epochs, learning_rates=FINETUNE_RATES
        )


def check_methods(methods: Sequence[str], num_iters: int, decay: float = 1.0) -> None:
    """Raise a ValueError for what a table's command line cannot run."""
    if not methods or "dropout" in methods:
        got = ", ".join(methods) or "none"
        raise ValueError(f"methods: expected at least one solver and no dropout, got {got}")
    if num_iters < 1:
        raise ValueError(f"num_iters: expected at least 1, got {num_iters}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a factor in (0, 1], got {decay}")
