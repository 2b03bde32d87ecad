"""NNX layers: the plain layers' parameters and checkpoints, random streams, cached constants."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import stochsolvers as ss

ONE = ss.ProxGD(1, step_size=1.0)


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(4 * 4 * 4, 10, rngs=rngs)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x))
        x = jax.nn.relu(self.dense(x.reshape(len(x), -1)))
        return self.head(x)


class Twin(nnx.Module):
    def __init__(self, conv_solver, dense_solver, rngs):
        self.conv = ss.nnx.SolverConv(
            1, 4, (3, 3), strides=2, solver=conv_solver, spatial_shape=(8, 8), rngs=rngs
        )
        self.dense = ss.nnx.SolverLinear(4 * 4 * 4, 10, solver=dense_solver, rngs=rngs)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        return self.head(self.dense(x.reshape(len(x), -1)))


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.normal(size=(5, 8, 8, 1)), jnp.float32)


@pytest.mark.optimized
def test_parameter_state_is_identical(images):
    streams = {"params": 0, "dropout": 1}
    plain, twin = Plain(nnx.Rngs(**streams)), Twin(ONE, ONE, nnx.Rngs(**streams))
    ours, theirs = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (twin, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)  # same tree, same initial values
    np.testing.assert_array_equal(twin(images), plain(images))


@pytest.mark.optimized
def test_saved_checkpoint_of_a_plain_network_loads_into_its_twin(tmp_path, images):
    plain = Plain(nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", nnx.to_pure_dict(nnx.state(plain, nnx.Param)))
    twin = Twin(ONE, ONE, nnx.Rngs(2))
    assert not np.array_equal(twin(images), plain(images))
    state = nnx.state(twin, nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "plain", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(twin, state)
    np.testing.assert_array_equal(twin(images), plain(images))


@pytest.mark.optimized
@pytest.mark.parametrize("prior", [ss.prox.Zero(), ss.prox.NonNegative(), ss.prox.Box(0.0, 6.0)])
def test_one_iteration_of_unit_step_is_the_plain_layer_exactly(rng, prior):
    activation = {"Zero": lambda x: x, "NonNegative": jax.nn.relu, "Box": jax.nn.relu6}
    activation = activation[type(prior).__name__]
    linear = nnx.Linear(12, 7, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 3, 12)), jnp.float32)
    twin = ss.nnx.SolverLinear.from_layer(linear, solver=ONE, prior=prior)
    np.testing.assert_array_equal(twin(x), activation(linear(x)))
    conv = nnx.Conv(
        4, 6, (3, 5), strides=(2, 1), padding=((1, 2), (0, 2)), kernel_dilation=(2, 1),
        feature_group_count=2, use_bias=False, rngs=nnx.Rngs(0),
    )  # fmt: skip
    x = jnp.asarray(rng.normal(size=(3, 9, 8, 4)), jnp.float32)
    twin = ss.nnx.SolverConv.from_layer(conv, solver=ONE, prior=prior)
    np.testing.assert_allclose(twin(x), activation(conv(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, None])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_output_dtype_is_the_plain_layers(dtype, param_dtype):
    layer = nnx.Linear(4, 3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    twin = ss.nnx.SolverLinear.from_layer(layer, solver=ss.ProxGD(3))
    for x in (jnp.ones((2, 4), jnp.bfloat16), jnp.ones((2, 4), jnp.float32)):
        assert twin(x).dtype == layer(x).dtype


def test_from_layer_shares_the_parameter_variables(images):
    plain = Plain(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    plain.dense = ss.nnx.SolverLinear.from_layer(
        plain.dense, solver=ss.ProxSG(0.5, 3), ridge=1e-3, rngs=nnx.Rngs(dropout=1)
    )
    after = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_streams_train_and_eval(rng):
    layer = ss.nnx.SolverLinear(8, 5, solver=ss.ProxSG(0.5, 3), rngs=nnx.Rngs(0, dropout=1))
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    first, second = layer(x), layer(x)
    assert not np.array_equal(first, second)
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    full = ss.ProxSG(0.5, 3).solve(None, layer.problem(x), deterministic=True).value
    np.testing.assert_allclose(layer(x), full, rtol=1e-6)
    assert not np.array_equal(layer(x), layer(x, deterministic=False))
    key = jax.random.key(5)
    one, two = (layer(x, deterministic=False, rngs=key) for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_view_and_clone(rng):
    layer = ss.nnx.SolverLinear(8, 5, solver=ss.ProxSG(0.5, 3), rngs=nnx.Rngs(0, dropout=1))
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    view = nnx.view(layer, deterministic=True)
    np.testing.assert_array_equal(view(x), layer(x, deterministic=True))
    np.testing.assert_array_equal(nnx.clone(layer)(x), layer(x))
    assert not layer.deterministic


def test_training_with_nnx_transforms_and_optimizer(images):
    model = Twin(ss.ProxGD(3), ss.ProxSG(0.5, 4), nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(images) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert model.dense.rngs.count[...] == 40


def test_missing_stream_says_so(rng):
    layer = ss.nnx.SolverLinear.from_layer(
        nnx.Linear(8, 5, rngs=nnx.Rngs(0)), solver=ss.ProxSG(0.5, 3)
    )
    with pytest.raises(ValueError, match="rngs of SolverLinear: expected a random stream"):
        layer(jnp.ones((2, 8)))
    assert layer(jnp.ones((2, 8)), deterministic=True).shape == (2, 5)


def test_lipschitz_constant_is_cached_outside_the_parameters(images):
    twin = Twin(ss.ProxGD(3), ss.ProxSG(0.5, 3), nnx.Rngs(0))
    cached = nnx.to_pure_dict(nnx.state(twin, ss.nnx.SolverState))
    assert set(cached) == {"conv", "dense"}
    kernel = np.asarray(twin.dense.kernel[...], np.float64)
    largest = np.linalg.norm(kernel, 2) ** 2
    np.testing.assert_allclose(twin.dense.lipschitz[...], largest, rtol=1e-5)
    twin.dense.kernel[...] = 2 * twin.dense.kernel[...]
    np.testing.assert_allclose(twin.dense.lipschitz[...], largest, rtol=1e-5)  # not yet
    ss.nnx.refresh_lipschitz(twin)
    np.testing.assert_allclose(twin.dense.lipschitz[...], 4 * largest, rtol=1e-5)


def test_loaded_weights_do_not_run_on_the_steps_of_the_initialisation(rng):
    plain = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
    plain.kernel[...] = 10 * plain.kernel[...]
    twin = ss.nnx.SolverLinear(8, 8, solver=ss.ProxGD(10), rngs=nnx.Rngs(0))
    nnx.update(twin, nnx.state(plain, nnx.Param))
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    want = ss.nnx.SolverLinear.from_layer(plain, solver=ss.ProxGD(10))(x)
    np.testing.assert_allclose(twin(x), want, rtol=1e-5, atol=1e-6)
    ss.nnx.refresh_lipschitz(twin)
    np.testing.assert_allclose(twin(x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "solver",
    [
        ss.ProxSG(0.5, 3, step_size=ss.InverseExpectedSmoothness()),
        ss.NSync(0.5, 3, step_size=ss.InverseSeparable()),
        ss.ProxGD(3, step_size=ss.InverseLipschitz(grid="padded")),
    ],
)
def test_whatever_a_rule_is_read_off_is_cached(rng, solver):
    layer = ss.nnx.SolverLinear(8, 5, solver=solver, ridge=0.1, rngs=nnx.Rngs(0, dropout=1))
    x, key = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32), jax.random.key(3)
    np.testing.assert_array_equal(
        layer.lipschitz[...], solver.step_constant(layer.problem(x)).astype(jnp.float32)
    )
    np.testing.assert_allclose(
        layer(x, rngs=key), solver.solve(key, layer.problem(x)).value, rtol=1e-5
    )
    np.testing.assert_allclose(
        layer(x, deterministic=True),
        solver.solve(None, layer.problem(x), deterministic=True).value,
        rtol=1e-6,
    )
    ss.nnx.refresh_lipschitz(layer)
    before = layer(x, rngs=key)
    layer.lipschitz[...] = 4 * layer.lipschitz[...]
    assert not np.allclose(layer(x, rngs=key), before)


def test_a_number_as_step_size_needs_no_cache():
    layer = ss.nnx.SolverLinear(8, 5, solver=ss.ProxGD(3, step_size=0.1), rngs=nnx.Rngs(0))
    assert layer.lipschitz is None
    ss.nnx.refresh_lipschitz(layer)


def test_convolution_without_a_spatial_shape_computes_its_constant_per_call(rng):
    conv = nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    free = ss.nnx.SolverConv.from_layer(conv, solver=ss.ProxGD(4))
    fixed = ss.nnx.SolverConv.from_layer(conv, solver=ss.ProxGD(4), spatial_shape=(6, 6))
    assert free.lipschitz is None
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 2)), jnp.float32)
    np.testing.assert_allclose(free(x), fixed(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"spatial shape of the inputs: expected \(6, 6\)"):
        fixed(x[:, :5])


def test_training_step_in_the_functional_form(images):
    model = Twin(ss.ProxGD(3), ss.ProxSG(0.5, 4), nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, rest):
        def loss(params):
            merged = nnx.merge(graph, params, rest, copy=True)
            value = jnp.mean(merged(images) ** 2)
            return value, nnx.split(merged, nnx.Param, ...)[2]

        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), rest, value

    first = rest
    losses = []
    for _ in range(40):
        params, rest, value = step(params, rest)
        losses.append(float(value))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    counts = [nnx.to_pure_dict(r)["dense"]["rngs"]["count"] for r in (first, rest)]
    assert counts[1] == counts[0] + 40  # the stream moved on
    # no gradient is spent on the constant: it is no parameter
    assert "lipschitz" not in nnx.to_pure_dict(params)["dense"]


def test_solution_problem_and_certificate_of_a_layer(rng):
    layer = ss.nnx.SolverLinear(8, 5, solver=ss.ProxGD(200), ridge=0.1, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    solution = layer.solve(x)
    assert solution.residuals.shape == (200, 2)
    assert np.all(layer.problem(x).certificate(solution.value) < 1e-5)


def test_resnet_block_is_two_plain_layers_and_a_skip(rng):
    first, second = (nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(i)) for i in (0, 1))
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 4)), jnp.float32)
    block = ss.nnx.SolverResNetBlock(first, second, solver=ONE)
    want = jax.nn.relu(second(jax.nn.relu(first(x))) + x)
    np.testing.assert_allclose(block(x), want, rtol=1e-5, atol=1e-6)
    more = ss.nnx.SolverResNetBlock(
        first, second, solver=ss.ProxSG(0.5, 4), rngs=nnx.Rngs(dropout=0)
    )
    assert more(x).shape == x.shape
    assert np.all(np.isfinite(more(x, deterministic=True)))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folded_batch_norm_is_the_pair_at_inference(rng, use_bias, affine):
    norm = nnx.BatchNorm(
        6, use_bias=affine, use_scale=affine, use_running_average=True, rngs=nnx.Rngs(0)
    )
    norm.mean[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    norm.var[...] = jnp.asarray(rng.uniform(0.5, 2, size=6), jnp.float32)
    if affine:
        norm.scale[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
        norm.bias[...] = jnp.asarray(rng.normal(size=6), jnp.float32)
    conv = nnx.Conv(4, 6, (3, 3), feature_group_count=2, use_bias=use_bias, rngs=nnx.Rngs(0))
    linear = nnx.Linear(4, 6, use_bias=use_bias, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32)
    for layer in (conv, linear):
        folded = ss.nnx.fold_batch_norm(layer, norm)
        np.testing.assert_allclose(folded(x), norm(layer(x)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="features of the BatchNorm: expected 6, got 5"):
        ss.nnx.fold_batch_norm(conv, nnx.BatchNorm(5, rngs=nnx.Rngs(0)))


def test_dropout_modules_count_exactly(rng):
    x = jnp.ones((6, 4, 4, 10))
    drop = ss.nnx.TauNiceDropout(0.3, spatial_ndim=2, rngs=nnx.Rngs(dropout=0))
    kept = np.asarray(drop(x))
    maps = kept.reshape(6, 16, 10)
    assert np.all((maps == 0).all(1) | (maps == maps[:, :1]).all(1))  # whole feature maps
    np.testing.assert_array_equal((maps[:, 0] > 0).sum(1), 3)
    np.testing.assert_allclose(maps.max(), 10 / 3, rtol=1e-6)
    output = ss.nnx.OutputDropout(4, rngs=nnx.Rngs(dropout=0))(x[:, 0, 0])
    np.testing.assert_array_equal(np.asarray(output).sum(1), 4)
    drop.eval()
    np.testing.assert_array_equal(drop(x), x)


def test_additive_and_importance_dropout_modules(rng):
    linear = nnx.Linear(9, 5, rngs=nnx.Rngs(0))
    x, z = (jnp.asarray(rng.normal(size=(3, n)), jnp.float32) for n in (9, 5))
    kernel = np.asarray(linear.kernel[...])
    additive = ss.nnx.AdditiveDropout(linear, 4, rngs=nnx.Rngs(dropout=0))
    draws = np.stack([additive(x, z) for _ in range(3)])
    assert not np.allclose(draws[0], draws[1])
    additive.eval()
    mean = np.asarray(linear(x)) + z - np.asarray(z) @ kernel.T @ kernel
    np.testing.assert_allclose(additive(x, z), mean, rtol=1e-4, atol=1e-5)
    importance = ss.nnx.ImportanceDropout(linear, 4, rngs=nnx.Rngs(dropout=0))
    kept = np.asarray(importance(x))
    np.testing.assert_array_equal((kept != 0).sum(1), 4)
    importance.eval()
    np.testing.assert_array_equal(importance(x), x)
    with pytest.raises(ValueError, match="by: expected one of"):
        ss.nnx.ImportanceDropout(linear, 4, by="size")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dilation": 2}, "input_dilation of a solver convolution: expected 1"),
        ({"mask": jnp.ones((3, 3, 2, 4))}, "mask of a solver convolution: expected None"),
        ({"padding": "REFLECT"}, "padding: expected one of 'SAME'"),
    ],
)
def test_unsupported_convolutions_are_refused(options, message):
    conv = nnx.Conv(2, 4, (3, 3), **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        ss.nnx.SolverConv.from_layer(conv, solver=ONE, spatial_shape=(6, 6))(jnp.ones((1, 6, 6, 2)))


def test_configuration_may_hold_arrays(rng):
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    gamma = jnp.asarray([0.1, 0.3], jnp.float32)
    layer = ss.nnx.SolverLinear(
        3,
        2,
        solver=ss.ProxGD(3, step_size=jnp.asarray(0.2)),
        prior=ss.prox.L1(gamma),
        rngs=nnx.Rngs(0),
    )
    want = ss.prox_gd(layer.problem(x), step_size=0.2, num_iters=3).value
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(layer, x), want, rtol=1e-6)
    graph, state = nnx.split(layer)
    np.testing.assert_allclose(nnx.merge(graph, state)(x), want, rtol=1e-6)


def test_options_that_would_be_ignored_are_refused():
    def custom(*args, **kwargs):
        raise AssertionError

    with pytest.raises(ValueError, match="dot_general of SolverLinear: expected the default"):
        ss.nnx.SolverLinear(3, 2, solver=ONE, dot_general=custom, rngs=nnx.Rngs(0))
    conv = nnx.Conv(1, 1, (3, 3), conv_general_dilated=custom, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="conv_general_dilated of SolverConv"):
        ss.nnx.SolverConv.from_layer(conv, solver=ONE)
    solver_layer = ss.nnx.SolverLinear(3, 2, solver=ONE, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layer: expected a plain layer"):
        ss.nnx.fold_batch_norm(solver_layer, nnx.BatchNorm(2, rngs=nnx.Rngs(0)))


def test_tabulate(images):
    table = nnx.tabulate(Twin(ss.ProxGD(3), ss.ProxSG(0.5, 3), nnx.Rngs(0, dropout=1)), images)
    assert "dense" in table
    assert "conv" in table


@pytest.mark.parametrize("how", ["update", "assign", "one entry"])
def test_weights_loaded_after_from_layer_do_not_keep_the_old_step(how, rng):
    plain = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
    layer = ss.nnx.SolverLinear.from_layer(plain, solver=ss.ProxGD(40), ridge=0.1)
    kernel = jnp.asarray(7 * rng.normal(size=(8, 8)), jnp.float32)
    if how == "update":
        nnx.update(layer, {"kernel": nnx.Param(kernel)})
    elif how == "assign":
        layer.kernel[...] = kernel
    else:
        kernel = layer.kernel[...].at[3, 5].set(50.0)
        layer.kernel[...] = kernel
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    want = ss.prox_gd(layer.problem(x), num_iters=40)
    np.testing.assert_allclose(layer(x), want.value, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(layer.solve(x, certify=True).certificate))
    # in a report too
    step = ss.certify(layer, x).rows[0].step_size
    np.testing.assert_allclose(step, 1 / (0.1 + np.linalg.norm(kernel, 2) ** 2), rtol=1e-4)


def test_a_stack_of_layers_is_refreshed(rng):
    @nnx.vmap
    def stack(key):
        rngs = nnx.Rngs(params=key, dropout=key)
        return ss.nnx.SolverLinear(6, 4, solver=ss.ProxSG(0.5, 3), rngs=rngs)

    layers = stack(jax.random.split(jax.random.key(0), 3))
    layers.kernel[...] = 2 * layers.kernel[...]
    ss.nnx.refresh_lipschitz(layers)
    want = [np.linalg.norm(kernel, 2) ** 2 for kernel in np.asarray(layers.kernel[...])]
    np.testing.assert_allclose(layers.lipschitz[...], want, rtol=1e-5)
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    outputs = nnx.vmap(lambda layer, x: layer(x, deterministic=True), in_axes=(0, None))(layers, x)
    assert outputs.shape == (3, 2, 4)


def test_output_dtype_is_the_plain_layers_whatever_the_bias_has():
    x = jnp.ones((2, 4), jnp.bfloat16)
    plain = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    plain.bias = nnx.Param(jnp.ones(3, jnp.float32))
    twin = ss.nnx.SolverLinear.from_layer(plain, solver=ss.ProxGD(1, step_size=1.0))
    assert twin(x).dtype == plain(x).dtype == jnp.float32


LORA = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
LINEAR, CONV = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Conv(4, 3, (3, 3), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ss.nnx.SolverLinear.from_layer(LORA, solver=ss.ProxGD(1)),
            "layer: expected an nnx.Linear without a call of its own, got LoRALinear",
        ),
        (
            lambda: ss.nnx.SolverLinear.from_layer(CONV, solver=ss.ProxGD(1)),
            "layer: expected an nnx.Linear without a call of its own, got Conv",
        ),
        (
            lambda: ss.nnx.SolverConv.from_layer(LINEAR, solver=ss.ProxGD(1)),
            "layer: expected an nnx.Conv without a call of its own, got Linear",
        ),
        (
            lambda: ss.nnx.SolverLinear.from_layer(nnx.Linear, solver=ss.ProxGD(1)),
            "layer: expected an nnx.Linear without a call of its own, got the class Linear",
        ),
        (
            lambda: ss.nnx.SolverLinear.from_layer(LINEAR, solver="prox_gd"),
            "solver of SolverLinear: expected a Solver such as ProxGD.10., got 'prox_gd'",
        ),
        (
            lambda: ss.nnx.SolverLinear.from_layer(LINEAR, solver=ss.ProxGD),
            "solver of SolverLinear: expected a Solver such as ProxGD.10., got <class",
        ),
        (
            lambda: ss.nnx.SolverLinear.from_layer(LINEAR, solver=ss.ProxGD(1), prior=nnx.relu),
            "prior of SolverLinear: expected a Prior such as prox.NonNegative",
        ),
        (
            lambda: ss.linen.SolverDense(3, solver=ss.ProxGD(1), prior=nnx.relu),
            "prior of SolverDense: expected a Prior such as prox.NonNegative",
        ),
        (
            lambda: ss.linen.SolverConv(3, (3, 3), solver="fista"),
            "solver of SolverConv: expected a Solver such as ProxGD.10., got 'fista'",
        ),
        (
            lambda: ss.nnx.fold_batch_norm(LINEAR, nnx.LayerNorm(3, rngs=nnx.Rngs(0))),
            "norm: expected an nnx.BatchNorm, got LayerNorm",
        ),
        (
            lambda: ss.nnx.fold_batch_norm(nnx.Embed, nnx.BatchNorm(3, rngs=nnx.Rngs(0))),
            "layer: expected an nnx.Linear or nnx.Conv",
        ),
    ],
)
def test_wrong_kinds_are_refused_at_construction(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_solver_layer_gets_another_solver(rng):
    first = ss.nnx.SolverLinear.from_layer(LINEAR, solver=ss.ProxGD(1, step_size=1.0))
    second = ss.nnx.SolverLinear.from_layer(first, solver=ss.ProxGD(5))
    assert second.kernel is LINEAR.kernel


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(rank, rng):
    plain = nnx.Conv(2, 3, (3,) * rank, padding="CIRCULAR", rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(2, *(5, 4, 6)[:rank], 2)), jnp.float32)
    one = ss.nnx.SolverConv.from_layer(plain, solver=ss.ProxGD(1, step_size=1.0))
    np.testing.assert_allclose(one(x), nnx.relu(plain(x)), rtol=1e-5, atol=1e-6)
    layer = ss.nnx.SolverConv.from_layer(
        plain, solver=ss.ProxGD(300, momentum=True), spatial_shape=x.shape[1:-1], ridge=0.1
    )
    assert np.all(layer.solve(x, certify=True).certificate < 0.1)


def test_any_change_of_the_norm_is_noticed(rng):
    """A mean shift, a kernel replaced but for its first column, one scaled: none runs on steps beyond 2/L."""
    kernel = jnp.asarray(rng.normal(size=(256, 256)) / 16, jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 256)), jnp.float32)
    changes = [kernel + 0.02, kernel.at[:, 1:].set(1 / 16), 1.49 * kernel, kernel.at[7, 9].set(9.0)]
    for changed in changes:
        layer = ss.nnx.SolverLinear(256, 256, solver=ss.ProxGD(30), ridge=0.1, rngs=nnx.Rngs(0))
        layer.kernel[...] = kernel
        layer.refresh_lipschitz()
        layer.kernel[...] = changed
        want = ss.prox_gd(layer.problem(x), num_iters=30).value
        np.testing.assert_allclose(layer(x), want, rtol=1e-3, atol=1e-4)
    layer.kernel[...] = kernel
    layer.refresh_lipschitz()
    layer.kernel[...] = kernel + 0.002 * jnp.asarray(rng.normal(size=(256, 256)), jnp.float32)
    moved = ss.prox_gd(layer.problem(x), num_iters=30).value
    kept = ss.prox_gd(
        layer.problem(x), num_iters=30, step_size=1 / (layer.lipschitz[...] + 0.1)
    ).value
    np.testing.assert_allclose(layer(x), kept, rtol=1e-5, atol=1e-6)  # a step of training
    assert not np.array_equal(moved, kept)


def test_another_solver_does_not_run_on_the_constant_of_the_first(rng):
    x, key = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32), jax.random.key(0)
    layer = ss.nnx.SolverLinear.from_layer(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), solver=ss.ProxGD(5))
    for solver in (
        ss.ProxSG(2, 20, step_size=ss.InverseExpectedSmoothness()),
        ss.NSync(2, 20),
    ):
        layer.solver = solver
        want = solver.solve(key, layer.problem(x)).value
        np.testing.assert_allclose(layer(x, rngs=key), want, rtol=1e-5)


def test_a_layer_of_another_loss(rng):
    x = jnp.asarray(3 * rng.normal(size=(2, 8)), jnp.float32)
    plain, huber = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), ss.losses.Huber(0.5)
    layer = ss.nnx.SolverLinear.from_layer(plain, solver=ss.ProxGD(300), ridge=0.1, loss=huber)
    module = ss.linen.SolverDense(6, solver=ss.ProxGD(300), ridge=0.1, loss=huber)
    problem = ss.LayerProblem(
        ss.Dense(plain.kernel[...]), x, bias=plain.bias[...], ridge=0.1, loss=huber
    )
    want = ss.prox_gd(problem, num_iters=300).value
    np.testing.assert_allclose(layer(x), want, rtol=1e-5)
    variables = {"params": {"kernel": plain.kernel[...], "bias": plain.bias[...]}}
    np.testing.assert_allclose(module.apply(variables, x), want, rtol=1e-5)
    assert ss.certify(layer, x).rows[0].gap_max < 1e-2
    assert ss.lipschitz_report(layer, x.shape).bound == np.inf
    with pytest.raises(ValueError, match="loss of SolverLinear: expected a Loss"):
        ss.nnx.SolverLinear.from_layer(plain, solver=ss.ProxGD(4), loss="huber")
