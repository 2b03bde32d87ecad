"""Activations beside the proximal operators that take their place."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers.plot import _axes
from stochsolvers.prox import Prior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 401


def activation(
    prior: Prior,
    function: Callable[[Any], Any] | None = None,
    *,
    steps: Sequence[float] = (1.0, 0.3, 0.1),
    reach: float = 4.0,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""prox_{ηg}(v) for |v| ≤ reach and several step sizes η, beside an activation σ(v).

    An exact prior has σ = prox_g at η = 1; a solver with the step η < 1 applies prox_{ηg}, which for priors
    other than indicators is another function, nearer to the identity the smaller η is.

    Args:
      prior: g, a sum of functions of single entries.
      function: σ, elementwise; None draws the proximal operators alone.
      steps: the step sizes η > 0.
      reach: the range of v, > 0.
      ax: matplotlib `Axes`; by default those of a new figure.

    Returns:
      the `Axes`.

    Raises:
      ImportError: without matplotlib.
      ValueError: for other objects, priors of groups or matrices, no steps.
    """
    if not isinstance(prior, Prior):
        _checks.fail("prior", "a Prior", type(prior).__name__)
    if not prior.separable:
        _checks.fail("prior", "a sum of functions of single entries", type(prior).__name__)
    if function is not None and not callable(function):
        _checks.fail("function", "an elementwise function, or None", type(function).__name__)
    if not steps:
        _checks.fail("steps", "at least one step size", steps)
    _checks.positive("reach", reach)
    ax = _axes.axes(ax, "plot.activation", (5.2, 4.0))
    v = jnp.linspace(-reach, reach, POINTS)
    if function is not None:
        name = getattr(function, "__name__", "activation")
        ax.plot(np.asarray(v), np.asarray(function(v)), color="0.75", linewidth=5, label=name)
    for i, step in enumerate(steps):
        label = f"prox of ηg, η = {step:g}"
        ax.plot(np.asarray(v), np.asarray(prior.prox(v, step)), label=label, **_axes.line_style(i))
    ax.set_xlabel("v")
    ax.set_ylabel("output")
    ax.margins(x=0.0)
    _axes.legend(ax)
    return ax
