"""Reports on whole networks, against dense matrices in numpy and certificates layer by layer."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss
from experiments.networks import BlockConfig, LeNet, LeNetConfig
from stochsolvers import reports
from stochsolvers.reports import _observations

ONE = ss.ProxGD(1, step_size=1.0)


def dense_norm(function, shape):
    """Largest singular value of a linear function, from its matrix column by column."""
    columns = [
        np.ravel(function(jnp.asarray(np.reshape(unit, (1, *shape)))))
        for unit in np.eye(int(np.prod(shape)))
    ]
    return np.linalg.norm(np.stack(columns, 1), 2)


def snapshot(model):
    """Structure and modes, and the bits of every variable."""
    graph, state = nnx.split(model)
    leaves = [
        np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)
        for v in jax.tree.leaves(state)
    ]
    return graph, leaves


def assert_unchanged(model, before):
    graph, leaves = snapshot(model)
    assert graph == before[0]
    for now, then in zip(leaves, before[1], strict=True):
        np.testing.assert_array_equal(now, then)


class Twice(nnx.Module):
    """A convolution, a dense layer that is used twice, one that samples."""

    def __init__(self, rngs):
        self.conv = ss.nnx.SolverConv(
            2, 3, (3, 3), padding="CIRCULAR", solver=ss.ProxGD(12), ridge=0.2, rngs=rngs
        )
        self.shared = ss.nnx.SolverLinear(48, 48, solver=ss.ProxGD(5), ridge=0.1, rngs=rngs)
        self.alpha = ss.nnx.SolverLinear(48, 4, solver=ss.ProxSG(0.5, 6, decay=0.9), rngs=rngs)

    def __call__(self, x, *, again=True):
        x = self.shared(self.conv(x).reshape(len(x), -1))
        x = nnx.remat(lambda layer, x: layer(x))(self.shared, x) if again else x
        return self.alpha(x)


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(3, 4, 4, 2)), jnp.float32)


@nnx.jit
def own_problem(layer, x):
    """The problem of a layer, its solution, the certificate and the objective of that."""
    problem, solution = layer.problem(x), layer.solve(x, deterministic=True)
    return problem, solution, problem.certificate(solution.value), problem.objective(solution.value)


def test_certificates_are_those_of_the_layers_own_problems(images):
    model = Twice(nnx.Rngs(0, dropout=1))
    before = snapshot(model)
    report = ss.certify(model, images, deterministic=True)
    assert_unchanged(model, before)
    assert [row.name for row in report.rows] == ["conv", "shared", "shared", "alpha"]
    x = images
    for row, layer in zip(
        report.rows, (model.conv, model.shared, model.shared, model.alpha), strict=True
    ):
        problem, solution, gap, objective = own_problem(layer, x)
        np.testing.assert_allclose(row.gap_max, np.max(gap), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(row.gap_mean, np.mean(gap), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            row.relative_gap, np.max(gap / np.abs(objective)), rtol=1e-3, atol=1e-5
        )
        norm = dense_norm(problem.linear_map, problem.linear_map.in_shape) ** 2
        assert row.lower <= norm * (1 + 1e-6)
        assert row.upper >= norm * (1 - 1e-6)
        np.testing.assert_allclose([row.lower, row.upper, row.lipschitz], norm, rtol=2e-3)
        ridge = layer.ridge
        np.testing.assert_allclose(row.step_size, 1 / (norm + ridge), rtol=1e-3)
        assert row.num_iters == layer.solver.num_iters
        assert row.finite
        assert np.isnan(row.contraction_bound) == (layer is model.alpha)  # whose steps decay
        if layer is not model.alpha:
            ratios = np.asarray(solution.residuals[1:] / solution.residuals[:-1])
            assert np.max(ratios) <= row.contraction_bound * (1 + 1e-3)
            first, *_, last = np.asarray(solution.residuals)
            rate = (last / first) ** (1 / (row.num_iters - 1))
            np.testing.assert_allclose(row.contraction, np.max(rate), rtol=1e-3)
        x = solution.value.reshape(len(x), -1)
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report.rows)
    assert len({len(line) for line in lines}) == 1  # aligned
    assert "nan" not in str(report)
    assert report.as_dict()["name"] == ["conv", "shared", "shared", "alpha"]


def test_one_compilation_serves_every_batch_and_samples_anew(images):
    traces = []

    class Counted(nnx.Module):
        def __init__(self, rngs):
            self.alpha = ss.nnx.SolverLinear(32, 4, solver=ss.ProxSG(0.5, 6, decay=0.9), rngs=rngs)

        def __call__(self, x, *, again=True):
            traces.append(again)
            x = self.alpha(x.reshape(len(x), -1))
            return self.alpha(jnp.tile(x, 8)) if again else x

    model = Counted(nnx.Rngs(0, dropout=1))
    one = ss.nnx.certify(model, images, again=False)
    two = ss.nnx.certify(model, images + 1, again=False)
    assert traces == [False]
    assert len(one.rows) == 1
    assert one.rows[0].gap_max != two.rows[0].gap_max
    count = model.alpha.rngs.count[...]
    model(images, again=False)
    assert model.alpha.rngs.count[...] == count + 1  # certify drew nothing from the model's stream
    assert ss.nnx.certify(model, images, again=False).rows[-1] != one.rows[-1]


def test_layers_that_a_scan_stacks_have_rows_of_their_own(rng):
    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda r: ss.nnx.SolverLinear(4, 4, solver=ss.ProxGD(3), rngs=r))
            self.layers = make(rngs.split(2))

        def __call__(self, x):
            run = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return run(x, self.layers)

    model, x = Stack(nnx.Rngs(0)), jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    rows = ss.nnx.certify(model, x).rows
    assert [row.name for row in rows] == ["layers[0]", "layers[1]"]
    kernels = np.asarray(model.layers.kernel[...])
    norms = [np.linalg.norm(kernel, 2) ** 2 for kernel in kernels]
    np.testing.assert_allclose([row.lipschitz for row in rows], norms, rtol=1e-3)


def test_a_layer_fills_in_its_certificate_on_request(rng):
    layer = ss.nnx.SolverLinear(8, 5, solver=ss.ProxGD(20), ridge=0.1, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    solution = layer.solve(x, certify=True)
    want = layer.problem(x).certificate(solution.value)
    np.testing.assert_allclose(solution.certificate, want, rtol=1e-6)
    assert layer.solve(x).certificate is None
    twin = ss.linen.SolverDense(5, solver=ss.ProxGD(20), ridge=0.1)
    variables = {"params": {"kernel": layer.kernel[...], "bias": layer.bias[...]}}
    ours = twin.apply(variables, x, method="solve", certify=True)
    np.testing.assert_allclose(ours.certificate, want, rtol=1e-3, atol=1e-6)


def test_measured_contraction_stops_at_round_off():
    residuals = jnp.asarray([[1.0, 1.0], [0.5, 0.2], [0.25, 1e-9], [0.125, 0.0]])
    rate = _observations.contraction(residuals, jnp.asarray([1e-6, 1e-6]))
    np.testing.assert_allclose(rate, [0.5, 0.2])
    assert np.isinf(_observations.contraction(residuals[:1], jnp.zeros(2))).all()


def test_guarantees_are_those_of_theory_alone(rng):
    kernel = rng.normal(size=(12, 6))
    problem = ss.LayerProblem(ss.Dense(jnp.asarray(kernel)), jnp.ones(12), ridge=0.1)
    smallest, *_, largest = np.linalg.eigvalsh(kernel.T @ kernel) + 0.1

    def guarantee(solver, deterministic=False):
        return reports._bounds.guarantee(solver, problem, largest - 0.1, None, deterministic)

    for solver, deterministic, step in [
        (ss.ProxGD(6), False, 1 / largest),
        (ss.ProxGD(6, step_size=0.01), False, 0.01),
        (ss.ProxSG(0.5, 6), True, 1 / largest),
    ]:
        want = max(abs(1 - step * smallest), abs(1 - step * largest))
        np.testing.assert_allclose(guarantee(solver, deterministic), want, rtol=1e-6)
    for solver in [
        ss.ProxSG(0.5, 6),
        ss.ProxGD(6, momentum=True),
        ss.ProxGD(6, step_size=ss.exponential_decay(0.1, 0.9)),
        ss.NSync(2, 6, step_size=ss.InverseSeparable()),
    ]:
        assert np.isinf(guarantee(solver))
    assert np.isinf(guarantee(ss.ProxSG(0.5, 6, decay=0.9), deterministic=True))


def test_a_network_without_solver_layers_says_so():
    report = ss.certify(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3)))
    assert (report.rows, str(report)) == ((), "No solver layer was called.")


def test_an_empty_batch_is_refused():
    layer = ss.nnx.SolverLinear(3, 2, solver=ONE, rngs=nnx.Rngs(0))
    wanted = r"batch of the solver layer '\(model\)': expected at least one example"
    with pytest.raises(ValueError, match=wanted):
        ss.certify(layer, jnp.ones((0, 3)))


class Within(nnx.Module):
    """A solver layer, called within some transform."""

    def __init__(self, call, rngs):
        self.inner = ss.nnx.SolverLinear(3, 3, solver=ONE, rngs=rngs)
        self.call = call

    def __call__(self, x):
        return self.call(self.inner, x)


def same(layer, x):
    return layer(x)


def test_transforms_that_keep_the_records():
    def call(layer, x):
        x = nnx.remat(same)(layer, x)
        return nnx.cond(True, lambda m, x: m(2 * x), same, layer, x)

    x = jnp.ones((2, 3))
    model = Within(call, nnx.Rngs(0))
    rows = ss.certify(model, x).rows
    assert [row.name for row in rows] == ["inner", "inner"]
    for row in rows:
        solution = model.inner.solve(x, certify=True)
        np.testing.assert_allclose(row.gap_max, np.max(solution.certificate), rtol=1e-4, atol=1e-6)
        x = 2 * solution.value


DROPPING = {
    "cond": lambda m, x: nnx.cond(True, same, lambda m, x: x, m, x),
    "loop": lambda m, x: nnx.fori_loop(0, 2, lambda i, c: (c[0], c[0](c[1])), (m, x))[1],
    "one layer for all steps": lambda m, x: nnx.scan(
        lambda x, m: m(x), in_axes=(nnx.Carry, None), out_axes=nnx.Carry, length=2
    )(x, m),
    "one layer for all rows": lambda m, x: nnx.vmap(same, in_axes=(None, 0))(m, x),
    "jax.vmap": lambda m, x: jax.vmap(m)(x),
    "jax.lax.scan": lambda m, x: jax.lax.scan(lambda x, _: (m(x), None), x, None, length=2)[0],
}


@pytest.mark.parametrize("call", DROPPING.values(), ids=DROPPING.keys())
def test_no_solver_layer_is_dropped_in_silence(call):
    with pytest.raises(ValueError, match=r"transform around the solver layer 'inner': expected"):
        ss.certify(Within(call, nnx.Rngs(0)), jnp.ones((2, 3)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return ss.linen.SolverDense(3, solver=ONE, name="inner")(x), None


class LinenWithin(nn.Module):
    """A solver layer within a transform that lifts these collections."""

    transform: str
    axes: tuple[str, ...] = ("params",)

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": dict.fromkeys(self.axes, 0), "split_rngs": {"params": True}}
        if self.transform == "scan":
            return nn.scan(LinenBlock, length=2, **options)(name="block")(x, None)[0]
        if self.transform == "vmap":
            layer = nn.vmap(ss.linen.SolverDense, in_axes=None, axis_size=2, **options)
            return layer(3, solver=ONE, name="inner")(x)
        layer = ss.linen.SolverDense(3, solver=ONE, name="inner")
        if self.transform == "jax.vmap" and not self.is_initializing():
            return jax.vmap(layer)(x)
        if self.transform == "cond" and not self.is_initializing():
            return nn.cond(True, lambda m, x: layer(x), lambda m, x: x, self, x)
        return layer(x)


@pytest.mark.parametrize("transform", ["scan", "vmap"])
def test_linen_layers_of_a_stack_have_rows_where_their_records_are_lifted(transform):
    x = jnp.ones((2, 3))
    model = LinenWithin(transform)
    variables = model.init(jax.random.key(0), x)
    wanted = r"inner': expected one that lifts \"solver_records\".*variable_axes"
    with pytest.raises(ValueError, match=wanted):
        ss.certify(model, variables, x)
    rows = ss.certify(LinenWithin(transform, ("params", "solver_records")), variables, x).rows
    name = {"scan": "block/inner", "vmap": "inner"}[transform]
    assert [row.name for row in rows] == [f"{name}[0]", f"{name}[1]"]
    (kernels,) = (leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 3)
    norms = [np.linalg.norm(kernel, 2) ** 2 for kernel in np.asarray(kernels)]
    np.testing.assert_allclose([row.lipschitz for row in rows], norms, rtol=1e-3)


@pytest.mark.parametrize("transform", ["jax.vmap", "cond"])
def test_no_linen_solver_layer_is_dropped_in_silence(transform):
    model, x = LinenWithin(transform), jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"transform around the solver layer 'inner': expected"):
        ss.certify(model, variables, x)


def test_a_bound_linen_module_is_refused():
    layer = ss.linen.SolverDense(3, solver=ONE)
    bound = layer.bind(layer.init(jax.random.key(0), jnp.ones((1, 3))))
    with pytest.raises(ValueError, match=r"variables: expected the collections that init returns"):
        ss.certify(bound, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"variables: expected the collections that init returns"):
        ss.lipschitz_report(bound, (1, 3), (1, 3))


class LinenNet(nn.Module):
    prior: ss.Prior = ss.prox.NonNegative()

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2, name="stem")(x))
        x = nn.BatchNorm(use_running_average=deterministic, name="norm")(x)
        x = nn.relu(nn.Dense(6, name="dense")(x.reshape(len(x), -1)))
        last = ss.linen.SolverDense(
            6, solver=ss.ProxSG(0.5, 4), prior=self.prior, ridge=0.1, name="last"
        )
        return last(last(x, deterministic=deterministic), deterministic=deterministic)


@pytest.mark.parametrize("prior", [ss.prox.NonNegative(), ss.prox.L1(jnp.asarray([0.1] * 6))])
def test_linen_certificates(images, prior):
    model = LinenNet(prior)
    variables = model.init(jax.random.key(0), images)
    assert set(variables) == {"params", "batch_stats", "solver_state"}
    report = ss.certify(model, variables, images, deterministic=True)
    assert [row.name for row in report.rows] == ["last", "last"]
    _, state = model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])
    x = nn.relu(state["intermediates"]["dense"]["__call__"][0])
    layer = ss.linen.SolverDense(6, solver=ss.ProxSG(0.5, 4), prior=prior, ridge=0.1)
    own = {"params": variables["params"]["last"]}
    for row in report.rows:
        solution = layer.apply(own, x, deterministic=True, method="solve", certify=True)
        np.testing.assert_allclose(row.gap_max, np.max(solution.certificate), rtol=1e-3, atol=1e-6)
        x = solution.value
    if prior == ss.prox.NonNegative():  # of a key, nothing is sampled
        keys = {"dropout": jax.random.key(1)}
        drawn = ss.linen.certify(model, variables, images, rngs=keys, deterministic=True)
        assert drawn.rows == report.rows


class Plain(nnx.Module):
    def __init__(self, rngs, padding="CIRCULAR"):
        self.conv = nnx.Conv(
            2, 4, (3, 3), strides=2, padding=padding, feature_group_count=2, rngs=rngs
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(16, 5, rngs=rngs)
        self.unused = nnx.Linear(3, 3, rngs=rngs)
        self.norm.var[...] = jnp.asarray([0.2, 1.0, 4.0, 0.5], jnp.float32)
        self.norm.scale[...] = jnp.asarray([-1.5, 0.3, 1.0, 0.2], jnp.float32)

    def __call__(self, x):
        x = nnx.relu(nnx.jit(lambda norm, x: norm(x))(self.norm, self.conv(x)))
        return self.head(x.reshape(len(x), -1))


@pytest.mark.parametrize("padding", ["CIRCULAR", "SAME"])
def test_norms_and_their_product_are_those_of_dense_matrices(padding):
    model = Plain(nnx.Rngs(0), padding)
    before = snapshot(model)
    report = ss.nnx.lipschitz_report(model, (7, 4, 4, 2))
    assert_unchanged(model, before)
    assert [row.name for row in report.rows] == ["conv", "norm", "head"]
    assert [row.input_shape for row in report.rows] == [(7, 4, 4, 2), (7, 2, 2, 4), (7, 16)]
    bias = model.conv(jnp.zeros((1, 4, 4, 2)))
    conv = dense_norm(lambda x: model.conv(x) - bias, (4, 4, 2))
    norm = 1.5 / np.sqrt(0.2 + 1e-5)
    head = np.linalg.norm(np.asarray(model.head.kernel[...]), 2)
    np.testing.assert_allclose([row.upper for row in report.rows], [conv, norm, head], rtol=1e-3)
    np.testing.assert_allclose([row.lower for row in report.rows], [conv, norm, head], rtol=1e-3)
    assert report.rows[0].lower <= conv * (1 + 1e-6)
    assert conv * (1 - 1e-6) <= report.rows[0].upper
    # the normalisation and the convolution before it as one map
    at_zero = model.norm(model.conv(jnp.zeros((1, 4, 4, 2))), use_running_average=True)
    folded = dense_norm(
        lambda x: model.norm(model.conv(x), use_running_average=True) - at_zero, (4, 4, 2)
    )
    assert folded < conv * norm
    np.testing.assert_allclose(report.bound, folded * head, rtol=2e-3)
    assert report.bound >= folded * head * (1 - 1e-6)
    assert report.between == ("relu",)
    assert report.factor == 1.0
    assert "of which 1 between the layers: relu" in str(report)
    assert report == ss.nnx.lipschitz_report(model, (7, 4, 4, 2))  # inner traces are cached


def test_what_has_no_bound_is_named(rng):
    norms = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3,), rngs=norms),
        nnx.LayerNorm(4, rngs=norms),
        nnx.SpectralNorm(nnx.Linear(4, 4, rngs=norms), rngs=norms),
        nnx.gelu,
        jnp.exp,
        nnx.Linear(4, 2, rngs=norms),
    )
    report = ss.nnx.lipschitz_report(model, (1, 10, 3))
    missing = [row.name for row in report.rows if row.note == "not bounded"]
    assert missing == ["layers.2.layer_instance"]
    assert report.bound == np.inf
    assert "tanh" in report.between  # of the GELU, whose constant is known
    assert report.unknown == ("exp",)
    assert "No Lipschitz bound" in str(report)


class Between(nnx.Module):
    """Two dense layers and a function between them."""

    def __init__(self, function):
        self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
        self.function = function

    def __call__(self, x):
        return self.last(self.function(self.first(x)))


def test_operations_between_the_layers_count_with_their_constants(rng):
    points = rng.normal(size=(2, 2000, 4)) * 2
    points[1, 1000:] = points[0, 1000:] + 1e-4 * rng.normal(size=(1000, 4))  # slopes
    for function in [
        lambda x: 3 * nnx.relu(x) / 2 + 1,
        lambda x: x + jnp.tanh(x),
        lambda x: jnp.concatenate([x[..., :2], 2 * x[..., :2]], -1),
        lambda x: jnp.clip(x, -1, 1).mean(-1, keepdims=True).repeat(4, -1),
        lambda x: nnx.avg_pool(x[..., None], (3,), (1,), "SAME").squeeze(-1),
        lambda x: nnx.max_pool(x[..., None], (3,), (1,), "SAME").squeeze(-1),
        lambda x: nnx.leaky_relu(x, 2.0),
        nnx.elu, nnx.selu, nnx.celu, nnx.silu, nnx.softplus, nnx.hard_tanh, nnx.sigmoid,
    ]:  # fmt: skip
        report = ss.lipschitz_report(Between(function), (1, 4))
        x, y = jnp.asarray(points)
        moved = np.linalg.norm(function(x) - function(y), axis=-1)
        steepest = np.max(moved / np.linalg.norm(x - y, axis=-1))
        assert np.isfinite(report.factor), report.unknown
        assert steepest <= report.factor * (1 + 1e-5)
        assert report.factor <= 4 * steepest  # nor is it vacuous
        assert report.unknown == ()
        np.testing.assert_allclose(report.bound, report.factor * report.product)


def test_an_operation_without_a_constant_is_named():
    for function, name in [
        (jnp.sign, "sign"),
        (jnp.exp, "exp"),
        (jnp.square, "square"),
        (lambda x: x * jnp.tanh(x), "mul"),
        (lambda x: jnp.where(x > 0, x, 1.0), "gt"),
        (lambda x: jnp.round(x).astype(int).astype(float), "round"),
        (lambda x: jax.lax.scan(lambda c, _: (jnp.exp(c), None), x, None, length=2)[0], "exp"),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c + 1, x), "while"),
        (lambda x: jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: -x, x), "gt"),
    ]:
        report = ss.lipschitz_report(Between(function), (1, 4))
        assert report.unknown[0] == name
        assert report.bound == np.inf
        assert np.isfinite(report.product)
        assert f"No Lipschitz constant is known of: {name}" in str(report)


def test_an_output_that_ignores_the_input_has_the_bound_zero():
    for function in [jnp.ones_like, lambda x: 0 * x]:
        report = ss.lipschitz_report(Between(function), (1, 4))
        assert report.bound == 0
        assert "0, its output does not depend on the input" in str(report)


def test_a_norm_is_one_number_only_where_both_bounds_show_it():
    for lower, shown in [(1.999, "[1.999, 2]"), (1.99999, " 2 ")]:
        row = reports.LayerNorm("a", "Conv", (1,), lower, 2.0, 2.0, "")
        assert row.is_tight
        assert shown in str(reports.LipschitzReport((row,), (), 1.0, ()))


def test_norms_of_one_structure_are_one_program(caplog):
    def network(seed):
        norms = nnx.Rngs(seed)
        return nnx.Sequential(
            nnx.Linear(7, 5, rngs=norms),
            nnx.BatchNorm(5, rngs=norms),
            ss.nnx.SolverLinear(5, 3, solver=ss.ProxGD(3), rngs=norms),
            nnx.Linear(3, 3, rngs=norms),
        )

    one, two = network(0), network(1)
    compiled = []
    for model in (one, two):
        caplog.clear()
        with jax.log_compiles():
            report = ss.lipschitz_report(model, (1, 7))
        messages = [r.getMessage() for r in caplog.records]
        compiled.append([m for m in messages if m.startswith("Compiling ")])
        assert len(report.rows) == 4
    assert [len(messages) for messages in compiled] == [1, 0]
    assert "_measure" in compiled[0][0]


def test_layers_without_a_norm_are_named_in_both_interfaces():
    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.wide = nnx.ConvTranspose(4, 4, (3,), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.gain = nnx.Param(jnp.ones((1, 1, 4)))
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.gain * self.norm(self.wide(self.attention(self.embed(x)))))

    report = ss.lipschitz_report(Mixed(nnx.Rngs(0)), (2, 5), dtype=jnp.int32)
    missing = {row.name for row in report.rows if row.note == "not bounded"}
    parts = {f"attention.{part}" for part in ("query", "key", "value", "out")}
    assert missing == {"embed", "(model)"}
    assert {row.name for row in report.rows} - missing == {"wide", "norm", "head"} | parts
    assert [row.note != "" for row in report.rows if row.name in parts] == [True] * 3 + [False]
    assert report.bound == np.inf

    class Twin(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(7, 4, name="embed")(x)
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            x = nn.ConvTranspose(4, (3,), name="wide")(x)
            x = nn.BatchNorm(use_running_average=True, name="norm")(x)
            return nn.Dense(2, name="head")(x * self.param("gain", nn.initializers.ones, (1, 1, 4)))

    model = Twin()
    variables = model.init(jax.random.key(0), jnp.zeros((2, 5), int))
    report = ss.lipschitz_report(model, variables, (2, 5), dtype=jnp.int32)
    missing = {row.name for row in report.rows if row.note == "not bounded"}
    assert missing == {"embed", "(model)"}
    parts = {part.replace(".", "/") for part in parts}
    assert {row.name for row in report.rows} - missing == {"wide", "norm", "head"} | parts


def test_residual_connections_are_found(rng):
    first, second = (nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(i)) for i in (0, 1))
    block = ss.nnx.SolverResNetBlock(first, second, solver=ONE)
    stem = nnx.Conv(2, 2, (1, 1), rngs=nnx.Rngs(2))
    report = ss.nnx.lipschitz_report(nnx.Sequential(stem, block), (1, 4, 4, 2))
    notes = [row.note for row in report.rows]
    # the skip goes around the first solver, and enters the second beside its input
    assert notes == ["", "on one of several paths", "on one of several paths"]
    assert np.isfinite(report.product)
    stem_norm, one, two = (row.constant for row in report.rows)
    np.testing.assert_allclose(report.bound, stem_norm * (1 + one * two), rtol=1e-6)

    def network(x):
        return block(stem(x.reshape(1, 4, 4, 2)))

    for x in rng.normal(size=(3, 32)):
        jacobian = np.asarray(jax.jacobian(network)(jnp.asarray(x, jnp.float32))).reshape(-1, 32)
        assert np.linalg.norm(jacobian, 2) <= report.bound


def test_constant_of_a_solver_bounds_its_differences(rng):
    solver = ss.ProxGD(7)
    layer = ss.nnx.SolverLinear(
        6, 9, solver=solver, prior=ss.prox.Zero(), ridge=0.05, rngs=nnx.Rngs(0)
    )
    (row,) = ss.nnx.lipschitz_report(layer, (1, 6)).rows
    # with the zero prior z_K is linear in x: Σ_j (I − ηH)^j η Kᵀx
    kernel = np.asarray(layer.kernel[...], np.float64)
    hessian = kernel.T @ kernel + 0.05 * np.eye(9)
    step = 1 / np.linalg.norm(hessian, 2)
    powers = [np.linalg.matrix_power(np.eye(9) - step * hessian, j) for j in range(7)]
    true = np.linalg.norm(sum(powers) @ (step * kernel.T), 2)
    assert true <= row.constant
    norm = np.linalg.norm(kernel, 2)
    ell = 0.0
    for _ in range(7):
        ell = (1 - step * 0.05) * ell + step * norm
    np.testing.assert_allclose(row.constant, ell, rtol=1e-3)
    (unit,) = ss.nnx.lipschitz_report(
        ss.nnx.SolverLinear(6, 9, solver=ONE, rngs=nnx.Rngs(0)), (1, 6)
    ).rows
    np.testing.assert_allclose(unit.constant, unit.upper, rtol=1e-4)
    fista = ss.nnx.SolverLinear(6, 9, solver=ss.ProxGD(7, momentum=True), rngs=nnx.Rngs(0))
    (free,) = ss.nnx.lipschitz_report(fista, (1, 6)).rows
    assert free.constant == np.inf
    assert np.isfinite(free.upper)


def test_linen_report_has_the_norms_of_the_same_layers(images):
    model = LinenNet()
    variables = model.init(jax.random.key(0), images)
    report = ss.linen.lipschitz_report(model, variables, images.shape)
    assert [row.name for row in report.rows] == ["stem", "norm", "dense", "last", "last"]
    params = variables["params"]
    stem = nn.Conv(3, (3, 3), strides=2, use_bias=False)
    kernel = {"params": {"kernel": params["stem"]["kernel"]}}
    want = [dense_norm(lambda x: stem.apply(kernel, x), images.shape[1:]), 1 / np.sqrt(1 + 1e-5)]
    want += [np.linalg.norm(params[name]["kernel"], 2) for name in ("dense", "last", "last")]
    np.testing.assert_allclose([row.upper for row in report.rows], want, rtol=1e-3)
    assert np.isfinite(report.bound)
    # statistics of the batch have no bound
    training = ss.linen.lipschitz_report(
        model, variables, images.shape, rngs={"dropout": jax.random.key(0)}, deterministic=False
    )
    assert next(row.name for row in training.rows if row.note == "not bounded") == "norm"
    assert training.bound == np.inf


def test_dispatch_and_its_refusal():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    assert reports.lipschitz_report(layer, (1, 3)).rows[0].name == "(model)"
    plain = nn.Dense(2)
    variables = plain.init(jax.random.key(0), jnp.ones((1, 3)))
    assert reports.lipschitz_report(plain, variables, (1, 3)).rows[0].kind == "Dense"
    for report in (ss.lipschitz_report, ss.certify):
        with pytest.raises(ValueError, match=r"model: expected an nnx\.Module or a linen\.Module"):
            report(jnp.ones(3))


def test_lenet_report_and_chart(monkeypatch):
    network = LeNet(LeNetConfig(block=BlockConfig("prox-sg")), rngs=nnx.Rngs(0, dropout=1))
    report = ss.nnx.lipschitz_report(network, (1, *LeNetConfig().image_shape))
    assert len(report.rows) == 5
    assert np.isfinite(report.bound)
    axes = report.plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == [r.name for r in report.rows]
    np.testing.assert_allclose(
        [b.get_width() for b in axes.patches], [r.upper for r in report.rows]
    )
    import matplotlib.pyplot as plt

    plt.close(axes.figure)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install"):
        report.plot()


SEVERAL_LAYERS = """
from flax import nnx
import stochsolvers as ss
from experiments.networks import BlockConfig, LeNet, LeNetConfig
model = LeNet(LeNetConfig(block=BlockConfig("prox-sg")), rngs=nnx.Rngs(0, dropout=1))
for _ in range(10):
    ss.lipschitz_report(model, (1, 32, 32, 3))
"""


def test_layers_of_one_report_do_not_wait_for_each_others_threads(quick_environment):
    # with XLA's threads on, which conftest turns off
    run = [sys.executable, "-c", SEVERAL_LAYERS]
    subprocess.run(run, env=quick_environment, check=True, timeout=240)


def factor_of(function, shape=(1, 4), dtype=None):
    return ss.lipschitz_report(Function(function), shape, dtype=dtype).factor


class Function(nnx.Module):
    """A network without layers."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def points(rng, shape, count):
    """Pairs of random points, near ones and far ones."""
    x = 2 * rng.normal(size=(count, *shape))
    scales = np.reshape(10.0 ** rng.uniform(-4, 0, count), (count, *(1 for _ in shape)))
    return x, x + scales * rng.normal(size=x.shape) * (rng.random(x.shape) < 0.5)


def stacked(x, y):
    return jnp.asarray(np.concatenate([x, y]))


def largest_quotient(values, x, y):
    """The largest difference quotient of the values at `stacked(x, y)`."""
    values, count = np.reshape(values, (2, len(x), -1)), len(x)
    moved = np.linalg.norm(values[0] - values[1], axis=-1)
    distance = np.linalg.norm((x - y).reshape(count, -1), axis=-1)
    return np.max(moved[distance > 0] / distance[distance > 0])


def steepest(function, rng, shape, count=400):
    """The largest difference quotient at random points."""
    at = points(rng, shape, count)
    return largest_quotient(jax.vmap(function)(stacked(*at)), *at)


def named(name, function):
    """A jitted function of that name."""
    function.__name__ = function.__qualname__ = name
    return jax.jit(function)


TRUSTED_NAMES = ["softplus", "soft_sign", "log_sigmoid", "celu", "silu", "leaky_relu", "hard_tanh"]
TRUSTED_NAMES += ["elu", "selu", "relu", "relu6", "_where", "clip"]


@pytest.mark.parametrize("name", TRUSTED_NAMES)
def test_a_name_proves_nothing(name, rng):
    for function, slope in [
        (lambda x: 5 * jnp.tanh(x), 5.0),  # the right constant, by its program
        (lambda x: jax.nn.softplus(5 * x), 5.0),
        (lambda x: jnp.expm1(x), np.inf),
        (lambda x: jnp.where(x > 0, x, 1.0), np.inf),  # jumps
        (lambda x: jnp.where(x > 0, x, jnp.expm1(3 * x)), np.inf),  # an ELU of other numbers
        (lambda x: jnp.where(x > 0, x, jnp.expm1(-x)), np.inf),
        (lambda x: jnp.where(x > 0.5, x, jnp.where(x > 0, 0.0, x) * 0.1), np.inf),
        (lambda x: jnp.where(x > 2.0, 2.0, jnp.where(x < -1.0, -1.0, x)), np.inf),
    ]:
        jitted = named(name, function)
        for wrapped in (jitted, jax.vmap(jitted), jax.jit(jitted), nnx.remat(jitted)):
            report = ss.lipschitz_report(Between(wrapped), (1, 4))
            np.testing.assert_allclose(report.factor, slope)
            assert bool(report.unknown) == np.isinf(slope)


def test_a_function_within_an_activation_of_that_name_is_not_excused():
    jump = jax.jit(lambda x: jnp.where(x > 0, x, 1.0))
    for name in TRUSTED_NAMES:
        assert factor_of(named(name, lambda x: jnp.maximum(jump(x), 0.0))) == np.inf


ACTIVATIONS = {
    "softplus": jax.nn.softplus, "soft_sign": jax.nn.soft_sign, "silu": jax.nn.silu,
    "log_sigmoid": jax.nn.log_sigmoid, "hard_tanh": jax.nn.hard_tanh, "mish": jax.nn.mish,
    "sparse_plus": jax.nn.sparse_plus, "hard_silu": jax.nn.hard_silu, "celu": jax.nn.celu,
    "elu": jax.nn.elu, "selu": jax.nn.selu, "leaky_relu": jax.nn.leaky_relu,
    "squareplus": jax.nn.squareplus, "relu6": jax.nn.relu6, "sigmoid": jax.nn.sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid, "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "elu(2.5)": lambda x: jax.nn.elu(x, 2.5), "elu(-2)": lambda x: jax.nn.elu(x, -2.0),
    "celu(.3)": lambda x: jax.nn.celu(x, 0.3), "leaky(-3)": lambda x: jax.nn.leaky_relu(x, -3),
    "squareplus(0)": lambda x: jax.nn.squareplus(x, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_jax_are_recognised_within_transformations(name, rng):
    function = ACTIVATIONS[name]
    slope = steepest(function, rng, (4,), 4000)
    for wrapped in [
        function,
        jax.jit(function),
        jax.vmap(function),
        lambda x: jax.vmap(jax.vmap(function, in_axes=1, out_axes=1))(x[None]),
        jax.vmap(function, in_axes=1),
        nnx.remat(function),
        jax.jit(lambda x: function(x.T).T),
    ]:
        for dtype in (jnp.float32, jnp.float64, jnp.bfloat16):
            factor = factor_of(wrapped, (1, 4), dtype)
            rounding = max(1e-6, 2 * float(jnp.finfo(dtype).eps))  # of the function's own numbers
            assert slope * (1 - rounding) <= factor <= 2.5 * slope
    # of a value that is a function of the input itself
    chained = factor_of(jax.jit(lambda x: function(3 * jnp.sin(x))))
    np.testing.assert_allclose(chained, 3 * factor, rtol=0.01)  # the last was in bfloat16


def test_an_activation_without_a_slope_has_none():
    for function in [
        lambda x: jax.nn.celu(x, -1.0),  # grows like exp
        lambda x: jax.nn.squareplus(x, -1.0),
        lambda x: jax.nn.leaky_relu(x, np.nan),
        lambda x: jax.nn.elu(x, jnp.sum(x)),
        jax.jit(lambda x: jax.nn.elu(x[:1], x[-1][None])),
        lambda x: jax.nn.celu(x, jnp.where(jnp.arange(4) == 1, -1.0, 1.0).reshape(x.shape)),
    ]:
        assert factor_of(function) == np.inf


def test_rounding_and_integers_have_no_constant():
    floats = [
        lambda x: jax.lax.reduce_precision(x, 8, 2),
        lambda x: x.astype(jnp.float8_e4m3fn).astype(float),
        lambda x: x * np.nan,
        lambda x: jnp.real(x * 1j),
        lambda x: jnp.abs(jnp.sin(x + 1j)),
        lambda x: jnp.argsort(x).astype(float),
        lambda x: jnp.cumprod(x),
        lambda x: x[jnp.argsort(x[0])[0] % 1],
    ]
    for function in floats:
        assert factor_of(function) == np.inf
    two = np.uint8(2)
    integers = [lambda x: jax.lax.div(x, two), lambda x: x - two, lambda x: -x, lambda x: two * x]
    for function in integers:  # 2 / 2 − 1 / 2 is 1, and 0 − 1 is 255
        assert factor_of(function, (1, 4), jnp.uint8) == np.inf
    assert factor_of(lambda x: x / 2, (1, 4), jnp.uint8) == 0.5
    assert factor_of(lambda x: jax.lax.reduce_precision(x, 8, 23), dtype=jnp.float32) == 1


def test_a_result_that_is_returned_twice_counts_twice():
    np.testing.assert_allclose(factor_of(lambda x: (x, x)), np.sqrt(2))


_JITTED = {name: named(name, lambda x: 5 * jax.nn.softplus(2 * x) - 1) for name in TRUSTED_NAMES}
PIECES = [
    *ACTIVATIONS.values(),
    *_JITTED.values(),
    lambda x: x[..., ::-1],
    lambda x: x.T,
    lambda x: x.reshape(x.shape[::-1]),
    lambda x: jnp.concatenate([x, -0.5 * x[:1]]),
    lambda x: jnp.concatenate([x, x], -1),
    lambda x: jnp.pad(x, ((1, 0), (0, 1))),
    lambda x: jnp.maximum(x, x[:1]),
    lambda x: jnp.minimum(jnp.maximum(x, jnp.cos(x)), x[:, :1]),
    lambda x: x + x[:1],
    lambda x: x - jnp.mean(x, axis=-1, keepdims=True),
    lambda x: jnp.broadcast_to(x.sum(0), x.shape),
    lambda x: jnp.where(np.eye(*x.shape) > 0, x, -2 * x),
    lambda x: jnp.stack([x[0], jnp.max(x, axis=0)]),
    lambda x: jnp.clip(x, -0.3, 0.8) / -0.5,
    lambda x: sum(jnp.split(x, [1])[:1]) + x,
    lambda x: nnx.max_pool(x[..., None], (2,), (1,), "SAME")[..., 0],
    lambda x: jnp.maximum(
        jax.lax.reduce_window(
            x, -np.inf, jax.lax.max, (1, 2), (1, 1), ((0, 0), (2, 2)), (1, 2), (1, 3)
        ),
        -9.0,
    ),
    lambda x: jax.lax.reduce_window(
        x, 0.0, jax.lax.add, (2, 2), (1, 1), ((1, 1), (2, 2)), (2, 1), (1, 2)
    ),
    lambda x: nnx.avg_pool(x[..., None], (2,), (2,), "SAME")[..., 0],
    lambda x: jax.lax.dynamic_slice(x, (0, 0), (1, x.shape[1])),
    lambda x: jnp.where(x[:1] > 0, x, 0.0),
    lambda x: jnp.where(jnp.sum(x) > 0, x, -x),
    lambda x: jnp.where(x > 0, x, x[:1]),
    lambda x: x * jnp.tanh(x),
    lambda x: x * x[0, 0],
    lambda x: x * np.arange(1.0, 1 + x.size).reshape(x.shape),
    lambda x: x @ np.full((x.shape[1], 3), 2.0),
    lambda x: jnp.take(x, np.asarray([0, 0]), axis=0),
    lambda x: jnp.cumsum(x, axis=-1),
    lambda x: jnp.roll(x, 1, axis=-1),
]  # fmt: skip
WRAPPERS = [
    lambda f: f,
    jax.jit,
    nnx.remat,
    jax.checkpoint,
    lambda f: lambda x: jax.vmap(lambda row: f(row[None])[0])(x),
    lambda f: lambda x: jax.vmap(lambda row: f(row[None])[0], in_axes=1, out_axes=1)(x),
    lambda f: jax.jit(lambda x: f(jnp.tanh(x))),
]


def test_random_compositions_stay_below_their_constants(rng):
    shape, found = (2, 3), []
    for _ in range(150):
        pieces = [
            WRAPPERS[rng.integers(len(WRAPPERS))](PIECES[rng.integers(len(PIECES))])
            for _ in range(rng.integers(1, 4))
        ]

        def compose(x, pieces=tuple(pieces)):
            for piece in pieces:
                x = piece(x)
            return x

        factor = factor_of(compose, shape, jnp.float64)
        if np.isfinite(factor):
            found.append((compose, factor))
    assert len(found) > 50
    at = points(rng, shape, 400)
    every = jax.jit(lambda x: [jax.vmap(function)(x) for function, _ in found])(stacked(*at))
    for k, ((_, factor), values) in enumerate(zip(found, every, strict=True)):
        assert largest_quotient(values, *at) <= factor * (1 + 1e-6), k


def test_a_layer_that_computes_something_else_is_not_bounded_by_its_kernel():
    def tenfold(*args, **options):
        return 10 * jax.lax.dot_general(*args, **options)

    class Steep(ss.nnx.SolverLinear):
        def problem(self, inputs, **options):
            return super().problem(10 * inputs, **options)

    class Replaced(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.layer.kernel.set_value(100 * jnp.eye(3))
            return self.layer(x)

    class Own(nnx.Linear):
        """Another constructor and another method, but the same map."""

        def __init__(self, rngs):
            super().__init__(3, 3, rngs=rngs)

        def reset(self):
            self.kernel[...] = jnp.zeros((3, 3))

    class Narrow(nnx.Module):
        """A normalisation by other statistics than those that it keeps."""

        def __init__(self, of_the_batch):
            self.norm, self.of_the_batch = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), of_the_batch

        def __call__(self, x):
            if self.of_the_batch:
                self.norm.use_running_average = False
            else:
                self.norm.var.set_value(1e-4 * jnp.ones(3))
            return self.norm(x)

    one = nnx.Linear(3, 3, dot_general=tenfold, rngs=nnx.Rngs(0))
    report = ss.lipschitz_report(one, (1, 3))  # bounded by what it computes
    np.testing.assert_allclose(report.bound, 10 * np.linalg.norm(one.kernel[...], 2), rtol=1e-5)
    assert [row.note for row in report.rows] == ["counted between the layers"]
    steep = Steep(3, 3, solver=ONE, rngs=nnx.Rngs(0))
    report = ss.lipschitz_report(steep, (1, 3))
    assert [row.upper for row in report.rows] == [np.inf]
    assert report.bound >= 10 * np.linalg.norm(steep.kernel[...], 2) * (1 - 1e-5)
    for model in [
        Replaced(),
        Narrow(True),
        Narrow(False),
    ]:
        assert ss.lipschitz_report(model, (1, 3)).bound == np.inf
    own = ss.lipschitz_report(Own(nnx.Rngs(0)), (1, 3))
    np.testing.assert_allclose(
        own.bound, np.linalg.norm(Own(nnx.Rngs(0)).kernel[...], 2), rtol=1e-5
    )

    class SteepDense(ss.linen.SolverDense):
        def assembled(self, inputs):
            return super().assembled(10 * inputs)

    class Shifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            def steep(_):
                return {"params": {"kernel": 100 * jnp.eye(3), "bias": jnp.zeros(3)}}

            mapped = nn.map_variables(nn.Dense, "params", steep, init=self.is_initializing())
            return mapped(3, name="dense")(x)

    variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 3)))
    kernel = variables["params"]["kernel"]
    bound = ss.lipschitz_report(nn.Dense(3, dot_general=tenfold), variables, (1, 3)).bound
    np.testing.assert_allclose(bound, 10 * np.linalg.norm(kernel, 2), rtol=1e-5)
    report = ss.lipschitz_report(SteepDense(3, solver=ONE), variables, (1, 3))
    assert all(row.upper == np.inf for row in report.rows)
    assert report.bound >= 10 * np.linalg.norm(kernel, 2) * (1 - 1e-5)
    nested = {"params": {"dense": variables["params"]}}
    assert ss.lipschitz_report(Shifted(), nested, (1, 3)).bound == np.inf


def test_a_layer_within_vmap_has_the_shape_that_it_sees():
    class Mapped(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):  # examples along the last axis
            return jax.vmap(self.conv, in_axes=-1, out_axes=-1)(x)

    model = Mapped()
    report = ss.lipschitz_report(model, (5, 4, 2, 2))
    bias = model(jnp.zeros((5, 4, 2, 1)))
    want = dense_norm(lambda x: model(x[0][..., None]) - bias, (5, 4, 2))
    assert report.rows[0].input_shape == (5, 4, 2)
    assert want * (1 - 1e-6) <= report.bound <= want * 1.01

    @nnx.vmap
    def stacked(seed):
        return nnx.Linear(3, 3, rngs=nnx.Rngs(params=seed))

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = stacked(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x))(self.layers, x)

    assert ss.lipschitz_report(Stack(), (3, 1, 3)).bound == np.inf

    for axes in [{"params": 0}, {"params": None}]:

        class Lifted(nn.Module):
            axes: Any

            @nn.compact
            def __call__(self, x):
                split = {"params": self.axes["params"] == 0}
                conv = nn.vmap(nn.Conv, self.axes, split, in_axes=-1, out_axes=-1)
                return conv(2, (3, 3), use_bias=False, name="conv")(x)

        module = Lifted(axes)
        variables = module.init(jax.random.key(0), jnp.ones((1, 5, 4, 2, 2)))
        report = ss.lipschitz_report(module, variables, (1, 5, 4, 2, 2))
        one = np.inf  # kernels of their own
        if axes["params"] is None:
            apply = functools.partial(module.apply, variables)
            one = dense_norm(lambda x, apply=apply: apply(x[..., None]), (5, 4, 2))
        assert one * (1 - 1e-6) <= report.bound
        assert report.bound <= one * 1.01


def test_a_layer_with_a_rewritten_kernel_has_one_row_in_both_interfaces():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.SpectralNorm(nn.Dense(4, name="first"))(x, update_stats=False)
            return nn.WeightNorm(nn.Dense(3, name="second"))(x)

    class SetUp(nn.Module):
        def setup(self):
            self.first = nn.SpectralNorm(nn.Dense(4))
            self.second = nn.WeightNorm(nn.Dense(3))

        def __call__(self, x):
            return self.second(self.first(x, update_stats=False))

    for module, names in [
        (Named(), ["first", "second"]),
        (SetUp(), ["first/layer_instance", "second/layer_instance"]),
    ]:
        variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
        report = ss.lipschitz_report(module, variables, (1, 4))
        assert [row.name for row in report.rows] == names
        assert all(row.note == "counted between the layers" for row in report.rows)
        norm = np.linalg.norm(matrix_of(functools.partial(module.apply, variables), (4,)), 2)
        assert norm * (1 - 1e-6) <= report.bound <= 4 * norm
    norms = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.SpectralNorm(nnx.Linear(4, 4, rngs=norms), rngs=norms),
        nnx.WeightNorm(nnx.Linear(4, 3, rngs=norms), rngs=norms),
    )
    report = ss.lipschitz_report(model, (1, 4))
    assert [row.name for row in report.rows] == [f"layers.{i}.layer_instance" for i in (0, 1)]


def test_parameters_in_a_container_are_those_of_its_module():
    class Scaled(nnx.Module):
        def __init__(self):
            self.gains = nnx.data({"first": nnx.Param(jnp.ones((1, 4)))})

        def __call__(self, x):
            return x * self.gains["first"][...]

    report = ss.lipschitz_report(nnx.Sequential(Scaled(), jnp.tanh), (1, 4))
    assert [(row.name, row.kind) for row in report.rows] == [("layers.0", "Scaled")]
    assert report.bound == 1.0  # the largest of its numbers


def test_partitioned_parameters_are_arrays():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "x"))
    module = nn.Sequential([nn.Dense(4, kernel_init=kernel_init), jnp.tanh])
    variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    kernel = nn.unbox(variables)["params"]["layers_0"]["kernel"]
    report = ss.lipschitz_report(module, variables, (1, 3))
    np.testing.assert_allclose(report.bound, np.linalg.norm(kernel, 2), rtol=1e-4)


def test_layers_that_share_their_output_are_told_apart():
    class Branches(nnx.Module):
        def __init__(self, rngs):
            self.stem, self.left, self.right, self.head = (
                nnx.Linear(4, 4, rngs=rngs) for _ in range(4)
            )

        def __call__(self, x):
            x = self.stem(x)
            y = nnx.relu(self.left(x)) + nnx.tanh(self.right(x))
            return self.head(jnp.concatenate([y[..., :2], y[..., 2:]], -1) / 2)

    report = ss.lipschitz_report(Branches(nnx.Rngs(0)), (1, 4))
    bypassed = {row.name: row.note for row in report.rows}
    assert bypassed == {
        "stem": "", "left": "on one of several paths", "right": "on one of several paths", "head": "",
    }  # fmt: skip
    np.testing.assert_allclose(report.factor, 2 * np.sqrt(2) / 2)


class Graph(nnx.Module):
    """Nodes that add what some earlier nodes computed; the last one is the output.

    Args:
      parents: of each node but the first, which is the input.
      layered: the nodes that apply a dense layer to their sum.
    """

    def __init__(self, parents, layered):
        self.parents = nnx.static(parents)
        self.layers = nnx.data({i: nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in layered})

    def __call__(self, x):
        values = [x]
        for i, parents in enumerate(self.parents, 1):
            value = sum((values[j] for j in parents[1:]), start=values[parents[0]])
            if i in self.layers:
                value = (nnx.jit if i % 2 else nnx.remat)(lambda f, x: f(x))(self.layers[i], value)
            values.append(value)
        return values[-1]


UNUSED = "the output does not depend on it"


def test_calls_on_every_path_are_those_of_all_enumerated_paths(rng):
    seen = set()
    for _ in range(40):
        nodes = range(1, rng.integers(2, 8))
        parents = tuple(
            tuple(int(j) for j in rng.choice(i, rng.integers(1, min(i, 2) + 1), replace=False))
            for i in nodes
        )
        layered = tuple(i for i in nodes if rng.random() < 0.6)

        def paths(node, parents=parents):
            return [(*p, node) for j in parents[node - 1] for p in paths(j)] if node else [(0,)]

        everywhere = set.intersection(*map(set, paths(len(parents))))
        anywhere = set.union(*map(set, paths(len(parents))))
        report = ss.lipschitz_report(Graph(parents, layered), (1, 2))
        for row in report.rows:
            node = int(row.name.split(".")[-1])
            on_a_path = "on one of several paths" if node in anywhere else UNUSED
            assert row.note == ("" if node in everywhere else on_a_path)
            seen.add(row.note)
        # a sum of sums counts every path once
        assert report.factor == len(paths(len(parents)))
    assert len(seen) == 3


def matrix_of(function, shape):
    """The matrix of an affine function of one example, by numpy."""
    units = np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, *shape)
    columns = [np.asarray(function(jnp.asarray(unit[None])), np.float64).ravel() for unit in units]
    zero = np.asarray(function(jnp.zeros((1, *shape))), np.float64).ravel()
    return np.stack(columns) - zero


OTHER_LAYERS = {
    "1-D": (lambda r: nnx.Conv(3, 4, (3,), rngs=r), lambda: nn.Conv(4, (3,)), (6, 3)),
    "3-D": (
        lambda r: nnx.Conv(2, 3, (2, 3, 2), strides=(1, 2, 1), rngs=r),
        lambda: nn.Conv(3, (2, 3, 2), strides=(1, 2, 1)),
        (3, 4, 3, 2),
    ),
    "grouped": (
        lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, padding="CIRCULAR", rngs=r),
        lambda: nn.Conv(6, (3, 3), feature_group_count=2, padding="CIRCULAR"),
        (4, 3, 4),
    ),
    "transposed": (
        lambda r: nnx.ConvTranspose(3, 2, (3, 2), strides=(2, 1), rngs=r),
        lambda: nn.ConvTranspose(2, (3, 2), strides=(2, 1)),
        (3, 4, 3),
    ),
    "general": (
        lambda r: nnx.LinearGeneral((3, 4), (2, 5), axis=(-2, -1), rngs=r),
        lambda: nn.DenseGeneral((2, 5), axis=(-2, -1)),
        (3, 4),
    ),
    "einsum": (
        lambda r: nnx.Einsum("...gc,gcn->...gn", (2, 3, 4), (2, 4), rngs=r),
        lambda: nn.Einsum((2, 3, 4), "...gc,gcn->...gn"),
        (2, 3),
    ),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_norms_of_other_layers_are_those_of_their_matrices(name):
    make, make_linen, shape = OTHER_LAYERS[name]
    layer, module = make(nnx.Rngs(0)), make_linen()
    variables = module.init(jax.random.key(1), jnp.zeros((1, *shape)))
    for function, report in (
        (layer, ss.lipschitz_report(layer, (2, *shape))),
        (
            lambda x: module.apply(variables, x),
            ss.lipschitz_report(module, variables, (2, *shape)),
        ),
    ):
        norm = np.linalg.norm(matrix_of(function, shape), 2)
        (row,) = report.rows
        assert not row.note
        assert row.lower <= norm * (1 + 1e-5)
        assert row.upper >= norm * (1 - 1e-5)
        np.testing.assert_allclose(row.upper, norm, rtol=2e-3)
        np.testing.assert_allclose(report.bound, row.upper)


def test_an_equation_given_at_the_call_is_not_bounded_as_a_layer():
    class Changed(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Einsum("...c,cn->...n", (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.layer(x, "...c,nc->...n")

    changed = Changed(nnx.Rngs(0))
    report = ss.lipschitz_report(changed, (2, 3))
    assert [row.upper for row in report.rows] == [np.inf]  # not as a layer, but by what it computes
    norm = np.linalg.norm(changed.layer.kernel[...], 2)
    np.testing.assert_allclose(report.bound, norm, rtol=1e-5)
    module = nn.Einsum((3, 3), use_bias=False)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 3)), "...c,cn->...n")
    report = ss.lipschitz_report(module, variables, (2, 3), einsum_str="...c,cn->...n")
    assert [row.upper for row in report.rows] == [np.inf]
    norm = np.linalg.norm(variables["params"]["kernel"], 2)
    np.testing.assert_allclose(report.bound, norm, rtol=1e-5)


def test_a_report_says_why_a_gap_is_infinite(rng):
    x = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)

    def note(**options):
        layer = ss.nnx.SolverLinear(6, 24, **({"solver": ss.ProxGD(5)} | options), rngs=nnx.Rngs(0))
        layer.bias[...] = jnp.ones(24, jnp.float32)
        (row,) = ss.certify(layer, x).rows
        assert str(ss.certify(layer, x)).endswith(f"(model): {row.note}" if row.note else "–")
        return row.note

    assert note(ridge=0.1, solver=ss.ProxGD(5, momentum=True)) == ""
    assert note() == "4 of 4 gaps infinite: no curvature and no dual point found; add a ridge"
    assert "iterates grow at a constant rate; add a ridge" in note(solver=ss.ProxGD(9000, tol=1e-3))
    assert "not finite; take a shorter step" in note(solver=ss.ProxGD(500, step_size=99.0))


def test_certify_says_that_it_is_at_work_if_asked(capsys):
    plain, x = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2))
    ss.certify(plain, x, progress=True)
    shown = capsys.readouterr().err
    assert shown.startswith("\rcertificates of the layers: 0 s")
    assert shown.endswith("\n")
    ss.certify(plain, x)  # to no terminal
    assert not capsys.readouterr().err
