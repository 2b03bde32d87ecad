"""One iteration of a solver is a layer: Bibi et al. 2019, propositions 1, 2 and 6, and eq. 3.

The right-hand sides are plain Flax and jax.numpy code: dropout, `nnx.Linear` or `nn.Conv`, activation.
The samplings enter only through the masks of the same keys.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalence.plain_layers import Geometry, forward, transposed
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import stochsolvers as ss
from stochsolvers import prox
from stochsolvers.sampling import tau_nice_mask

# prior g <-> the activation that is its proximal operator for a unit step
ACTIVATIONS = {
    "identity": (prox.Zero(), lambda v: v),
    "relu": (prox.NonNegative(), jax.nn.relu),
    "leaky relu": (prox.SquaredHinge(1 / 0.2 - 1), lambda v: jax.nn.leaky_relu(v, 0.2)),
    "squareplus": (prox.LogBarrier(0.7), lambda v: jax.nn.squareplus(v, 4 * 0.7)),
    "hard tanh": (prox.Box(-1.0, 1.0), jax.nn.hard_tanh),
    "relu6": (prox.Box(0.0, 6.0), jax.nn.relu6),
    "soft": (prox.L1(0.4), lambda v: jnp.sign(v) * jnp.maximum(jnp.abs(v) - 0.4, 0)),
}
DENSE = [(4, 3), (1, 3), (5, 6)]
CONVOLUTIONS = [
    Geometry((4, 3), (3, 3), 4, 3),
    Geometry((4, 4), (2, 3), 4, 2, "CIRCULAR", strides=(2, 2), groups=2),
    Geometry((4, 3), (2, 2), 3, 2, ((1, 0), (0, 2)), dilation=(2, 1)),
]
ROUND_OFF = {"rtol": 1e-11, "atol": 1e-11}
seeds = st.integers(0, 2**31 - 1)
activations = st.sampled_from(list(ACTIVATIONS))
dense_shapes, geometries = st.sampled_from(DENSE), st.sampled_from(CONVOLUTIONS)
batches = st.sampled_from([(), (2, 3)])
fractions = st.floats(0, 1)
few = settings(max_examples=8)  # compilation is what takes the time


class Layer:
    """Random weights and inputs, once for the library and once for a plain Flax layer.

    Only the layers and activations of the reference are JAX; the rest of it is numpy.
    """

    def __init__(self, shape, batch, seed):
        rng = np.random.default_rng(seed)
        self.batch, self.key = batch, jax.random.key(seed)
        if isinstance(shape, Geometry):
            self.n1, self.n2, self.spatial = shape.in_features, shape.out_features, (1, 1)
            kernel, in_shape = jnp.asarray(shape.kernel(rng)), shape.in_shape
            self.linear_map = ss.Conv(kernel, shape.spatial_shape, **shape.options)
            self.layer = functools.partial(forward(shape), kernel)
        else:
            (self.n1, self.n2), self.spatial, in_shape = shape, (), shape[:1]
            kernel = jnp.asarray(rng.normal(size=shape))
            self.linear_map = ss.Dense(kernel)
            self.layer = nnx.Linear(
                *shape, use_bias=False, kernel_init=lambda *_: kernel, rngs=nnx.Rngs(0)
            )
        self.shape, self.kernel = shape, kernel
        self.x = rng.normal(size=(*batch, *in_shape))
        self.bias = rng.normal(size=self.n2)

    def forward(self, x):
        """The plain layer without its bias."""
        return np.asarray(self.layer(jnp.asarray(x)))

    def transposed(self, z):
        """The plain layer's transpose."""
        if isinstance(self.shape, Geometry):
            return np.asarray(transposed(self.shape)(self.kernel, self.x, z))
        return z @ np.asarray(self.kernel).T

    def problem(self, prior, **kwargs):
        x, bias = jnp.asarray(self.x), jnp.asarray(self.bias)
        return ss.LayerProblem(self.linear_map, x, bias=bias, prior=prior, **kwargs)

    def mask(self, iteration, tau, n):
        """The τ-nice mask of one iteration, broadcast over whole feature maps."""
        mask = np.asarray(draw(jax.random.fold_in(self.key, iteration), tau, n, self.batch))
        assert np.all(np.sum(mask, axis=-1) == tau)
        return mask.reshape(*self.batch, *self.spatial, n)


draw = jax.jit(tau_nice_mask, static_argnames=("n", "batch_shape"))


def count(fraction, n):
    """τ in 1..n, traced by the solvers below, so that all counts of a shape compile once."""
    return 1 + min(int(fraction * n), n - 1)


@functools.partial(jax.jit, static_argnames="num_iters")
def prox_sg(key, problem, tau, num_iters=1):
    return ss.prox_sg(key, problem, tau=tau, step_size=1.0, num_iters=num_iters).value


@functools.partial(jax.jit, static_argnames=("num_outer", "num_inner"))
def ms2gd(key, problem, tau, step_size=1.0, num_outer=1, num_inner=3):
    return ss.ms2gd(
        key, problem, tau=tau, step_size=step_size, num_outer=num_outer, num_inner=num_inner
    ).value


@jax.jit
def nsync(key, problem, tau):
    return ss.nsync(key, problem, tau=tau, num_iters=1, step_size=1.0).value


@functools.partial(jax.jit, static_argnames="num_iters")
def prox_gd(problem, step_size, num_iters=1):
    return ss.prox_gd(problem, step_size=step_size, num_iters=num_iters).value


shape_kinds = pytest.mark.parametrize("shape", [DENSE[0], CONVOLUTIONS[0]], ids=["dense", "conv"])


@pytest.mark.parametrize("name", ACTIVATIONS)
@shape_kinds
def test_one_iteration_of_prox_gd_is_the_plain_layer(shape, name):
    layer, (prior, activation) = Layer(shape, (2, 3), 1), ACTIVATIONS[name]
    plain = np.asarray(activation(layer.forward(layer.x) + layer.bias))
    chex.assert_trees_all_close(prox_gd(layer.problem(prior), 1.0), plain, **ROUND_OFF)


@shape_kinds
def test_one_iteration_without_noise_is_the_plain_layer(shape):
    """Sampling everything is no sampling, and the first inner step of mS2GD has no noise."""
    layer = Layer(shape, (2, 3), 1)
    plain = np.maximum(layer.forward(layer.x) + layer.bias, 0)
    problem = layer.problem(prox.NonNegative())
    chex.assert_trees_all_close(ms2gd(layer.key, problem, 1, num_inner=1), plain, **ROUND_OFF)
    chex.assert_trees_all_close(prox_sg(layer.key, problem, layer.n1), plain, **ROUND_OFF)
    chex.assert_trees_all_close(nsync(layer.key, problem, layer.n2), plain, **ROUND_OFF)


def check_proposition_1(layer, name, fraction):
    """Prox-SG from 0 with unit step: dropout of exactly n1 − τ inputs → linear → activation."""
    prior, activation = ACTIVATIONS[name]
    tau = count(fraction, layer.n1)
    dropped = np.where(layer.mask(0, tau, layer.n1), layer.x / (tau / layer.n1), 0)
    chex.assert_trees_all_close(
        prox_sg(layer.key, layer.problem(prior), tau),
        activation(layer.forward(dropped) + layer.bias),
        **ROUND_OFF,
    )


@few
@given(dense_shapes, batches, activations, fractions, seeds)
def test_proposition_1_dense(shape, batch, name, fraction, seed):
    check_proposition_1(Layer(shape, batch, seed), name, fraction)


@few
@given(geometries, batches, activations, fractions, seeds)
def test_proposition_1_conv(geometry, batch, name, fraction, seed):
    check_proposition_1(Layer(geometry, batch, seed), name, fraction)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9])
def test_proposition_1_states_tau_as_a_dropout_rate(rate):
    """τ = (1 − p) n1 as a fraction: exactly p n1 inputs drop, the rest are scaled by 1/(1 − p)."""
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, size=(6, 20)))
    problem = ss.LayerProblem(ss.Dense(jnp.eye(20)), x, prior=prox.Zero())
    value = ss.prox_sg(jax.random.key(0), problem, tau=1.0 - rate, step_size=1.0, num_iters=1).value
    zeros = np.asarray(value) == 0
    np.testing.assert_array_equal(zeros.sum(axis=-1), round(20 * rate))
    chex.assert_trees_all_close(value, jnp.where(zeros, 0, x / (1 - rate)), **ROUND_OFF)


def check_proposition_2(layer, name, tau, num_inner):
    """mS2GD's first epoch: z ← σ(A x + b + (I − (n1/τ) Σ_{i∈S} A_i A_i*) z), eq. 31, each step."""
    prior, activation = ACTIVATIONS[name]
    plain = layer.forward(layer.x) + layer.bias
    z = np.zeros_like(plain)
    for j in range(num_inner):
        kept = layer.mask(j, tau, layer.n1) * layer.transposed(z)
        z = np.asarray(activation(plain + z - (layer.n1 / tau) * layer.forward(kept)))
    value = ms2gd(layer.key, layer.problem(prior), tau, num_inner=num_inner)
    # unit steps may amplify: round-off is relative to the largest entry
    scale = np.max(np.abs(z)) + 1.0
    chex.assert_trees_all_close(np.asarray(value) / scale, z / scale, **ROUND_OFF)


@few
@given(dense_shapes, batches, activations, fractions, seeds)
def test_proposition_2_dense(shape, batch, name, fraction, seed):
    layer = Layer(shape, batch, seed)
    check_proposition_2(layer, name, count(fraction, layer.n1), 3)


@few
@given(geometries, batches, activations, fractions, seeds)
def test_proposition_2_conv(geometry, batch, name, fraction, seed):
    layer = Layer(geometry, batch, seed)
    check_proposition_2(layer, name, count(fraction, layer.n1), 3)


@shape_kinds
def test_proposition_2_with_one_sample_is_s2gd(shape):
    check_proposition_2(Layer(shape, (2, 3), 2), "relu", 1, 3)


def test_proposition_2_needs_the_random_term():
    """The second inner step is the first that is noisy: two keys agree before it, not after."""
    layer = Layer(DENSE[2], (3,), 4)
    problem, other = layer.problem(prox.Zero()), jax.random.key(5)
    first = ms2gd(layer.key, problem, 2, num_inner=1)
    chex.assert_trees_all_close(first, ms2gd(other, problem, 2, num_inner=1), **ROUND_OFF)
    second = ms2gd(layer.key, problem, 2, num_inner=2)
    assert np.max(np.abs(second - ms2gd(other, problem, 2, num_inner=2))) > 0.1


def test_ms2gd_over_two_epochs_is_its_definition():
    """z ← σ(z − η[∇F(y) + ∇Ψ_S(z) − ∇Ψ_S(y)]), y the last inner iterate of the epoch before."""
    layer, step, ridge, tau = Layer(DENSE[0], (3,), 6), 0.1, 0.2, 2
    problem = layer.problem(prox.NonNegative(), ridge=ridge)

    def gradient(z, weights):
        residual = weights * (layer.transposed(z) - layer.x)
        return layer.forward(residual) - layer.bias + ridge * z

    z = np.zeros((3, layer.n2))
    for epoch in range(2):
        y = z
        for j in (3 * epoch, 3 * epoch + 1, 3 * epoch + 2):
            weights = layer.mask(j, tau, layer.n1) * (layer.n1 / tau)
            estimate = gradient(y, 1.0) + gradient(z, weights) - gradient(y, weights)
            z = np.maximum(z - step * estimate, 0)
    value = ms2gd(layer.key, problem, tau, step, num_outer=2, num_inner=3)
    chex.assert_trees_all_close(value, z, **ROUND_OFF)


def check_proposition_6(layer, name, fraction):
    """NSync from 0 with v = 1: linear → dropout of exactly n2 − τ outputs, unscaled → activation."""
    prior, activation = ACTIVATIONS[name]
    tau = count(fraction, layer.n2)
    plain = layer.forward(layer.x) + layer.bias
    chex.assert_trees_all_close(
        nsync(layer.key, layer.problem(prior), tau),
        activation(np.where(layer.mask(0, tau, layer.n2), plain, 0)),
        **ROUND_OFF,
    )


@few
@given(dense_shapes, batches, activations, fractions, seeds)
def test_proposition_6_dense(shape, batch, name, fraction, seed):
    check_proposition_6(Layer(shape, batch, seed), name, fraction)


@few
@given(geometries, batches, activations, fractions, seeds)
def test_proposition_6_conv(geometry, batch, name, fraction, seed):
    check_proposition_6(Layer(geometry, batch, seed), name, fraction)


NUMPY_PROX = {
    "relu": lambda v, step: np.maximum(v, 0),
    "leaky relu": lambda v, step: np.where(v >= 0, v, v / (1 + step * 4.0)),
    "soft": lambda v, step: np.sign(v) * np.maximum(np.abs(v) - step * 0.4, 0),
    "squareplus": lambda v, step: v / 2 + np.sqrt(v**2 / 4 + step * 0.7),
}


@pytest.mark.parametrize("name", NUMPY_PROX)
@shape_kinds
def test_iterations_of_prox_gd_are_equation_3(shape, name):
    """z ← prox_{ηg}(z − η(A(A* z − x) − b)), K times, in numpy with the plain layer's matrix."""
    layer, step, num_iters = Layer(shape, (2,), 8), 0.05, 7
    size = layer.x[0].size
    units = np.eye(size).reshape(size, *layer.x.shape[1:])
    matrix, x = layer.forward(units).reshape(size, -1).T, layer.x.reshape(2, size)
    bias = np.tile(layer.bias, len(matrix) // layer.n2)
    z = np.zeros((2, len(matrix)))
    for _ in range(num_iters):
        z = NUMPY_PROX[name](z - step * ((z @ matrix - x) @ matrix.T - bias), step)
    value = prox_gd(layer.problem(ACTIVATIONS[name][0]), step, num_iters=num_iters)
    chex.assert_trees_all_close(np.asarray(value).reshape(2, -1), z, **ROUND_OFF)
