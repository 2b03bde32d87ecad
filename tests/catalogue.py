"""Every map, loss, prior, estimator, step size, solver and layer of the library once, small.

The contracts run over all of them. To add one, write a line: the first word of its name is that by which the
library exports it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def cumulative(x):
    return jnp.cumsum(x, axis=-1)


SQUARE = normal(0, 2, 2, 2, 3)  # a kernel of two by two pixels
MAPS = {
    "Dense": ss.Dense(normal(1, 4, 3)),
    "Conv": ss.Conv(SQUARE, (3, 3), strides=(2, 1)),
    "Conv on one axis": ss.Conv(normal(2, 2, 2, 3), (4,), padding="CIRCULAR"),
    "Conv on three axes": ss.Conv(normal(3, 1, 2, 2, 1, 2), (2, 2, 2), padding="VALID"),
    "Conv in groups": ss.Conv(normal(4, 2, 2, 2, 4), (2, 3), feature_group_count=2),
    "conv_transpose": ss.conv_transpose(normal(5, 2, 2, 2, 3), (2, 2), strides=2),
    "Contraction": ss.Contraction("ab,bcd->acd", normal(6, 3, 2, 2), (2, 3)),
    "dense_general": ss.dense_general(normal(7, 2, 3, 4), (2, 3), axis=(-2, -1)),
    "Transposed": ss.Dense(normal(8, 4, 3)).T,
    "Matrix": ss.linear_maps.Matrix(normal(9, 6, 4), (2, 3), (4,)),
    "linear_map": ss.linear_map(cumulative, (5,)),
    "linear_map times a number": -1.5 * ss.linear_map(cumulative, (5,)),
    "linear_map of two axes": ss.linear_map(lambda x: jnp.roll(x, 1, 0) @ SQUARE[0, 0], (2, 2)),
    "convex.GatedMap": ss.convex.GatedMap(
        normal(16, 4, 2),
        ss.convex.Patterns(normal(17, 2, 3), normal(16, 4, 2) @ normal(17, 2, 3) >= 0),
        outputs=2,
    ),
}
LABELS = jnp.sign(normal(10, 2, 4))
LOSSES = {
    "Squares": (ss.losses.Squares(), normal(11, 2, 4)),
    "Huber": (ss.losses.Huber(0.5), normal(11, 2, 4)),
    "Logistic": (ss.losses.Logistic(), LABELS),
    "CrossEntropy": (ss.losses.CrossEntropy(), jnp.eye(3)[:, [0, 1, 2, 0]]),
    "Scaled": (2.5 * ss.losses.Huber(0.5), normal(11, 2, 4)),
}
PRIORS = {
    "Zero": ss.prox.Zero(),
    "NonNegative": ss.prox.NonNegative(),
    "SquaredHinge": ss.prox.SquaredHinge(0.3),
    "leaky_relu_prior": ss.prox.leaky_relu_prior(0.2),
    "LogBarrier": ss.prox.LogBarrier(0.3),
    "SymmetricLogBarrier": ss.prox.SymmetricLogBarrier(0.3),
    "IntervalLogBarrier": ss.prox.IntervalLogBarrier(0.3),
    "L1": ss.prox.L1(0.3),
    "Box": ss.prox.Box(-0.3, 0.4),
    "GroupL2": ss.prox.GroupL2(0.3),
    "NuclearNorm": ss.prox.NuclearNorm(0.3),
    "NuclearNorm with weights": ss.prox.NuclearNorm(0.3, weights=jnp.asarray([1.5, 0.5, 0.2])),
    "PositiveSemidefinite": ss.prox.PositiveSemidefinite(),
    "Tanh": ss.prox.Tanh(),
    "Sigmoid": ss.prox.Sigmoid(),
    "Softplus": ss.prox.Softplus(),
    "ELU": ss.prox.ELU(0.6),
    "Softsign": ss.prox.Softsign(),
    "Arctan": ss.prox.Arctan(),
    "LeakyReLU": ss.prox.LeakyReLU(0.2),
    "Activation": ss.prox.Activation(jax.nn.squareplus),
    "Simplex": ss.prox.Simplex(),
    "Entropy": ss.prox.Entropy(),
    "L2Ball": ss.prox.L2Ball(0.8),
    "ElasticNet": ss.prox.ElasticNet(0.3, 0.5),
    "NonNegativeL1": ss.prox.NonNegativeL1(0.3),
    "Scaled": ss.prox.Scaled(ss.prox.L1(0.3), 1.5),
    "Scaled groups": ss.prox.Scaled(ss.prox.GroupL2(0.3), 1.5),
}
SHAPES = {
    "NuclearNorm": (2, 2, 3),
    "NuclearNorm with weights": (2, 3, 3),
    "PositiveSemidefinite": (2, 2, 2),
}  # of arguments; (4,) if not here
PROBLEM = ss.LayerProblem(
    MAPS["Dense"], normal(12, 2, 4), bias=normal(13, 3), prior=ss.prox.L1(0.05), ridge=0.3
)
PAIRS = np.array(
    [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0]]
)
COINS = np.array([[i >> j & 1 for j in range(4)] for i in range(16)])
ESTIMATORS = {  # with the law of their draws, where it does not depend on the problem
    "Full": (ss.estimators.Full(), None),
    "TauNice": (ss.estimators.TauNice(2), (2.0 * PAIRS, np.full(6, 1 / 6))),
    "TauNice shared": (ss.estimators.TauNice(2, shared=True), None),
    "Bernoulli": (
        ss.estimators.Bernoulli(0.4),
        (COINS / 0.4, 0.4 ** COINS.sum(1) * 0.6 ** (4 - COINS.sum(1))),
    ),
    "SerialImportance": (ss.estimators.SerialImportance(), None),
    "Importance": (ss.estimators.Importance(2), None),
    "Importance by gradient": (ss.estimators.Importance(2, by="gradient"), None),
    "OutputCoordinates": (ss.estimators.OutputCoordinates(2), None),
    "VarianceReduced": (
        ss.estimators.VarianceReduced.at(
            PROBLEM, jnp.ones(PROBLEM.shape, PROBLEM.dtype), ss.estimators.TauNice(2)
        ),
        None,
    ),
}
STEP_SIZES = {  # with the estimator that they are for
    "InverseLipschitz": (ss.InverseLipschitz(decay=0.99), None),
    "InverseExpectedSmoothness": (ss.InverseExpectedSmoothness(), ss.estimators.TauNice(2)),
    "InverseSeparable": (ss.InverseSeparable(), ss.estimators.OutputCoordinates(2)),
    "exponential_decay": (ss.exponential_decay(0.05, 0.9), None),
    "number": (0.05, None),
    "None": (None, None),
}
SOLVERS = {
    "ProxGD": ss.ProxGD(4),
    "ProxGD with momentum": ss.ProxGD(4, momentum=True),
    "ProxGD with restart": ss.ProxGD(4, momentum=True, restart=True),
    "FixedPoint": ss.FixedPoint(4),
    "Anderson": ss.Anderson(4, memory=3),
    "ProxSG": ss.ProxSG(0.5, 4, decay=0.9),
    "ProxSG with importance": ss.ProxSG(None, 4, 0.05, sampling=ss.estimators.Importance(2)),
    "MS2GD": ss.MS2GD(0.5, 2, 2),
    "MS2GD of random lengths": ss.MS2GD(0.5, 2, 2, 0.05, random_inner=True),
    "NSync": ss.NSync(0.5, 4),
}
VECTORS, IMAGES = normal(14, 3, 4), normal(15, 2, 3, 3, 2)


class Layer(NamedTuple):
    """A layer, inputs for it and, of a Linen module, its variables."""

    layer: Any
    inputs: jax.Array
    variables: Any = None


def linen(layer, inputs):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return Layer(layer, inputs, layer.init(keys, inputs))


def streams():
    return nnx.Rngs(0, dropout=1)


LAYERS = {
    "nnx.SolverLinear": lambda: Layer(
        ss.nnx.SolverLinear(4, 3, solver=ss.ProxSG(0.5, 3), rngs=streams()), VECTORS
    ),
    "nnx.SolverLinear normalised": lambda: Layer(
        ss.nnx.SolverLinear(
            4, 3, solver=ss.ProxGD(3), normalize=True, output="pre_activation", rngs=streams()
        ),
        VECTORS,
    ),
    "nnx.SolverConv": lambda: Layer(
        ss.nnx.SolverConv(2, 3, (2, 2), solver=ss.ProxGD(2), spatial_shape=(3, 3), rngs=streams()),
        IMAGES,
    ),
    "nnx.SolverConvTranspose": lambda: Layer(
        ss.nnx.SolverConvTranspose(
            2,
            3,
            (2, 2),
            2,
            solver=ss.ProxSG(0.5, 5),
            spatial_shape=(3, 3),
            bias_init=nnx.initializers.normal(),  # of zeros an iterate can be at the kink of ReLU
            rngs=streams(),
        ),
        IMAGES,
    ),
    "linen.SolverConvTranspose": lambda: linen(
        ss.linen.SolverConvTranspose(3, (2, 2), solver=ss.ProxGD(2)), IMAGES
    ),
    "nnx.SolverLinearGeneral": lambda: Layer(
        ss.nnx.SolverLinearGeneral(4, 3, solver=ss.ProxGD(2), rngs=streams()), VECTORS
    ),
    "linen.SolverDenseGeneral": lambda: linen(
        ss.linen.SolverDenseGeneral(3, solver=ss.ProxGD(2)), VECTORS
    ),
    "linen.SolverDense": lambda: linen(ss.linen.SolverDense(3, solver=ss.ProxSG(0.5, 3)), VECTORS),
    "linen.SolverConv": lambda: linen(ss.linen.SolverConv(3, (2, 2), solver=ss.ProxGD(2)), IMAGES),
}


@ss.value_object
class Decay(ss.FixedPointProblem):
    """z = tanh(z / 2 + x), as a problem of a user's own."""

    drive: jax.Array

    batch_shape = property(lambda self: self.drive.shape[:-1])
    shape = property(lambda self: self.drive.shape)
    dtype = property(lambda self: self.drive.dtype)

    def layer(self, z):
        return jnp.tanh(0.5 * z + self.drive)

    def certificate(self, z):
        return 2 * self.norm(z - self.layer(z))


class DecayLayer(ss.nnx.Equilibrium):
    """A layer of a user's own."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(4, jnp.float32))
        self.init_equilibrium()

    def problem(self, inputs):
        scale = jnp.expand_dims(self.scale[...], range(inputs.ndim - 1))
        return Decay((scale * inputs).astype(jnp.promote_types(inputs.dtype, jnp.float32)))


class LinenDecayLayer(ss.linen.Equilibrium):
    """The same in Linen."""

    @nn.compact
    def problem(self, inputs):
        scale = self.param("scale", nn.initializers.ones_init(), (4,), jnp.float32)
        scale = jnp.expand_dims(scale, range(inputs.ndim - 1))
        return Decay((scale * inputs).astype(jnp.promote_types(inputs.dtype, jnp.float32)))


def members(room, count=2):
    """Layers of a composition, as the constructors of a room make them."""
    if room is ss.linen:
        return [room.EquilibriumLinear(features=3, hidden_features=5) for _ in range(count)]
    return [room.EquilibriumLinear(4, 3, 5, rngs=nnx.Rngs(k)) for k in range(count)]


EQUILIBRIA = {
    "nnx.Equilibrium": lambda: Layer(DecayLayer(), VECTORS),
    "nnx.EquilibriumLinear": lambda: Layer(
        ss.nnx.EquilibriumLinear(4, 3, 5, prior=ss.prox.Tanh(), rngs=streams()), VECTORS
    ),
    "nnx.EquilibriumConv": lambda: Layer(
        ss.nnx.EquilibriumConv(2, 3, (2, 2), spatial_shape=(3, 3), strides=2, rngs=streams()),
        IMAGES,
    ),
    "nnx.DeepEquilibrium": lambda: Layer(ss.nnx.DeepEquilibrium(members(ss.nnx)), VECTORS),
    "linen.Equilibrium": lambda: linen(LinenDecayLayer(), VECTORS),
    "linen.EquilibriumLinear": lambda: linen(
        ss.linen.EquilibriumLinear(features=3, hidden_features=5, prior=ss.prox.Tanh()), VECTORS
    ),
    "linen.EquilibriumConv": lambda: linen(
        ss.linen.EquilibriumConv(features=3, kernel_size=(2, 2), strides=2), IMAGES
    ),
    "linen.DeepEquilibrium": lambda: linen(
        ss.linen.DeepEquilibrium(layers=members(ss.linen), warm_start=True), VECTORS
    ),
}


class Equivalence(NamedTuple):
    """Arguments of `assert_equivalent`."""

    layer: Any
    block: Any
    inputs: jax.Array
    options: Any = {}  # noqa: RUF012 - read only


def resnet_block():
    first, second = (nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(i)) for i in (0, 1))
    layer = ss.nnx.SolverResNetBlock(first, second, solver=ss.ProxGD(1, 1.0), rngs=streams())
    relu = jax.nn.relu
    return Equivalence(layer, lambda x: relu(second(relu(first(x))) + x), IMAGES)


def dropout(kind, block, **options):
    """A dropout module, which takes its key as `rngs`, and the block that it is."""
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    layer = kind(linear) if kind in (additive, importance) else kind(2)
    return Equivalence(layer, block(linear), VECTORS[0], options)


def additive(linear):
    layer = ss.nnx.AdditiveDropout(linear, 2)
    return lambda key, x: layer(x, jnp.ones(3), rngs=key)


def importance(linear):
    return ss.nnx.ImportanceDropout(linear, 2)


def plain_additive(linear):
    """W x + b + (I − Wᵀ (2 m ⊙ W)) z at z = 1, in the terms of matrices."""

    def block(key, x):
        W, z = linear.kernel[...], jnp.ones(3)
        mask = jax.random.permutation(key, jnp.array([2.0, 2.0, 0.0, 0.0]))
        return linear(x) + z - (mask * (z @ W.T)) @ W

    return block


def plain_importance(linear):
    dense = ss.Dense(linear.kernel[...])
    return lambda key, x: ss.dropout.importance_dropout(key, dense, x, 2)


EQUIVALENCES = {  # layers that one iteration is, and the blocks that they are
    "nnx.SolverResNetBlock": resnet_block,
    "nnx.TauNiceDropout": lambda: dropout(ss.nnx.TauNiceDropout, lambda _: lambda x: x, tau=2),
    "nnx.OutputDropout": lambda: dropout(ss.nnx.OutputDropout, lambda _: lambda x: x / 2, tau=2),
    "nnx.AdditiveDropout": lambda: dropout(additive, plain_additive, sampled=True),
    "nnx.ImportanceDropout": lambda: dropout(importance, plain_importance, sampled=True),
}

KIN = (  # priors whose formulas are of the same kind as those of others, for tests of what uses a prior
    "Sigmoid", "Softplus", "ELU", "Softsign", "Arctan", "ElasticNet", "NonNegativeL1", "Scaled",
    "NuclearNorm with weights",
)  # fmt: skip
_EACH = {name: prior for name, prior in PRIORS.items() if name not in KIN}
each_prior = pytest.mark.parametrize("prior", _EACH.values(), ids=_EACH.keys())
