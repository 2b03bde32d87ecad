"""README's picture: a layer is one iteration of a solver, and what further iterations gain.

    python -m experiments.picture

A dense layer of 400 inputs and 120 outputs with a tanh, in normalised units, so that the first iterate from
zero is the layer itself (with sampling: dropout, the layer, the activation). Lines: P(z_k) − min P over
P(0) − min P, the median over 64 inputs. Circles: the certified gap at K = 1, 3, 10, 30, 100 iterations of
Prox-GD, a bound that needs no minimiser.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import stochsolvers as ss
from experiments.output import plots, terminal

PICTURE = Path(__file__).parent.parent / "docs/_static/layer.png"
TITLES = {
    "Prox-GD": "full gradients",
    "FISTA": "full gradients, momentum",
    "Prox-SG": "half of the inputs an iteration, decaying step",
    "mS2GD": "the same, variance reduced",
}
ROUND_OFF = 1e-10
ARROW = {"arrowstyle": "-", "color": "0.5"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw README's picture."""

    out: Path = PICTURE
    """The file."""
    shape: tuple[int, int, int] = (400, 120, 64)
    """Inputs, outputs and examples."""
    num_iters: int = 100
    """Iterations of each solver."""


def layer_problem(n1: int, n2: int, batch: int) -> ss.LayerProblem:
    """A layer as Flax initialises it, with inputs of unit variance, in normalised units."""
    keys = jax.random.split(jax.random.key(0), 2)
    A = ss.Dense(jax.random.normal(keys[0], (n1, n2)) / jnp.sqrt(n1))
    x = jax.random.normal(keys[1], (batch, n1))
    return ss.LayerProblem(A, x, prior=ss.prox.Tanh(), ridge=1e-3).normalized()


@jax.jit
def objectives(problem: ss.LayerProblem, solver: ss.Solver) -> jax.Array:
    """P(z_k), k = 1..K, shape (K, batch)."""
    objectives = solver.solve(jax.random.key(1), problem, trace_objective=True).objectives
    assert objectives is not None
    return objectives


def gaps(config: Config) -> tuple[dict[str, np.ndarray], dict[int, float]]:
    """Relative gaps of every solver over its iterations; certified ones of Prox-GD at some K."""
    problem = layer_problem(*config.shape)
    count = config.num_iters
    solvers = {
        "Prox-GD": ss.ProxGD(count),
        "FISTA": ss.ProxGD(count, momentum=True),
        "Prox-SG": ss.ProxSG(tau=0.5, num_iters=count, decay=0.9),
        "mS2GD": ss.MS2GD(
            tau=0.5,
            num_outer=-(-count // 10),
            num_inner=10,
            step_size=ss.InverseExpectedSmoothness(),
        ),
    }
    best = objectives(problem, ss.ProxGD(20 * count, momentum=True)).min(axis=0)
    zero = problem.objective(jnp.zeros(problem.shape, problem.dtype)) - best
    lines = {
        name: np.asarray(jnp.median((objectives(problem, s) - best) / zero, axis=1))
        for name, s in solvers.items()
    }
    certified = {}
    for k in (1, 3, 10, 30, 100):
        if k <= count:
            z = ss.ProxGD(k).solve(None, problem).value
            certified[k] = float(jnp.median(problem.certificate(z) / zero))
    return lines, certified


def draw(lines: dict[str, np.ndarray], certified: dict[int, float]) -> Figure:
    """Gaps over iterations, both on logarithmic axes."""
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.4, 4.4))
        axes = figure.add_subplot()
        for (name, gap), dashes in zip(lines.items(), ss.plot.DASHES, strict=True):
            shown = np.where(gap > ROUND_OFF, gap, np.nan)
            axes.loglog(np.arange(1, len(gap) + 1), shown, dashes, label=f"{name}: {TITLES[name]}")
        axes.loglog(
            list(certified),
            list(certified.values()),
            "o",
            mfc="none",
            color=ss.plot.COLORS[0],
            label="Prox-GD, certified",
        )
        first = float(lines["Prox-GD"][0]), float(lines["Prox-SG"][0])
        for height, text, offset in (
            (first[0], "linear → tanh", (0, -60)),
            (first[1], "dropout → linear → tanh", (10, 14)),
        ):
            axes.annotate(text, (1, height), offset, textcoords="offset points", arrowprops=ARROW)
        axes.set_xlabel("iterations K, from zero; the first is the layer")
        axes.set_ylabel("(P(z) − min P) / (P(0) − min P)")
        axes.set_ylim(ROUND_OFF, 4)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def main(args: list[str] | None = None) -> None:
    """Command line."""
    config = terminal.parse(Config, "experiments.picture", args, description=__doc__ or "")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_enable_x64", True)
    lines, certified = gaps(config)
    draw(lines, certified).savefig(config.out, dpi=150)
    print({name: f"{gap[0]:.2g} → {gap[-1]:.2g}" for name, gap in lines.items()}, certified)


if __name__ == "__main__":
    main(sys.argv[1:])
