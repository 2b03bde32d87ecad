"""How solvers converge, and what is certified of it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stochsolvers import _checks
from stochsolvers.plot import _axes
from stochsolvers.solvers import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def convergence(
    solutions: Solution | Mapping[str, Solution],
    *,
    certificate: Any = None,
    minimum: Any = None,
    work: float | Mapping[str, float] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Gaps or residuals over the iterations, on a logarithmic axis, as means over the batch.

    Where every solution has its objectives (`trace_objective=True`) and the minimum is known, the line is

        P(z_k) − min P.

    Where it is not known but certified, P(z_K) − c ≤ min P ≤ P(z_k) for every solution of the problem, with c
    its certificate, and every k. With the best of these bounds, m₋ ≤ min P ≤ m₊, the line is the certified
    gap P(z_k) − m₋, and a band reaches from it down to P(z_k) − m₊: the gap is within, for every solver.
    Certificates hold for single examples; those without a finite one are left out of the means.

    Else the line is the residual ||z_{k+1} − z_k||, which proves nothing, and the legend has the certificate
    of the worst example where there is one. An example that has stopped has no residual and is left out.

    Args:
      solutions: a `Solution`, or several of one problem by their names.
      certificate: bounds on P(z_K) − min P, shape (*batch,), by the same names if there are several
        solutions; by default those that the solutions hold (`certify=True`).
      minimum: min P, a number or shape (*batch,).
      work: the cost of an iteration, by the names if it differs, in full gradients: the horizontal axis then
        counts these.
      ax: matplotlib `Axes`; by default those of a new figure.

    Returns:
      the `Axes`.

    Raises:
      ImportError: without matplotlib.
      ValueError: for other objects, shapes that differ, and a minimum without objectives.
    """
    runs = _axes.named("solutions", solutions, Solution, "a Solution")
    bounds = _by_name("certificate", certificate, runs)
    costs = _by_name("work", work, runs)
    for bound in bounds.values():
        if bound is not None and (isinstance(bound, bool) or np.asarray(bound).dtype == object):
            wanted = "an array, as problem.certificate(solution.value) is"
            _checks.fail("certificate", wanted, _checks.named(bound))
    bounds = {n: runs[n].certificate if bounds[n] is None else bounds[n] for n in runs}
    traced = all(run.objectives is not None for run in runs.values())
    if minimum is not None and not traced:
        _checks.fail("objectives of the solutions", "traced (trace_objective=True)", None)
    ax = _axes.axes(ax, "plot.convergence")
    if minimum is not None:
        low = high = minimum
    elif traced and any(bound is not None for bound in bounds.values()):
        low, high = _enclosed_minimum(runs, bounds)
    else:
        low = high = None
    for i, (name, run) in enumerate(runs.items()):
        label, style = name, _axes.line_style(i)
        if low is None:
            line, band = _mean(np.asarray(run.residuals), positive=True), None
            label = _with_certificate(name, bounds[name])
        else:
            line = _mean(np.asarray(run.objectives) - low)
            band = None if low is high else _mean(np.asarray(run.objectives) - high)
        cost = 1.0 if costs[name] is None else float(costs[name])
        places = cost * np.arange(1, len(line) + 1)
        ax.plot(places, np.where(line > 0, line, np.nan), label=label, **style)
        if band is not None:
            below = np.maximum(band, np.finfo(line.dtype).tiny)
            ax.fill_between(places, below, line, color=style["color"], alpha=0.12, linewidth=0)
    kind = "gap" if minimum is not None else "residual" if low is None else "certified gap"
    _describe(ax, kind, counts_work=work is not None)
    return ax


def _describe(ax: "Axes", kind: str, *, counts_work: bool) -> None:
    """Labels, the logarithmic scale and limits that the lines alone determine."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
    values = values[np.isfinite(values) & (values > 0)]
    ax.set_yscale("log")
    if values.size:
        ax.set_ylim(values.min() / 2, values.max() * 2)
    labels = {
        "gap": "gap P(z$_k$) − min P",
        "certified gap": "certified gap (band: the gap is within)",
        "residual": "residual ‖z$_k$ − z$_{k−1}$‖",
    }
    ax.set_xlabel("work, in full gradients" if counts_work else "iteration k")
    ax.set_ylabel(labels[kind])
    ax.margins(x=0.01)
    _axes.legend(ax)


def _by_name(what: str, values: Any, runs: Mapping[str, Solution]) -> dict[str, Any]:
    """A value for each solution, None where there is none."""
    if not isinstance(values, Mapping):
        if what == "certificate" and values is not None and len(runs) > 1:
            _checks.fail(what, "a mapping by the names of the solutions", type(values).__name__)
        return dict.fromkeys(runs, values)
    if not values.keys() <= runs.keys():
        _checks.fail(f"names of {what}", f"among {list(runs)}", list(values))
    return {name: values.get(name) for name in runs}


def _enclosed_minimum(
    runs: Mapping[str, Solution], bounds: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """m₋ ≤ min P ≤ m₊ for each example; NaN where nothing finite is certified."""
    objectives = {name: np.asarray(run.objectives) for name, run in runs.items()}
    shapes = {name: np.shape(values)[1:] for name, values in objectives.items()}
    if len(set(shapes.values())) > 1:
        _checks.fail("batch shapes of the solutions", "one for all", shapes)
    lows = [objectives[n][-1] - np.asarray(b) for n, b in bounds.items() if b is not None]
    low = np.max([np.where(np.isfinite(one), one, -np.inf) for one in lows], 0)
    every = np.concatenate(list(objectives.values()))
    high = np.where(np.isnan(every), np.inf, every).min(0)
    certified = np.isfinite(low)
    if not certified.any():
        _checks.fail("certificate", "finite for an example", "infinite for all")
    return np.where(certified, low, np.nan), high


def _mean(values: np.ndarray, *, positive: bool = False) -> np.ndarray:
    """The mean over the batch of each iteration, over what is known of it (and positive)."""
    values = values.reshape(len(values), -1).astype(np.float64)
    known = (values > 0) if positive else ~np.isnan(values)
    count = known.sum(1)
    total = np.where(known, values, 0.0).sum(1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _with_certificate(name: str, bound: Any) -> str:
    """The name, and the certified gap of the worst example where it is known."""
    if bound is None:
        return name
    return f"{name}{', ' if name else ''}gap ≤ {np.max(np.asarray(bound)):.1e}"
