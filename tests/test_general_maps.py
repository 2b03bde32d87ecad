"""Convolutions on any number of axes, transposes, contractions and functions as linear maps.

The oracles are dense matrices from loops and `numpy.einsum` in float64, and Flax's own layers.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.test_util import check_grads
from oracles import convolution_matrix

import stochsolvers as ss
from stochsolvers import linear_maps
from stochsolvers.estimators import forms
from stochsolvers.linear_maps import Contraction, conv_transpose, dense_general, linear_map

TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def assert_is_matrix(A, matrix, absolute=None):
    """A and its adjoint, restriction and |A| are those of the matrix (outputs, inputs)."""
    absolute = abs(matrix) if absolute is None else absolute
    inputs, outputs = math.prod(A.in_shape), math.prod(A.out_shape)
    assert matrix.shape == (outputs, inputs)
    x = np.eye(inputs).reshape(inputs, *A.in_shape)
    z = np.eye(outputs).reshape(outputs, *A.out_shape)
    features = jnp.asarray(np.arange(A.in_features)[::-2].copy())
    columns = matrix.reshape(outputs, -1, A.in_features)[:, :, features].reshape(outputs, -1)
    kept = jnp.asarray(np.arange(A.out_features)[::-2].copy())
    rows = matrix.reshape(-1, A.out_features, inputs)[:, kept].reshape(-1, inputs)

    @jax.jit
    def evaluate(A, x, z):
        part = A.restrict(features)
        narrow = jnp.eye(math.prod(part.in_shape)).reshape(-1, *part.in_shape)
        sizes, head = A.absolute(), A.restrict_outputs(kept)
        thin = jnp.eye(math.prod(head.out_shape)).reshape(-1, *head.out_shape)
        values = [A(x), A.adjoint(z), A.T(z), A.T.adjoint(x), part(narrow), part.adjoint(z)]
        values += [head(x), head.adjoint(thin), A.T.restrict(kept)(thin)]
        values += [A.T.restrict_outputs(features)(z)]
        return values, None if sizes is None else (sizes(x), sizes.adjoint(z))

    values, sizes = evaluate(A, x, z)
    expected = (matrix.T, matrix, matrix, matrix.T, columns.T, columns)
    expected += (rows.T, rows, rows, columns)
    for value, want in zip(values, expected, strict=True):
        np.testing.assert_allclose(np.asarray(value).reshape(want.shape), want, **TIGHT)
    if sizes is not None:
        for value, want in zip(sizes, (absolute.T, absolute), strict=True):
            np.testing.assert_allclose(np.asarray(value).reshape(want.shape), want, **TIGHT)


@st.composite
def convolutions(draw):
    """Kernel shape, image, and options of a small convolution on one to three axes."""
    axes = draw(st.integers(1, 3))
    limit = {1: 9, 2: 5, 3: 3}[axes]

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * axes))

    shape, taps, strides, dilation = each(1, limit), each(1, 3), each(1, 3), each(1, 2)
    groups = draw(st.integers(1, 2))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    padding = draw(st.sampled_from(["SAME", "VALID", "CIRCULAR", "pairs", "CAUSAL"]))
    if padding == "CAUSAL" and axes > 1:
        padding = "SAME"
    if padding == "pairs":
        padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(axes))
    total = [sum(p) for p in padding] if isinstance(padding, tuple) else [0] * axes
    if padding == "VALID" or isinstance(padding, tuple):
        shape = tuple(max(n, k - t) for n, k, t in zip(shape, extents, total, strict=True))
        shape = tuple(max(n, 1) for n in shape)
    features = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return shape, (*taps, features[0] // groups, features[1]), strides, dilation, groups, padding


def pads_of(shape, extents, strides, padding):
    """Flax's paddings, written down once more."""
    if padding == "VALID":
        return [(0, 0)] * len(shape)
    if padding == "CAUSAL":
        return [(k - 1, 0) for k in extents]
    if padding == "CIRCULAR":
        return [((k - 1) // 2, k // 2) for k in extents]
    if padding == "SAME":
        sizes = zip(shape, extents, strides, strict=True)
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sizes]
        return [(t // 2, t - t // 2) for t in totals]
    return padding


@given(case=convolutions())
def test_convolution_is_its_matrix(case):
    shape, kernel_shape, strides, dilation, groups, padding = case
    kernel = np.random.default_rng(0).normal(size=kernel_shape)
    A = ss.Conv(
        jnp.asarray(kernel),
        shape,
        strides=strides,
        padding=padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
    )
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_shape, strict=False)]
    pads = pads_of(shape, extents, strides, padding)
    wrap = padding == "CIRCULAR"
    options = {"groups": groups, "wrap": wrap}
    matrix = convolution_matrix(kernel, shape, strides, pads, dilation, **options)
    # of taps that meet on a small torus, the sum of the absolute values
    absolute = convolution_matrix(abs(kernel), shape, strides, pads, dilation, **options)
    assert_is_matrix(A, matrix, absolute)
    if not wrap or all(k <= n for k, n in zip(extents, shape, strict=True)):
        np.testing.assert_array_equal(absolute, abs(matrix))


@pytest.mark.parametrize("low", [0, 2, (1, 3)])
def test_circular_windows_may_start_anywhere(rng, low):
    kernel = rng.normal(size=(3, 4, 2, 3))
    A = ss.Conv(jnp.asarray(kernel), (5, 4), strides=(2, 1), padding="CIRCULAR", circular_low=low)
    lows = np.broadcast_to(low, 2).tolist()
    pads = [(n, k - 1 - n) for n, k in zip(lows, (3, 4), strict=True)]
    matrix = convolution_matrix(kernel, (5, 4), (2, 1), pads, (1, 1), wrap=True)
    assert_is_matrix(A, matrix)
    assert A.restrict(jnp.array([0])).circular_low == tuple(lows)


def test_an_integer_stands_for_all_axes(rng):
    kernel = jnp.asarray(rng.normal(size=(2, 2, 2, 1, 1)))
    short = ss.Conv(kernel, 6, strides=2, padding=1, kernel_dilation=2)
    long = ss.Conv(
        kernel, (6, 6, 6), strides=(2, 2, 2), padding=((1, 1),) * 3, kernel_dilation=(2, 2, 2)
    )
    assert jax.tree.structure(short) == jax.tree.structure(long)
    assert short.out_shape == (3, 3, 3, 1)


def one_of_each(rng, dtype=jnp.float64):
    """Maps by name, with arrays of one dtype."""

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "1-D": ss.Conv(array(3, 2, 3), (6,), strides=2),
        "2-D": ss.Conv(array(2, 3, 2, 3), (4, 5), padding="CIRCULAR"),
        "3-D": ss.Conv(array(2, 2, 3, 1, 4), (3, 2, 4), feature_group_count=2),
        "transposed": conv_transpose(array(3, 3, 2, 3), (3, 2), strides=2),
        "dense": ss.Dense(array(4, 3)),
        "dense transposed": ss.Dense(array(4, 3)).T,
        "contraction": Contraction("ghd,gdk->hkg", array(2, 3, 4), (2, 2, 3)),
        "heads": dense_general(array(3, 2, 2), (4, 3)),
        "function": linear_map(blur, (5, 2), array(3), dtype=dtype),
        "matrix": linear_maps.Matrix(array(6, 4), (3, 2), (2, 2)),
    }


def blur(taps, x):
    """A filter along the first axis, between two FFTs."""
    spectrum = jnp.fft.rfft(x, axis=0) * jnp.fft.rfft(taps, n=x.shape[0])[:, None]
    return jnp.fft.irfft(spectrum, n=x.shape[0], axis=0)


NAMES = tuple(one_of_each(np.random.default_rng(0)))
each_map = pytest.mark.parametrize("name", NAMES)


@each_map
def test_adjoint_identity_and_batch_axes(rng, name):
    A = one_of_each(rng)[name]
    x, z = (rng.normal(size=(2, 3, *shape)) for shape in (A.in_shape, A.out_shape))

    @jax.jit
    def evaluate(A, x, z):
        gradient = jax.grad(lambda A: A.adjoint(A(x[:0])).sum(), allow_int=True)(A)
        whole, part, none = (x, z), (x[1, 2], z[1]), (x[:0], z[:0])
        return [(A(x), A.adjoint(z)) for x, z in (whole, part, none)], gradient

    ((image, pulled), part, none), gradient = jax.tree.map(np.asarray, evaluate(A, x, z))
    np.testing.assert_allclose(np.vdot(image, z), np.vdot(x, pulled), rtol=1e-10)
    np.testing.assert_allclose(image[1, 2], part[0], **TIGHT)
    np.testing.assert_allclose(pulled[1], part[1], **TIGHT)
    assert none[0].shape == (0, 3, *A.out_shape)
    assert none[1].shape == (0, 3, *A.in_shape)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., "):
        A(x[..., :-1])
    with pytest.raises(ValueError, match=r"expected \(\.\.\., "):
        A.adjoint(z[..., None])


def along(function, point, way, weights):
    """φ = <w, f> at a point, and along a way φ' in both modes and φ'' in all four."""

    def value(point):
        return tree_vdot(weights, function(*point))

    def forward(function):
        return lambda point: jax.jvp(function, (point,), (way,))[1]

    def reverse(function):
        return lambda point: tree_vdot(jax.grad(function)(point), way)

    modes = forward, reverse
    first = [mode(value) for mode in modes]
    second = [mode(derivative) for mode in modes for derivative in first]
    return value(point), *([derivative(point) for derivative in d] for d in (first, second))


def tree_vdot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@each_map
def test_jit_vmap_and_derivatives(rng, name):
    A = one_of_each(rng)[name]
    x, z = (rng.normal(size=(2, *shape)) for shape in (A.in_shape, A.out_shape))

    @jax.jit
    def product(A, x, z):
        return A(jnp.sin(x)), A.adjoint(z)

    want = product(A, x, z)
    stack = jax.tree.map(lambda leaf: np.stack([leaf, -np.asarray(leaf)]), A)
    both = map(np.asarray, jax.jit(jax.vmap(product, (0, None, None)))(stack, x, z))
    for value, expected in zip(both, want, strict=True):
        np.testing.assert_allclose(value[0], expected, **TIGHT)
        np.testing.assert_allclose(-value[1], expected, **TIGHT)
    way, weights = (
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), tree) for tree in ((A, x, z), want)
    )

    @jax.jit
    def evaluate(step):
        point = jax.tree.map(lambda p, d: p + step * d, (A, x, z), way)
        return along(product, point, way, weights)

    before, (_, first, second), after = (evaluate(step) for step in (-1e-4, 0.0, 1e-4))
    slope, (curve, _) = ((np.asarray(after[k]) - np.asarray(before[k])) / 2e-4 for k in (0, 1))
    np.testing.assert_allclose(first, slope, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(second, curve, rtol=1e-6, atol=1e-6)


@each_map
def test_low_precision_is_promoted(rng, name):
    A = one_of_each(rng, jnp.float32)[name]
    x, z = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (A.in_shape, A.out_shape)
    )

    @jax.jit
    def evaluate(A, x, z):
        return A(x), A.adjoint(z), A.adjoint(A(x))

    image, pulled, want = evaluate(A, x, z)
    assert A.dtype == image.dtype == pulled.dtype == jnp.float32
    low = A.astype(jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    assert A.astype(jnp.float64).dtype == jnp.float64
    if name == "function":  # XLA has no FFT in bfloat16
        return
    image, pulled, got = evaluate(low, x, z)
    assert image.dtype == pulled.dtype == jnp.bfloat16
    want, got = np.asarray(want), np.asarray(got, np.float32)
    np.testing.assert_allclose(got, want, atol=0.1 * np.max(np.abs(want)))


@each_map
def test_strict_modes(rng, name):
    """They raise while tracing: nothing is compiled."""

    def evaluate(A, x):
        problem = ss.LayerProblem(A, x, bias=jnp.ones(A.out_features, jnp.float32))
        for form in forms.FORMS:
            if form not in ("auto", "literal") and forms._refusal(A, form):
                continue
            gradient = forms.gradient_form(problem, form, num_calls=1)
            jax.grad(lambda z, gradient=gradient: gradient(z).sum())(A(x))
        return A.restrict(jnp.array([0, 1])).adjoint(A(x))

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        A = one_of_each(rng, jnp.float32)[name]
        jax.eval_shape(evaluate, A, jnp.asarray(rng.normal(size=(2, *A.in_shape)), jnp.float32))


@each_map
def test_symbolic_batches(rng, name):
    A = one_of_each(rng)[name]
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *A.in_shape), A.dtype)
    product = jax.jit(lambda x: A.adjoint(jnp.sin(A(x))))
    saved = export.export(product)(shape)
    x = rng.normal(size=(3, *A.in_shape))
    np.testing.assert_allclose(saved.call(x), product(x), **TIGHT)


@each_map
def test_a_solver_takes_every_map(rng, name):
    A = one_of_each(rng)[name]
    x = rng.normal(size=(2, *A.in_shape))
    problem = ss.LayerProblem(A, x, prior=ss.prox.Zero(), ridge=0.1)
    value = ss.prox_gd(problem, step_size=0.02, num_iters=4).value
    matrix = np.asarray(jax.jit(linear_maps.written_out)(A).kernel)
    want, flat = np.zeros((2, matrix.shape[1])), np.asarray(x).reshape(2, -1)
    for _ in range(4):
        want = want - 0.02 * ((want @ matrix.T - flat) @ matrix + 0.1 * want)
    np.testing.assert_allclose(np.asarray(value).reshape(2, -1), want, **TIGHT)


def test_the_adjoint_of_the_adjoint(rng):
    A = ss.Conv(jnp.asarray(rng.normal(size=(3, 2, 3))), (6,), strides=2)
    transposed = A.T
    assert transposed.T is A
    assert (transposed.in_shape, transposed.out_shape) == (A.out_shape, A.in_shape)
    assert transposed == A.T
    assert transposed != ss.Conv(2 * A.kernel, (6,), strides=2).T
    assert jax.tree.structure(transposed) == jax.tree.structure(A.T)
    static = jax.tree.map(lambda leaf: None, transposed)
    assert hash(static) == hash(jax.tree.map(lambda leaf: None, A.T))
    assert transposed.T.absolute() == transposed.absolute().T
    assert transposed.squared_norm_bound() is None
    part = transposed.restrict(jnp.array([2, 0]))  # a convolution with two filters
    np.testing.assert_array_equal(part.T.kernel, A.kernel[..., jnp.array([2, 0])])


class Plain(ss.LinearMap):
    """The least that a map needs."""

    in_shape, out_shape = (4,), (3,)

    def __call__(self, x):
        return x[..., 1:] - x[..., :-1]


def test_a_map_with_nothing_but_its_product():
    matrix = np.diff(np.eye(4), axis=0)
    plain = jax.tree_util.register_pytree_node_class(
        type(
            "Differences",
            (Plain,),
            {
                "tree_flatten": lambda self: ((), None),
                "tree_unflatten": classmethod(lambda cls, *_: cls()),
            },
        )
    )()
    assert plain.dtype == jnp.float32
    assert_is_matrix(plain, matrix)


TRANSPOSED = [
    # spatial shape, taps, strides, dilation
    ((4,), (3,), (1,), (1,)),
    ((5,), (4,), (2,), (1,)),
    ((3,), (2,), (3,), (2,)),
    ((3, 4), (3, 3), (2, 2), (1, 1)),
    ((4, 3), (2, 3), (1, 3), (2, 1)),
    ((3, 2), (1, 4), (2, 2), (1, 1)),
    ((2, 3, 2), (3, 2, 1), (2, 1, 2), (1, 2, 1)),
]


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", "pairs", 1])
@pytest.mark.parametrize(("shape", "taps", "strides", "dilation"), TRANSPOSED)
def test_conv_transpose_is_flax(rng, shape, taps, strides, dilation, padding, transpose_kernel):
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    if padding == "pairs":  # one cut off, one as wide as can be
        padding = tuple((k // 2, k + s - 2) for k, s in zip(extents, strides, strict=True))
    if padding == 1 and 1 in taps:  # out of that filter's reach
        padding = tuple((min(k - 1, 1), 1) for k in extents)
    options = {"strides": strides, "padding": padding, "kernel_dilation": dilation}
    features = (3, 2) if transpose_kernel else (2, 3)
    kernel = jnp.asarray(rng.normal(size=(*taps, *features)))
    x = jnp.asarray(rng.normal(size=(2, *shape, 2)))
    layer = nnx.ConvTranspose(
        2,
        3,
        taps,
        use_bias=False,
        transpose_kernel=transpose_kernel,
        kernel_init=lambda *_: kernel,
        rngs=nnx.Rngs(0),
        **options,
    )
    plain = nn.ConvTranspose(
        3,
        taps,
        use_bias=False,
        transpose_kernel=transpose_kernel,
        param_dtype=jnp.float64,
        **options,
    )
    A = conv_transpose(kernel, shape, transpose_kernel=transpose_kernel, **options)
    want, product, other = jax.jit(
        lambda A, x: (layer(x), A(x), plain.apply({"params": {"kernel": kernel}}, x))
    )(A, x)
    assert A.in_shape == x.shape[1:]
    assert A.out_shape == want.shape[1:]
    np.testing.assert_allclose(product, want, **TIGHT)
    np.testing.assert_allclose(other, want, **TIGHT)


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        ((3, 2), {}, "3 to 5 axes"),
        ((3, 2, 2), {"padding": "CAUSAL"}, "'SAME', 'VALID', 'CIRCULAR'"),
        ((3, 2, 2), {"padding": ((3, 0),)}, "low <= 2 and high <= 2"),
        ((3, 2, 2), {"padding": ((0, 4),), "strides": 2}, "low <= 2 and high <= 3"),
        ((3, 2, 2), {"padding": ((0.5, 0),)}, "an integer or a pair"),
        ((3, 2, 2), {"padding": (1, 1)}, "an integer or a pair"),
        ((3, 2, 2), {"padding": -3}, "at least one pixel"),
        ((3, 3, 2, 2), {"strides": (2, 2, 2)}, "strides"),
    ],
)
def test_bad_transposed_convolutions_are_refused(kernel, options, message):
    with pytest.raises(ValueError, match=message):
        conv_transpose(jnp.ones(kernel), 4, **options)


CONTRACTIONS = {
    # equation, shapes of one input and of the kernel
    "dense": ("d,dk->k", (3,), (3, 2)),
    "heads": ("...td,dhk->...thk", (2, 3), (3, 2, 2)),
    "out of heads": ("thk,hkd->td", (2, 3, 2), (3, 2, 4)),
    "groups": ("gd,gdk->gk", (3, 2), (3, 2, 4)),
    "groups apart": ("ghd,gdk->hkg", (2, 2, 3), (2, 3, 2)),
    "features are copied": ("td,ts->sd", (3, 2), (3, 4)),
    "diagonal": ("td,d->td", (2, 3), (3,)),
    "x summed": ("std,dk->tk", (2, 3, 2), (2, 3)),
    "last of x summed": ("td,tk->k", (3, 2), (3, 2)),
    "kernel summed": ("td,dkr->tk", (2, 3), (3, 2, 4)),
    "outer": ("d,k->dk", (3,), (2,)),
    "scaled": ("td,->td", (2, 3), ()),
    "everything": ("apgc,gcnr->gpn", (2, 2, 3, 2), (3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_contraction_is_its_matrix_and_its_blocks(rng, name):
    equation, in_shape, kernel_shape = CONTRACTIONS[name]
    kernel = rng.normal(size=kernel_shape)
    A = Contraction(equation, jnp.asarray(kernel), in_shape)
    bare = equation.replace("...", "")
    units = np.eye(math.prod(in_shape)).reshape(-1, *in_shape)
    x, rest = bare.split(",")
    products = np.einsum(f"Z{x},{rest.replace('->', '->Z')}", units, kernel)
    assert A.out_shape == products.shape[1:]
    matrix = products.reshape(len(units), -1).T
    assert_is_matrix(A, matrix)

    blocks = np.asarray(A.blocks())
    groups = math.prod(in_shape[x.index(a)] for a in A.labels.groups)
    assert blocks.shape[0] == groups
    copies = math.prod(in_shape[x.index(a)] for a in A.labels.copies)
    values = np.tile(np.linalg.svd(blocks, compute_uv=False).ravel(), copies)
    want = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(np.sort(values)[::-1], want[: len(values)], atol=1e-12)
    assert len(values) == len(want)


@pytest.mark.parametrize("name", ["heads", "out of heads", "groups apart", "features are copied"])
def test_contraction_is_flax_einsum(rng, name):
    equation, in_shape, kernel_shape = CONTRACTIONS[name]
    kernel = jnp.asarray(rng.normal(size=kernel_shape))
    x = jnp.asarray(rng.normal(size=(2, *in_shape)))
    inputs, output = equation.replace("...", "").split("->")
    equation = f"...{inputs}->...{output}"
    A = Contraction(equation, kernel, in_shape)
    layer = nnx.Einsum(equation, kernel_shape, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(A(x), layer(x), **TIGHT)
    plain = nn.Einsum(kernel_shape, equation, use_bias=False, param_dtype=jnp.float64)
    np.testing.assert_allclose(A(x), plain.apply({"params": {"kernel": kernel}}, x), **TIGHT)


@pytest.mark.parametrize(
    ("in_shape", "features", "axis", "batch_axis"),
    [
        ((3,), (2,), -1, ()),
        ((4, 3), (2, 2), -1, ()),
        ((4, 3, 2), (2,), (-2, -1), ()),
        ((4, 3, 2), (3,), (-1, -2), ()),
        ((4, 3, 2), (2, 2), -2, ()),
        ((4, 3, 2), (5,), -1, (0,)),
        ((2, 3, 2, 4), (5, 2), (-1,), (0, 1)),
        ((2, 3, 2, 4), (5,), (-1, 1), (0,)),
    ],
)
def test_dense_general_is_flax(rng, in_shape, features, axis, batch_axis):
    axes = sorted(a % len(in_shape) for a in ([axis] if isinstance(axis, int) else axis))
    contracted = tuple(in_shape[a] for a in axes)
    sizes = {a: in_shape[a] for a in batch_axis}
    kernel = jnp.asarray(rng.normal(size=(*sizes.values(), *contracted, *features)))
    A = dense_general(kernel, in_shape, axis=axis, batch_axis=sizes)
    assert dense_general(kernel, in_shape, axis=axis, batch_axis=batch_axis) == A
    # Flax's batch axes lead all others
    x = jnp.asarray(rng.normal(size=in_shape if batch_axis else (2, *in_shape)))
    layer = nnx.LinearGeneral(
        contracted,
        features,
        axis=axis,
        batch_axis=sizes,
        use_bias=False,
        kernel_init=lambda *_: kernel.reshape(
            math.prod(sizes.values()) * math.prod(contracted), -1
        ),
        rngs=nnx.Rngs(0),
    )
    np.testing.assert_allclose(A(x), layer(x), **TIGHT)
    plain = nn.DenseGeneral(features, axis, batch_axis, use_bias=False, param_dtype=jnp.float64)
    np.testing.assert_allclose(A(x), plain.apply({"params": {"kernel": kernel}}, x), **TIGHT)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Contraction("td,dk", jnp.ones((3, 2)), (2, 3)), "'x,kernel->output'"),
        (lambda: Contraction("td->t", jnp.ones((3, 2)), (2, 3)), "'x,kernel->output'"),
        (lambda: Contraction(3, jnp.ones((3, 2)), (2, 3)), "a string, got int"),
        (lambda: Contraction("...d,dk->k", jnp.ones((3, 2)), (3,)), "leading dots"),
        (lambda: Contraction("d...,dk->k...", jnp.ones((3, 2)), (3,)), "dots that lead"),
        (lambda: Contraction("dd,dk->k", jnp.ones((3, 2)), (3, 3)), "no label twice"),
        (lambda: Contraction("d,dk->kz", jnp.ones((3, 2)), (3,)), "output labels that"),
        (lambda: Contraction("d,d->", jnp.ones(3), (3,)), "at least one label"),
        (lambda: Contraction("d,dk->k", jnp.ones((3, 2, 1)), (3,)), "2 axes"),
        (lambda: Contraction("d,dk->k", jnp.ones((3, 2)), (4,)), r"expected \(3,\), got \(4,\)"),
        (lambda: Contraction("d,dk->k", jnp.ones((3, 2)), (4, 3)), "one integer"),
        (lambda: Contraction("d,dk->k", jnp.ones((3, 2), int), (3,)), "floating"),
        (lambda: dense_general(jnp.ones((3, 2)), (4, 3), axis=2), "distinct axes"),
        (lambda: dense_general(jnp.ones((3, 2)), (4, 3), axis=(-1, 1)), "distinct axes"),
        (
            lambda: dense_general(jnp.ones((3, 2)), (4, 3), axis=0, batch_axis=0),
            "not in batch_axis",
        ),
        (lambda: dense_general(jnp.ones((3, 2)), (4, 3), batch_axis=1), "leading axes 0, 1"),
        (lambda: dense_general(jnp.ones(3), (3, 3, 3), axis=(0, 1)), "at least 2 axes"),
        (lambda: dense_general(jnp.ones((4, 2)), (4, 3)), "expected"),
    ],
)
def test_bad_contractions_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_function_is_its_matrix(rng):
    taps = jnp.asarray(rng.normal(size=3))
    A = linear_map(blur, (5, 2), taps, dtype=jnp.float64)
    matrix = np.zeros((5, 2, 5, 2))
    for p, a, i in itertools.product(range(5), range(3), range(2)):
        matrix[p, i, (p - a) % 5, i] += taps[a]
    assert_is_matrix(A, matrix.reshape(10, 10))


def test_derivatives_reach_the_operands_and_other_operands_do_not_compile_again(rng):
    traces = []

    def function(weights, x):
        traces.append(x.shape)
        return jnp.tanh(weights["a"]) @ x + weights["b"] * x

    @jax.jit
    def loss(A, x):
        return jnp.sum(A.adjoint(A(x)) ** 2)

    x = jnp.asarray(rng.normal(size=(2, 3)))
    weights = [{"a": jnp.asarray(rng.normal(size=(3, 3))), "b": jnp.asarray(b)} for b in (0.5, 2.0)]
    maps = [linear_map(function, (3,), w) for w in weights]
    for A, w in zip(maps, weights, strict=True):
        matrix = np.tanh(w["a"]) + float(w["b"]) * np.eye(3)
        np.testing.assert_allclose(loss(A, x), np.sum((x @ matrix.T @ matrix) ** 2), rtol=1e-12)
        traces.append("used")
    assert traces[-1] == traces[-2] == "used"
    check_grads(lambda w: loss(linear_map(function, (3,), w), x), (weights[0],), order=1, eps=1e-4)
    gradient = jax.grad(loss)(maps[0], x)
    assert gradient.operands[0]["a"].shape == (3, 3)


def test_functions_that_are_pytrees_are_operands(rng):
    kernel = jnp.asarray(rng.normal(size=(3, 2)))
    partial = jax.tree_util.Partial(lambda kernel, x: x @ kernel, kernel)
    dense = ss.Dense(kernel)
    for function in (partial, dense):
        A = linear_map(function, (3,))
        assert jax.tree.leaves(A)[0] is kernel
        np.testing.assert_allclose(linear_maps.written_out(A).kernel, kernel, **TIGHT)


def test_a_sum_of_two_maps_and_a_closure(rng):
    A = ss.Conv(jnp.asarray(rng.normal(size=(3, 2, 2))), (4,))
    B = linear_map(blur, (4, 2), jnp.asarray(rng.normal(size=3)))
    total = linear_map(lambda A, B, x: A(x) + B(x), (4, 2), A, B)
    closure = linear_map(lambda x: A(x) + B(x), (4, 2))
    matrices = [linear_maps.written_out(one).kernel for one in (A, B)]
    for one in (total, closure):
        np.testing.assert_allclose(
            one(jnp.eye(8).reshape(8, 4, 2)).reshape(8, 8), sum(matrices), **TIGHT
        )
    assert not jax.tree.leaves(closure)


def test_a_function_in_float32(rng):
    A = linear_map(functools.partial(jnp.cumsum, axis=0), (3, 2))
    x = jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.bfloat16)
    assert A.dtype == A(x).dtype == A.adjoint(x).dtype == jnp.float32
    wide = linear_map(lambda x: x.astype(jnp.float64), (3, 2))  # the output's own dtype
    assert wide.adjoint(x).dtype == jnp.float32


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (jnp.sin, "cannot transpose it|cannot transpose .*sin"),
        (lambda x: x * x, "linear in x, got one that JAX cannot transpose"),
        (jax.nn.relu, "linear in x"),
        (lambda x: jnp.where(x > 0, x, 0.0), "linear in x"),
        (lambda x: x + 1, "zero at x = 0, got an entry of 1"),
        (lambda x: jnp.concatenate([x, jnp.full(2, -3.0, x.dtype)]), "an entry of 3"),
        (lambda x: jnp.ones(3), "zero at x = 0"),
        (lambda x: (x, x), "one real floating-point array"),
        (lambda x: x.sum(), "at least one axis"),
        (lambda x: x * 1j, "one real floating-point array"),
        (lambda x: x.astype(int), "one real floating-point array"),
        (3, "a function, got int"),
    ],
)
def test_functions_that_are_not_linear_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        linear_map(function, (3,))

    @jax.jit
    def traced(x):
        return linear_map(function, (3,))(x)

    with pytest.raises(ValueError, match=message):
        traced(jnp.ones((2, 3)))


def test_structure_of_functions_is_checked_and_values_are_not():
    for in_shape in ((), 3, (0,), (2.0,)):
        with pytest.raises(ValueError, match="in_shape of linear_map"):
            linear_map(lambda x: x, in_shape)
    with pytest.raises(ValueError, match="dtype of linear_map"):
        linear_map(lambda x: x, (3,), dtype=jnp.complex64)
    broken = linear_map(lambda a, x: a * x, (3,), jnp.inf)
    assert np.isnan(broken(jnp.zeros(3))).all()
    shifted = jax.jit(lambda b, x: linear_map(lambda b, x: x + b, (3,), b)(x))
    np.testing.assert_array_equal(shifted(1.0, jnp.ones(3)), 2 * np.ones(3))
