"""Figure 2: common activations beside the proximal operators that take their place.

    python -m experiments.figure2

Left: softplus and the proximal operator of −γ log u, γ = 1. Right: tanh and the proximal operator of
−γ log(1 − u²), γ = 0.1. Below: their differences, with the same operators for the step sizes η that a
solver would use, since prox_{ηg} changes its shape with η.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019, figure 2.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from experiments.output import plots, terminal


@dataclasses.dataclass(frozen=True)
class Panel:
    """An activation, the prior whose proximal operator approximates it, and the range |v| ≤ reach."""

    name: str
    activation: Callable[[jax.Array], jax.Array]
    prior: ss.Prior
    formula: str
    reach: float


PANELS = (
    Panel("softplus", jax.nn.softplus, ss.prox.LogBarrier(1.0), "g(u) = −log u", 6.0),
    Panel("tanh", jnp.tanh, ss.prox.SymmetricLogBarrier(0.1), "g(u) = −0.1 log(1 − u²)", 4.0),
)
STEP_SIZES = (1.0, 0.3, 0.1)


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw figure 2 and print the largest distance between the two curves of each pair."""

    out: Path = Path("runs/figure2")
    """Folder of figure2.png."""
    points: int = 801
    """Number of points of the differences, and of those that the largest distances are taken over."""
    smoke: bool = False
    """Accepted as by the tables, without effect: the whole figure takes seconds."""


def values(panel: Panel, points: int) -> tuple[np.ndarray, np.ndarray, dict[float, np.ndarray]]:
    """Abscissas, the activation, and the proximal operator for every step size."""
    v = jnp.linspace(-panel.reach, panel.reach, points)
    operators = {step: np.asarray(panel.prior.prox(v, step)) for step in STEP_SIZES}
    return np.asarray(v), np.asarray(panel.activation(v)), operators


def draw(path: Path, points: int) -> dict[str, float]:
    """Draw the figure; returns the largest distance between the two curves of each pair at η = 1."""
    apart = {}
    with plots.figure(path, (9, 6)) as figure:
        grid = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
        for (top, bottom), panel in zip(grid.T, PANELS, strict=True):
            ss.plot.activation(
                panel.prior, panel.activation, steps=STEP_SIZES, reach=panel.reach, ax=top
            )
            top.set(title=f"{panel.name}:  {panel.formula}", xlabel="")
            v, activation, operators = values(panel, points)
            apart[panel.name] = float(np.abs(operators[1.0] - activation).max())
            for operator, dashes in zip(operators.values(), ss.plot.DASHES, strict=False):
                bottom.plot(v, operator - activation, dashes)
            bottom.set(xlabel="v", ylabel="prox − activation")
        figure.align_ylabels()
    return apart


def main(args: list[str] | None = None) -> None:
    """Parse the command line, draw, print the distances."""
    try:
        config = terminal.parse(Config, "experiments.figure2", args)
        if config.points < 2:
            raise ValueError(f"points: expected at least 2, got {config.points}")
        apart = draw(config.out / "figure2.png", config.points)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, distance in apart.items():
        print(f"{name}: the proximal operator at η = 1 is within {distance:.3f}")
    print(f"written to {config.out}")


if __name__ == "__main__":
    main()
