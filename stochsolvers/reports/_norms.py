r"""Norms of layers on the host, in float64 and without compilation, for reports that are read once.

lower ≤ ||A||² ≤ upper, as `lipschitz_bracket` and `operator_bracket` of `stochsolvers.lipschitz` have them
for programs. A circular convolution is block-diagonal in the frequencies f, and its Gram matrices are
trigonometric polynomials in few real matrices (lemma 2 of Bibi et al. 2019, with the strides folded in):

    Â(f) Â(f)ᴴ = Σ_δ C_δ exp(i f·δ),   C_δ = Σ_t K_tᵀ K_{t+δ},   δ a multiple of the strides,

or with K_t K_{t+δ}ᵀ, of the order of the inputs, without strides. The upper end is a level τ at which τ I
less each of them has a Cholesky factorisation, whose round-off is at most n² u τ (Higham 2002, theorem
10.3), the lower end a Rayleigh quotient. Under zero padding the layer is a part of the circular one on a
larger torus, which gives the upper end, and the lower is from Lanczos steps with the layer itself; one of up
to four million entries is written out.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
import scipy  # its parts are loaded where they are first used

from stochsolvers.linear_maps import Conv, Dense, LinearMap, Matrix, Transposed
from stochsolvers.lipschitz import is_exact
from stochsolvers.lipschitz._torus import half_spectrum, torus

_UNIT = 2.0**-53
_GAP = 1e-3  # of the upper end, relative
_SMALL = 32  # orders whose eigenvalues are all computed
_DENSE = 2**22  # entries of a matrix that is written out
_DECOMPOSED = 2048  # order of a Gram matrix whose eigenvalues are computed for the least one
_LARGEST = 4096  # order of a dense Gram matrix
_CHUNK = 2**22  # entries of the Gram matrices formed at once
_STEPS = 8  # of Lanczos


def squared_norm(linear_map: LinearMap) -> tuple[float, float] | None:
    """lower ≤ ||A||² ≤ upper; NaN for a kernel that is not finite, None for maps without a kernel."""
    while isinstance(linear_map, Transposed):
        linear_map = linear_map.base
    if not isinstance(linear_map, Conv | Dense | Matrix):
        return _of_blocks(linear_map) if hasattr(linear_map, "blocks") else None
    kernel = np.asarray(linear_map.kernel).astype(np.float64)
    if not np.all(np.isfinite(kernel)):
        return math.nan, math.nan
    scale = float(np.max(np.abs(kernel), initial=0.0))
    if scale == 0:
        return 0.0, float(np.finfo(np.float32).tiny)
    kernel = kernel / scale
    if not isinstance(linear_map, Conv):
        ends = _of_matrix(kernel) if min(kernel.shape) <= _LARGEST else None
    else:
        ends = _of_convolution(linear_map, kernel)
    return None if ends is None else (ends[0] * scale**2, ends[1] * scale**2)


def least_eigenvalue(linear_map: LinearMap) -> float | None:
    """A lower bound on λ_min(A A*), 0 for more outputs than inputs; None for maps other than dense ones."""
    if not isinstance(linear_map, Dense):
        return None if is_exact(linear_map) else 0.0
    kernel = np.asarray(linear_map.kernel).astype(np.float64)
    rows, columns = kernel.shape
    if columns > rows or not np.all(np.isfinite(kernel)):
        return 0.0 if columns > rows else math.nan
    if columns > _DECOMPOSED:
        return None
    gram = kernel.T @ kernel
    error = (4 * (rows + columns) + 16 * columns) * _UNIT * float(np.trace(gram))
    return max(0.0, float(np.linalg.eigvalsh(gram)[0]) - error)


def _of_blocks(linear_map: LinearMap) -> tuple[float, float] | None:
    """Of a block-diagonal map; blocks that are sums of products are left to programs."""
    blocks = linear_map.blocks()  # pyright: ignore[reportAttributeAccessIssue]
    if blocks.size != sum(leaf.size for leaf in jax.tree.leaves(linear_map)):
        return None
    ends = [
        squared_norm(Matrix(block, block.shape[:1], block.shape[1:]))
        for block in np.asarray(blocks)
    ]
    if any(end is None for end in ends):
        return None
    lower, upper = np.max(np.asarray(ends), axis=0)
    return float(lower), float(upper)


def _of_matrix(matrix: np.ndarray) -> tuple[float, float]:
    """Of one matrix."""
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = matrix.T @ matrix
    error = 4 * sum(matrix.shape) * _UNIT * float(np.trace(gram))
    return _top_of([(gram[None], None)], error)


def _of_convolution(conv: Conv, kernel: np.ndarray) -> tuple[float, float]:
    inputs, outputs = math.prod(conv.in_shape), math.prod(conv.out_shape)
    if is_exact(conv):
        lower, upper, _ = _on_torus(conv, kernel, "layer")
        return lower, upper
    if inputs * outputs <= _DENSE:
        return _of_matrix(_written(conv, kernel))
    _, upper, start = _on_torus(conv, kernel, "padded")
    return _lanczos(conv, kernel, start), upper


def _on_torus(conv: Conv, kernel: np.ndarray, grid: str) -> tuple[float, float, np.ndarray]:
    """Of the circular layer on a grid, and its top singular vector on the inputs of the layer as it is."""
    shape, strides = torus(conv, grid)  # pyright: ignore[reportArgumentType]
    *_, n1, n2 = kernel.shape
    groups = conv.feature_group_count
    taps = kernel.reshape(-1, n1, groups, n2 // groups).transpose(2, 0, 1, 3)
    places = np.stack(np.unravel_index(np.arange(taps.shape[1]), kernel.shape[:-2]), axis=-1)
    places = places * np.asarray(conv.kernel_dilation)
    of_inputs = math.prod(strides) == 1 and n1 < n2 // groups
    taps = taps.transpose(0, 1, 3, 2) if of_inputs else taps
    folded = tuple(n // s for n, s in zip(shape, strides, strict=True))
    frequencies = np.stack(np.unravel_index(half_spectrum(folded), folded), axis=-1)
    angles = 2 * math.pi * frequencies / np.asarray(shape)

    ends, top, place = (0.0, 0.0), np.zeros(0), (0, 0)
    for group, own in enumerate(taps):
        shifts, matrices = _correlations(own, places, np.asarray(strides))
        norms = np.linalg.norm(own.reshape(len(own), -1), axis=1)
        error = 64 * (sum(own.shape) + len(shifts)) * _UNIT * float(np.sum(norms)) ** 2
        turns = angles @ shifts.T  # (frequencies, δ)
        lower, upper, at, vector = _top(_grams(turns, matrices), error, ends[1])
        ends = max(ends[0], lower), max(ends[1], upper)
        if vector is not None:
            top, place = vector, (at, group)
    return *ends, _plane_wave(conv, top, angles[place[0]], place[1], of_inputs)


def _correlations(
    taps: np.ndarray, places: np.ndarray, strides: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """δ, one of each pair ±δ, zero first, and C_δ; taps of shape (taps, contracted, kept)."""
    sums: dict[tuple[int, ...], np.ndarray] = {}
    for s, t in itertools.product(range(len(taps)), repeat=2):
        shift = tuple(int(d) for d in places[t] - places[s])
        if shift < (0,) * len(shift) or any(shift % strides):
            continue
        sums[shift] = sums.get(shift, 0.0) + taps[s].T @ taps[t]
    shifts = sorted(sums)
    return np.asarray(shifts), np.stack([sums[shift] for shift in shifts])


def _grams(
    turns: np.ndarray, matrices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Real and imaginary parts of the Gram matrices, some at a time."""
    count, n = matrices.shape[:2]
    first, rest = matrices[:1], matrices[1:]
    symmetric = np.concatenate([first, rest + rest.transpose(0, 2, 1)]).reshape(count, n * n)
    skew = (rest - rest.transpose(0, 2, 1)).reshape(count - 1, n * n)
    size = max(1, _CHUNK // n**2)
    for start in range(0, len(turns), size):
        part = turns[start : start + size]
        re = (np.cos(part) @ symmetric).reshape(-1, n, n)
        im = (np.sin(part[:, 1:]) @ skew).reshape(-1, n, n) if count > 1 else None
        yield re, im


def _top_of(
    chunks: list[tuple[np.ndarray, np.ndarray | None]], error: float
) -> tuple[float, float]:
    lower, upper, *_ = _top(iter(chunks), error, 0.0)
    return lower, upper


def _top(
    chunks: Iterator[tuple[np.ndarray, np.ndarray | None]], error: float, level: float
) -> tuple[float, float, int, np.ndarray | None]:
    """lower ≤ max λ_max ≤ upper of Hermitian matrices, which have the error, and the place and vector of it.

    Args:
      chunks: real and imaginary parts, (matrices, n, n).
      error: of each matrix in the spectral norm.
      level: of no interest is what is below it.
    """
    best, place, vector, offset, n = 0.0, 0, None, 0, 1
    for re, im in chunks:
        n = re.shape[-1]
        matrices = re if im is None else re + 1j * im
        if n <= _SMALL:
            values = np.linalg.eigvalsh(matrices)[:, -1]
            at = int(np.argmax(values))
            if values[at] > max(best, level):
                best, place = float(values[at]), offset + at
                vector = np.linalg.eigh(matrices[at])[1][:, -1]
                level = best
        else:
            sizes = np.sqrt(np.sum(re**2, (1, 2)) + (0 if im is None else np.sum(im**2, (1, 2))))
            for at in np.argsort(-sizes):
                if sizes[at] <= level:
                    break
                while not _is_below(matrices[at], level):
                    theta, v = _top_pair(matrices[at])
                    if theta > best:
                        best, place, vector = theta, offset + int(at), v
                    level = max(level * (1 + _GAP), theta * (1 + _GAP))
        offset += len(re)
    rounding = 32 * (n + 2) ** 2 * _UNIT * level
    return max(0.0, best * (1 - 1e-12) - error), level + error + rounding, place, vector


def _is_below(matrix: np.ndarray, level: float) -> bool:
    """Whether level I − matrix has a Cholesky factorisation: λ_max ≤ level, up to n² u of it."""
    shifted = -matrix
    shifted[np.diag_indices(len(matrix))] += level
    (factor,) = scipy.linalg.get_lapack_funcs(("potrf",), (shifted,))
    return factor(shifted, lower=True, clean=False, overwrite_a=True)[1] == 0


def _top_pair(matrix: np.ndarray) -> tuple[float, np.ndarray]:
    """A Rayleigh quotient about the largest eigenvalue, and its unit vector."""
    n = len(matrix)
    start = np.random.default_rng(0).standard_normal(n).astype(matrix.dtype)
    value, vector = _ritz(lambda v: matrix @ v, start, min(n, 24))
    return value, vector / np.linalg.norm(vector)


def _ritz(
    product: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int
) -> tuple[float, np.ndarray]:
    """The largest Ritz value of a Hermitian matrix after some Lanczos steps, and its vector."""
    shape, v = start.shape, start.ravel() / np.linalg.norm(start)
    basis, images = [], []
    for _ in range(steps):
        basis.append(v)
        image = product(v.reshape(shape)).ravel()
        images.append(image)
        for _ in range(2):
            image = image - sum(np.vdot(b, image) * b for b in basis)
        size = np.linalg.norm(image)
        if size <= 1e-10 * np.linalg.norm(images[-1]) or not np.isfinite(size):
            break
        v = image / size
    Q, Y = np.stack(basis, 1), np.stack(images, 1)
    small = Q.conj().T @ Y
    values, vectors = np.linalg.eigh((small + small.conj().T) / 2)
    return float(values[-1]), (Q @ vectors[:, -1]).reshape(shape)


def _plane_wave(
    conv: Conv, vector: np.ndarray, angles: np.ndarray, group: int, of_inputs: bool
) -> np.ndarray:
    """Re v exp(i f·p) on the pixels of the inputs, or of the outputs, in the channels of one group."""
    shape = conv.in_shape if of_inputs else conv.out_shape
    steps = np.ones(len(angles)) if of_inputs else np.asarray(conv.strides)
    pixels = np.stack(np.meshgrid(*map(np.arange, shape[:-1]), indexing="ij"), axis=-1)
    wave = np.exp(1j * (pixels @ (angles * steps)))
    start = np.zeros(shape)
    first = group * len(vector)
    start[..., first : first + len(vector)] = np.real(wave[..., None] * vector)
    return start if np.any(start) else np.ones(shape)


def _lanczos(conv: Conv, kernel: np.ndarray, start: np.ndarray) -> float:
    """A lower bound on ||A||² from Lanczos steps with the layer as it is."""
    of_inputs = start.shape == conv.in_shape

    def gram(kernel: np.ndarray, x: np.ndarray) -> np.ndarray:
        if of_inputs:
            return _adjoint(conv, kernel, _forward(conv, kernel, x))
        return _forward(conv, kernel, _adjoint(conv, kernel, x))

    narrow = functools.partial(gram, kernel.astype(np.float32))
    _, vector = _ritz(narrow, start.astype(np.float32), _STEPS)
    vector = vector.astype(np.float64)
    image = (_forward if of_inputs else _adjoint)(conv, kernel, vector)
    return float(np.sum(image**2) / np.sum(vector**2)) * (1 - 1e-9)


def _windows(conv: Conv, padded: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """For every tap a view of the pixels that it meets, one for each output pixel."""
    taps = conv.kernel.shape[:-2]
    for t, place in enumerate(np.ndindex(*taps)):
        cut = tuple(
            slice(p * d, p * d + s * (n - 1) + 1, s)
            for p, d, s, n in zip(
                place, conv.kernel_dilation, conv.strides, conv.out_shape, strict=False
            )
        )
        yield t, padded[cut]


def _forward(conv: Conv, kernel: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A x for one example."""
    mode = "wrap" if conv.padding == "CIRCULAR" else "constant"
    padded = np.pad(x, (*conv.pads, (0, 0)), mode=mode)  # pyright: ignore[reportCallIssue]
    groups, (n1, n2) = conv.feature_group_count, kernel.shape[-2:]
    taps = kernel.reshape(-1, n1, groups, n2 // groups).transpose(0, 2, 1, 3)
    pixels = math.prod(conv.out_shape[:-1])
    total = np.zeros((groups, pixels, n2 // groups), x.dtype)
    for t, window in _windows(conv, padded):
        total += window.reshape(pixels, groups, n1).transpose(1, 0, 2) @ taps[t]
    return total.transpose(1, 0, 2).reshape(conv.out_shape)


def _adjoint(conv: Conv, kernel: np.ndarray, z: np.ndarray) -> np.ndarray:
    """A* z for one example under zero padding."""
    groups, (n1, n2) = conv.feature_group_count, kernel.shape[-2:]
    taps = kernel.reshape(-1, n1, groups, n2 // groups).transpose(0, 2, 3, 1)
    sizes = [n + sum(pad) for n, pad in zip(conv.spatial_shape, conv.pads, strict=True)]
    padded = np.zeros((*sizes, conv.in_shape[-1]), z.dtype)
    columns = z.reshape(-1, groups, n2 // groups).transpose(1, 0, 2)
    for t, window in _windows(conv, padded):
        window += (columns @ taps[t]).transpose(1, 0, 2).reshape(window.shape)
    cut = tuple(
        slice(low, low + n) for (low, _), n in zip(conv.pads, conv.spatial_shape, strict=True)
    )
    return padded[cut]


def _written(conv: Conv, kernel: np.ndarray) -> np.ndarray:
    """The matrix (inputs, outputs)."""
    pixels, out = math.prod(conv.spatial_shape), math.prod(conv.out_shape[:-1])
    mode = (
        {"mode": "wrap"}
        if conv.padding == "CIRCULAR"
        else {"mode": "constant", "constant_values": -1}
    )
    numbers = np.arange(pixels).reshape(*conv.spatial_shape, 1)
    padded = np.pad(numbers, (*conv.pads, (0, 0)), **mode)  # pyright: ignore
    groups, (n1, n2) = conv.feature_group_count, kernel.shape[-2:]
    matrix = np.zeros((pixels, groups, n1, out, groups, n2 // groups))
    taps = kernel.reshape(-1, n1, groups, n2 // groups)
    for t, window in _windows(conv, padded):
        sources, targets = window.ravel(), np.arange(out)
        inside = sources >= 0
        for g in range(groups):
            matrix[sources[inside], g, :, targets[inside], g, :] += taps[t, None, :, g]
    return matrix.reshape(pixels * groups * n1, -1)
