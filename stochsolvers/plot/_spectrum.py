"""Singular values of maps, sorted, and over the frequencies of a convolution."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np

from stochsolvers import _checks
from stochsolvers.linear_maps import Conv, LinearMap
from stochsolvers.lipschitz import Grid, frequency_norms, singular_values
from stochsolvers.plot import _axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def spectrum(
    maps: LinearMap | Mapping[str, LinearMap],
    *,
    grid: Grid | Literal["operator"] = "operator",
    ax: "Axes | None" = None,
) -> "Axes":
    r"""All singular values σ₁ ≥ σ₂ ≥ …, with multiplicity, on a logarithmic axis.

    The horizontal axis is the share of the singular values that are larger, in percent, so that maps of any
    size fit one picture. The first point of a line is the spectral norm. Values below the round-off of σ₁ are
    not drawn.

    Args:
      maps: a `LinearMap`, or several by their names.
      grid: as in `singular_values`: "operator" for those of the maps as they are; "layer" or "padded" for
        lemma 2, which large convolutions need.
      ax: matplotlib `Axes`; by default those of a new figure.

    Returns:
      the `Axes`.

    Raises:
      ImportError: without matplotlib.
      ValueError: for other objects, and maps too large to be written out.
    """
    named = _axes.named("maps", maps, LinearMap, "a LinearMap")
    ax = _axes.axes(ax, "plot.spectrum")
    for i, (name, linear_map) in enumerate(named.items()):
        values = np.asarray(singular_values(linear_map, grid=grid))
        share = 100 * np.arange(len(values)) / len(values)
        certain = values > values[0] * np.finfo(values.dtype).eps
        ax.plot(share, np.where(certain, values, np.nan), label=name, **_axes.line_style(i))
    ax.set_yscale("log")
    ax.set_xlabel("share of larger singular values (%)")
    ax.set_ylabel("singular value σ")
    ax.margins(x=0.01)
    _axes.legend(ax)
    return ax


def frequencies(conv: Conv, *, grid: Grid = "layer", ax: "Axes | None" = None) -> "Axes":
    r"""The largest singular value of Â(f) at every frequency f: an image, or a line for one spatial axis.

    It is the gain of the layer for the wave of that frequency with its best mixture of channels, exactly so
    for circular padding; the greatest is ||A|| (lemma 2), and is marked. Frequencies are in cycles a pixel,
    −½ to ½, the constant wave in the middle. A stride s folds the s² frequencies that alias into one, and the
    axes reach to 1/(2s).

    Args:
      conv: a `Conv` with one or two spatial axes.
      grid: as in `lipschitz_constant`.
      ax: matplotlib `Axes`; by default those of a new figure. An image has a colour bar beside it.

    Returns:
      the `Axes`.

    Raises:
      ImportError: without matplotlib.
      ValueError: for other maps.

    References:
      Bibi et al. 2019, lemma 2; Sedghi et al. 2019.
    """
    if not isinstance(conv, Conv) or len(conv.spatial_shape) > 2:
        axes = f" with {len(conv.spatial_shape)}" if isinstance(conv, Conv) else ""
        _checks.fail("conv", "a Conv with 1 or 2 spatial axes", type(conv).__name__ + axes)
    norms = np.asarray(frequency_norms(conv, grid=grid))
    shifted = np.fft.fftshift(norms)
    edges = [_edges(n, s) for n, s in zip(norms.shape, conv.strides, strict=True)]
    peak = np.unravel_index(np.argmax(shifted), shifted.shape)
    places = [0.5 * (edge[i] + edge[i + 1]) for edge, i in zip(edges, peak, strict=True)]
    if norms.ndim == 1:
        ax = _axes.axes(ax, "plot.frequencies")
        ax.plot(0.5 * (edges[0][1:] + edges[0][:-1]), shifted, color=_axes.COLORS[0])
        ax.plot(places[0], shifted[peak], "o", color=_axes.COLORS[1], markersize=5)
        ax.set_ylabel("largest singular value")
        ax.set_ylim(bottom=0)
    else:
        ax = _axes.axes(ax, "plot.frequencies", (5.2, 4.2), **{"axes.grid": False})
        image = ax.pcolormesh(edges[1], edges[0], shifted, cmap="viridis", rasterized=True)
        ax.plot(places[1], places[0], "o", color=_axes.COLORS[1], markersize=6, mec="white")
        ax.set_aspect("equal")
        ax.set_ylabel("vertical (cycles/pixel)")
        ax.figure.colorbar(image, ax=ax, label="largest singular value")
    across = "horizontal" if norms.ndim == 2 else "frequency"
    ax.set_xlabel(f"{across} (cycles/pixel)")
    ax.set_title(f"greatest {shifted.max():.3g}, least {shifted.min():.3g}")
    return ax


def _edges(count: int, stride: int) -> np.ndarray:
    """Ends of the cells around the frequencies −⌊n/2⌋ … of an axis, in cycles a pixel of the input."""
    return (np.arange(count + 1) - count // 2 - 0.5) / (count * stride)
