"""The Lipschitz constant of a layer."""

import functools
from typing import Literal

import jax
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import replicated
from stochsolvers._typing import Array
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz._formula import lipschitz_formula
from stochsolvers.lipschitz._matrix_free import norm_estimate
from stochsolvers.lipschitz._types import Grid, check_grid, of_map
from stochsolvers.lipschitz.machinery.blocks import (
    DIRECT,
    best_of_all,
    block_size,
    scale_of,
    search_for,
)
from stochsolvers.lipschitz.machinery.taps import folded, taps_and_phases
from stochsolvers.lipschitz.machinery.top import top_square
from stochsolvers.lipschitz.machinery.written import has_blocks


@of_map
@replicated
@functools.partial(jax.jit, static_argnames=("grid", "method"))
def lipschitz_constant(
    linear_map: LinearMap, *, grid: Grid = "layer", method: Literal["fast", "formula"] = "fast"
) -> Array:
    r"""L = λ_max(A A*), the squared spectral norm of a layer.

    "fast" visits the frequencies in descending order of their norms, and rules most of them out without
    an eigenvalue; it agrees with "formula", which transforms the padded kernel and takes the eigenvalues
    of every block, to 1e-5 in float32 and 1e-9 in float64. Its derivative is that of ||Â(f) v||² at the
    top singular vector v of the top frequency f, the envelope theorem; a subgradient where they are
    not unique. Derivatives of higher order follow v, and exist where it is unique; in blocks of more
    than 16 channels they are as accurate as v, to about the root of the round-off.

    A map without a kernel is written out if its matrix has up to four million entries. Of a larger one,
    "layer" is an estimate: the map's `squared_norm_bound()` if it has one, else the largest Ritz value θ
    after 64 Lanczos steps, θ ≤ L; "padded" is the map's bound, or else the upper end of `lipschitz_bracket`,
    for safe steps. The derivative is that of the bound, or of ||A v||² at the Ritz vector v.

    Args:
      linear_map: any.
      grid: of a convolution. "layer" for lemma 2 on the layer's own grid: exact for CIRCULAR padding whose
        strides divide the grid, an approximation otherwise. "padded" for an upper bound under any padding.
      method: "fast" or "formula".

    Returns:
      scalar, in float32 or the map's wider dtype. Differentiable, `jit`-able; `vmap` visits one
      kernel after another.

    Raises:
      ValueError: at trace time, for an unknown grid or method, or "formula" of a map too large to be written
        out.

    References:
      Bibi et al. 2019, lemma 2; Sedghi et al. 2019.
    """
    _checks.member("method", method, ("fast", "formula"))
    check_grid(grid)
    if method == "formula":
        return lipschitz_formula(linear_map, grid)
    if not has_blocks(linear_map):
        return norm_estimate(linear_map, safe=grid == "padded")
    taps, phases = taps_and_phases(linear_map, grid)
    scale = scale_of(taps)
    taps, phases = folded(taps / scale, phases)
    find = best_of_all if block_size(taps, phases) <= DIRECT else search_for
    best = find(lax.stop_gradient(taps), phases)
    return top_square(taps, phases, best) * scale * scale
