r"""All activation patterns of data: the cells of an arrangement of hyperplanes, without linear programs.

In coordinates of the row space, of dimension r, every cell is a pointed cone. It is the hull of its
extreme rays, on each of which r − 1 independent hyperplanes meet, and their sum lies strictly inside. So
visit all rays, list the cells around each, and add the ray to the gates of these cells.
"""

import itertools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers.convex import _inputs
from stochsolvers.convex._patterns import Patterns

_SAME = 1e-9  # rows of norm 1 that are closer are parallel; a ray that is closer to a hyperplane lies on it
_CHUNK = 2**25  # bits that are made at a time
_LIMIT = 4_000_000  # patterns


def enumerate_patterns(X: ArrayLike) -> Patterns:
    r"""All patterns 1[X g ≥ 0] of gates g with x_j·g ≠ 0 for all x_j ≠ 0, each with such a gate.

    These are the patterns of full-dimensional cells, which suffice for convex programs. There are at most
    2 Σ_{k<r} C(n − 1, k) of them, r = rank X, and that many in general position. One of them may be the
    pattern of no active data. The gates have norm 1 and are sums of the unit extreme rays of their cells.

    Around a ray on which exactly r − 1 hyperplanes meet there are 2^(r−1) cells, all signs of these; around
    others, the cells of the hyperplanes that meet there, an arrangement of rank r − 1. Parallel rows are one
    hyperplane, rows of zeros none: they are active, as 0 ≥ 0. All arithmetic is numpy's, in float64. With
    data in float32 the gates are rounded to it, which moves those of cells narrower than its round-off.

    Args:
      X: data, shape (n, d); (n, K, d) for K patches each. Not traced: how many patterns there are depends on
        their values.

    Raises:
      ValueError: for data that do not fit (see `Patterns`), and where more than four million patterns are
        possible.

    References:
      Winder, Partitions of N-space by hyperplanes, 1966 (the count); Pilanci and Ergen 2020, section 2.
    """
    X = _inputs.data("data of enumerate_patterns", X)
    values = _inputs.known(X)
    if values is None:
        _checks.fail("data of enumerate_patterns", "known numbers", "a traced array")
    rows = values.astype(np.float64).reshape(-1, X.shape[-1])
    planes, basis, which, signs = _hyperplanes(rows)
    if len(planes) == 0:  # all data are zero
        gates, mask = np.ones((X.shape[-1], 1)), np.ones((len(rows), 1), bool)
    else:
        count = num_patterns(*planes.shape)
        if count > _LIMIT:
            wanted = f"data with at most {_LIMIT:,} patterns (sample_patterns takes more)"
            _checks.fail("data of enumerate_patterns", wanted, f"up to {count:.3g}")
        half, rays = _half_of_cells(planes)
        cells, rays = np.concatenate([half, ~half]), np.concatenate([rays, -rays])
        gates = basis @ (rays / np.linalg.norm(rays, axis=1, keepdims=True)).T
        mask = (cells.T[which] == (signs > 0)[:, None]) | (signs == 0)[:, None]
        inside = np.all(((rows @ gates >= 0) == mask) | (signs == 0)[:, None], axis=0)
        gates, mask = gates[:, inside], mask[:, inside]
    return Patterns(jnp.asarray(gates, X.dtype), jnp.asarray(mask.reshape(*X.shape[:-1], -1)))


def num_patterns(num: int, rank: int) -> int:
    """2 Σ_{k<r} C(n − 1, k), the cells of n hyperplanes through 0 in general position in r dimensions."""
    return 2 * sum(math.comb(num - 1, k) for k in range(rank))


def _hyperplanes(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct unit normals (m, r) in a basis (d, r) of the row space; which one each row is, and its sign.

    The sign is 0 for rows of zeros.
    """
    sizes = np.max(np.abs(rows), axis=1)
    kept = np.nonzero(sizes)[0]
    which, signs = np.zeros(len(rows), int), np.zeros(len(rows), int)
    if len(kept) == 0:
        return np.zeros((0, 0)), np.zeros((rows.shape[1], 0)), which, signs
    unit = rows[kept] / sizes[kept, None]
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    # one of each pair of opposite normals, by a direction that none of them is orthogonal to
    direction = np.random.default_rng(0).normal(size=rows.shape[1])
    side = np.where(unit @ direction > 0, 1, -1)
    unit *= side[:, None]
    order = np.argsort(unit @ direction, kind="stable")
    new = np.linalg.norm(np.diff(unit[order], axis=0), axis=1) > _SAME
    first = np.concatenate([[True], new])
    which[kept[order]], signs[kept] = np.cumsum(first) - 1, side
    planes = unit[order][first]
    basis = _row_space(planes)
    return planes @ basis, basis, which, signs


def _row_space(Y: np.ndarray) -> np.ndarray:
    """An orthonormal basis (d, r) of the row space."""
    _, sigma, right = np.linalg.svd(Y, full_matrices=False)
    return right[sigma > _SAME * sigma[0]].T


def _half_of_cells(Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cells on the positive side of the first hyperplane, and the sum of the rays of each.

    Args:
      Y: distinct unit normals, shape (m, r) of rank r.

    Returns:
      booleans (cells, m) and rays (cells, r).
    """
    num, rank = Y.shape
    if rank == 1:
        return np.ones((1, 1), bool), np.sign(Y)
    signs = np.array(list(itertools.product([False, True], repeat=rank - 1)))
    found = []
    visited: set[bytes] = set()
    for subsets in _chunks(num, rank - 1, _CHUNK // (num << (rank - 1)) + 1):
        rays, subsets = _rays(Y, subsets)
        heights = rays @ Y.T
        meets = np.abs(heights) < _SAME
        np.put_along_axis(meets, subsets, True, axis=1)
        simple = np.sum(meets, axis=1) == rank - 1
        bits = np.repeat((heights[simple] > 0)[:, None], len(signs), axis=1)
        np.put_along_axis(bits, subsets[simple][:, None], signs[None], axis=2)
        found.append(_merged(bits.reshape(-1, num), np.repeat(rays[simple], len(signs), axis=0)))
        for i in np.nonzero(~simple)[0]:
            flat = meets[i].tobytes()
            if flat not in visited:
                visited.add(flat)
                found.append(_around(Y, rays[i], meets[i], heights[i] > 0))
    return _merged(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _chunks(num: int, size: int, length: int) -> Iterator[np.ndarray]:
    """The subsets of 0..num-1 of a size, some at a time."""
    subsets = itertools.combinations(range(num), size)
    while chunk := list(itertools.islice(subsets, length)):
        yield np.array(chunk)


def _rays(Y: np.ndarray, subsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors orthogonal to r − 1 normals, for the subsets that are independent."""
    normals, rank = Y[subsets], Y.shape[1]
    if rank <= 8:  # cofactors
        minors = [np.linalg.det(np.delete(normals, k, axis=2)) for k in range(rank)]
        rays = np.stack([(-1) ** k * minor for k, minor in enumerate(minors)], axis=1)
        volume = np.linalg.norm(rays, axis=1)
    else:
        _, sigma, right = np.linalg.svd(normals)
        rays, volume = right[:, -1], sigma[:, -1]
    kept = volume > _SAME
    rays = rays[kept]
    return rays / np.linalg.norm(rays, axis=1, keepdims=True), subsets[kept]


def _around(Y: np.ndarray, ray: np.ndarray, meets: np.ndarray, above: np.ndarray):
    """The cells around a ray on which more than r − 1 hyperplanes meet."""
    normals = Y[meets]
    local, _ = _half_of_cells(normals @ _row_space(normals))
    bits = np.repeat(above[None], 2 * len(local), axis=0)
    bits[:, meets] = np.concatenate([local, ~local])
    return _merged(bits, np.repeat(ray[None], len(bits), axis=0))


def _merged(bits: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells turned to the positive side of the first hyperplane, each once, with the sum of their rays."""
    turned = ~bits[:, 0]
    bits, rays = bits ^ turned[:, None], np.where(turned[:, None], -rays, rays)
    packed = np.packbits(bits, axis=1)
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))
    words = np.ascontiguousarray(packed).view(np.uint64)
    order = np.argsort(words[:, 0], kind="stable") if words.shape[1] == 1 else np.lexsort(words.T)
    ordered = words[order]
    first = np.concatenate([[True], np.any(ordered[1:] != ordered[:-1], axis=1)])[: len(order)]
    which = np.empty(len(order), int)
    which[order] = np.cumsum(first) - 1
    sums = [np.bincount(which, along, minlength=int(first.sum())) for along in rays.T]
    return bits[order[first]], np.stack(sums, axis=1)
