"""Layers and reports of both front ends, and convex programs of networks."""

import hostile
import jax
import jax.numpy as jnp
import numpy as np
from entries import (
    OVERFLOW,
    Entry,
    array,
    certified,
    count,
    key,
    name,
    number,
    shape,
    solution,
    value,
)
from flax import linen as nn
from flax import nnx
from hostile import Argument, normal

import stochsolvers as ss

INPUTS = ("another length",)


def rngs():
    return nnx.Rngs(0, dropout=1)


def nnx_layer(make, **fixed):
    """A layer of NNX made and called. Sizes, dtypes and initialisers are Flax's own arguments."""

    def call(x, **options):
        return make(**fixed, **options, rngs=rngs())(x)

    return call


def linen_layer(make, *shape, **fixed):
    def call(x, **options):
        module = make(*shape, **fixed, **options)
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        return module.init_with_output(keys, x)[0]

    return call


MADE = ("another length", "one axis more")
"""Inputs for which Linen makes parameters."""


def vectors(*allowed, **options):
    return lambda s: {"x": array(normal(2, s.batch, 4), *allowed), **options}


def images(*allowed, **options):
    return lambda s: {"x": array(normal(2, s.batch, 3, 3, 2), *allowed), **options}


SOLVER = {
    "solver": value(ss.ProxGD(2)),
    "prior": value(ss.prox.NonNegative()),
    "ridge": number(0.1),
    "loss": value(ss.losses.Squares()),
    "output": name("activation"),
}
EQUILIBRIUM = {
    "prior": value(ss.prox.NonNegative()),
    "bound": number(0.9),
    "solver": value(ss.FixedPoint(5), "None"),
    "derivative": name("implicit", "None"),
}
STEP = {"step": value(ss.proxprop.Exact(0.5))}


def deep(room):
    def call(x, layers, alpha):
        if room is ss.nnx:
            return room.DeepEquilibrium(layers, alpha=alpha, solver=ss.FixedPoint(5))(x)
        return linen_layer(room.DeepEquilibrium, solver=ss.FixedPoint(5))(
            x, layers=layers, alpha=alpha
        )

    return call


def weight(seed, *sizes, allowed=()):
    """Of a layer of Flax, which holds it whatever it is."""
    return Argument(normal(seed, *sizes), "weight", allowed)


def with_weights(make, kernel, bias, **options):
    """A layer of 4 features in and 3 out with these weights."""
    layer = make(4, 3, use_bias=bias is not None, **options, rngs=rngs())
    layer.kernel = nnx.Param(kernel)
    if bias is not None:
        layer.bias = nnx.Param(bias)
    return layer


def members(room):
    if room is ss.linen:
        return [room.EquilibriumLinear(features=3, hidden_features=3)]
    return [room.EquilibriumLinear(4, 3, 3, rngs=nnx.Rngs(0))]


def nnx_dropout(make):
    def call(x, rngs, **options):
        return make(**options)(x, rngs=rngs)

    return call


def linear():
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def network():
    return nnx.Sequential(linear(), nnx.relu, nnx.Linear(3, 2, rngs=nnx.Rngs(1)))


class Block(nn.Module):
    """Two layers and a ReLU."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(3)(x)))


def with_norm(channels=2):
    return nnx.Conv(2, channels, (3, 3), rngs=nnx.Rngs(0))


NNX = {
    "nnx.SolverLinear": Entry(
        nnx_layer(ss.nnx.SolverLinear, in_features=4, out_features=3), vectors(**SOLVER)
    ),
    "nnx.SolverConv": Entry(
        nnx_layer(ss.nnx.SolverConv, in_features=2, out_features=3, kernel_size=(2, 2)),
        images(**SOLVER, spatial_shape=shape(None, "None")),
    ),
    "nnx.SolverConvTranspose": Entry(
        nnx_layer(ss.nnx.SolverConvTranspose, in_features=2, out_features=3, kernel_size=(2, 2)),
        images(**SOLVER, spatial_shape=shape(None, "None")),
    ),
    "nnx.SolverLinearGeneral": Entry(
        nnx_layer(ss.nnx.SolverLinearGeneral, in_features=4, out_features=3), vectors(**SOLVER)
    ),
    "nnx.SolverResNetBlock": Entry(
        lambda x, **o: ss.nnx.SolverResNetBlock(**o, rngs=rngs())(x),
        images(
            first=value(with_norm()),
            second=value(with_norm()),
            solver=value(ss.ProxGD(1)),
            prior=value(ss.prox.NonNegative()),
            ridge=number(0.1),
        ),
    ),
    "nnx.EquilibriumLinear": Entry(
        nnx_layer(ss.nnx.EquilibriumLinear, in_features=4, features=3, hidden_features=3),
        vectors(**EQUILIBRIUM),
        compares=False,
    ),
    "nnx.EquilibriumConv": Entry(
        nnx_layer(ss.nnx.EquilibriumConv, in_features=2, features=2, kernel_size=(2, 2)),
        images(**EQUILIBRIUM),
        compares=False,
    ),
    "nnx.DeepEquilibrium": Entry(
        deep(ss.nnx),
        lambda s: {
            "x": array(normal(2, s.batch, 4)),
            "layers": value(members(ss.nnx)),
            "alpha": number(0.5),
        },
        compares=False,
    ),
    "nnx.ProxPropLinear": Entry(
        nnx_layer(ss.nnx.ProxPropLinear, in_features=4, out_features=3), vectors(**STEP)
    ),
    "nnx.ProxPropConv": Entry(
        nnx_layer(ss.nnx.ProxPropConv, in_features=2, out_features=3, kernel_size=(2, 2)),
        images(**STEP),
    ),
    "nnx.TauNiceDropout": Entry(
        nnx_dropout(ss.nnx.TauNiceDropout),
        lambda s: {
            "x": array(normal(2, s.batch, 4), "one axis more", "NaN", *INPUTS),
            "rngs": key("None"),
            "tau": count(2),
            "spatial_ndim": count(0),
        },
        compares=False,
    ),
    "nnx.OutputDropout": Entry(
        nnx_dropout(ss.nnx.OutputDropout),
        lambda s: {
            "x": array(normal(2, s.batch, 4), "one axis more", "NaN", *INPUTS),
            "rngs": key("None"),
            "tau": count(2),
            "spatial_ndim": count(0),
        },
        compares=False,
    ),
    "nnx.AdditiveDropout": Entry(
        lambda x, z, rngs, layer, tau: ss.nnx.AdditiveDropout(layer, tau)(x, z, rngs=rngs),
        lambda s: {
            "x": array(normal(2, s.batch, 4)),
            "z": array(normal(3, s.batch, 3)),
            "rngs": key("None"),
            "layer": value(linear()),
            "tau": count(2),
        },
        compares=False,
    ),
    "nnx.ImportanceDropout": Entry(
        lambda x, rngs, layer, tau, by: ss.nnx.ImportanceDropout(layer, tau, by=by)(x, rngs=rngs),
        lambda s: {
            "x": array(normal(2, s.batch, 4)),
            "rngs": key("None"),
            "layer": value(linear()),
            "tau": count(2),
            "by": name("gradient"),
        },
        compares=False,
    ),
    "nnx.SpectralNorm": Entry(
        lambda x, layer, bound: ss.nnx.SpectralNorm(layer, bound=bound, rngs=rngs())(x),
        lambda s: {
            "x": Argument(normal(2, s.batch, 4), "other"),
            "layer": value(linear()),
            "bound": number(0.5),
        },
        compares=False,
    ),
    "nnx.linear_map_of": Entry(
        lambda layer, inputs_shape: ss.nnx.linear_map_of(layer, inputs_shape).kernel,
        lambda s: {"layer": value(linear()), "inputs_shape": shape((2, 4))},
    ),
    "nnx.fold_batch_norm": Entry(
        lambda layer, norm: ss.nnx.fold_batch_norm(layer, norm).kernel[...],
        lambda s: {
            "layer": value(linear()),
            "norm": value(nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))),
        },
    ),
    "nnx.refresh_lipschitz": Entry(
        ss.nnx.refresh_lipschitz, lambda s: {"model": value(network())}, on_host=True
    ),
    "nnx.certify": Entry(
        lambda model, x: certified(ss.nnx.certify(model, x)),
        lambda s: {
            "model": value(ss.nnx.SolverLinear(4, 3, solver=ss.ProxGD(2), rngs=rngs())),
            "x": array(normal(2, s.batch, 4)),
        },
        on_host=True,
    ),
    "nnx.lipschitz_report": Entry(
        lambda model, input_shape, radius: (
            str(ss.nnx.lipschitz_report(model, input_shape, radius=radius)) and None
        ),
        lambda s: {
            "model": value(network()),
            "input_shape": shape((1, 4)),
            "radius": number(None, "None"),
        },
        on_host=True,
    ),
    "nnx.replace_layers": Entry(
        lambda where, solver, inputs, prior, dropout, ridge, model: ss.nnx.replace_layers(
            model, where, solver=solver, inputs=inputs, prior=prior, dropout=dropout, ridge=ridge
        ),
        lambda s: {
            "model": value(network()),
            "where": name("layers.0", "a list of strings", "a class"),
            "solver": value(ss.ProxGD(2)),
            "inputs": Argument(normal(2, s.batch, 4), "other"),
            "prior": name("auto"),
            "dropout": name("absorb"),
            "ridge": number(0.1),
        },
        on_host=True,
    ),
    "nnx.restore_layers": Entry(
        ss.nnx.restore_layers, lambda s: {"model": value(network())}, on_host=True
    ),
}


def linen_dropout(make):
    def call(x, rng, **options):
        return make(**options).apply({}, x, rngs={"dropout": rng})

    return call


def variables(module, x):
    return module.init(jax.random.key(0), x)


X = normal(2, 2, 4)
BLOCK = Block()
BLOCK_VARIABLES = variables(BLOCK, X)


def norm_of_three():
    norm = nn.BatchNorm(use_running_average=True)
    return norm, variables(norm, jnp.ones((2, 3), jnp.float32))


LINEN = {
    "linen.SolverDense": Entry(linen_layer(ss.linen.SolverDense, 3), vectors(*MADE, **SOLVER)),
    "linen.SolverConv": Entry(linen_layer(ss.linen.SolverConv, 3, (2, 2)), images(*MADE, **SOLVER)),
    "linen.SolverConvTranspose": Entry(
        linen_layer(ss.linen.SolverConvTranspose, 3, (2, 2)), images(*MADE, **SOLVER)
    ),
    "linen.SolverDenseGeneral": Entry(
        linen_layer(ss.linen.SolverDenseGeneral, 3), vectors(*MADE, **SOLVER)
    ),
    "linen.SolverResNetBlock": Entry(
        linen_layer(ss.linen.SolverResNetBlock),
        images(
            *MADE,
            first=value(nn.Conv(2, (3, 3))),
            second=value(nn.Conv(2, (3, 3))),
            solver=value(ss.ProxGD(1)),
            prior=value(ss.prox.NonNegative()),
            ridge=number(0.1),
        ),
    ),
    "linen.EquilibriumLinear": Entry(
        linen_layer(ss.linen.EquilibriumLinear, features=3, hidden_features=3),
        vectors(*MADE, **EQUILIBRIUM),
        compares=False,
    ),
    "linen.EquilibriumConv": Entry(
        linen_layer(ss.linen.EquilibriumConv, features=2, kernel_size=(2, 2)),
        images(*MADE, **EQUILIBRIUM),
        compares=False,
    ),
    "linen.DeepEquilibrium": Entry(
        deep(ss.linen),
        lambda s: {
            "x": array(normal(2, s.batch, 4), *MADE),
            "layers": value(members(ss.linen)),
            "alpha": number(0.5),
        },
        compares=False,
    ),
    "linen.ProxPropDense": Entry(linen_layer(ss.linen.ProxPropDense, 3), vectors(*MADE, **STEP)),
    "linen.ProxPropConv": Entry(
        linen_layer(ss.linen.ProxPropConv, 3, (2, 2)), images(*MADE, **STEP)
    ),
    "linen.TauNiceDropout": Entry(
        linen_dropout(ss.linen.TauNiceDropout),
        lambda s: {
            "x": array(normal(2, s.batch, 4), "one axis more", "NaN", *INPUTS),
            "rng": Argument(hostile.KEY, "other"),
            "tau": count(2),
            "spatial_ndim": count(0),
        },
        compares=False,
    ),
    "linen.OutputDropout": Entry(
        linen_dropout(ss.linen.OutputDropout),
        lambda s: {
            "x": array(normal(2, s.batch, 4), "one axis more", "NaN", *INPUTS),
            "rng": Argument(hostile.KEY, "other"),
            "tau": count(2),
            "spatial_ndim": count(0),
        },
        compares=False,
    ),
    "linen.AdditiveDropout": Entry(
        lambda x, z, layer, tau: ss.linen.AdditiveDropout(layer, tau).init_with_output(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, z
        )[0],
        lambda s: {
            "x": array(normal(2, s.batch, 4), *MADE),
            "z": array(normal(3, s.batch, 3)),
            "layer": value(nn.Dense(3)),
            "tau": count(2),
        },
        compares=False,
    ),
    "linen.ImportanceDropout": Entry(
        linen_layer(ss.linen.ImportanceDropout),
        lambda s: {
            "x": array(normal(2, s.batch, 4), *MADE),
            "layer": value(nn.Dense(3)),
            "tau": count(2),
            "by": name("gradient"),
        },
        compares=False,
    ),
    "linen.SpectralNorm": Entry(
        lambda x, layer, bound: ss.linen.SpectralNorm(layer, bound=bound).init_with_output(
            jax.random.key(0), x, update_stats=False
        )[0],
        lambda s: {
            "x": Argument(normal(2, s.batch, 4), "other"),
            "layer": value(nn.Dense(3)),
            "bound": number(0.5),
        },
        compares=False,
    ),
    "linen.linear_map_of": Entry(
        lambda layer, kernel, shape: ss.linen.linear_map_of(layer, kernel, shape).kernel,
        lambda s: {
            "layer": value(nn.Dense(3)),
            "kernel": array(normal(1, 4, 3), *INPUTS),
            "shape": shape((2, 4)),
        },
    ),
    "linen.fold_batch_norm": Entry(
        lambda layer, variables, norm, norm_variables: ss.linen.fold_batch_norm(
            layer, variables, norm, norm_variables
        )[1],
        lambda s: {
            "layer": value(nn.Dense(3)),
            "variables": value(variables(nn.Dense(3), X)),
            "norm": value(norm_of_three()[0]),
            "norm_variables": value(norm_of_three()[1]),
        },
    ),
    "linen.refresh_lipschitz": Entry(
        lambda module, variables, x: ss.linen.refresh_lipschitz(module, variables, x) and None,
        lambda s: {
            "module": value(BLOCK),
            "variables": value(BLOCK_VARIABLES),
            "x": Argument(normal(2, s.batch, 4), "other"),
        },
        on_host=True,
    ),
    "linen.certify": Entry(
        lambda module, variables, x: certified(ss.linen.certify(module, variables, x)),
        lambda s: {
            "module": value(ss.linen.SolverDense(3, solver=ss.ProxGD(2))),
            "variables": value(variables(ss.linen.SolverDense(3, solver=ss.ProxGD(2)), X)),
            "x": array(normal(2, s.batch, 4), *MADE),
        },
        on_host=True,
    ),
    "linen.lipschitz_report": Entry(
        lambda module, variables, input_shape, radius: (
            str(ss.linen.lipschitz_report(module, variables, input_shape, radius=radius)) and None
        ),
        lambda s: {
            "module": value(BLOCK),
            "variables": value(BLOCK_VARIABLES),
            "input_shape": shape((1, 4)),
            "radius": number(None, "None"),
        },
        on_host=True,
    ),
    "linen.replace_layers": Entry(
        lambda module, variables, where, **o: (
            ss.linen.replace_layers(module, variables, where, **o) and None
        ),
        lambda s: {
            "module": value(BLOCK),
            "variables": value(BLOCK_VARIABLES),
            "where": name("Dense_1", "a class"),  # which is made second, and called first
            "solver": value(ss.ProxGD(2)),
            "inputs": Argument(normal(2, s.batch, 4), "other"),
            "prior": name("auto"),
            "dropout": name("absorb"),
            "ridge": number(0.1),
        },
        on_host=True,
    ),
    "linen.restore_layers": Entry(
        ss.linen.restore_layers,
        lambda s: {"module": value(BLOCK), "variables": value(BLOCK_VARIABLES, "a dict")},
        on_host=True,
    ),
}

C = ss.convex
DATA = normal(16, 5, 2)
GATES = normal(17, 2, 3)


def patterns():
    return C.Patterns(GATES, DATA @ GATES >= 0)


def gated():
    return C.GatedProblem(DATA, normal(18, 5), patterns(), 0.3)


def cones():
    return C.ReLUProblem(DATA, normal(18, 5), patterns(), 0.3)


def two_layers():
    return C.Network(normal(19, 2, 3), normal(20, 3))


def data(*allowed):
    return array(DATA, *allowed)


def targets(*allowed):
    return array(normal(18, 5), *allowed)


def program(make):
    def call(X, y, patterns, beta, **options):
        p = make(X, y, patterns, beta, **options)
        zero = jnp.zeros(p.shape, p.dtype)
        return {"P": p.objective(zero), "certificate?": p.certificate(zero)}

    return call


def programs(**options):
    return lambda s: {
        "X": data("integers", "booleans"),
        "y": targets("integers", "booleans"),
        "patterns": value(patterns()),
        "beta": number(0.3),
        "loss": value(ss.losses.Squares()),
        **options,
    }


def with_algorithm(make, problem):
    def call(**options):
        return solution(C.solve(problem(), solver=make(**options)))

    return call


def iterations():
    return count(20)


def fitted(make):
    def call(X, y, **options):
        return make(**options).fit(np.asarray(X), np.asarray(y)).predict(np.asarray(X))

    return call


CONVEX = {
    "convex.Patterns": Entry(
        lambda gates, mask: C.Patterns(gates, mask).gates,
        lambda s: {"gates": array(GATES), "mask": value(DATA @ GATES >= 0)},
    ),
    "convex.sample_patterns": Entry(
        lambda **o: C.sample_patterns(**o).gates,
        lambda s: {
            "key": key(),
            "X": data("integers", "booleans", "one axis more", *INPUTS),
            "num": count(3),
            "kind": name("gaussian"),
            "num_nonzero": count(1),
        },
        compares=False,
        on_host=True,
    ),
    "convex.enumerate_patterns": Entry(
        lambda X: C.enumerate_patterns(X).gates,
        lambda s: {"X": data("integers", "booleans", "one axis more", *INPUTS)},
        compares=False,
        on_host=True,
    ),
    "convex.GatedMap": Entry(
        lambda X, patterns, outputs, x: C.GatedMap(X, patterns, outputs=outputs)(x),
        lambda s: {
            "X": data(),
            "patterns": value(patterns()),
            "outputs": count(2, "None"),
            "x": array(normal(21, 2, 5), "complex numbers"),
        },
    ),
    "convex.GatedProblem": Entry(program(C.GatedProblem), programs(regularizer=name("group"))),
    "convex.ReLUProblem": Entry(program(C.ReLUProblem), programs()),
    "convex.ThreeLayerProblem": Entry(
        lambda X, y, patterns, beta, width: (
            C.ThreeLayerProblem(X, y, patterns, beta, width=width).beta
        ),
        lambda s: {
            "X": data("integers", "booleans"),
            "y": targets("integers", "booleans"),
            "patterns": value(patterns()),
            "beta": number(0.3),
            "width": count(1),
        },
        compares=False,
        on_host=True,
    ),
    "convex.whitened": Entry(
        lambda X: C.whitened(X).data,
        lambda s: {"X": data("integers", "booleans", *INPUTS)},
        compares=False,
    ),
    "convex.solve": Entry(
        lambda problem, solver, tol, init: solution(
            C.solve(problem, solver=solver, tol=tol, init=init)
        ),
        lambda s: {
            "problem": value(gated()),
            "solver": value(None, "None"),
            "tol": number(1e-3),
            "init": array(jnp.zeros(gated().shape, jnp.float32), "None", "integers", "booleans"),
        },
        compares=False,
        on_host=True,
    ),
    "convex.regularization_path": Entry(
        lambda problem, betas, tol: [
            solution(one) for one in C.regularization_path(problem, betas, tol=tol)
        ],
        lambda s: {
            "problem": value(gated()),
            "betas": array(jnp.float32([0.5, 0.3]), *INPUTS),
            "tol": number(1e-3),
        },
        compares=False,
        on_host=True,
    ),
    "convex.KernelADMM": Entry(
        with_algorithm(C.KernelADMM, gated),
        lambda s: {"max_iters": iterations()},
        compares=False,
        on_host=True,
    ),
    "convex.LandmarkADMM": Entry(
        with_algorithm(C.LandmarkADMM, gated),
        lambda s: {"max_iters": iterations(), "landmarks": count(3), "steps": count(2)},
        compares=False,
        on_host=True,
    ),
    "convex.FISTA": Entry(
        with_algorithm(C.FISTA, gated),
        lambda s: {"max_iters": iterations()},
        compares=False,
        on_host=True,
    ),
    "convex.ConeADMM": Entry(
        with_algorithm(C.ConeADMM, cones),
        lambda s: {"max_iters": iterations()},
        compares=False,
        on_host=True,
    ),
    "convex.InteriorPoint": Entry(
        with_algorithm(C.InteriorPoint, cones),
        lambda s: {"max_iters": iterations()},
        compares=False,
        on_host=True,
    ),
    "convex.Network": Entry(
        lambda X, **o: C.Network(**o)(X),
        lambda s: {
            "hidden": array(normal(19, 2, 3)),
            "output": array(normal(20, 3)),
            "hidden_bias": array(normal(21, 3), "None"),
            "output_bias": number(0.5, "None", "NaN"),
            "X": data(),
        },
    ),
    "convex.GatedNetwork": Entry(
        lambda X, **o: C.GatedNetwork(**o)(X),
        lambda s: {
            "hidden": array(normal(19, 2, 3)),
            "output": array(normal(20, 3), "one axis more"),
            "gates": array(GATES),
            "gate_bias": array(normal(21, 3), "None"),
            "X": data(),
        },
    ),
    "convex.as_network": Entry(
        lambda network: C.as_network(network)(DATA), lambda s: {"network": value(two_layers())}
    ),
    "convex.from_network": Entry(
        lambda network, X: C.from_network(network, X)[0],
        lambda s: {"network": value(two_layers()), "X": data("integers", "booleans")},
        compares=False,
        on_host=True,
    ),
    "convex.recover": Entry(
        lambda problem, value: C.recover(problem, value)(DATA),
        lambda s: {
            "problem": value(gated()),
            "value": array(normal(22, *gated().shape), "integers", "booleans"),
        },
        on_host=True,
    ),
    "convex.to_nnx": Entry(
        lambda problem, value: C.to_nnx(problem, value)(DATA),
        lambda s: {
            "problem": value(gated()),
            "value": array(normal(22, *gated().shape), "integers", "booleans"),
        },
        on_host=True,
    ),
    "convex.to_linen": Entry(
        lambda problem, value: C.to_linen(problem, value)[1],
        lambda s: {
            "problem": value(gated()),
            "value": array(normal(22, *gated().shape), "integers", "booleans"),
        },
        on_host=True,
    ),
    "convex.decompose": Entry(
        lambda problem, V, num_rounds: (
            C.decompose(problem, V, num_rounds=num_rounds).network.hidden
        ),
        lambda s: {
            "problem": value(gated()),
            "V": array(normal(22, *gated().shape), "integers", "booleans"),
            "num_rounds": count(1),
        },
        compares=False,
        on_host=True,
    ),
    "convex.prune": Entry(
        lambda network, X, tol: C.prune(network, X, tol=tol)(X),
        lambda s: {
            "network": value(two_layers()),
            "X": data("integers", "booleans"),
            "tol": number(1e-9),
        },
        compares=False,
        on_host=True,
    ),
    "convex.network_gap": Entry(
        lambda **o: C.network_gap(**o).gap,
        lambda s: {
            "network": value(two_layers()),
            "X": data("integers", "booleans"),
            "y": targets("integers", "booleans"),
            "beta": number(0.3),
            "loss": value(ss.losses.Squares()),
            "method": name("enumerate"),
            "key": key("None"),
            "num_starts": count(4),
            "num_rounds": count(0),
        },
        compares=False,
        on_host=True,
    ),
    "convex.separate": Entry(
        lambda **o: getattr(C.separate(**o), "gates", None),
        lambda s: {
            "key": key(),
            "X": data("integers", "booleans", *INPUTS),
            "v": targets("integers", "booleans"),
            "patterns": value(None, "None"),
            "threshold": number(0.0),
            "num_starts": count(4),
            "num_iters": count(3),
            "max_gates": count(None, "None"),
        },
        compares=False,
        on_host=True,
    ),
    "convex.train_network": Entry(
        lambda **o: C.train_network(**o).objectives,
        lambda s: {
            "key": key(),
            "X": data("integers", "booleans", *INPUTS),
            "y": targets("integers", "booleans"),
            "beta": number(0.3),
            "loss": value(ss.losses.Squares()),
            "init": value(None, "None"),
            "width": count(3),
            "num_gates": count(3),
            "tol": number(1e-2),
            "num_rounds": count(1),
            "num_iters": count(3),
            "num_starts": count(4),
            "num_new": count(1),
        },
        compares=False,
        on_host=True,
    ),
    "convex.ConvexReLURegressor": Entry(
        fitted(C.ConvexReLURegressor),
        lambda s: {
            "X": Argument(DATA, "other"),
            "y": Argument(normal(18, 5), "other"),
            "beta": number(0.3),
            "num_gates": count(3),
            "loss": name("squares"),
            "tol": number(1e-3),
        },
        compares=False,
        on_host=True,
    ),
    "convex.ConvexReLUClassifier": Entry(
        fitted(C.ConvexReLUClassifier),
        lambda s: {
            "X": Argument(DATA, "other"),
            "y": Argument(np.array([0, 1, 0, 1, 1]), "other"),
            "beta": number(0.3),
            "num_gates": count(3),
            "loss": name("cross-entropy"),
            "tol": number(1e-3),
        },
        compares=False,
        on_host=True,
    ),
}

WEIGHTS = {
    "nnx.SolverLinear of weights": Entry(
        lambda kernel, bias, normalize: with_weights(
            ss.nnx.SolverLinear, kernel, bias, solver=ss.ProxGD(2), normalize=bool(normalize)
        )(X),
        lambda s: {
            "kernel": weight(1, 4, 3, allowed=OVERFLOW),
            "bias": weight(2, 3),
            "normalize": Argument(True, "other"),
        },
    ),
    "nnx.SpectralNorm of weights": Entry(
        lambda kernel: ss.nnx.SpectralNorm(
            with_weights(nnx.Linear, kernel, None), bound=0.5, rngs=rngs()
        )(X),
        lambda s: {"kernel": weight(1, 4, 3)},
        compares=False,
    ),
    "nnx.certify of weights": Entry(
        lambda kernel: certified(
            ss.nnx.certify(with_weights(ss.nnx.SolverLinear, kernel, None, solver=ss.ProxGD(2)), X)
        ),
        lambda s: {"kernel": weight(1, 4, 3)},
        on_host=True,
    ),
    "nnx.lipschitz_report of weights": Entry(
        lambda kernel: {
            "bound?": ss.nnx.lipschitz_report(
                with_weights(nnx.Linear, kernel, None), (1, len(kernel))
            ).bound
        },
        lambda s: {"kernel": weight(1, 4, 3)},
        on_host=True,
    ),
    "convex.network_gap of weights": Entry(
        lambda hidden, output: (
            C.network_gap(C.Network(hidden, output), DATA, normal(18, 5), 0.3).gap
        ),
        lambda s: {
            "hidden": array(normal(19, 2, 3)),
            "output": array(normal(20, 3), "one axis more"),
        },
        compares=False,
        on_host=True,
    ),
    "convex.prune of weights": Entry(
        lambda hidden, output: C.prune(C.Network(hidden, output), DATA)(DATA),
        lambda s: {
            "hidden": array(normal(19, 2, 3)),
            "output": array(normal(20, 3), "one axis more"),
        },
        compares=False,
        on_host=True,
    ),
    "convex.from_network of weights": Entry(
        lambda hidden, output: C.from_network(C.Network(hidden, output), DATA)[0],
        lambda s: {
            "hidden": array(normal(19, 2, 3)),
            "output": array(normal(20, 3), "one axis more"),
        },
        compares=False,
        on_host=True,
    ),
}

REPORTS = {
    "reports.certify": Entry(
        lambda model, x: certified(ss.certify(model, x)),
        lambda s: {
            "model": value(ss.nnx.SolverLinear(4, 3, solver=ss.ProxGD(2), rngs=rngs())),
            "x": array(normal(2, s.batch, 4)),
        },
        on_host=True,
    ),
    "reports.lipschitz_report": Entry(
        lambda model, input_shape: str(ss.lipschitz_report(model, input_shape)) and None,
        lambda s: {"model": value(network()), "input_shape": shape((1, 4))},
        on_host=True,
    ),
}

INTERNAL = {
    # of what the front ends have recorded, which alone call it
    "reports.observe",
}

ENTRIES = NNX | LINEN | CONVEX | WEIGHTS | REPORTS
