r"""The high-order t-product, one linear map for dense and convolutional layers.

    A ⊛ X = fold(circ(A) · mat_vec(X))            (Bibi et al. 2019, appendix D and lemma 1)

A tensor has shape (n1, n2, W, H): an n1 × n2 matrix A[:, :, i, j], a frontal slice, at each site of
a W × H torus. The product is the matrix product of slices, convolved circularly over the sites,

    (A ⊛ X)[:, :, i, j] = Σ_{k, l} A[:, :, (i − k) mod W, (j − l) mod H] X[:, :, k, l],

and the ordinary matrix product when W = H = 1. Order of unfolding, everywhere: the H site index is
the slowest, then the W site index, then the row within a slice: row (j W + i) n + r. In this order

    circ(A) = (F_H ⊗ F_W ⊗ I_n1) bdiag(Â) (F_H ⊗ F_W ⊗ I_n2)ᴴ,               (eq. 21)

with F_n[a, b] = exp(+2πi ab/n)/√n, the unitary matrix of the inverse DFT: the paper's eigenvectors,
whose sign of the exponent it leaves open. Â is the unnormalised 2-D DFT of A over its sites.

All of these are for reading and for tests; layers use `linear_maps`.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from stochsolvers import _checks
from stochsolvers._typing import Array, at_least_float32


def t_product(a: Array, x: Array) -> Array:
    r"""A ⊛ X, shapes (n1, n2, W, H) and (n2, p, W, H) to (n1, p, W, H), by one product a frequency.

    Real tensors give a real tensor.

    Raises:
      ValueError: at trace time, for ranks, dtypes or shapes that do not fit.
    """
    a, x = _tensor("a", a), _tensor("x", x)
    if x.shape[0] != a.shape[1] or x.shape[2:] != a.shape[2:]:
        expected = f"({a.shape[1]}, p, {a.shape[2]}, {a.shape[3]})"
        _checks.fail("shape of x", expected, x.shape)
    a_hat, x_hat = jnp.fft.rfft2(a), jnp.fft.rfft2(x)
    product = jnp.einsum("rsij,spij->rpij", a_hat, x_hat, precision="highest")
    return jnp.fft.irfft2(product, s=a.shape[2:])


def identity_tensor(
    n: int, spatial_shape: tuple[int, int], dtype: DTypeLike = jnp.float32
) -> Array:
    """I with I ⊛ X = X: the identity matrix at site (0, 0), zero elsewhere. Shape (n, n, W, H)."""
    shape = _checks.pair_of_counts("spatial_shape", spatial_shape)
    n = _checks.count("n", n)
    return jnp.zeros((n, n, *shape), dtype).at[:, :, 0, 0].set(jnp.eye(n, dtype=dtype))


def hermitian_transpose(a: Array) -> Array:
    r"""Aᴴ[:, :, i, j] = A[:, :, −i mod W, −j mod H]ᵀ, so that <A ⊛ X, Y> = <X, Aᴴ ⊛ Y>.

    Each slice is transposed and each filter rotated by 180° about site (0, 0): the transposed
    convolution. Shape (n1, n2, W, H) to (n2, n1, W, H).
    """
    a = _tensor("a", a)
    return jnp.roll(jnp.flip(a, (2, 3)), (1, 1), (2, 3)).swapaxes(0, 1)


def circ(d: Array) -> Array:
    r"""The block circulant matrix, with circulant blocks, of X ↦ D ⊛ X.

    Block (i + j W, k + l W) is D[:, :, (i − k) mod W, (j − l) mod H]. Shape (n1, n2, W, H) to
    (n1 W H, n2 W H).
    """
    d = _tensor("d", d)
    n1, n2, width, height = d.shape
    i, j = jnp.arange(width), jnp.arange(height)
    rows, columns = (i[:, None] - i[None]) % width, (j[:, None] - j[None]) % height
    blocks = d[:, :, rows[None, :, None, :], columns[:, None, :, None]]  # n1, n2, j, i, l, k
    return blocks.transpose(2, 3, 0, 4, 5, 1).reshape(height * width * n1, height * width * n2)


def bdiag(d_hat: Array) -> Array:
    """Frontal slices on the diagonal blocks, in the order of unfolding (eq. 20); may be complex.

    Shape (n1, n2, W, H) to (n1 W H, n2 W H).
    """
    _checks.rank("d_hat", d_hat, 4)
    d_hat = jnp.asarray(d_hat)
    n1, n2, width, height = d_hat.shape
    sites = width * height
    slices = d_hat.transpose(3, 2, 0, 1).reshape(sites, n1, n2)
    diagonal = jnp.eye(sites, dtype=d_hat.dtype)
    return jnp.einsum("brs,bc->brcs", slices, diagonal).reshape(sites * n1, sites * n2)


def mat_vec(x: Array) -> Array:
    """Slices stacked on top of each other in the order of unfolding: (n, p, W, H) to (n W H, p)."""
    x = _tensor("x", x)
    n, p, width, height = x.shape
    return x.transpose(3, 2, 0, 1).reshape(height * width * n, p)


def fold(v: Array, spatial_shape: tuple[int, int]) -> Array:
    """The inverse of `mat_vec`: (n W H, p) to (n, p, W, H)."""
    _checks.rank("v", v, 2)
    v = jnp.asarray(v)
    width, height = _checks.pair_of_counts("spatial_shape", spatial_shape)
    rows, p = v.shape
    if rows % (width * height):
        _checks.fail("rows of v", f"a multiple of W H = {width * height}", rows)
    return v.reshape(height, width, rows // (width * height), p).transpose(2, 3, 1, 0)


def normalized_dft(n: int, dtype: DTypeLike = jnp.complex64) -> Array:
    """F_n of eq. 21, F[a, b] = exp(2πi ab/n)/√n, unitary and symmetric."""
    n = _checks.count("n", n)
    return jnp.fft.ifft(jnp.eye(n, dtype=dtype), norm="ortho")


def _tensor(what: str, array: Array) -> Array:
    """A real tensor of order four in float32 or wider."""
    _checks.rank(what, array, 4)
    _checks.floating(what, array)
    array = jnp.asarray(array)
    return array.astype(at_least_float32(array.dtype))
