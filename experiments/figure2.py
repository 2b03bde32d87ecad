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
from experiments.output import plots, runs, terminal


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
    """Number of points of each curve."""
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
            v, activation, operators = values(panel, points)
            apart[panel.name] = float(np.abs(operators[1.0] - activation).max())
            top.plot(v, activation, color="k", label=panel.name)
            for color, (step, operator) in enumerate(operators.items()):
                style = "-" if step == 1.0 else "--"
                top.plot(v, operator, f"C{color}{style}", label=f"prox of ηg, η = {step:g}")
                bottom.plot(v, operator - activation, f"C{color}{style}")
            top.set(title=f"{panel.name}:  {panel.formula}")
            top.legend(loc="upper left")
            bottom.set(xlabel="v")
        grid[0, 0].set_ylabel("activation")
        grid[1, 0].set_ylabel("prox − activation")
    return apart


def main(args: list[str] | None = None) -> None:
    """Parse the command line, draw, print the distances."""
    try:
        config = terminal.parse(Config, "experiments.figure2", args)
        if config.points < 2:
            raise ValueError(f"points: expected at least 2, got {config.points}")
        apart: dict[str, float] = {}
        target = config.out / "figure2.png"
        runs.write_figure(target, lambda path: apart.update(draw(path, config.points)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, distance in apart.items():
        print(f"{name}: the proximal operator at η = 1 is within {distance:.3f}")
    print(f"written to {config.out}")


if __name__ == "__main__":
    main()
