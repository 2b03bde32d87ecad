r"""Constants of single features: columns and rows of a map."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _linalg
from stochsolvers._shards import replicated
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, Dense, LinearMap, Matrix, Transposed
from stochsolvers.lipschitz._matrix_free import norm_estimate
from stochsolvers.lipschitz._types import Grid, check_grid, of_map
from stochsolvers.lipschitz.machinery.blocks import scale_of
from stochsolvers.lipschitz.machinery.taps import taps_and_phases
from stochsolvers.lipschitz.machinery.written import entries, is_small


@of_map
@replicated
@functools.partial(jax.jit, static_argnames="grid")
def feature_lipschitz_constants(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""L_i of the n1 terms f_i of objective (5): L_i = n1 ||A_i||², shape (n1,).

    Of a convolution of unit stride ||A_i||² = max_f ||Â(f)_{:, i}||², a norm and no eigenvalue. Of A.T they
    are n2 times the `output_lipschitz_constants` of A. A map without a kernel is written out; if it has more
    than 2^22 entries, all are n1 times the upper bound `lipschitz_constant(grid="padded")`, ||A_i|| ≤ ||A||.

    References:
      Bibi et al. 2019, section 5.
    """
    check_grid(grid)
    return linear_map.in_features * _columns(linear_map, grid)


@of_map
@replicated
@functools.partial(jax.jit, static_argnames="grid")
def output_lipschitz_constants(linear_map: LinearMap, *, grid: Grid = "layer") -> Array:
    r"""Blockwise constants of the outputs, M_j = ||(A A*)_{jj}|| = max_f ||Â(f)_{j, :}||², (n2,).

    They are the coordinate constants of F, which the step sizes of `nsync` need. Maps without a kernel as in
    `feature_lipschitz_constants`.
    """
    check_grid(grid)
    return _rows(linear_map, grid)


def _columns(linear_map: LinearMap, grid: Grid) -> Array:
    """||A_i||² of the columns of every input feature."""
    if isinstance(linear_map, Transposed):
        return _rows(linear_map.base, grid)
    if not isinstance(linear_map, Dense | Conv):
        return _parts_of_matrix(linear_map, of_inputs=True)
    blocks, scale = _blocks(linear_map, grid, (1, 3))
    columns = jnp.moveaxis(blocks, -1, -3)  # (frequencies, groups, inputs, outputs, aliases)
    if columns.shape[-1] == 1:
        squared = jnp.sum(jnp.abs(columns) ** 2, axis=(-2, -1))
    else:
        gram = jnp.einsum("...oa,...ob->...ab", columns.conj(), columns, precision="highest")
        squared = _linalg.eigvalsh(gram)[..., -1]
    return jnp.max(squared, axis=0).reshape(-1) * scale * scale


def _rows(linear_map: LinearMap, grid: Grid) -> Array:
    """||A_j||² of the rows of every output feature."""
    if isinstance(linear_map, Transposed):
        return _columns(linear_map.base, grid)
    if not isinstance(linear_map, Dense | Conv):
        return _parts_of_matrix(linear_map, of_inputs=False)
    blocks, scale = _blocks(linear_map, grid, (1, 2))
    squared = jnp.sum(jnp.abs(blocks) ** 2, axis=(-2, -1))
    return jnp.max(squared, axis=0).reshape(-1) * scale * scale


def _blocks(linear_map: LinearMap, grid: Grid, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Blocks of half of the frequencies, (frequencies, groups, outputs, aliases, inputs), and their scales.

    One for each feature, from the taps, (groups, taps, inputs, outputs), along `axes`.
    """
    taps, phases = taps_and_phases(linear_map, grid)
    scale = scale_of(taps, axes)
    re, im = (
        jnp.einsum(
            "fat,gtio->fgoai", jnp.asarray(part, taps.dtype), taps / scale, precision="highest"
        )
        for part in (phases.cosines, phases.sines)
    )
    real = phases.num_real == len(phases.cosines)
    return re if real else lax.complex(re, im), scale.ravel()


def _parts_of_matrix(linear_map: LinearMap, *, of_inputs: bool) -> Array:
    """The squared norm of the part of each feature, at all of its pixels, of the matrix written out."""
    features = linear_map.in_features if of_inputs else linear_map.out_features
    if not is_small(linear_map) and not isinstance(linear_map, Matrix):
        return jnp.full(features, norm_estimate(linear_map, safe=True))
    matrix, _ = entries(linear_map)
    matrix = matrix if of_inputs else matrix.T
    parts = jnp.moveaxis(matrix.reshape(-1, features, matrix.shape[-1]), 1, 0)
    scale = scale_of(parts, (1, 2))
    parts, scale = parts / scale, scale.ravel()
    if min(parts.shape[1:]) == 1:
        squared = jnp.sum(parts**2, axis=(-2, -1))
    else:
        subscripts = "fpk,fqk->fpq" if parts.shape[1] < parts.shape[2] else "fkp,fkq->fpq"
        gram = jnp.einsum(subscripts, parts, parts, precision="highest")
        squared = jnp.maximum(_linalg.eigvalsh(gram)[..., -1], 0.0)
    return squared * scale * scale
