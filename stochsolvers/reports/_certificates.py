r"""How well the solver layers of a network solved their problems, as arrays and as a table.

For one solve of problem P(z) = F(z) + g(z) by iterates z_1, …, z_K with residuals r_k = ||z_k − z_{k−1}||,

    gap            P(z_K) − min P ≤ gap                          (`LayerProblem.certificate`)
    relative gap   gap / |P(z_K)|
    contraction    (r_m / r_1)^(1/(m − 1)),  m the last iteration whose residual is above round-off
    guaranteed     max(|1 − η μ|, |1 − η L|),  μ = λ + λ_min(A A*),  L = λ + λ_max(A A*)

The guarantee is the factor by which a proximal step of size η along the full gradient brings two
points closer; with η = 1/L it is 1 − μ/L. Where all steps are that one map, as for `ProxGD` without
momentum at a constant step, r_{k+1} is at most that factor times r_k. Momentum, sampled gradients,
steps that change and steps that differ between outputs have no such guarantee: NaN, printed as –.

Equilibrium layers, whose problem is z = h(z), have the same rows, with A = W, the step 1 and the gap of G,
and show the certified distance ||z_K − z*|| as well (`EquilibriumProblem.distance`). A composition's A is
the product of its W_i, and it has a gap only if it has an objective.

A gap is infinite where nothing can be promised, and the report says why: iterates that are not finite, a
point
outside the domain of g, or a problem without curvature for which no dual point was found, as when it is
unbounded below. A ridge λ > 0 removes the last cause.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from stochsolvers import _checks, plot
from stochsolvers.reports import _table
from stochsolvers.reports._observations import Observation as Observation
from stochsolvers.reports._observations import numbered_calls as numbered_calls
from stochsolvers.reports._observations import observe as observe
from stochsolvers.reports._progress import waiting as waiting


@functools.singledispatch
def certify(model: Any, *args: Any, **options: Any) -> "CertificateReport":
    """How well every solver layer of a network solves its problem at a batch, as a table.

    Args:
      model: an `nnx.Module`, with the arguments of `stochsolvers.nnx.certify`, or a Linen `nn.Module`,
        with those of `stochsolvers.linen.certify`.
      *args: see there.
      **options: see there.

    Returns:
      `CertificateReport`.
    """
    _checks.fail("model", "an nnx.Module or a linen.Module", type(model).__name__)


def fail_dropped_records(layer: str, wanted: str) -> NoReturn:
    """Refuse a transform that would drop the records of a layer's solves.

    Args:
      layer: its path in the network.
      wanted: the transforms that keep it.
    """
    _checks.fail(
        f"transform around the solver layer {layer!r}", wanted, "one that drops its records"
    )


@dataclasses.dataclass(frozen=True)
class LayerCertificate:
    """One call of a solver layer.

    Attributes:
      name: the layer's path in the network.
      lipschitz: L = λ_max(A A*), without the ridge: the middle of [lower, upper] where lemma 2 is exact
        (dense, circular), else `lipschitz_constant` on the layer's own grid.
      lower: a lower bound on ||A||².
      upper: an upper bound on ||A||².
      step_size: the first step, the largest where output features have their own.
      num_iters: K; with a tolerance, the maximum over the batch.
      gap_max: the certified gap of the batch's worst example, in units of the objective.
      gap_mean: its mean over the batch.
      relative_gap: the largest gap / |objective| of the batch.
      contraction: measured factor of the residuals for each iteration, the maximum over the batch; NaN
        where fewer than two residuals are above round-off.
      contraction_bound: the factor that theory guarantees; NaN where it guarantees none (momentum,
        sampled gradients, steps that change or that differ between outputs).
      finite: whether every iterate of every example was finite.
      note: why a gap is infinite and what to do, or "".
      distance_max: the certified distance of the batch's worst example from its equilibrium, in units of z;
        NaN for layers that are no equilibrium layers.
    """

    name: str
    lipschitz: float
    lower: float
    upper: float
    step_size: float
    num_iters: int
    gap_max: float
    gap_mean: float
    relative_gap: float
    contraction: float
    contraction_bound: float
    finite: bool
    note: str = ""
    distance_max: float = math.nan


@dataclasses.dataclass(frozen=True)
class CertificateReport:
    """The solver layers of a network in call order; `str` is a table.

    Attributes:
      rows: one record for each call of a solver layer.
    """

    rows: tuple[LayerCertificate, ...]

    def as_dict(self) -> dict[str, list[Any]]:
        """A list for each column, as `pandas.DataFrame` takes it."""
        return _table.columns(self.rows, LayerCertificate)

    def __str__(self) -> str:
        """The aligned table."""
        if not self.rows:
            return "No solver layer was called."
        headers = [
            "layer", "L", "||A||² in", "step", "iterations", "gap max", "gap mean", "relative",
            "contraction", "guaranteed",
        ]  # fmt: skip
        cells = [_cells(row) for row in self.rows]
        if not all(np.isnan(row.distance_max) for row in self.rows):
            headers.append("distance")
            cells = [
                [*one, _number(row.distance_max, ".1e")]
                for one, row in zip(cells, self.rows, strict=True)
            ]
        lines = [_table.text(headers, cells)]
        lines += [f"{row.name}: {row.note}" for row in self.rows if row.note]
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """A dot for each layer's largest certified gap over its objective, on a logarithmic axis.

        Args:
          ax: a matplotlib `Axes`; by default, those of a new figure.

        Returns:
          the `Axes`.

        Raises:
          ImportError: without matplotlib.
        """
        return plot.certificates(self, ax=ax)


def certificate_report(
    observations: Mapping[str, Sequence[Observation]],
) -> CertificateReport:
    """A row for each recorded solve, by the names of the layers.

    A transformation that stacks layers (a scan) stacks their records: each gets a row.
    """
    rows = []
    for name, calls in jax.device_get(dict(observations)).items():
        for observation in calls:
            stack = np.shape(observation.call)
            for index in np.ndindex(stack):
                suffix = "".join(f"[{i}]" for i in index)
                one = jax.tree.map(lambda array, index=index: array[index], observation)
                rows.append((int(one.call), index, _row(name + suffix, one)))
    rows.sort(key=lambda entry: entry[:2])
    return CertificateReport(tuple(row for *_, row in rows))


def _row(name: str, seen: Observation) -> LayerCertificate:
    gap, objective = np.asarray(seen.gap), np.abs(seen.objective)
    if not gap.size:
        _checks.fail(f"batch of the solver layer {name!r}", "at least one example", "none")
    relative = np.divide(
        gap,
        objective,
        out=np.full_like(gap, np.inf),
        where=(objective > 0) & np.isfinite(objective),
    )
    relative = np.where(gap == 0, 0.0, np.where(np.isinf(gap), np.inf, relative))
    rates = seen.contraction[np.isfinite(seen.contraction)]
    return LayerCertificate(
        name=name,
        lipschitz=float(seen.lipschitz),
        lower=float(seen.lower),
        upper=float(seen.upper),
        step_size=float(seen.step_size),
        num_iters=int(seen.num_iters),
        gap_max=float(np.max(gap)),
        gap_mean=float(np.mean(gap)),
        relative_gap=float(np.max(relative)),
        contraction=float(np.max(rates)) if rates.size else math.nan,
        contraction_bound=_or_nan(seen.contraction_bound),
        finite=bool(np.all(seen.finite)),
        note=_note(seen),
        distance_max=_or_nan(np.max(seen.distance)),
    )


def _or_nan(value: Any) -> float:
    """NaN, "none", in a record; within JAX it is +∞, which `jax_debug_nans` lets pass.

    One NaN for all, so that equal rows compare as equal.
    """
    return math.nan if np.isinf(value) else float(value)


def _note(seen: Observation) -> str:
    """Why gaps are infinite, for the first cause that applies to an example."""
    infinite = np.isinf(seen.gap)
    growing = np.asarray(seen.growing)
    if not np.any(infinite | growing):
        return ""
    count = f"{np.sum(infinite)} of {infinite.size} gaps infinite"
    if np.any(infinite & ~np.asarray(seen.finite)):
        return f"{count}: the iterates are not finite; take a shorter step"
    if np.any(infinite & ~np.asarray(seen.feasible)):
        return f"{count}: the output is outside the prior's domain"
    if np.all(np.isinf(np.asarray(seen.objective))):
        return f"{count}: the layer has no objective; see its distance from the equilibrium"
    if np.any(growing):
        return f"{count}: the iterates grow at a constant rate; add a ridge to bound the problem"
    return f"{count}: no curvature and no dual point found; add a ridge"


def _cells(row: LayerCertificate) -> list[str]:
    return [
        row.name if row.finite else f"{row.name} (not finite)",
        f"{row.lipschitz:.4g}",
        f"[{row.lower:.4g}, {row.upper:.4g}]",
        _number(row.step_size, ".3g"),
        str(row.num_iters),
        f"{row.gap_max:.1e}",
        f"{row.gap_mean:.1e}",
        f"{row.relative_gap:.1e}",
        _number(row.contraction, ".4f"),
        _number(row.contraction_bound, ".4f"),
    ]


def _number(value: float, style: str) -> str:
    return "–" if np.isnan(value) else format(value, style)
