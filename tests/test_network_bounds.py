"""Lipschitz bounds of whole graphs, against norms of dense Jacobians in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import stochsolvers as ss
from benchmarks._networks import LinenResNet, LinenUNet, ResNet, UNet
from stochsolvers.reports import _norms


class Function(nnx.Module):
    """A network without layers."""

    def __init__(self, function):
        self.function = function

    def __call__(self, x):
        return self.function(x)


def report_of(function, shape=(2, 4), **options):
    return ss.lipschitz_report(Function(function), shape, dtype=jnp.float64, **options)


def steepest(function, shape, rng, count=4, scale=1.0, radius=None):
    """The largest norm of the Jacobian at random points."""
    size = int(np.prod(shape))

    def flat(x):
        leaves = jax.tree.leaves(function(x.reshape(shape)))
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    points = scale * rng.normal(size=(count, size))
    if radius is not None:
        points *= radius * rng.uniform(0.3, 1, (count, 1)) / np.linalg.norm(points, axis=1)[:, None]
    jacobians = jax.jit(jax.vmap(jax.jacfwd(flat)))(jnp.asarray(points))
    return max(np.linalg.norm(np.asarray(jacobian), 2) for jacobian in jacobians)


def randomised(module, rng):
    """A model whose normalisations have statistics and scales of their own."""
    for _, one in nnx.iter_modules(module):
        if isinstance(one, nnx.BatchNorm):
            layer: Any = one
            size = layer.mean[...].shape
            layer.mean[...] = jnp.asarray(rng.normal(size=size), jnp.float32)
            layer.var[...] = jnp.asarray(rng.uniform(0.3, 3, size), jnp.float32)
            layer.scale[...] = jnp.asarray(rng.normal(size=size), jnp.float32)
    return module


@pytest.mark.parametrize("make", [ResNet, UNet])
def test_residual_networks_and_unets_have_a_bound(make, rng):
    model = randomised(make(nnx.Rngs(0), (3, 4)), rng)
    model.eval()
    report = ss.lipschitz_report(model, (1, 4, 4, 3))
    true = steepest(model, (1, 4, 4, 3), rng)
    assert true <= report.bound < np.inf
    assert report.unknown == ()
    twin = {ResNet: LinenResNet, UNet: LinenUNet}[make]((3, 4))
    variables = jax.jit(twin.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    report = ss.lipschitz_report(twin, variables, (1, 4, 4, 3))
    true = steepest(functools.partial(twin.apply, variables), (1, 4, 4, 3), rng)
    assert true <= report.bound < np.inf


def test_a_residual_connection_adds_one(rng):
    class Residual(nnx.Module):
        def __init__(self, rngs):
            self.f, self.g = (nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            x = x + self.f(x)
            return jnp.concatenate([x, nnx.relu(self.g(x))], -1)

    model = Residual(nnx.Rngs(0))
    f, g = (np.linalg.norm(np.asarray(layer.kernel[...]), 2) for layer in (model.f, model.g))
    report = ss.lipschitz_report(model, (1, 4))
    np.testing.assert_allclose(report.bound, (1 + f) * np.hypot(1, g), rtol=2e-3)
    assert f"{report.bound:.4g}" in str(report)


def test_a_scan_over_a_stack_has_the_product_of_its_layers():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.vmap
            def make(rngs):
                return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))

            self.layers = make(rngs.split(3))

        def __call__(self, x):
            run = nnx.scan(
                lambda x, m: x + nnx.relu(m(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return run(x, self.layers)

    model: Any = Stack(nnx.Rngs(0))
    model.layers.layers[1].scale[...] = jnp.asarray([[1.0, -2, 0.1, 3]] * 3, jnp.float32)
    report = ss.lipschitz_report(model, (1, 4))
    names = [f"layers.layers.{i}[{k}]" for k in range(3) for i in (0, 1)]
    assert [row.name for row in report.rows] == names
    scale = np.asarray([1, -2, 0.1, 3]) / np.sqrt(1 + 1e-5)
    kernels = np.asarray(model.layers.layers[0].kernel[...], np.float64)
    want = np.prod([1 + np.linalg.norm(kernel * scale, 2) for kernel in kernels])
    np.testing.assert_allclose(report.bound, want, rtol=2e-3)

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(4, name="dense")(x)), x[..., :1]

    class LinenStack(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Cell,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                reverse=True,
            )
            return stack(name="cells")(x, None)

    module = LinenStack()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 4)))
    report = ss.lipschitz_report(module, variables, (1, 4))
    norms = [np.linalg.norm(k, 2) for k in variables["params"]["cells"]["dense"]["kernel"]]
    carried = np.cumprod(1 + np.asarray([0.0, *norms[::-1]]))
    want = np.hypot(carried[-1], np.linalg.norm(carried[:-1]))
    np.testing.assert_allclose(report.bound, want, rtol=2e-3)
    assert len(report.rows) == 3


# Functions, and a number that their bound must not exceed.
BOUNDED = {
    "sort": (lambda x: jnp.sort(x), 1.0),
    "top_k": (lambda x: jax.lax.top_k(x, 2)[0], 1.0),
    "cumsum": (lambda x: jnp.cumsum(x, axis=-1), 2.88),
    "reverse cumsum": (lambda x: jax.lax.cumsum(x, 1, reverse=True), 2.88),
    "cummax": (lambda x: jax.lax.cummax(x, 1), 2.0),
    "repeated indices": (lambda x: x[:, np.asarray([0, 1, 0, 0])], np.sqrt(3)),
    "indices out of bounds": (lambda x: jnp.take(x, np.asarray([9, 0, -1]), axis=1), 1.0),
    "clipped indices": (lambda x: jnp.take(x, np.asarray([9, 8, 3]), 1, mode="clip"), np.sqrt(3)),
    "matrix": (lambda x: x @ np.arange(12.0).reshape(4, 3), 22.45),
    "left matrix": (lambda x: np.arange(6.0).reshape(3, 2) @ x, 7.39),
    "kernel": (
        lambda x: jax.lax.conv(x[:, None], jnp.asarray([[[1.0, -2.0]]]), (1,), "VALID"), 3.01
    ),
    "gain": (lambda x: x * np.asarray([[1.0, -3, 2, 0]]) / np.asarray([[2.0, 4, -0.5, 1]]), 6.0),
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), 1.0),
    "softmax of rows": (jax.vmap(jax.nn.softmax, 1, 1), 1.0),
    "masked softmax": (
        lambda x: jax.nn.softmax(jnp.where(np.eye(2, 4) > 0, -1e9, 3 * x), axis=0), 3.0
    ),
    "gelu": (jax.nn.gelu, 1.13),
    "exact gelu": (lambda x: jax.nn.gelu(x, approximate=False), 1.13),
    "loop": (lambda x: jax.lax.fori_loop(0, 3, lambda i, x: 0.5 * x + jnp.sin(x), x), 3.38),
    "outputs of a loop": (
        lambda x: jax.lax.scan(lambda c, r: (c + r, (c, 2 * r)), jnp.zeros(4), x), 4.0
    ),
    "erf": (lambda x: jax.scipy.special.erf(x) + x, 2.13),
    "tile": (lambda x: jnp.tile(x, (2, 3)), 2.45),
    "nearest": (lambda x: jax.image.resize(x, (6, 8), "nearest"), 2.46),
    "linear": (lambda x: jax.image.resize(x, (6, 8), "linear"), 2.6),
    "stop_gradient": (lambda x: jax.lax.stop_gradient(3 * x), 3.0),
    "update": (lambda x: jax.lax.dynamic_update_slice(x, 2 * x[:1], (1, 0)), 2.24),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
def test_functions_stay_below_their_constants(name, rng):
    function, known = BOUNDED[name]
    for wrapped in (function, jax.jit(function), jax.checkpoint(function)):
        report = report_of(wrapped)
        assert report.bound <= known * (1 + 1e-3), report
    if name != "stop_gradient":
        assert steepest(function, (2, 4), rng) <= report.bound * (1 + 1e-9)


@jax.custom_jvp
def lying(x):
    return 5 * x


lying.defjvp(lambda primals, tangents: (lying(primals[0]), 0 * tangents[0]))


def test_a_derivative_that_lies_proves_nothing():
    assert report_of(lying).bound == 5
    assert report_of(lambda x: lying(jax.lax.stop_gradient(x))).bound == 5


@pytest.mark.parametrize(
    "function",
    [
        jnp.floor, jnp.sign, jnp.round, jnp.argmax,
        lambda x: x.astype(int).astype(float),
        lambda x: x[jnp.argmax(x[:, 0])],
        lambda x: jax.lax.dynamic_slice(x, (jnp.argmax(x[:, 0]), 0), (1, 4)),
        lambda x: jnp.asarray([1.0, 5.0])[jnp.where(x > 0, 1, 0)],
        lambda x: jax.lax.while_loop(lambda c: jnp.sum(c) < 9, lambda c: c + 1, x),
        lambda x: jax.lax.fori_loop(0, jnp.argmax(x), lambda i, c: 2 * c, x),
        lambda x: 1 / x, lambda x: x / (1 + x[:1]), lambda x: x % 1.0, jnp.sqrt, jnp.cumprod,
        lambda x: jnp.exp(x) / jnp.sum(jnp.exp(2 * x), axis=1, keepdims=True),
        lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), axis=1)[0],
        lambda x: jnp.exp(x - x[:, :1]) / 2, lambda x: x * x, lambda x: x @ x.T,
        lambda x: jax.lax.sort((x, 3 * x[::-1]), num_keys=1)[1],
        jax.jit(lambda x: x * jnp.asarray(np.asarray([1.0, np.nan, 1.0, 1.0]))[None]),
    ],
)  # fmt: skip
def test_functions_without_a_constant_have_none(function):
    report = report_of(function)
    assert report.bound == np.inf
    assert report.unknown


def test_softmax_along_other_axes_than_the_sums_is_none(rng):
    # the axes of the sum and of the entries are as many, but not the same
    def swapped(x):
        e = jnp.exp(x)
        return e / jnp.broadcast_to(jnp.sum(e, axis=0, keepdims=True).T, x.shape)

    assert report_of(swapped, (3, 3)).bound == np.inf


ON_A_BALL = {
    "square": lambda x: x * x,
    "power": lambda x: x**3,
    "exp": jnp.exp,
    "gram": lambda x: x @ x.T,
    "gated": lambda x: jnp.sin(x) * (1 + x),
    "attention": lambda x: jax.nn.softmax(x @ x.T) @ jnp.tanh(x),
    "norm": lambda x: x * jnp.sum(x**2),
}


@pytest.mark.parametrize("name", ON_A_BALL)
def test_products_have_a_bound_on_a_ball(name, rng):
    function = ON_A_BALL[name]
    assert report_of(function).bound == np.inf
    assert "give a radius" in str(report_of(function))
    for radius in (0.3, 2.0):
        bound = report_of(function, radius=radius).bound
        assert steepest(function, (2, 4), rng, 20, radius=radius) <= bound
        assert bound < 40 * (1 + radius**3)
    assert report_of(function, radius=0.0).bound < np.inf


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, epsilon=0.1, rngs=rngs)
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.position = nnx.Param(jnp.ones((1, 3, 4)))

    def __call__(self, x):
        x = x + self.position[...]
        x = x + self.attend(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


def test_attention_is_named_and_bounded_on_a_ball(rng):
    model = Transformer(nnx.Rngs(0))
    report = ss.lipschitz_report(model, (1, 3, 4))
    assert report.bound == np.inf
    assert report.unknown == ("dot_general",)
    for radius in (0.5, 3.0):
        report = ss.lipschitz_report(model, (1, 3, 4), radius=radius)
        true = steepest(model, (1, 3, 4), rng, 20, radius=radius)
        assert true <= report.bound < 1e4 * true
        assert f"||x|| ≤ {radius:.4g}" in str(report)
    with pytest.raises(ValueError, match="radius: expected a finite number"):
        ss.lipschitz_report(model, (1, 3, 4), radius=-1.0)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_normalisations_have_the_constant_of_no_variance(kind, rng):
    options = {"num_groups": 2} if kind == "GroupNorm" else {}
    layer = getattr(nnx, kind)(4, epsilon=0.01, rngs=nnx.Rngs(0), **options)
    layer.scale[...] = jnp.asarray([1.0, -3, 2, 1], jnp.float32)
    report = ss.lipschitz_report(layer, (1, 5, 4))
    np.testing.assert_allclose(report.bound, 3 / np.sqrt(0.01), rtol=1e-5)
    assert [row.note for row in report.rows] == ["reached where the variance vanishes"]
    true = max(steepest(layer, (1, 5, 4), rng, scale=scale) for scale in (1e-3, 1.0))
    assert 0.5 * report.bound <= true <= report.bound
    module = getattr(nn, kind)(epsilon=0.01, **options)
    variables = {"params": {"scale": layer.scale[...]}}
    if hasattr(layer, "bias"):
        variables["params"]["bias"] = layer.bias[...]
    np.testing.assert_allclose(
        ss.lipschitz_report(module, variables, (1, 5, 4)).bound, report.bound
    )


class Jitted(nnx.Linear):
    """Its call is a method of its own, though no Python function."""

    @nnx.jit
    def __call__(self, x):
        return 5 * nnx.Linear.__call__(self, x)


def test_layers_of_another_kind_than_they_seem_are_bounded_by_their_operations():
    rngs, integers = nnx.Rngs(0), {"preferred_element_type": jnp.int32}
    jitted = Jitted(3, 3, rngs=rngs)
    norm = np.linalg.norm(np.asarray(jitted.kernel[...], np.float64), 2)
    np.testing.assert_allclose(ss.lipschitz_report(jitted, (2, 3)).bound, 5 * norm, rtol=1e-6)
    for layer in (
        nnx.Linear(3, 3, rngs=rngs, **integers),
        nnx.Linear(3, 3, dtype=jnp.float8_e4m3fn, rngs=rngs),
    ):
        assert ss.lipschitz_report(layer, (2, 3)).bound == np.inf
    module = nn.Einsum((3, 3), "ab,bc->ac", **integers)
    variables = {"params": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}}
    assert ss.lipschitz_report(module, variables, (2, 3)).bound == np.inf


def test_a_leak_and_a_closed_over_variance_prove_nothing():
    variance = jnp.full(3, 1e-4)

    class Closed(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.norm.var.set_value(variance)
            return self.norm(x)

    assert ss.lipschitz_report(Closed(), (1, 3)).bound == np.inf

    kept: list[Any] = []

    class Inner(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.layer(x)
            return y + kept.pop()

    class Keeping(nnx.Linear):
        """Its kernel's product leaves it by another door than its output."""

        def __init__(self):
            super().__init__(3, 3, rngs=nnx.Rngs(0), promote_dtype=self.promote)

        @staticmethod
        def promote(arrays: Any, *_: Any, **__: Any) -> Any:
            kept.append(arrays[0])
            return arrays

    model: Any = Inner()
    model.layer = Keeping()
    norm = np.linalg.norm(np.eye(3) + np.asarray(model.layer.kernel[...]).T, 2)
    assert ss.lipschitz_report(model, (1, 3)).bound >= norm * (1 - 1e-6)


class Random(nnx.Module):
    """Nodes of random operations on earlier nodes, arrays (1, 4, 4, 2) all of them."""

    def __init__(self, nodes, seed):
        self.nodes = nnx.static(nodes)
        rngs = nnx.Rngs(seed)
        self.convs = nnx.List([nnx.Conv(2, 2, (3, 3), rngs=rngs) for _ in range(2)])
        self.wide = nnx.Conv(4, 2, (1, 1), rngs=rngs)
        self.norm = nnx.BatchNorm(2, use_running_average=True, rngs=rngs)
        self.solver = ss.nnx.SolverConv(2, 2, (3, 3), solver=ss.ProxGD(2), ridge=0.1, rngs=rngs)
        self.gain = nnx.Param(jax.random.normal(jax.random.key(seed), (1, 1, 1, 2)))

    def __call__(self, x):
        values = [x]
        for kind, first, second in self.nodes:
            a, b = values[first % len(values)], values[second % len(values)]
            values.append(self.node(kind, a, b))
        return values[-1]

    def node(self, kind, a, b):
        return {
            "conv": lambda: self.convs[0](a),
            "other": lambda: nnx.tanh(self.convs[1](a)),
            "folded": lambda: self.norm(self.convs[1](a)),
            "solver": lambda: self.solver(a, skip=b),
            "add": lambda: a + b,
            "concatenate": lambda: self.wide(jnp.concatenate([a, b], axis=-1)),
            "max": lambda: jnp.maximum(a, b),
            "pool": lambda: nnx.max_pool(a, (2, 2), padding="SAME"),
            "average": lambda: nnx.avg_pool(a, (3, 3), padding="SAME"),
            "gelu": lambda: nnx.gelu(a),
            "gain": lambda: a * self.gain[...],
            "turn": lambda: a.reshape(1, 2, 4, 4).transpose(0, 2, 3, 1)[:, ::-1],
            "up": lambda: jax.image.resize(a[:, ::2, 1::2], a.shape, "nearest"),
        }[kind]()


KINDS = [
    "conv", "other", "folded", "solver", "add", "concatenate", "max", "pool", "average", "gelu",
    "gain", "turn", "up",
]  # fmt: skip
NODES = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=7
)


@given(NODES, st.integers(0, 3))
def test_random_networks_stay_below_their_bounds(nodes, seed):
    model = Random(tuple(nodes), seed)
    report = ss.lipschitz_report(model, (1, 4, 4, 2))
    assert report.bound < np.inf, report
    model.eval()
    rng = np.random.default_rng(seed)
    assert steepest(model, (1, 4, 4, 2), rng, 2) <= report.bound * (1 + 1e-5)


def test_norms_on_the_host_enclose_those_of_dense_matrices(rng, monkeypatch):
    for case in range(24):
        axes, groups = int(rng.integers(1, 3)), int(rng.choice([1, 1, 2]))
        wide = case % 4 == 0
        n1, n2 = (36, 34 * groups) if wide else (int(n) for n in rng.integers(1, 4, 2))
        kernel = rng.normal(size=(*rng.integers(1, 4, axes), n1, n2 * (1 if wide else groups)))
        conv = ss.Conv(
            jnp.asarray(kernel),
            tuple(int(n) for n in rng.integers(3, 6, axes)),
            strides=tuple(int(n) for n in rng.integers(1, 3, axes)),
            padding=["SAME", "CIRCULAR", ((1, 2),) * axes][case % 3],
            feature_group_count=groups,
        )
        units = np.eye(int(np.prod(conv.in_shape))).reshape(-1, *conv.in_shape)
        matrix = np.asarray(conv(jnp.asarray(units))).reshape(len(units), -1)
        true = np.linalg.norm(matrix, 2) ** 2
        for size in (2**22, 0):
            monkeypatch.setattr(_norms, "_DENSE", size)
            ends = _norms.squared_norm(conv)
            assert ends is not None
            assert ends[0] <= true * (1 + 1e-12)
            assert ends[1] >= true * (1 - 1e-12)
            assert not size or ends[1] <= true * 1.0011
    for shape in ((5, 7), (50, 40)):
        matrix = rng.normal(size=shape)
        layer = ss.Dense(jnp.asarray(matrix))
        lower, upper = _norms.squared_norm(layer) or (np.nan, np.nan)
        assert lower <= np.linalg.norm(matrix, 2) ** 2 * (1 + 1e-12)
        assert upper >= np.linalg.norm(matrix, 2) ** 2 * (1 - 1e-12)
        least = np.linalg.eigvalsh(matrix.T @ matrix)[0] if shape[0] >= shape[1] else 0.0
        bound = _norms.least_eigenvalue(layer)
        assert bound is not None
        assert least - 1e-9 <= bound <= max(least, 0.0)
    assert _norms.squared_norm(ss.Dense(jnp.zeros((2, 3)))) == (0.0, np.finfo(np.float32).tiny)
    ends = _norms.squared_norm(ss.Dense(jnp.full((2, 3), np.nan)))
    assert ends is not None
    assert np.isnan(ends).all()
