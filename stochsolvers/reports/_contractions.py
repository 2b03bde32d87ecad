r"""Lipschitz constants of products of matrices, convolutions and gathers.

With a factor C whose entries are known, ||X C||_F ≤ ||C||₂ ||X||_F; for a convolution with taps K_t

    ||K ∗ x|| ≤ Σ_t ||K_t||₂ ||x||,

as shifts, strides and dilations bring no two points further apart, and for a gather that reads an entry at
most m times m^{1/2}. If both factors of X Y depend on the input, ||X Y||_F ≤ ||X||_F ||Y||_F gives
||Y|| ℓ_X + ||X|| ℓ_Y for inputs in a ball.
"""

import math
from collections.abc import Sequence

import numpy as np

from stochsolvers.reports._entries import apply
from stochsolvers.reports._program import Value, product

_DECOMPOSED = 2048  # order up to which singular values are computed
_ROUNDING = 1 + 1e-9  # of singular values in float64
_COUNTED = 2**24  # entries of an array from which entries are gathered


def multiplied(result: Value) -> float:
    """Of `dot_general`."""
    x, y = result.operands
    contracted, batch = result.equation.params["dimension_numbers"]
    if x.constant and y.constant:
        return product(x.constant, y.size) + product(y.constant, x.size)
    free, known, side = (x, y, 1) if x.constant else (y, x, 0)
    norm = matrix_norm(known.entries(), contracted[side], batch[side])
    return product(free.constant, min(norm, known.size))


def matrix_norm(
    entries: np.ndarray | None, rows: Sequence[int], batch: Sequence[int] = ()
) -> float:
    """The largest spectral norm of a stack of matrices, or a bound on it; ∞ if the entries are not known.

    Args:
      entries: of the array.
      rows: its axes that make up the rows of a matrix.
      batch: its axes along which it is a stack; all others make up the columns.
    """
    if entries is None or not np.all(np.isfinite(entries)):
        return math.inf
    columns = [axis for axis in range(entries.ndim) if axis not in (*rows, *batch)]
    moved = entries.astype(np.float64).transpose(*batch, *rows, *columns)
    sizes = [math.prod(entries.shape[axis] for axis in axes) for axes in (batch, rows, columns)]
    stack = moved.reshape(sizes)
    if not stack.size:
        return 0.0
    if min(sizes[1:]) <= _DECOMPOSED:
        gram = stack if sizes[1] >= sizes[2] else stack.transpose(0, 2, 1)
        gram = gram.transpose(0, 2, 1) @ gram
        largest = float(np.max(np.linalg.eigvalsh(gram)[:, -1]))
        slack = 1e-13 * max(sizes[1:]) * float(np.max(np.trace(gram, axis1=1, axis2=2)))
        return math.sqrt(max(largest, 0.0) + slack) * _ROUNDING
    absolute = np.abs(stack)
    sums = np.max(np.sum(absolute, axis=1), axis=1) * np.max(np.sum(absolute, axis=2), axis=1)
    frobenius = np.sum(absolute**2, axis=(1, 2))
    return math.sqrt(float(np.max(np.minimum(sums, frobenius)))) * _ROUNDING


def convolved(result: Value) -> float:
    """Of `conv_general_dilated` with a known kernel."""
    x, kernel = result.operands
    options = result.equation.params
    entries = kernel.entries()
    if kernel.constant or entries is None or options["batch_group_count"] != 1:
        return math.inf
    out, into, *spatial = options["dimension_numbers"].rhs_spec
    groups = options["feature_group_count"]
    taps = entries.transpose(*spatial, out, into).reshape(
        -1, groups, *_split(entries, out, into, groups)
    )
    norms = [matrix_norm(tap, rows=(1,), batch=(0,)) for tap in taps]
    return product(x.constant, math.fsum(norms) * _ROUNDING)


def _split(entries: np.ndarray, out: int, into: int, groups: int) -> tuple[int, int]:
    return entries.shape[out] // groups, entries.shape[into]


def gathered(result: Value) -> float:
    """Of `gather` at known indices, counted on the numbers of the entries."""
    x, indices = result.operands
    known, size = indices.entries(), x.aval.size
    if indices.constant or known is None or not 0 < size <= _COUNTED:
        return math.inf
    numbers = np.arange(size, dtype=np.int32).reshape(x.aval.shape)
    operands = [numbers, known.astype(indices.aval.dtype)]
    (read,) = apply(result.equation, operands, fill_value=-1)
    read = np.asarray(read).ravel()
    times = np.bincount(read[read >= 0], minlength=1)  # what is out of bounds is filled in
    return product(x.constant, math.sqrt(float(np.max(times))))
