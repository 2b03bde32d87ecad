"""Axes to draw into, in one style; the only place that imports matplotlib."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stochsolvers import _checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Blue, vermilion, green, purple, orange, sky blue, black."""
DASHES = ("-", "--", "-.", ":")
"""Line styles that go with the first four colours."""
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "image.cmap": "viridis",
    "savefig.dpi": 150,
}
"""Settings of matplotlib (`rcParams`) that new figures are made with."""


def axes(
    ax: "Axes | None", what: str, size: tuple[float, float] = (6.4, 4.0), **style: Any
) -> "Axes":
    """The axes given, or those of a new figure in `STYLE`.

    Args:
      ax: of the caller.
      what: name of the function, for the error.
      size: of a new figure, in inches.
      **style: settings on top of `STYLE`.

    Raises:
      ImportError: without matplotlib.
      ValueError: if `ax` is neither None nor `Axes`.
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install 'stochsolvers[plot]'") from error
    if ax is None:
        settings: Any = STYLE | style
        with plt.rc_context(settings):
            return plt.subplots(figsize=size)[1]
    if not isinstance(ax, Axes):
        _checks.fail(f"ax of {what}", "matplotlib Axes, or None", type(ax).__name__)
    return ax


def named(what: str, values: Any, kind: type | tuple[type, ...], wanted: str) -> dict[str, Any]:
    """Objects by their labels; one alone has the label ""."""
    found = dict(values) if isinstance(values, Mapping) else {"": values}
    if not found:
        _checks.fail(what, f"{wanted}, or a mapping of names to such", "an empty mapping")
    for name, value in found.items():
        if not isinstance(value, kind):
            got = f"{type(value).__name__} for {name!r}" if name else type(value).__name__
            _checks.fail(what, f"{wanted}, or a mapping of names to such", got)
    return {str(name): value for name, value in found.items()}


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of a line: lines of one picture differ in both, as far as the four dashes go."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}


def legend(ax: "Axes", **options: Any) -> None:
    """A legend without a frame, if any line has a label."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, **options)


def categories(ax: "Axes", names: list[str]) -> None:
    """Names from top to bottom on the vertical axis, with grid lines across them alone."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
