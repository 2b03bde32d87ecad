"""Equal forms of the gradient: the same values as dense matrices, at fewer operations."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import stochsolvers as ss
from stochsolvers.estimators import _costs, forms

PADDINGS = ("SAME", "VALID", "CIRCULAR", ((1, 0), (2, 1)), ((3, 4), (0, 5)))
CASES = [
    # spatial shape, kernel shape, dilation, groups
    ((5, 7), (3, 3), (1, 1), 1),
    ((6, 5), (2, 5), (1, 1), 2),
    ((7, 7), (3, 2), (2, 1), 2),
    ((3, 4), (1, 3), (1, 1), 4),
]


OTHER_AXES = [
    ((7,), (3,), (1,), 1),
    ((8,), (4,), (2,), 2),
    ((4, 3, 5), (3, 2, 3), (1, 1, 2), 2),
    ((3, 4, 3), (1, 3, 2), (1, 1, 1), 1),
]


def random_cases(count):
    """Shapes, kernels, dilations, groups and paddings at random; padding no wider than the output."""
    rng = np.random.default_rng(11)

    def draw():
        shape, kernel = map(tuple, (rng.integers(2, 9, 2).tolist(), rng.integers(1, 5, 2).tolist()))
        dilation, groups = tuple(rng.integers(1, 3, 2).tolist()), int(rng.choice([1, 2, 4]))
        pads = tuple(map(tuple, rng.integers(0, 4, (2, 2)).tolist()))
        return shape, kernel, dilation, groups, ("SAME", "VALID", "CIRCULAR", pads)[rng.integers(4)]

    def fits(shape, kernel, dilation, _, padding):
        pads = padding if isinstance(padding, tuple) else ((0, 0), (0, 0))
        extents = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding in ("SAME", "CIRCULAR"):
            return all(e <= n for e, n in zip(extents, shape, strict=True))
        outputs = [n + sum(p) - e for n, p, e in zip(shape, pads, extents, strict=True)]
        return all(n >= max(1, *p) for n, p in zip(outputs, pads, strict=True))

    return list(itertools.islice((case for case in iter(draw, None) if fits(*case)), count))


def conv_problem(rng, shape, kernel, dilation, groups, padding, *, batch=2, n1=4, n2=8):
    conv = ss.Conv(
        jnp.asarray(rng.normal(size=(*kernel, n1 // groups, n2))),
        shape,
        padding=padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
    )
    inputs = rng.normal(size=(batch, *shape, n1))
    return ss.LayerProblem(conv, inputs, bias=rng.normal(size=n2), ridge=0.1)


def dense_problem(rng, n1=9, n2=6, batch=3, **options):
    kernel, inputs = rng.normal(size=(n1, n2)), rng.normal(size=(batch, n1))
    return ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), jnp.asarray(inputs), **options)


def columns(linear_map):
    """A as a dense matrix (inputs, outputs), from its images of the unit vectors."""
    size = int(np.prod(linear_map.in_shape))
    return linear_map(jnp.eye(size).reshape(size, *linear_map.in_shape)).reshape(size, -1)


@pytest.mark.parametrize(
    ("shape", "kernel", "dilation", "groups", "padding"),
    [(*case, padding) for padding in PADDINGS for case in CASES]
    + random_cases(10)
    + [(*case, padding) for padding in PADDINGS[:3] for case in OTHER_AXES]
    + [
        ((6,), (4,), (1,), 2, ((3, 5),)),
        ((5,), (3,), (2,), 1, "CAUSAL"),
        ((4, 3, 3), (2, 2, 1), (1, 2, 1), 2, ((2, 0), (1, 2), (0, 1))),
    ],
)
def test_conv_forms_are_the_dense_matrix(rng, shape, kernel, dilation, groups, padding):
    problem = conv_problem(rng, shape, kernel, dilation, groups, padding)
    z = rng.normal(size=problem.shape)

    @jax.jit
    def evaluate(problem, z):
        values = [forms.gradient_form(problem, form, num_calls=1) for form in forms.FORMS]
        return columns(problem.linear_map), [(v(z), v.curvature(z), v.at_zero()) for v in values]

    matrix, values = evaluate(problem, z)
    A = np.asarray(matrix).T
    flat, x = z.reshape(2, -1), np.asarray(problem.inputs).reshape(2, -1)
    data = ((flat @ A - x) @ A.T).reshape(problem.shape)
    want = data - np.asarray(problem.bias) + 0.1 * z
    curvature = (flat @ A @ A.T).reshape(problem.shape) + 0.1 * z
    zero = -(x @ A.T).reshape(problem.shape) - np.asarray(problem.bias)

    for value, curved, at_zero in values:
        np.testing.assert_allclose(value, want, atol=1e-10)
        np.testing.assert_allclose(curved, curvature, atol=1e-10)
        np.testing.assert_allclose(at_zero, zero, atol=1e-10)


@pytest.mark.optimized
@pytest.mark.parametrize(("n1", "n2"), [(9, 6), (5, 8), (7, 513), (3, 256), (4, 1)])
def test_symmetric_product_by_blocks(rng, n1, n2):
    matrix, weight = rng.normal(size=(n1, n2)), rng.normal(size=(n2, n2))

    def loss(matrix):
        return jnp.sum(weight * forms.symmetric_product(matrix))

    value = forms.symmetric_product(jnp.asarray(matrix))
    np.testing.assert_allclose(value, matrix.T @ matrix, atol=1e-12)
    np.testing.assert_array_equal(value, value.T)
    gradient = jax.grad(loss)(jnp.asarray(matrix))
    np.testing.assert_allclose(gradient, matrix @ (weight + weight.T), atol=1e-10)


@pytest.mark.optimized
def test_symmetric_product_has_both_modes_and_its_reverse_is_one_product(rng):
    matrix = jnp.asarray(rng.normal(size=(5, 4)))
    check_grads(forms.symmetric_product, (matrix,), order=2, modes=["fwd", "rev"], eps=1e-4)
    n1, n2 = 256, 512
    big = jax.ShapeDtypeStruct((n1, n2), jnp.float32)
    weight = jax.ShapeDtypeStruct((n2, n2), jnp.float32)

    def reverse(matrix, weight):
        return jax.vjp(forms.symmetric_product, matrix)[1](weight)[0]

    forward_flops = flops(forms.symmetric_product, big)
    assert forward_flops < 0.66 * 2 * n1 * n2**2
    assert flops(reverse, big, weight) < 1.05 * 2 * n1 * n2**2


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def solve(problem, form, momentum=False, **options):
    return ss.prox_gd(problem, step_size=0.02, num_iters=6, form=form, momentum=momentum, **options)


def build_dense(rng):
    return dense_problem(rng, bias=jnp.ones(6), ridge=0.2, prior=ss.prox.L1(0.1))


def build_zero_padded(rng):
    return conv_problem(rng, (5, 4), (3, 3), (1, 1), 2, "SAME")


def build_circular(rng):
    return conv_problem(rng, (5, 4), (3, 2), (1, 1), 1, "CIRCULAR")


@pytest.mark.parametrize(
    ("build", "form", "momentum"),
    [
        (build_dense, "gram", False),
        (build_dense, "gram", True),
        (build_zero_padded, "fourier", False),
        (build_circular, "fourier", True),
        (build_circular, "gram", False),
    ],
)
def test_solutions_and_derivatives_do_not_depend_on_the_form(rng, build, form, momentum):
    def loss(problem, form):
        solution = solve(problem, form, momentum)
        return jnp.sum(jnp.sin(solution.value)), solution

    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    problem = build(rng)
    want, literal = differentiate(problem, "literal")
    got, solution = differentiate(problem, form)
    np.testing.assert_allclose(solution.value, literal.value, atol=1e-9)
    np.testing.assert_allclose(solution.residuals, literal.residuals, atol=1e-9)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_ms2gd_takes_its_full_gradient_in_any_form(rng):
    problem = conv_problem(rng, (4, 5), (3, 3), (1, 1), 1, "SAME")
    values = [
        ss.ms2gd(
            jax.random.key(0), problem, tau=2, step_size=0.01, num_outer=2, num_inner=2, form=form
        ).value
        for form in ("literal", "fourier")
    ]
    np.testing.assert_allclose(*values, atol=1e-9)


def test_float32_forms_agree_to_its_round_off(rng):
    problem = dense_problem(rng, n1=300, n2=40, batch=8)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), problem)
    results = [
        ss.prox_gd(low, step_size=1e-3, num_iters=20, form=form).value
        for form in ("literal", "gram", "auto")
    ]
    assert all(value.dtype == jnp.float32 for value in results)
    scale = np.max(np.abs(results[0]))
    for value in results[1:]:
        np.testing.assert_allclose(value, results[0], atol=2e-5 * scale)


@pytest.mark.optimized
def test_an_iteration_of_the_gram_form_does_not_grow_with_n1():
    def cost(n1, form):
        def run(kernel, x):
            problem = ss.LayerProblem(ss.Dense(kernel), x)
            gradient = forms.gradient_form(problem, form, num_calls=1)
            return lambda z: gradient(z)

        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n1, 64), (16, n1), (16, 64))]
        whole = flops(lambda kernel, x, z: run(kernel, x)(z), *shapes)
        twice = flops(lambda kernel, x, z: (g := run(kernel, x))(g(z)), *shapes)
        return twice - whole

    assert cost(1024, "gram") == cost(128, "gram")
    assert cost(1024, "literal") > 7 * cost(128, "literal")


@pytest.mark.optimized
@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME", "VALID"])
@pytest.mark.parametrize(
    ("form", "least", "most"),
    # what a complex product and a point of a transform count for are their times, not their operations
    [("literal", 0.9, 1.1), ("gram", 0.8, 1.1), ("fourier", 0.25, 0.4)],
)
def test_an_iteration_of_a_convolution_costs_what_auto_counts(form, least, most, padding):
    """Of its operations: the times of calls, of copies and of what is read are left out."""
    left_out = ("call", "entry", "patch", "symbol_entry", "rim_call", "rim_entry")
    rates = _costs.SOLVE._replace(**dict.fromkeys(left_out, 0.0), fft=20.0, complex=5.5, rim=1.0)

    def problem_of(kernel, x):
        return ss.LayerProblem(ss.Conv(kernel, (16, 18), padding=padding), x)

    def run(kernel, x, z, num_calls):
        gradient = forms.gradient_form(problem_of(kernel, x), form, num_calls=num_calls)
        for _ in range(num_calls):
            z = gradient(z)
        return z

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 3, 8, 8), (4, 16, 18, 8))]
    problem = jax.eval_shape(problem_of, *shapes)
    z = jax.ShapeDtypeStruct(problem.shape, jnp.float32)
    once, thrice = (flops(lambda *a, k=k: run(*a, k), *shapes, z) for k in (1, 3))
    counted = forms.form_cost(problem, form, 3, rates) - forms.form_cost(problem, form, 1, rates)
    assert least < (thrice - once) / (2 * counted) < most


@pytest.mark.optimized
def test_one_iteration_from_zero_costs_the_plain_layer():
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((256, 128), (32, 256), (128,))]

    def layer(kernel, x, bias):
        return jax.nn.relu(x @ kernel + bias[None])

    def solver(kernel, x, bias):
        problem = ss.LayerProblem(ss.Dense(kernel), x, bias=bias)
        return ss.prox_gd(problem, step_size=1.0, num_iters=1).value

    assert flops(solver, *shapes) < 1.05 * flops(layer, *shapes)


@pytest.mark.parametrize(
    ("batch", "n1", "n2", "num_calls", "best"),
    [(128, 4096, 512, 9, "gram"), (128, 4096, 512, 1, "literal"), (8, 64, 512, 9, "literal")],
)
def test_auto_counts_operations_of_dense_maps(batch, n1, n2, num_calls, best):
    problem = jax.eval_shape(
        lambda: ss.LayerProblem(ss.Dense(jnp.zeros((n1, n2))), jnp.zeros((batch, n1)))
    )
    assert forms.cheapest_form(problem, num_calls) == best


@pytest.mark.parametrize(
    ("kernel", "padding", "strides", "best"),
    [
        ((3, 3, 64, 64), "CIRCULAR", 1, "fourier"),
        ((3, 3, 3, 64), "SAME", 1, "literal"),
        ((1, 1, 256, 64), "VALID", 1, "gram"),
        ((3, 3, 64, 64), "CIRCULAR", 2, "literal"),
        ((1, 256, 64), "SAME", 1, "gram"),
        ((9, 64, 64), "CIRCULAR", 1, "fourier"),
        ((3, 3, 3, 64, 64), "CIRCULAR", 1, "fourier"),
        ((1, 1, 1, 2, 64), "VALID", 1, "literal"),
    ],
)
def test_auto_counts_operations_of_convolutions(kernel, padding, strides, best):
    def build():
        conv = ss.Conv(jnp.zeros(kernel), 32, padding=padding, strides=strides)
        return ss.LayerProblem(conv, jnp.zeros((128, *conv.in_shape)))

    assert forms.cheapest_form(jax.eval_shape(build), 9) == best


@pytest.mark.optimized
def test_auto_takes_another_form_under_differentiation(rng):
    """The values of the one, the derivatives of the other, and the operations of neither beside them."""
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64, 32)) / 24)
    inputs = jnp.asarray(rng.normal(size=(8, 16, 16, 64)))

    def solve_with(form, kernel, inputs):
        problem = ss.LayerProblem(ss.Conv(kernel, 16), inputs)
        return ss.prox_gd(problem, step_size=1e-2, num_iters=10, form=form).value

    def gradient(form):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(solve_with(form, *args))), (0, 1))

    problem = jax.eval_shape(lambda k, x: ss.LayerProblem(ss.Conv(k, 16), x), kernel, inputs)
    assert forms.cheapest_form(problem, 9) == "literal"
    assert forms.cheapest_form(problem, 9, differentiated=True) == "fourier"
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (kernel, inputs)]
    counts = [flops(lambda *a, f=f: solve_with(f, *a), *shapes) for f in ("auto", "literal")]
    assert counts[0] == counts[1]
    counts = [flops(gradient(f), *shapes) for f in ("auto", "fourier", "literal")]
    assert counts[0] < 1.01 * counts[1] < 0.8 * counts[2]
    chex.assert_trees_all_equal(*(solve_with(f, kernel, inputs) for f in ("auto", "literal")))
    chex.assert_trees_all_close(
        *(gradient(f)(kernel, inputs) for f in ("auto", "literal")), rtol=1e-8, atol=1e-10
    )


def test_derivatives_of_two_forms_in_every_mode(rng):
    problem = conv_problem(rng, (4, 5), (3, 2), (1, 1), 1, "SAME", n1=2, n2=2)
    z = jnp.asarray(rng.normal(size=problem.shape))

    def evaluate(kernel, z):
        A = dataclasses.replace(problem.linear_map, kernel=kernel)
        own = dataclasses.replace(problem, linear_map=A)
        literal, gram = (forms.gradient_form(own, f, num_calls=3) for f in ("literal", "gram"))
        both = forms.TwoFormGradient(literal, gram)
        return jnp.sin(both(z)) + both.curvature(z) + both.at_zero()

    check_grads(jax.jit(evaluate), (problem.linear_map.kernel, z), order=2)


def test_what_has_no_such_form_is_refused(rng):
    def conv(shape, **options):
        return ss.LayerProblem(
            ss.Conv(jnp.ones((5, 5, 1, 1)), shape, **options), jnp.ones((*shape, 1))
        )

    strided, wide = conv((6, 6), strides=(2, 2)), conv((1, 1), padding=((4, 4), (2, 2)))
    one_axis = ss.LayerProblem(ss.Conv(jnp.ones((3, 1, 1)), 5, strides=2), jnp.ones((5, 1)))
    other = ss.LayerProblem(ss.Dense(jnp.ones((3, 2))).T, jnp.ones((4, 2)))
    assert forms.cheapest_form(other, 1000) == "literal"
    for problem, form, message in [
        (dense_problem(rng), "fourier", "linear map of form 'fourier': expected a convolution"),
        (strided, "gram", r"linear map of form 'gram': expected strides \(1, 1\), got \(2, 2\)"),
        (wide, "fourier", "expected padding no wider than the output"),
        (wide, "newton", "form: expected one of 'auto'"),
        (one_axis, "fourier", r"expected strides \(1,\), got \(2,\)"),
        (other, "gram", "linear map of form 'gram': expected a Dense or a Conv, got Transposed"),
        (other, "fourier", "expected a Dense or a Conv, got Transposed"),
    ]:
        with pytest.raises(ValueError, match=message):
            solve(problem, form)
    with pytest.raises(ValueError, match="form: expected one of"):
        ss.ProxGD(3, form="newton")
