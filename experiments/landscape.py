"""Small examples of the hidden convex landscape of two-layer networks.

    python -m experiments.landscape
    python -m experiments.landscape --dataset cifar10 --data-dir DIR --only stochastic

| example | what it shows |
|---|---|
| three | three data in the plane: the whole program, its optimum, its network |
| starts | ten random starts of gradient descent beside the optimum of the convex program |
| path | the number of neurons of an optimal network along the regularisation path |
| stochastic | SGD on the convex program with sampled gates beside SGD on the network |
| gan | a Wasserstein GAN in closed form, and its generator as a convex program |
| layers | a deeper network, trained layer by layer through convex programs |

Each writes its picture and a line of numbers.

References:
  Pilanci, The hidden convex optimization landscape of deep neural networks, One World Optimization Seminar;
  Pilanci and Ergen 2020; Sahiner et al. 2022, Hidden convexity of Wasserstein GANs; Belilovsky et al. 2019.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import data
from experiments.data import archive
from experiments.output import plots, runs, terminal
from experiments.training import landscape_examples

NAMES = ("three", "starts", "path", "stochastic", "gan", "layers")


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the examples, write their pictures and numbers."""

    out: Path = Path("runs/landscape")
    """Folder of the pictures and of landscape.json."""
    only: tuple[str, ...] = NAMES
    """The examples to run."""
    dataset: Annotated[data.DatasetName, tyro.conf.arg(metavar="NAME|FILE.npz")] = "digits"
    """Of stochastic, gan and layers: digits, cifar10 or cifar100 (from --data-dir), or FILE.npz."""
    data_dir: Path = Path("runs/data")
    """Folder of the CIFAR archives."""
    examples: int | None = None
    """Train on so many images; by default on all."""
    gates: int = 100
    """Sampled gates of stochastic and layers."""
    epochs: int = 20
    """Of stochastic."""
    seed: int = 0
    """Of everything random."""
    smoke: bool = False
    """Few steps and images, to see that everything works."""

    def __post_init__(self):
        unknown = [name for name in self.only if name not in NAMES]
        if unknown or not self.only:
            raise ValueError(f"only: expected some of {', '.join(NAMES)}, got {self.only}")
        for name in ("gates", "epochs", "examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")


def run(config: Config) -> dict[str, dict[str, Any]]:
    """The numbers of each example by name; writes the files."""
    found = {}
    for name in dict.fromkeys(config.only):
        numbers, draw = getattr(landscape_examples, name)(config)
        with plots.figure(config.out / f"{name}.png", (7.4, 4.2)) as figure:
            draw(figure)
        found[name] = numbers
        print(f"{name}: {landscape_examples.sentence(numbers)}", flush=True)
    settings = dataclasses.asdict(config)
    del settings["out"], settings["data_dir"]
    stored = {"settings": settings, "examples": found, **runs.environment()}
    runs.write_text(config.out / "landscape.json", json.dumps(stored, indent=1) + "\n")
    return found


def main(args: list[str] | None = None) -> None:
    """Run the command."""
    try:
        config = terminal.parse(Config, "experiments.landscape", args)
        run(config)
    except (ValueError, OSError, archive.DataError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {config.out}")


if __name__ == "__main__":
    main()
