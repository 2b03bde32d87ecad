"""The networks: shapes, parameters by hand, blocks and their solvers, what a swap keeps."""

import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import stochsolvers as ss
from experiments import networks
from experiments.networks import (
    VGG16,
    AlexNet,
    AlexNetConfig,
    BlockConfig,
    DropoutReLU,
    DropoutSolver,
    LeNet,
    LeNetConfig,
    Method,
    VGG16Config,
)
from experiments.training.finetune import copied
from experiments.training.loop import count_parameters

SAMPLING = ("prox-sg", "prox-sg-constant", "ms2gd", "importance", "expected-smoothness")
FOLLOWING = ("prox-gd", "fista")
FULL = (*FOLLOWING, "prox-gd-no-dropout")
WITHOUT = ("none", "prox-gd-no-dropout")


def images_for(config, count=2):
    return jax.random.normal(jax.random.key(0), (count, *config.image_shape))


@pytest.fixture(scope="module")
def small_alexnet():
    with jax.enable_x64(False):
        return nnx.jit(lambda: AlexNet(AlexNetConfig(width=0.1), rngs=nnx.Rngs(0)))()


def conv(n1, n2, size):
    return n1 * n2 * size * size + n2


def dense(n1, n2):
    return n1 * n2 + n2


def test_alexnet_is_the_papers():
    model = nnx.eval_shape(lambda: AlexNet(AlexNetConfig(), rngs=nnx.Rngs(0)))
    expected = conv(3, 64, 11) + conv(64, 192, 5) + conv(192, 384, 3) + conv(384, 256, 3)
    expected += conv(256, 256, 3) + dense(256, 10)
    assert count_parameters(model) == expected
    assert model.last is None
    shape = jax.eval_shape(lambda m, x: m.first(x), model.features, jnp.zeros((2, 32, 32, 3))).shape
    assert shape == (2, 8, 8, 64)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_vgg16_is_the_papers(batch_norm):
    config = VGG16Config(num_classes=100, batch_norm=batch_norm)
    model = nnx.eval_shape(lambda: VGG16(config, rngs=nnx.Rngs(0)))
    sizes = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    expected = sum(conv(n1, n2, 3) for n1, n2 in itertools.pairwise(sizes))
    expected += sum(sizes[1:]) if batch_norm else 0  # scale and shift instead of a bias
    expected += 2 * dense(512, 512) + dense(512, 100)
    assert count_parameters(model) == expected
    for layer in (model.penultimate, model.last):
        assert isinstance(layer, DropoutReLU)
        assert layer.dropout.rate == 0.5


@pytest.mark.parametrize("width", [0.5, 1.0, 4.0])
def test_lenet_is_the_papers_times_its_width(width):
    model = nnx.eval_shape(lambda: LeNet(LeNetConfig(width=width), rngs=nnx.Rngs(0)))
    first, second, penultimate, last = (int(width * count) for count in (6, 16, 120, 84))
    expected = conv(3, first, 5) + conv(first, second, 5) + dense(25 * second, penultimate)
    expected += dense(penultimate, last) + dense(last, 10)
    assert count_parameters(model) == expected
    assert model.features.size == 25 * second


@pytest.mark.parametrize("size", [(8, 8, 1), (9, 13, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize("network", ["alexnet", "alexnet hidden", "vgg16"])
def test_small_images_fit(network, size):
    if network == "vgg16":
        config, make = VGG16Config(size, 7, width=0.05), VGG16
    else:
        config = AlexNetConfig(size, 7, width=0.05, hidden=40 if "hidden" in network else None)
        make = AlexNet

    def logits():
        model = make(config, rngs=nnx.Rngs(0))
        x = jnp.zeros((3, *size))
        assert model.features(x).ndim == 2
        return model(x)

    assert jax.eval_shape(logits).shape == (3, 7)


@pytest.mark.parametrize(
    ("make", "config"), [(AlexNet, AlexNetConfig((7, 32, 3))), (VGG16, VGG16Config((32, 7, 3)))]
)
def test_tiny_images_are_refused(make, config):
    with pytest.raises(ValueError, match="expected at least 8×8 pixels"):
        make(config, rngs=nnx.Rngs(0))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="width: expected a positive factor"):
        AlexNet(AlexNetConfig(width=-1.0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="width: expected a positive factor"):
        LeNet(LeNetConfig(width=0.0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="method: expected one of dropout, prox-sg"):
        BlockConfig("adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rate: expected a dropout rate in \[0, 1\)"):
        BlockConfig(rate=1.0)
    with pytest.raises(ValueError, match="expected one that solves"):
        BlockConfig("dropout").solver()


def test_the_methods_are_the_solvers_they_say():
    solvers = {method: BlockConfig(method, rate=0.25).solver() for method in SAMPLING + FULL}
    assert solvers["prox-sg"] == ss.ProxSG(tau=0.75, num_iters=10, decay=0.9)
    assert solvers["prox-sg-constant"] == ss.ProxSG(tau=0.75, num_iters=10)
    assert solvers["importance"].sampling == ss.estimators.Importance(0.75, by="lipschitz")
    smooth = solvers["expected-smoothness"]
    assert smooth.step_size == ss.InverseExpectedSmoothness(decay=0.9)
    assert (solvers["ms2gd"].num_outer, solvers["ms2gd"].num_inner) == (2, 5)
    assert solvers["prox-gd"] == solvers["prox-gd-no-dropout"] == ss.ProxGD(10)
    assert solvers["fista"] == ss.ProxGD(10, momentum=True)
    assert set(networks.NAMES) == set(get_args(Method)) == {*networks.PLAIN, *solvers}
    assert set(networks.FULL) == set(FULL)


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_in_a_layer(method):
    block = BlockConfig(method, num_iters=4)
    layer = networks.hidden_layer(20, 6, marked=True, block=block, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (5, 20))

    def outputs(mode):
        networks.set_mode(layer, mode)
        return layer(x), layer(x)

    varies = {mode: not np.array_equal(*outputs(mode)) for mode in ("train", "test")}
    # dropout is for training, sampling is for the test as well
    assert varies == {"train": method not in WITHOUT, "test": method in SAMPLING}
    networks.set_mode(layer, "deterministic")
    np.testing.assert_array_equal(layer(x), layer(x))
    assert networks.has_stochastic_solver(layer) == (method in SAMPLING)
    assert isinstance(layer, DropoutSolver) == (method in FULL)
    assert count_parameters(layer) == dense(20, 6)

    def loss(layer):
        return jnp.sum(layer(x) ** 2)

    gradients = nnx.grad(loss)(layer)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_the_control_is_the_plain_layer():
    block = BlockConfig("none", rate=0.9)
    layer = networks.hidden_layer(20, 6, marked=True, block=block, rngs=nnx.Rngs(0))
    dropped = networks.hidden_layer(
        20, 6, marked=True, block=BlockConfig("dropout"), rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (5, 20))
    kernel, bias = (np.asarray(value[...]) for value in (layer.linear.kernel, layer.linear.bias))
    np.testing.assert_array_equal(dropped.linear.kernel[...], kernel)  # the same initial weights
    networks.set_mode(layer, "train")
    np.testing.assert_allclose(layer(x), np.maximum(x @ kernel + bias, 0), rtol=1e-5, atol=1e-6)


def test_a_swap_shares_parameters_and_keeps_the_rest():
    plain = networks.hidden_layer(
        12, 5, marked=True, block=BlockConfig("dropout"), rngs=nnx.Rngs(0)
    )
    for method in SAMPLING + FULL:
        twin = networks.swap_hidden(plain, BlockConfig(method), rngs=nnx.Rngs(1))
        solver = networks.solver_of(twin)
        assert solver.kernel is plain.linear.kernel
        assert solver.bias is plain.linear.bias
        assert solver.ridge == 1e-3
    other = networks.swap_hidden(plain, BlockConfig("dropout", rate=0.9), rngs=nnx.Rngs(1))
    assert (other.dropout.rate, other.linear is plain.linear) == (0.9, True)
    other = networks.swap_hidden(plain, BlockConfig("none", rate=0.9), rngs=nnx.Rngs(1))
    assert (other.dropout.rate, other.linear is plain.linear) == (0.0, True)
    with pytest.raises(ValueError, match="expected a plain layer"):
        networks.swap_hidden(twin.linear, BlockConfig("dropout"), rngs=nnx.Rngs(1))


@pytest.mark.optimized
@pytest.mark.parametrize("method", FOLLOWING)
def test_one_unit_step_is_the_plain_network(method):
    one_step = BlockConfig(method, num_iters=1, step_size=1.0)
    config = LeNetConfig((16, 16, 1), block=BlockConfig("dropout"))
    model = nnx.jit(lambda: LeNet(config, rngs=nnx.Rngs(0)))()
    hidden = jax.random.normal(jax.random.key(0), (3, 16))
    networks.set_mode(model, "test")
    before = model.head(hidden)
    model.penultimate = networks.swap_hidden(model.penultimate, one_step, rngs=nnx.Rngs(1))
    model.last = networks.swap_hidden(model.last, one_step, rngs=nnx.Rngs(1))
    networks.set_mode(model, "test")
    np.testing.assert_array_equal(model.head(hidden), before)
    assert not model.is_stochastic


@pytest.mark.optimized
def test_one_unit_step_is_the_plain_convolution(small_alexnet):
    model = copied(small_alexnet)
    x = images_for(AlexNetConfig(), 3)
    before = model(x)
    one_step = BlockConfig("prox-gd", num_iters=1, step_size=1.0)
    features = model.features
    features.first = networks.swap_conv(features.first, one_step, features.image_size)
    np.testing.assert_array_equal(model(x), before)


def test_all_inputs_in_one_unit_step_are_the_plain_layer():
    plain = networks.hidden_layer(
        12, 5, marked=True, block=BlockConfig("dropout", rate=0.0), rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (3, 12))
    block = BlockConfig("prox-sg", rate=0.0, num_iters=1, step_size=1.0)
    twin = networks.swap_hidden(plain, block, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(twin(x), plain(x), rtol=1e-6)


def test_the_first_layer_has_the_constant_of_its_unpadded_grid(small_alexnet):
    features = copied(small_alexnet).features
    kernel = features.first.conv.kernel[...]
    prox_gd = BlockConfig("prox-gd")
    features.first = networks.swap_conv(features.first, prox_gd, features.image_size)
    state = nnx.state(features.first, ss.nnx.SolverState)
    constants = jax.tree.leaves(state)
    plain = ss.Conv(kernel, (32, 32), strides=(4, 4), padding=((5, 5), (5, 5)))
    np.testing.assert_allclose(constants[0], ss.lipschitz_constant(plain), rtol=1e-5)
    # the parameters have moved, the constant follows
    features.first.kernel[...] = 2 * kernel
    ss.nnx.refresh_lipschitz(features)
    refreshed = jax.tree.leaves(nnx.state(features.first, ss.nnx.SolverState))
    np.testing.assert_allclose(refreshed[0], 4 * constants[0], rtol=1e-5)


def test_what_a_convolution_cannot_be_swapped_for():
    layer = networks.ConvReLU(2, 3, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected one of prox-gd, fista, got prox-sg"):
        networks.swap_conv(layer, BlockConfig("prox-sg"), (8, 8))
    layer = networks.ConvReLU(2, 3, (3, 3), batch_norm=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="without batch normalisation"):
        networks.swap_conv(layer, BlockConfig("prox-gd"), (8, 8))


def test_batch_normalisation_learns_in_training_only():
    layer = networks.ConvReLU(1, 2, (3, 3), batch_norm=True, rngs=nnx.Rngs(0))
    x = 3 + images_for(VGG16Config((8, 8, 1)), 4)

    def mean_after(mode):
        networks.set_mode(layer, mode)
        layer(x)
        return np.asarray(layer.norm.mean[...])

    np.testing.assert_array_equal(mean_after("test"), 0)
    np.testing.assert_array_equal(mean_after("deterministic"), 0)
    assert np.any(mean_after("train") != 0)
