"""Proximal backpropagation: the implicit step of parameters against numpy, and as a backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import stochsolvers as ss
from stochsolvers.proxprop import ConjugateGradients, Exact, apply, implicit_gradient, through

CONVOLUTIONS = {
    "one axis, causal, dilated": ((3, 2, 4), (7,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "strides": ((3, 2, 2, 3), (5, 6), {"strides": (2, 1)}),
    "wide strides": ((1, 2, 2, 3), (7, 5), {"strides": (3, 3), "padding": "VALID"}),
    "dilated, explicit": ((2, 3, 2, 3), (5, 7), {"padding": ((2, 0), (1, 3)), "kernel_dilation": (2, 3)}),
    "groups": ((3, 3, 2, 6), (4, 5), {"feature_group_count": 3}),
    "circular, even": ((4, 2, 2, 3), (5, 3), {"padding": "CIRCULAR"}),
    "circular, larger than the image": ((5, 3, 1, 2), (3, 2), {"padding": "CIRCULAR", "strides": 2}),
    "three axes": ((2, 3, 2, 2, 3), (4, 3, 4), {"strides": (1, 2, 1)}),
    "one position": ((3, 4, 2, 3), (3, 4), {"padding": "VALID"}),
}  # fmt: skip


def conv_case(name, rng, batch=4):
    """A map, inputs, a cotangent, and for each group the rows [patch 1] with its part of the cotangent."""
    kernel, spatial, options = CONVOLUTIONS[name]
    A = ss.Conv(jnp.asarray(rng.normal(size=kernel)), spatial, **options)
    x = rng.normal(size=(batch, *A.in_shape))
    g = rng.normal(size=(batch, *A.out_shape))
    groups = A.feature_group_count
    n_in, n_out = x.shape[-1] // groups, g.shape[-1] // groups
    systems = []
    for k in range(groups):
        part = x[..., k * n_in : (k + 1) * n_in]
        wrap = A.padding == "CIRCULAR"
        rows = oracles.patch_rows(
            part, A.kernel.shape[:-2], A.strides, A.pads, A.kernel_dilation, wrap=wrap
        )
        systems.append((rows, g[..., k * n_out : (k + 1) * n_out].reshape(len(rows), -1)))
    return A, jnp.asarray(x), jnp.asarray(g), systems


def with_ones(rows):
    return np.concatenate([rows, np.ones((len(rows), 1))], 1)


def assert_same(found, kernel, bias, **tolerance):
    tolerance = {"rtol": 1e-9, "atol": 1e-12, **tolerance}
    np.testing.assert_allclose(found[0], kernel, **tolerance)
    if bias is not None:
        np.testing.assert_allclose(found[1], bias, **tolerance)


DENSE = {
    "few rows": (5, 8, 6),
    "many rows": (40, 3, 4),
    "many outputs": (6, 5, 30),
    "one row": (1, 4, 3),
}


@pytest.mark.parametrize("shape", DENSE.values(), ids=DENSE)
def test_dense_layers_in_closed_form(shape, rng):
    N, m, n = shape
    A = ss.Dense(jnp.asarray(rng.normal(size=(m, n))))
    x, g, tau = rng.normal(size=(N, m)), rng.normal(size=(N, n)), 0.7
    d = oracles.implicit_step(with_ones(x), g, tau)
    without = oracles.implicit_step(x, g, tau)
    forms = ("auto", "rows", "parameters")

    @jax.jit
    def every(x, g):
        steps = [Exact(tau, form) for form in forms]
        return [[implicit_gradient(A, x, g, s, bias=b) for s in steps] for b in (True, False)]

    biased, unbiased = every(x, g)
    for found, (kernel, bias) in zip(biased, unbiased, strict=True):
        assert_same(found, d[:-1], d[-1])
        assert bias is None
        assert_same((kernel,), without, None)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_in_closed_form(name, rng):
    A, x, g, systems = conv_case(name, rng)
    tau = 0.3
    solutions = [oracles.implicit_step(with_ones(rows), part, tau) for rows, part in systems]
    kernel = np.concatenate([d[:-1] for d in solutions], 1).reshape(A.kernel.shape)
    bias = np.concatenate([d[-1] for d in solutions])
    bare = [oracles.implicit_step(rows, part, tau) for rows, part in systems]
    forms = ("auto", "rows", "parameters", "patches")

    @jax.jit
    def every(x, g):
        without = implicit_gradient(A, x, g, Exact(tau, "patches"), bias=False)
        return without, [implicit_gradient(A, x, g, Exact(tau, form)) for form in forms]

    (found, none), each = every(x, g)
    assert none is None
    for with_bias in each:
        assert_same(with_bias, kernel, bias)
    assert_same((found,), np.concatenate(bare, 1).reshape(A.kernel.shape), None)


def test_row_grams_in_blocks(rng):
    """From 256 rows on, the products above the diagonal are left out; their derivatives as well."""
    x, g = jnp.asarray(rng.normal(size=(259, 4))), jnp.asarray(rng.normal(size=(259, 2)))
    A, step = ss.Dense(jnp.zeros((4, 2))), Exact(0.5, "rows")
    d = oracles.implicit_step(with_ones(x), np.asarray(g), 0.5)
    assert_same(implicit_gradient(A, x, g, step), d[:-1], d[-1])

    def size(form, x):
        return jnp.sum(jnp.sin(implicit_gradient(A, x, g, Exact(0.5, form))[0]))

    slopes = [
        jax.jit(jax.grad(size, 1), static_argnums=0)(form, x) for form in ("rows", "parameters")
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-7, atol=1e-10)


def largest_factor(step, shape):
    """The order of the matrix that is factored for a dense layer of (rows, inputs, outputs)."""
    N, m, n = shape
    arrays = jnp.ones((m, n)), jnp.ones((N, m)), jnp.ones((N, n))
    program = jax.make_jaxpr(lambda k, x, g: implicit_gradient(ss.Dense(k), x, g, step))(*arrays)
    found = str(program).split("cholesky")
    assert len(found) > 1
    orders = [line for line in str(program).splitlines() if " = cholesky" in line]
    return int(orders[0].split("[")[1].split(",")[0])


def test_the_form_with_the_smallest_count(rng):
    assert largest_factor(Exact(), (20, 50, 4)) == 20
    assert largest_factor(Exact(), (50, 20, 4)) == 21
    assert largest_factor(Exact(form="parameters"), (20, 50, 4)) == 51
    # 30² (36 + 35) + 30³ < 36² (30 + 35) + 36³ although the counts of N and m are near
    assert largest_factor(Exact(), (30, 35, 35)) == 30
    # by rows 60³ + … would be less for so many outputs, but G cancels there
    assert largest_factor(Exact(), (60, 50, 400)) == 51


CG_DENSE = {
    "rows": (5, 20, 8),
    "Gram matrix": (200, 6, 8),
    "products": (50, 40, 2),
}


def iterates(rows, cotangent, tau, num_iters):
    hessian = rows.T @ rows + np.eye(rows.shape[1]) / tau
    columns = (rows.T @ cotangent).T
    each = (oracles.textbook_conjugate_gradients(hessian, c, num_iters) for c in columns)
    return np.stack(list(each), -1)


@pytest.mark.parametrize("shape", CG_DENSE.values(), ids=CG_DENSE)
def test_conjugate_gradients_are_the_textbook_s(shape, rng):
    N, m, n = shape
    A = ss.Dense(jnp.asarray(rng.normal(size=(m, n))))
    x, g = rng.normal(size=(N, m)), rng.normal(size=(N, n))
    for num_iters in (1, 2, 3, 5):
        d = iterates(with_ones(x), g, 0.5, num_iters)
        found = implicit_gradient(A, x, g, ConjugateGradients(0.5, num_iters))
        assert_same(found, d[:-1], d[-1])
    d = iterates(x, g, 0.5, 3)
    assert_same(implicit_gradient(A, x, g, ConjugateGradients(0.5, 3), bias=False), d, None)


@pytest.mark.parametrize("name", ["groups", "strides", "one position"])
def test_conjugate_gradients_of_convolutions(name, rng):
    A, x, g, systems = conv_case(name, rng)
    for num_iters in (1, 4):
        parts = [iterates(with_ones(rows), part, 2.0, num_iters) for rows, part in systems]
        kernel = np.concatenate([d[:-1] for d in parts], 1).reshape(A.kernel.shape)
        step = ConjugateGradients(2.0, num_iters)
        found = jax.jit(implicit_gradient)(A, x, g, step)
        assert_same(found, kernel, np.concatenate([d[-1] for d in parts]), rtol=1e-8)


def test_many_conjugate_gradients_are_exact(rng):
    A = ss.Dense(jnp.asarray(rng.normal(size=(6, 3))))
    x, g = rng.normal(size=(9, 6)), rng.normal(size=(9, 3))
    exact = implicit_gradient(A, x, g, Exact(0.5))
    for num_iters in (7, 40):  # converged columns stay where they are, in a loop as well
        found = implicit_gradient(A, x, g, ConjugateGradients(0.5, num_iters))
        assert_same(found, *exact, rtol=1e-7)


def test_an_empty_batch_has_no_step():
    for step in (Exact(), ConjugateGradients()):
        for d in implicit_gradient(
            ss.Dense(jnp.ones((3, 2))), jnp.ones((0, 3)), jnp.ones((0, 2)), step
        ):
            np.testing.assert_array_equal(d, 0)


def test_bad_values_are_seen_and_do_not_raise():
    x = jnp.ones((4, 3)).at[1].set(jnp.nan)
    for step in (Exact(form="rows"), Exact(form="parameters"), ConjugateGradients()):
        d, _ = implicit_gradient(ss.Dense(jnp.ones((3, 2))), x, jnp.ones((4, 2)), step)
        assert not np.any(np.isfinite(d))


def test_small_steps_are_backpropagation(rng):
    kernel, x, g = (jnp.asarray(rng.normal(size=s)) for s in ((6, 3), (9, 6), (9, 3)))
    for step in (Exact(1e-9, "rows"), Exact(1e-9, "parameters"), ConjugateGradients(1e-9, 2)):
        d, d_bias = implicit_gradient(ss.Dense(kernel), x, g, step)
        assert_same((d / 1e-9, d_bias / 1e-9), x.T @ g, g.sum(0), rtol=1e-6)


def test_it_descends(rng):
    """<d, AᵀG> > 0 for 1,000 draws; as many models side by side."""
    x, g = (jnp.asarray(rng.normal(size=(1000, *s))) for s in ((5, 4), (5, 3)))
    taus = jnp.asarray(10.0 ** rng.uniform(-3, 3, size=1000))
    A = ss.Dense(jnp.zeros((4, 3)))
    rows = np.concatenate([x, np.ones((1000, 5, 1))], -1)
    slopes = np.einsum("bim,bin->bmn", rows, g)
    for make in (Exact, lambda tau: ConjugateGradients(tau, 2)):
        run = jax.jit(jax.vmap(lambda x, g, t, make=make: implicit_gradient(A, x, g, make(t))))
        d, d_bias = run(x, g, taus)
        both = np.concatenate([d, np.asarray(d_bias)[:, None]], 1)
        assert np.all(np.sum(both * slopes, (1, 2)) > 0)
        exact = [oracles.implicit_step(*each) for each in zip(rows, g, taus, strict=True)]
        if make is Exact:
            np.testing.assert_allclose(both, exact, rtol=1e-8, atol=1e-10)


STEPS = {
    "rows": Exact(0.5, "rows"),
    "parameters": Exact(0.5, "parameters"),
    "conjugate gradients": ConjugateGradients(0.5, 3),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_homogeneous_and_never_nan(step, rng):
    """No absolute number enters: a hundred times the cotangent is a hundred times the step."""
    A = ss.Dense(jnp.zeros((6, 3), jnp.float32))
    x = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32)
    g = jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)
    run = jax.jit(implicit_gradient)
    with jax.debug_nans(True):
        d, d_bias = run(A, x, g, step)
        for scale in (100.0, 1e-30, 1e25):
            found = run(A, x, scale * g, step)
            assert_same(found, scale * d, scale * d_bias, rtol=2e-5, atol=scale * 1e-6)
        for zero in (run(A, 0 * x, 0 * g, step), run(A, x, 0 * g, step)):
            assert_same(zero, jnp.zeros((6, 3)), jnp.zeros(3), atol=0)
        only_bias = run(A, 0 * x, g, step)
        np.testing.assert_allclose(only_bias[0], 0)
        assert np.all(only_bias[1] != 0)
        one_column = run(A, x, g.at[:, 1].set(0), step)
        np.testing.assert_array_equal(one_column[0][:, 1], 0)
        np.testing.assert_allclose(one_column[0][:, 0], d[:, 0], rtol=1e-5)


@pytest.mark.parametrize("form", ["rows", "parameters"])
def test_singular_to_round_off(form, rng):
    """Equal rows and equal columns, τ far beyond the precision: still a finite step."""
    base = rng.normal(size=(1, 30))
    for x in (np.repeat(base, 40, 0), np.repeat(rng.normal(size=(40, 2)), 15, 1)):
        for tau in (1e6, 1e12):
            A, x = ss.Dense(jnp.zeros((30, 2), jnp.float32)), jnp.asarray(x, jnp.float32)
            g = jnp.asarray(rng.normal(size=(40, 2)), jnp.float32)
            with jax.debug_nans(True):
                d, d_bias = implicit_gradient(A, x, g, Exact(tau, form))
            assert np.all(np.isfinite(d))
            assert np.all(np.isfinite(d_bias))


def plain(kernel, bias, x):
    return x @ kernel + bias


def gradients(function, *arguments):
    """Of half the squared outputs, whose cotangent is the outputs."""

    def loss(*arguments):
        return 0.5 * jnp.sum(function(*arguments) ** 2)

    return jax.jit(jax.grad(loss, tuple(range(len(arguments)))))(*arguments)


def test_a_layer_has_the_values_and_input_cotangents_of_the_plain_one(rng):
    kernel, bias, x = (jnp.asarray(rng.normal(size=s)) for s in ((6, 3), (3,), (2, 4, 6)))
    step = Exact(0.5)

    def layer(kernel, bias, x):
        return apply(ss.Dense(kernel), x, bias, step)

    y = plain(kernel, bias[None, None], x)
    np.testing.assert_array_equal(layer(kernel, bias, x), y)
    *d, of_x = gradients(layer, kernel, bias, x)
    np.testing.assert_array_equal(
        of_x, gradients(lambda x: plain(kernel, bias[None, None], x), x)[0]
    )
    assert_same(d, *implicit_gradient(ss.Dense(kernel), x, y, step))
    rows = with_ones(x.reshape(-1, 6))
    expected = oracles.implicit_step(rows, np.asarray(y).reshape(-1, 3), 0.5)
    assert_same(d, expected[:-1], expected[-1])
    (alone,) = gradients(lambda k: apply(ss.Dense(k), x, None, step), kernel)
    bare = oracles.implicit_step(rows[:, :-1], np.asarray(x @ kernel).reshape(-1, 3), 0.5)
    assert_same((alone,), bare, None)
    # τ is an argument without a derivative
    slope = jax.grad(lambda t: jnp.sum(apply(ss.Dense(kernel), x, bias, Exact(t))))(0.5)
    assert slope == 0


def test_a_convolution_as_a_layer(rng):
    A, x, _, _ = conv_case("groups", rng)
    step, bias = ConjugateGradients(0.5, 2), jnp.asarray(rng.normal(size=6))

    def layer(kernel, x):
        conv = ss.Conv(kernel, (4, 5), feature_group_count=3)
        return apply(conv, x, bias, step)

    def ordinary(x):
        return A(x) + bias[None, None, None]

    y = layer(A.kernel, x)
    np.testing.assert_array_equal(y, ordinary(x))
    kernel, of_x = jax.jit(lambda *args: gradients(layer, *args))(A.kernel, x)
    np.testing.assert_allclose(of_x, gradients(ordinary, x)[0], rtol=1e-12)
    assert_same((kernel,), implicit_gradient(A, x, y, step)[0], None)


def test_training_in_a_scan_with_any_optimiser(rng):
    x = jnp.asarray(rng.normal(size=(30, 5)))
    y = jnp.asarray(np.asarray(x) @ rng.normal(size=(5, 2)))
    optimiser = optax.adam(0.3)

    def loss(parameters):
        outputs = apply(ss.Dense(parameters["w"]), x, parameters["b"], Exact(0.1))
        return 0.5 * jnp.mean((outputs - y) ** 2)

    def step(state, _):
        parameters, memory = state
        value, d = jax.value_and_grad(loss)(parameters)
        updates, memory = optimiser.update(d, memory)
        return (optax.apply_updates(parameters, updates), memory), value

    parameters = {"w": jnp.zeros((5, 2)), "b": jnp.zeros(2)}
    start = parameters, optimiser.init(parameters)
    _, losses = jax.jit(lambda s: jax.lax.scan(step, s, length=40))(start)
    assert losses[-1] < 0.05 * losses[0]


def test_models_side_by_side_but_not_examples(rng):
    kernels, x = (jnp.asarray(rng.normal(size=s)) for s in ((3, 6, 4), (3, 5, 6)))
    for step in (Exact(0.5), ConjugateGradients(0.5, 3)):

        def one(kernel, x, step=step):
            return gradients(lambda k: apply(ss.Dense(k), x, None, step), kernel)[0]

        together = jax.jit(jax.vmap(one))(kernels, x)
        alone = np.stack([one(*each) for each in zip(kernels, x, strict=True)])
        np.testing.assert_allclose(together, alone, rtol=1e-9)
        shared = jax.jit(jax.vmap(one, (0, None)))(kernels, x[0])
        np.testing.assert_allclose(shared[1], one(kernels[1], x[0]), rtol=1e-9)
        with pytest.raises(ValueError, match="implicit step is that of a whole batch, and vmap"):
            jax.vmap(lambda x, step=step: apply(ss.Dense(kernels[0]), x, None, step))(x[0])
    A = ss.Conv(jnp.ones((3, 3, 2, 2)), (4, 4))
    with pytest.raises(ValueError, match=r"expected \(batch, \.\.\., 4, 4, 2\)"):
        apply(A, jnp.ones((4, 4, 2)), None, Exact())


def test_forward_mode_is_refused(rng):
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(
            lambda k: apply(ss.Dense(k), jnp.ones((3, 2)), None, Exact()),
            (jnp.ones((2, 2)),),
            (jnp.ones((2, 2)),),
        )


def test_the_step_itself_is_differentiable(rng):
    """d of a float64 system by central differences, through the factorisation, under vmap too."""
    x, g = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(4, 2)))
    along = jnp.asarray(rng.normal(size=(4, 3)))
    A = ss.Dense(jnp.zeros((3, 2)))
    for step in (Exact(0.5, "rows"), Exact(0.5, "parameters"), ConjugateGradients(0.5, 2)):

        def size(x, step=step):
            return jnp.sum(jnp.sin(implicit_gradient(A, x, g, step)[0]))

        slope = jnp.sum(jax.jit(jax.vmap(jax.grad(size)))(x[None])[0] * along)
        h = 1e-6
        np.testing.assert_allclose(
            slope, (size(x + h * along) - size(x - h * along)) / (2 * h), rtol=1e-6
        )


def brute_force(outputs, arrays, cotangent, tau, num_iters):
    """d of one system over all arrays, from the matrix of `outputs`, linear in them."""
    ends = np.cumsum([np.size(a) for a in arrays])

    def split(vector):
        parts = np.split(vector, ends[:-1])
        return [part.reshape(np.shape(a)) for part, a in zip(parts, arrays, strict=True)]

    J = np.stack([np.ravel(outputs(*split(unit))) for unit in np.eye(ends[-1])], 1)
    hessian, right = J.T @ J + np.eye(J.shape[1]) / tau, J.T @ np.ravel(cotangent)
    d = oracles.textbook_conjugate_gradients(hessian, right, num_iters)
    return split(d)


def test_other_maps_through_their_linearity_in_their_arrays(rng):
    kernel = rng.normal(size=(2, 3, 2))
    maps = {
        "contraction": lambda k: ss.Contraction("gd,gdh->gh", k, (2, 3)),
        "transposed": lambda k: ss.conv_transpose(k, (4,), strides=2),
        "function": lambda k: ss.linear_map(lambda k, x: jnp.einsum("i,aij->aj", x, k), (3,), k),
    }
    step = ConjugateGradients(0.5, 3)
    for name, make in maps.items():
        A = make(jnp.asarray(kernel))
        x = rng.normal(size=(5, *A.in_shape))
        g = rng.normal(size=(5, *A.out_shape))
        d, d_bias = jax.jit(implicit_gradient)(A, x, g, step)

        def outputs(k, b, make=make, A=A, x=x):
            return np.asarray(make(jnp.asarray(k))(x)) + b

        n2 = A.out_features
        expected = brute_force(outputs, [kernel, np.zeros(n2)], g, 0.5, 3)
        if name == "transposed":  # the stored kernel is the flipped one
            assert isinstance(d, type(A))
            expected[0] = np.asarray(jax.tree.leaves(make(jnp.asarray(expected[0])))[0])
        (kernel_found,) = jax.tree.leaves(d)
        assert_same((kernel_found, d_bias), *expected, rtol=1e-8)
        with pytest.raises(ValueError, match=r"expected ConjugateGradients .*, got Exact"):
            implicit_gradient(A, x, g, Exact())
    # as a layer, with a bias for every output
    A = maps["contraction"](jnp.asarray(kernel))
    x, bias = rng.normal(size=(5, 2, 3)), jnp.asarray(rng.normal(size=(2, 2)))

    def layer(k, b):
        return apply(maps["contraction"](k), x, b, step)

    d, d_bias = gradients(layer, jnp.asarray(kernel), bias)
    y = layer(jnp.asarray(kernel), bias)
    expected = brute_force(
        lambda k, b: np.asarray(maps["contraction"](jnp.asarray(k))(x)) + b,
        [kernel, bias],
        y,
        0.5,
        3,
    )
    assert_same((d, d_bias), *expected, rtol=1e-8)


def test_through_a_solver_layer(rng):
    """Three iterations of a solver as one block: the damped Gauss–Newton step of its parameters."""
    x = jnp.asarray(rng.normal(size=(6, 5)))
    parameters = {
        "w": jnp.asarray(rng.normal(size=(5, 3)) / 2),
        "b": jnp.asarray(rng.normal(size=3)),
    }

    def block(parameters, x, key):
        problem = ss.LayerProblem(ss.Dense(parameters["w"]), x, bias=parameters["b"], ridge=0.1)
        del key  # an input without a derivative
        return ss.prox_gd(problem, num_iters=3, step_size=0.2).value

    implicit = through(block, ConjugateGradients(0.5, 40))
    key = jax.random.key(0)
    value, pull = jax.vjp(lambda p, x: implicit(p, x, key), parameters, x)
    ordinary, pull_plain = jax.vjp(lambda p, x: block(p, x, key), parameters, x)
    np.testing.assert_array_equal(value, ordinary)
    g = jnp.asarray(rng.normal(size=value.shape))
    d, of_x = jax.jit(pull)(g)
    np.testing.assert_allclose(of_x, pull_plain(g)[1], rtol=1e-9, atol=1e-12)
    h, flat = 1e-6, np.concatenate([np.ravel(parameters["b"]), np.ravel(parameters["w"])])

    def at(vector):
        moved = {"b": jnp.asarray(vector[:3]), "w": jnp.asarray(vector[3:].reshape(5, 3))}
        return np.ravel(block(moved, x, key))

    J = np.stack([(at(flat + h * e) - at(flat - h * e)) / (2 * h) for e in np.eye(18)], 1)
    expected = oracles.implicit_step(J, np.ravel(g), 0.5)
    found = np.concatenate([d["b"], np.ravel(d["w"])])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    # few iterations are the textbook's, and a linear block with one output is `apply`
    short = jax.vjp(lambda p: through(block, ConjugateGradients(0.5, 2))(p, x, key), parameters)[1]
    hessian = J.T @ J + 2 * np.eye(18)
    two = oracles.textbook_conjugate_gradients(hessian, J.T @ np.ravel(g), 2)
    np.testing.assert_allclose(np.ravel(short(g)[0]["w"]), two[3:], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="step of through: expected a ConjugateGradients"):
        through(block, Exact())


def test_bfloat16_is_computed_in_float32(rng):
    kernel, x, g = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((6, 3), (9, 6), (9, 3)))

    @jax.jit
    def both(kernel, x, g):
        A, wide = ss.Dense(kernel), ss.Dense(kernel.astype(jnp.float32))
        found = []
        for step in STEPS.values():
            found.append(implicit_gradient(A, x, g, step))
            found.append(implicit_gradient(wide, x, g.astype(jnp.float32), step))
        return found

    @jax.jit
    def mixed(kernel, x, bias):
        step = STEPS["conjugate gradients"]
        return gradients(
            lambda *args: apply(ss.Dense(args[0]), args[1], args[2], step), kernel, x, bias
        )

    with jax.numpy_dtype_promotion("strict"):
        implicit_gradient(ss.Dense(kernel), x, g, STEPS["rows"])
        mixed(kernel, x, jnp.ones(3, jnp.bfloat16))
    found = both(kernel, x, g)
    for low, wide in zip(found[::2], found[1::2], strict=True):
        for one, other in zip(low, wide, strict=True):
            assert one.dtype == jnp.bfloat16
            np.testing.assert_array_equal(one, other.astype(jnp.bfloat16))
    # a wider bias widens the outputs, and nothing else
    slopes = mixed(kernel, x, jnp.ones(3, jnp.float32))
    assert [slope.dtype for slope in slopes] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


def test_one_compilation_for_every_tau(rng):
    x, g = jnp.ones((4, 3)), jnp.ones((4, 2))
    run = jax.jit(lambda step: implicit_gradient(ss.Dense(jnp.zeros((3, 2))), x, g, step))
    for tau in (0.1, 0.2):
        run(Exact(tau))
    assert run._cache_size() == 1


BAD = {
    "tau of Exact: expected a number > 0, got -1": lambda: Exact(-1.0),
    "tau of Exact: expected a number > 0, got 'x'": lambda: Exact("x"),
    "tau of ConjugateGradients: expected a number > 0, got 0": lambda: ConjugateGradients(0),
    "shape of tau of Exact: expected 0 axes": lambda: Exact(jnp.ones(2)),
    "form of Exact: expected one of 'auto'": lambda: Exact(form="best"),
    "num_iters of ConjugateGradients: expected an integer >= 1": lambda: ConjugateGradients(1.0, 0),
    "form of Exact for a Dense: expected": lambda: apply(
        ss.Dense(jnp.ones((2, 2))), jnp.ones((3, 2)), None, Exact(form="patches")
    ),
    "tau of Exact: expected a finite number": lambda: Exact(np.inf),
    "step of proximal backpropagation: expected": lambda: apply(
        ss.Dense(jnp.ones((2, 2))), jnp.ones((3, 2)), None, 0.1
    ),
    "linear_map of proximal backpropagation: expected a LinearMap": lambda: apply(
        jnp.ones((2, 2)), jnp.ones((3, 2)), None, Exact()
    ),
    "shape of inputs: expected": lambda: apply(
        ss.Dense(jnp.ones((2, 2))), jnp.ones((3, 3)), None, Exact()
    ),
    "dtype of inputs: expected": lambda: apply(
        ss.Dense(jnp.ones((2, 2))), jnp.ones((3, 2), int), None, Exact()
    ),
    "shape of the bias: expected": lambda: apply(
        ss.Dense(jnp.ones((2, 2))), jnp.ones((3, 2)), jnp.ones((3, 2)), Exact()
    ),
    "shape of the cotangent: expected": lambda: implicit_gradient(
        ss.Dense(jnp.ones((2, 2))), jnp.ones((3, 2)), jnp.ones((2, 2)), Exact()
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_within_shard_map_shared_parameters_are_refused(rng):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    kernel, x = jnp.ones((3, 2)), jnp.ones((4, 3))

    def part(kernel, x):
        return apply(ss.Dense(kernel), x, None, Exact())

    mapped = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    with pytest.raises(ValueError, match="implicit system is that of the whole batch"):
        mapped(kernel, x)

    def own(kernel, x):  # a model of its own on each device
        return jax.grad(lambda k: jnp.sum(part(k, x[0]) ** 2))(kernel[0])[None]

    for step in (Exact(), ConjugateGradients()):
        models = jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        found = jax.jit(models)(kernel[None], x[None])[0]
        y = 2 * x @ kernel
        del step
        assert_same(
            (found,), implicit_gradient(ss.Dense(kernel), x, y, Exact(), bias=False)[0], None
        )
