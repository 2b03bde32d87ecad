"""The t-product against loops over circular convolutions, and its algebra."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochsolvers import tensor_product as tp

SHAPES = [(2, 3, 4, 5), (3, 2, 5, 4), (3, 3, 1, 4), (2, 4, 3, 1), (4, 3, 1, 1), (1, 1, 4, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def _loops(a, x):
    """Definition: slices multiply, sites convolve circularly."""
    n1, n2, width, height = a.shape
    out = np.zeros((n1, x.shape[1], width, height))
    sites = list(itertools.product(range(width), range(height)))
    for (i, j), (k, l) in itertools.product(sites, sites):  # noqa: E741
        for r, s in itertools.product(range(n1), range(n2)):
            out[r, :, i, j] += a[r, s, (i - k) % width, (j - l) % height] * x[s, :, k, l]
    return out


def _pair(rng, shape, p=2):
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(
        rng.normal(size=(shape[1], p, *shape[2:]))
    )


@shapes
def test_product_is_circular_convolution(shape, rng):
    a, x = _pair(rng, shape)
    product = tp.t_product(a, x)
    assert product.dtype == np.float64
    np.testing.assert_allclose(product, _loops(np.asarray(a), np.asarray(x)), atol=1e-12)


@shapes
def test_product_by_unfolding(shape, rng):
    a, x = _pair(rng, shape)
    unfolded = tp.circ(a) @ tp.mat_vec(x)
    np.testing.assert_allclose(tp.fold(unfolded, shape[2:]), tp.t_product(a, x), atol=1e-12)
    np.testing.assert_array_equal(tp.fold(tp.mat_vec(x), shape[2:]), x)


@shapes
def test_order_of_unfolding(shape):
    n1, n2, width, height = shape
    x = np.arange(np.prod(shape), dtype=float).reshape(shape)
    unfolded = np.asarray(tp.mat_vec(jnp.asarray(x)))
    matrix = np.asarray(tp.circ(jnp.asarray(x)))
    for r, i, j in itertools.product(range(n1), range(width), range(height)):
        row = (j * width + i) * n1 + r
        np.testing.assert_array_equal(unfolded[row], x[r, :, i, j])
        np.testing.assert_array_equal(
            matrix[row, :n2], x[r, :, i, j]
        )  # first block column: k = l = 0


@shapes
def test_circulant_matrices_are_block_diagonal_in_fourier_space(shape, rng):
    d = rng.normal(size=shape)
    n1, n2, width, height = shape

    def dft(n):  # numpy's own sign, conjugated
        return np.conj(np.fft.fft(np.eye(n))) / np.sqrt(n)

    for n in (width, height):
        np.testing.assert_allclose(tp.normalized_dft(n, jnp.complex128), dft(n), atol=1e-15)
    left = np.kron(np.kron(dft(height), dft(width)), np.eye(n1))
    right = np.kron(np.kron(dft(height), dft(width)), np.eye(n2))
    blocks = np.asarray(tp.bdiag(jnp.asarray(np.fft.fft2(d))))
    circulant = left @ blocks @ right.conj().T
    np.testing.assert_allclose(circulant, tp.circ(jnp.asarray(d)), atol=1e-12)


def test_block_diagonal(rng):
    d = rng.normal(size=(2, 3, 2, 2))
    blocks = np.asarray(tp.bdiag(jnp.asarray(d)))
    assert blocks.shape == (8, 12)
    np.testing.assert_array_equal(blocks[2:4, 3:6], d[:, :, 1, 0])
    assert np.count_nonzero(blocks) == d.size


@shapes
def test_identity(shape, rng):
    a, _ = _pair(rng, shape)
    left = tp.identity_tensor(shape[0], shape[2:], jnp.float64)
    right = tp.identity_tensor(shape[1], shape[2:], jnp.float64)
    np.testing.assert_allclose(tp.t_product(left, a), a, atol=1e-14)
    np.testing.assert_allclose(tp.t_product(a, right), a, atol=1e-14)
    assert tp.identity_tensor(2, (3, 3)).dtype == np.float32


@shapes
def test_associativity(shape, rng):
    a, x = _pair(rng, shape, p=3)
    y = jnp.asarray(rng.normal(size=(3, 2, *shape[2:])))
    left = tp.t_product(tp.t_product(a, x), y)
    np.testing.assert_allclose(left, tp.t_product(a, tp.t_product(x, y)), atol=1e-11)


@shapes
def test_hermitian_transpose(shape, rng):
    a, x = _pair(rng, shape)
    y = jnp.asarray(rng.normal(size=(shape[0], 2, *shape[2:])))
    ah = tp.hermitian_transpose(a)
    _, _, width, height = shape
    for i, j in itertools.product(range(width), range(height)):
        np.testing.assert_array_equal(ah[:, :, i, j], a[:, :, -i % width, -j % height].T)
    np.testing.assert_array_equal(tp.hermitian_transpose(ah), a)
    np.testing.assert_allclose(tp.circ(ah), tp.circ(a).T)
    np.testing.assert_allclose(jnp.vdot(tp.t_product(a, x), y), jnp.vdot(x, tp.t_product(ah, y)))
    np.testing.assert_allclose(
        tp.hermitian_transpose(tp.t_product(a, x)),
        tp.t_product(tp.hermitian_transpose(x), ah),
        atol=1e-12,
    )


def test_one_site_is_the_matrix_product(rng):
    a, x = _pair(rng, (4, 3, 1, 1))
    np.testing.assert_allclose(tp.t_product(a, x)[..., 0, 0], a[..., 0, 0] @ x[..., 0, 0])
    np.testing.assert_array_equal(tp.circ(a), a[..., 0, 0])


def test_jit_grad_and_dtypes(rng):
    a, x = _pair(rng, (2, 3, 4, 3))
    gradient = jax.jit(jax.grad(lambda x: 0.5 * jnp.sum(tp.t_product(a, x) ** 2)))(x)
    expected = tp.t_product(tp.hermitian_transpose(a), tp.t_product(a, x))
    np.testing.assert_allclose(gradient, expected, atol=1e-11)
    half = tp.t_product(a.astype(jnp.bfloat16), x.astype(jnp.bfloat16))
    assert half.dtype == np.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tp.t_product(jnp.ones((2, 3, 4)), jnp.ones((3, 1, 4, 4))),
            "shape of a: expected 4",
        ),
        (lambda: tp.t_product(jnp.ones((2, 3, 4, 4)), jnp.ones((2, 1, 4, 4))), "shape of x"),
        (lambda: tp.t_product(jnp.ones((2, 3, 4, 4)), jnp.ones((3, 1, 4, 5))), "shape of x"),
        (lambda: tp.t_product(jnp.ones((1, 1, 2, 2), int), jnp.ones((1, 1, 2, 2))), "dtype of a"),
        (lambda: tp.fold(jnp.ones((7, 1)), (2, 2)), "rows of v: expected a multiple"),
        (lambda: tp.fold(jnp.ones(8), (2, 2)), "shape of v"),
        (lambda: tp.identity_tensor(0, (2, 2)), "n: expected an integer"),
        (lambda: tp.bdiag(jnp.ones((2, 2))), "shape of d_hat"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
