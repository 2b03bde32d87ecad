"""Linen's dropouts, blocks and tools against their NNX twins: of the same arrays and keys the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss

KEY = jax.random.key(5)
ONE = ss.ProxGD(1, step_size=1.0)


def parameters(layer):
    """The Linen variables of an NNX layer."""
    names = ("kernel", "bias") if layer.bias is not None else ("kernel",)
    return {"params": {name: getattr(layer, name)[...] for name in names}}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(3, 9)), jnp.float32)


@pytest.mark.parametrize("name", ["TauNiceDropout", "OutputDropout"])
def test_dropouts_of_a_mask(name, rng):
    images = jnp.asarray(rng.normal(size=(3, 4, 4, 10)), jnp.float32)
    ours = getattr(ss.linen, name)(0.3, spatial_ndim=2)
    twin = getattr(ss.nnx, name)(0.3, spatial_ndim=2)
    got = ours.apply({}, images, rng=KEY)
    np.testing.assert_array_equal(got, twin(images, rngs=KEY))
    assert 0 < np.sum(np.asarray(got) == 0) < got.size
    drawn = [ours.apply({}, images, rngs={"dropout": jax.random.key(k)}) for k in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(ours.apply({}, images, deterministic=True), images)
    np.testing.assert_array_equal(ours.clone(deterministic=True).apply({}, images), images)


class OneIterationOfMS2GD(nn.Module):
    """A layer and the additive dropout that shares it."""

    @nn.compact
    def __call__(self, x, z, **options):
        dense = nn.Dense(5, name="dense")
        return ss.linen.AdditiveDropout(dense, 4, name="drop")(x, z, **options)


def test_additive_dropout(x, rng):
    linear, z = (
        nnx.Linear(9, 5, rngs=nnx.Rngs(0)),
        jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
    )
    twin = ss.nnx.AdditiveDropout(linear, 4)
    shared = {"params": {"dense": parameters(linear)["params"]}}
    alone = ss.linen.AdditiveDropout(nn.Dense(5), 4)
    tree = alone.init({"params": KEY, "dropout": KEY}, x, z)
    assert jax.tree.map(jnp.shape, tree) == {"params": {"layer": {"kernel": (9, 5), "bias": (5,)}}}
    for options in ({"rng": KEY}, {"deterministic": True}):
        wanted = twin(x, z, **{"rngs" if key == "rng" else key: v for key, v in options.items()})
        got = OneIterationOfMS2GD().apply(shared, x, z, **options)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        got = alone.apply({"params": {"layer": shared["params"]["dense"]}}, x, z, **options)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["gradient", "lipschitz"])
def test_importance_dropout(by, x):
    linear = nnx.Linear(9, 5, rngs=nnx.Rngs(0))
    ours = ss.linen.ImportanceDropout(nn.Dense(5), 4, by=by)
    variables = {"params": {"layer": parameters(linear)["params"]}}
    tree = ours.init({"params": KEY, "dropout": KEY}, x)
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, variables)
    wanted = ss.nnx.ImportanceDropout(linear, 4, by=by)(x, rngs=KEY)
    got = ours.apply(variables, x, rng=KEY)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    np.testing.assert_array_equal(np.sum(np.asarray(got) != 0, axis=1), 4)
    np.testing.assert_array_equal(ours.apply(variables, x, deterministic=True), x)


def test_what_the_dropouts_refuse(x):
    with pytest.raises(ValueError, match="by: expected one of"):
        ss.linen.ImportanceDropout(nn.Dense(5), 4, by="size")
    drop = ss.linen.ImportanceDropout(nn.LayerNorm(), 4)
    with pytest.raises(
        ValueError, match="layer: expected a linear layer of Linen with a kernel, got"
    ):
        drop.init({"params": KEY, "dropout": KEY}, x)
    with pytest.raises(ValueError, match="layer: expected a linear layer of Linen, got LayerNorm"):
        ss.linen.linear_map_of(nn.LayerNorm(), jnp.ones((9, 5)), (3, 9))


@pytest.mark.parametrize("norm_of", ["scale and bias", "neither"])
def test_batch_norm_is_folded(norm_of, rng):
    affine = norm_of != "neither"
    norm = nn.BatchNorm(use_running_average=True, use_scale=affine, use_bias=affine)
    a, b, m, v = (jnp.asarray(rng.uniform(0.5, 2, size=6), jnp.float32) for _ in range(4))
    norm_variables = {"batch_stats": {"mean": m, "var": v}}
    if affine:
        norm_variables["params"] = {"scale": a, "bias": b}
    images = jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32)
    layers = (
        nn.Conv(6, (3, 3), feature_group_count=2, use_bias=affine),
        nn.Dense(6, use_bias=not affine),
    )
    twin_norm = nnx.BatchNorm(6, use_scale=affine, use_bias=affine, rngs=nnx.Rngs(0))
    twin_norm.mean[...], twin_norm.var[...] = m, v
    if affine:
        twin_norm.scale[...], twin_norm.bias[...] = a, b
    for layer in layers:
        variables = layer.init(KEY, images)
        folded, own = ss.linen.fold_batch_norm(layer, variables, norm, norm_variables)
        wanted = norm.apply(norm_variables, layer.apply(variables, images))
        np.testing.assert_allclose(folded.apply(own, images), wanted, rtol=1e-4, atol=1e-5)
        assert "bias" in own["params"]
        assert type(folded) is type(layer)
    dense = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    twin = ss.nnx.fold_batch_norm(dense, twin_norm)
    _, own = ss.linen.fold_batch_norm(nn.Dense(6), parameters(dense), norm, norm_variables)
    np.testing.assert_array_equal(own["params"]["kernel"], twin.kernel[...])
    np.testing.assert_array_equal(own["params"]["bias"], twin.bias[...])


def test_what_folding_refuses():
    norm, dense = nn.BatchNorm(use_running_average=True), nn.Dense(4)
    own = {"params": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}
    stats = {"params": {"scale": jnp.ones(5), "bias": jnp.ones(5)}}
    stats["batch_stats"] = {"mean": jnp.ones(5), "var": jnp.ones(5)}
    calls = [
        ((ss.linen.SolverDense(4, solver=ONE), own, norm, stats), "layer: expected a plain layer"),
        ((nn.LayerNorm(), own, norm, stats), "layer: expected an nn.Dense or nn.Conv"),
        ((dense, own, nn.LayerNorm(), stats), "norm: expected an nn.BatchNorm, got LayerNorm"),
        ((dense, own, nn.BatchNorm(axis=1), stats), "axis of the BatchNorm: expected -1, got 1"),
        ((dense, own, norm, stats), "features of the BatchNorm: expected 4, got 5"),
        ((dense, {}, norm, stats), "variables: expected 'kernel' in the collection 'params'"),
        ((dense, own, norm, {}), "norm_variables: expected 'mean' in the collection 'batch_stats'"),
    ]
    for arguments, message in calls:
        with pytest.raises(ValueError, match=message):
            ss.linen.fold_batch_norm(*arguments)


class Blocks(nn.Module):
    """Two blocks made within a compact method, of plain convolutions."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            convs = nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))
            x = ss.linen.SolverResNetBlock(first=convs[0], second=convs[1], solver=ONE)(x)
        return x


def test_resnet_block(rng):
    convs = [nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(seed)) for seed in (1, 2)]
    params = {"first": parameters(convs[0])["params"], "second": parameters(convs[1])["params"]}
    images = jnp.asarray(rng.normal(size=(2, 5, 5, 4)), jnp.float32)
    for solver in (ONE, ss.ProxSG(0.5, 3)):
        options = {"solver": solver, "ridge": 0.1, "normalize": solver is not ONE}
        plain = nn.Conv(4, (3, 3)), nn.Conv(4, (3, 3))
        block = ss.linen.SolverResNetBlock(first=plain[0], second=plain[1], **options)
        twin = ss.nnx.SolverResNetBlock(*convs, **options)
        got = block.apply({"params": params}, images, deterministic=True)
        np.testing.assert_allclose(got, twin(images, deterministic=True), rtol=1e-4, atol=1e-5)
    hidden = nnx.relu(convs[0](images))
    wanted = nnx.relu(convs[1](hidden) + images)
    block = block.clone(solver=ONE)  # the twins within keep theirs
    assert block.first.solver == options["solver"]
    block = ss.linen.SolverResNetBlock(first=plain[0], second=plain[1], solver=ONE)
    np.testing.assert_allclose(
        block.apply({"params": params}, images), wanted, rtol=1e-4, atol=1e-5
    )
    drawn = jax.eval_shape(Blocks().init, KEY, images)["params"]
    assert sorted(drawn) == ["SolverResNetBlock_0", "SolverResNetBlock_1"]
    assert sorted(drawn["SolverResNetBlock_0"]) == ["first", "second"]


def test_problem_and_solve_of_a_bound_layer(x):
    for options in ({"normalize": True}, {"ridge": 0.1}):
        linear = nnx.Linear(9, 5, rngs=nnx.Rngs(0))
        twin = ss.nnx.SolverLinear.from_layer(linear, solver=ss.ProxGD(4), **options)
        ours = ss.linen.SolverDense.from_layer(
            nn.Dense(5, name="a"), solver=ss.ProxGD(4), **options
        )
        assert ours.name == "a"
        bound = ours.bind(parameters(linear))
        value = bound.solve(x, certify=True)
        problem, wanted = bound.problem(x), twin.problem(x)
        assert jax.tree.structure(problem) == jax.tree.structure(wanted)
        np.testing.assert_allclose(
            problem.objective(value.value), wanted.objective(twin(x)), rtol=1e-5
        )
        np.testing.assert_allclose(
            problem.certificate(value.value), value.certificate, rtol=1e-4, atol=1e-6
        )
        applied = ours.apply(parameters(linear), x, method="problem")
        np.testing.assert_array_equal(applied.linear_map.kernel, problem.linear_map.kernel)
    skipped = ours.bind(parameters(linear)).problem(x, skip=jnp.ones((3, 5)))
    assert skipped.bias.shape == (3, 5)


class LoRA(nn.Dense):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


def test_twins_keep_options_and_refuse_calls_of_their_own():
    conv = nn.Conv(4, (3,), strides=2, padding="CIRCULAR", use_bias=False, dtype=jnp.bfloat16)
    twin = ss.linen.SolverConv.from_layer(conv, solver=ONE, ridge=0.1)
    for name in ("features", "kernel_size", "strides", "padding", "use_bias", "dtype"):
        assert getattr(twin, name) == getattr(conv, name)
    assert ss.linen.SolverConv.from_layer(twin, solver=ss.ProxGD(3)).solver == ss.ProxGD(3)
    for layer, got in ((LoRA(3), "LoRA"), (conv, "Conv"), (nn.Dense, "the class Dense")):
        with pytest.raises(ValueError, match=f"layer: expected an nn.Dense without.*got {got}"):
            ss.linen.SolverDense.from_layer(layer, solver=ONE)


class Mixed(nn.Module):
    """A solver layer, batch statistics and an equilibrium layer."""

    @nn.compact
    def __call__(self, x, train=True):
        x = ss.linen.SolverDense(6, solver=ss.ProxGD(3), name="dense")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return ss.linen.EquilibriumLinear(features=4, warm_start=True, name="equilibrium")(x)


def test_refreshed_constants(x):
    model = Mixed()
    variables = model.init(KEY, x)
    _, state = model.apply(variables, x, mutable=["solver_state", "batch_stats"])
    variables = {**variables, **state}
    doubled = {**variables, "params": jax.tree.map(lambda p: 2 * p, variables["params"])}
    got = jax.jit(lambda v: ss.linen.refresh_lipschitz(model, v, x))(doubled)
    for collection in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, got[collection], doubled[collection])
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    kernel = np.asarray(doubled["params"]["dense"]["kernel"], np.float64)
    state = got["solver_state"]
    np.testing.assert_allclose(
        state["dense"]["lipschitz"], np.linalg.norm(kernel, 2) ** 2, rtol=1e-5
    )
    before = variables["solver_state"]["equilibrium"]
    np.testing.assert_array_equal(state["equilibrium"]["start"], before["start"])
    unit = ss.nnx.EquilibriumLinear(6, 4, rngs=nnx.Rngs(0))
    for name in ("kernel", "input_kernel", "bias"):
        getattr(unit, name)[...] = doubled["params"]["equilibrium"][name]
    unit.refresh_lipschitz()
    exact = nnx.to_pure_dict(nnx.state(unit, ss.nnx.SolverState))
    kept = jax.tree.leaves({k: v for k, v in state["equilibrium"].items() if k == "norm"})
    for ours, theirs in zip(kept, jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
