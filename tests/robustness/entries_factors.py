"""Maps, losses, priors, samplings, norms and the t-product."""

import hostile
import jax
import jax.numpy as jnp
import numpy as np
from entries import (
    OF_RANK_ONE,
    Entry,
    array,
    conv,
    count,
    dense,
    function,
    key,
    name,
    number,
    problem,
    shape,
    value,
)
from hostile import Argument, normal

import stochsolvers as ss

MAPS = {
    "linear_maps.Dense": Entry(
        lambda kernel, x: {
            "A(x)": ss.Dense(kernel)(x),
            "A*(A(x))": (lambda A: A.adjoint(A(x)))(ss.Dense(kernel)),
        },
        lambda s: {
            "kernel": array(normal(1, s.n1, s.n2), "another length"),
            "x": array(normal(2, s.batch, s.n1), "complex numbers"),
        },
    ),
    "linear_maps.Conv": Entry(
        lambda x, strides=1, padding="SAME", **options: (
            lambda A: {"A(x)": A(x), "A*(A(x))": A.adjoint(A(x))}
        )(ss.Conv(strides=strides, padding=padding, **options)),
        lambda s: {
            "kernel": array(normal(1, 2, 2, s.n1, s.n2), "another length"),
            "spatial_shape": shape((3, 3)),
            "strides": shape(1),
            "padding": name("CIRCULAR", "a number"),
            "kernel_dilation": shape(1),
            "feature_group_count": count(1),
            "circular_low": shape(None, "None"),
            "x": array(normal(2, s.batch, 3, 3, s.n1), "complex numbers"),
        },
    ),
    "linear_maps.conv_transpose": Entry(
        lambda x, **options: ss.conv_transpose(**options)(x),
        lambda s: {
            "kernel": array(normal(1, 2, 2, s.n1, s.n2), "another length"),
            "spatial_shape": shape((2, 2)),
            "strides": shape(2),
            "padding": name("SAME"),
            "kernel_dilation": shape(1),
            "x": array(normal(2, s.batch, 2, 2, s.n1), "complex numbers"),
        },
    ),
    "linear_maps.Contraction": Entry(
        lambda x, **options: ss.Contraction(**options)(x),
        lambda s: {
            "equation": name("ab,bcd->acd"),
            "kernel": array(normal(1, s.n1, s.n2, 2), "another length"),
            "in_shape": shape((2, s.n1)),
            "x": array(normal(2, s.batch, 2, s.n1), "complex numbers"),
        },
    ),
    "linear_maps.dense_general": Entry(
        lambda x, **options: ss.dense_general(**options)(x),
        lambda s: {
            "kernel": array(normal(1, 2, s.n1, s.n2), "another length", "one axis more"),
            "in_shape": shape((2, s.n1)),
            "axis": shape((-2, -1)),
            "batch_axis": shape(()),
            "x": array(normal(2, s.batch, 2, s.n1), "complex numbers"),
        },
    ),
    "linear_maps.Matrix": Entry(
        lambda kernel, in_shape, out_shape, x: ss.linear_maps.Matrix(kernel, in_shape, out_shape)(
            x
        ),
        lambda s: {
            "kernel": array(normal(1, 2 * s.n1, s.n2)),
            "in_shape": shape((2, s.n1)),
            "out_shape": shape((s.n2,)),
            "x": array(normal(2, s.batch, 2, s.n1), "complex numbers"),
        },
    ),
    "linear_maps.Transposed": Entry(
        lambda base, z: ss.linear_maps.Transposed(base)(z),
        lambda s: {
            "base": value(dense(s)),
            "z": array(normal(2, s.batch, s.n2), "complex numbers"),
        },
    ),
    "linear_maps.linear_map": Entry(
        lambda function, in_shape, operand, x: ss.linear_map(function, in_shape, operand)(x),
        lambda s: {
            "function": function(lambda W, x: x @ W),
            "in_shape": shape((s.n1,)),
            "operand": Argument(normal(1, s.n1, s.n2), "other"),
            "x": array(normal(2, s.batch, s.n1), "complex numbers"),
        },
    ),
    "linear_maps.size": Entry(ss.linear_maps.size, lambda s: {"linear_map": value(dense(s))}),
    "linear_maps.written_out": Entry(
        ss.linear_maps.written_out, lambda s: {"linear_map": value(conv())}
    ),
}


def of_loss(make):
    """The parts of a loss in a problem: its own methods take arrays that the problem has checked."""

    def call(x, z, **factors):
        p = ss.LayerProblem(ss.Dense(normal(1, 4, 3)), x, loss=make(**factors), ridge=0.3)
        return {"P": p.objective(z), "∇F": p.gradient(z), "certificate?": p.certificate(z)}

    return call


def classes(s):
    return jnp.asarray(np.eye(3, dtype=np.float32)[:, [0, 1, 2, 0]])


def in_problem(**factors):
    return lambda s: {
        **factors,
        "x": array(jnp.sign(normal(3, s.batch, 4))),
        "z": array(0.1 * normal(5, s.batch, 3)),
    }


LOSSES = {
    "losses.Squares": Entry(of_loss(ss.losses.Squares), in_problem()),
    "losses.Huber": Entry(of_loss(ss.losses.Huber), in_problem(delta=number(0.5))),
    "losses.Logistic": Entry(of_loss(ss.losses.Logistic), in_problem()),
    "losses.CrossEntropy": Entry(
        lambda axis, x, z: ss.losses.CrossEntropy(axis).derivative(z, x),
        lambda s: {
            "axis": count(-2),
            "x": Argument(classes(s), "other"),
            "z": Argument(normal(3, 3, 4), "other"),
        },
    ),
    "losses.Scaled": Entry(
        of_loss(ss.losses.Scaled),
        in_problem(loss=value(ss.losses.Huber(0.5)), factor=number(2.5)),
    ),
}


def of_prior(make):
    def call(v, step_size=1.0, **weights):
        g = make(**weights)
        return {
            "prox": g.prox(v, step_size),
            "w": g.pre_activation(v, step_size),
            "g?": g.value(v),
            "g*?": g.conjugate(v),
            "P": g.dual_projection(v),
        }

    return call


def at(*tail, **weights):
    """The argument v, of shape (batch, n1) or (batch, *tail), a step and weights."""
    return lambda s: {
        "v": array(
            normal(5, s.batch, *(tail or (s.n1,))), "a scalar", "one axis more", "another length"
        ),
        "step_size": number(0.7),
        **weights,
    }


def matrices(s, *tail, **weights):
    """`at` for priors of matrices."""
    arguments = at(*tail, axes=shape((-2, -1)), **weights)(s)
    v = arguments["v"]
    return arguments | {"v": v._replace(allowed=(*v.allowed, *OF_RANK_ONE))}


def gamma(*allowed):
    return number(0.3, *allowed)


P = ss.prox
PRIORS = {
    "prox.Zero": Entry(of_prior(P.Zero), at()),
    "prox.NonNegative": Entry(of_prior(P.NonNegative), at()),
    "prox.SquaredHinge": Entry(of_prior(P.SquaredHinge), at(gamma=gamma(), shift=number(0.1))),
    "prox.leaky_relu_prior": Entry(of_prior(P.leaky_relu_prior), at(negative_slope=number(0.2))),
    "prox.LeakyReLU": Entry(of_prior(P.LeakyReLU), at(negative_slope=number(0.2))),
    "prox.LogBarrier": Entry(of_prior(P.LogBarrier), at(gamma=gamma())),
    "prox.SymmetricLogBarrier": Entry(of_prior(P.SymmetricLogBarrier), at(gamma=gamma())),
    "prox.IntervalLogBarrier": Entry(of_prior(P.IntervalLogBarrier), at(gamma=gamma())),
    "prox.L1": Entry(of_prior(P.L1), at(gamma=gamma())),
    "prox.NonNegativeL1": Entry(of_prior(P.NonNegativeL1), at(gamma=gamma())),
    "prox.ElasticNet": Entry(of_prior(P.ElasticNet), at(gamma=gamma(), ridge=number(0.5))),
    "prox.Box": Entry(of_prior(P.Box), at(lo=number(-0.3), hi=number(0.4))),
    "prox.GroupL2": Entry(
        of_prior(P.GroupL2), at(gamma=gamma(), axis=shape(-1, "a negative size"))
    ),
    "prox.L2Ball": Entry(
        of_prior(P.L2Ball), at(radius=number(0.8), axis=shape(-1, "a negative size"))
    ),
    "prox.Simplex": Entry(of_prior(P.Simplex), at(axis=shape(-1, "a negative size"))),
    "prox.Entropy": Entry(
        of_prior(P.Entropy), at(gamma=gamma(), axis=shape(-1, "a negative size"))
    ),
    "prox.NuclearNorm": Entry(
        of_prior(P.NuclearNorm),
        lambda s: {
            **matrices(s, s.n1, s.n2, gamma=gamma()),
            "weights": number(None, "None"),
        },
    ),
    "prox.PositiveSemidefinite": Entry(
        of_prior(P.PositiveSemidefinite),
        lambda s: matrices(s, s.n1, s.n1),
    ),
    "prox.Tanh": Entry(of_prior(P.Tanh), at()),
    "prox.Sigmoid": Entry(of_prior(P.Sigmoid), at()),
    "prox.Softplus": Entry(of_prior(P.Softplus), at()),
    "prox.Softsign": Entry(of_prior(P.Softsign), at()),
    "prox.Arctan": Entry(of_prior(P.Arctan), at()),
    "prox.ELU": Entry(of_prior(P.ELU), at(alpha=number(0.6))),
    "prox.Activation": Entry(of_prior(P.Activation), at(function=function(jax.nn.celu))),
    "prox.Scaled": Entry(of_prior(P.Scaled), at(prior=value(P.L1(0.3)), factor=number(1.5))),
}

S = ss.sampling
SAMPLINGS = {
    "sampling.num_sampled": Entry(
        S.num_sampled, lambda s: {"tau": count(2, "NaN"), "n": count(s.n1)}, on_host=True
    ),
    "sampling.canonical_tau": Entry(S.canonical_tau, lambda s: {"tau": Argument(2, "other")}),
    "sampling.tau_nice_mask": Entry(
        S.tau_nice_mask,
        lambda s: {"key": key(), "tau": count(2), "n": count(4), "batch_shape": shape((s.batch,))},
        compares=False,
    ),
    "sampling.tau_nice_indices": Entry(
        S.tau_nice_indices, lambda s: {"key": key(), "tau": count(2), "n": count(4)}, compares=False
    ),
    "sampling.bernoulli_mask": Entry(
        S.bernoulli_mask,
        lambda s: {
            "key": key(),
            "keep_probability": number(0.5),
            "n": count(4),
            "batch_shape": shape((s.batch,)),
        },
        compares=False,
    ),
    "sampling.serial_mask": Entry(
        S.serial_mask,
        lambda s: {
            "key": key(),
            "probabilities": array(
                jnp.full((s.batch, s.n1), 1 / s.n1, jnp.float32),
                "NaN",
                "NaN everywhere",
                "another length",
                "one axis more",
            ),
        },
        compares=False,
    ),
    "sampling.fixed_size_mask": Entry(
        S.fixed_size_mask,
        lambda s: {
            "key": key(),
            "probabilities": array(
                jnp.full((s.batch, s.n1), 1 / s.n1, jnp.float32),
                "NaN",
                "NaN everywhere",
                "another length",
                "one axis more",
            ),
        },
        compares=False,
    ),
    "sampling.systematic_mask": Entry(
        S.systematic_mask,
        lambda s: {
            "offset": array(jnp.full((s.batch,), 0.4, jnp.float32), "NaN", "NaN everywhere"),
            "probabilities": array(
                jnp.full((s.batch, s.n1), 1 / s.n1, jnp.float32),
                "NaN",
                "NaN everywhere",
                "another length",
                "one axis more",
            ),
        },
        compares=False,
    ),
    "sampling.inclusion_probabilities": Entry(
        S.inclusion_probabilities,
        lambda s: {
            "scores": array(jnp.abs(normal(6, s.batch, s.n1)), "another length", "one axis more"),
            "tau": count(1),
        },
    ),
}

E = ss.estimators


def of_estimator(make):
    def call(key, problem, z, **options):
        e = make(**options)
        return {"∇Ψ": e(key, problem, z), "𝓛": e.expected_smoothness(problem)}

    return call


def estimated(**options):
    return lambda s: {
        "key": key(),
        "problem": value(problem(s)),
        "z": array(normal(5, s.batch, s.n2)),
        **options,
    }


def tau(*allowed):
    return count(1, "NaN", *allowed)


ESTIMATORS = {
    "estimators.Full": Entry(
        of_estimator(E.Full),
        lambda s: (
            {k: v for k, v in estimated()(s).items() if k != "key"}
            | {"key": Argument(hostile.KEY, "other")}
        ),
    ),
    "estimators.TauNice": Entry(of_estimator(E.TauNice), estimated(tau=count(1)), compares=False),
    "estimators.Bernoulli": Entry(
        of_estimator(E.Bernoulli), estimated(keep_probability=number(0.5)), compares=False
    ),
    "estimators.Importance": Entry(
        of_estimator(E.Importance), estimated(tau=count(1), by=name("lipschitz")), compares=False
    ),
    "estimators.SerialImportance": Entry(
        of_estimator(E.SerialImportance), estimated(by=name("lipschitz")), compares=False
    ),
    "estimators.OutputCoordinates": Entry(
        lambda key, problem, z, tau: E.OutputCoordinates(tau)(key, problem, z),
        estimated(tau=count(1)),
        compares=False,
    ),
    "estimators.VarianceReduced": Entry(
        lambda key, problem, z, anchor, base: E.VarianceReduced.at(problem, anchor, base)(
            key, problem, z
        ),
        lambda s: {
            **estimated()(s),
            "anchor": array(normal(6, s.batch, s.n2)),
            "base": value(E.TauNice(1)),
        },
        compares=False,
    ),
    "estimators.feature_axis": Entry(
        E.feature_axis,
        lambda s: {
            "weights": array(normal(6, s.batch, s.n1), "complex numbers"),
            "problem": value(problem(s)),
        },
    ),
    "estimators.forms.gradient_form": Entry(
        lambda problem, form, num_calls, z: ss.forms.gradient_form(
            problem, form, num_calls=num_calls
        )(z),
        lambda s: {
            "problem": value(problem(s)),
            "form": name("gram"),
            "num_calls": count(3),
            "z": array(normal(5, s.batch, s.n2), "complex numbers"),  # linear, but for a constant
        },
    ),
    "estimators.forms.cheapest_form": Entry(
        ss.forms.cheapest_form,
        lambda s: {"problem": value(problem(s)), "num_calls": count(3)},
        on_host=True,
    ),
    "estimators.forms.form_cost": Entry(
        ss.forms.form_cost,
        lambda s: {"problem": value(problem(s)), "form": name("gram"), "num_calls": count(3)},
        on_host=True,
    ),
}

T = ss.tensor_product


def tensor(seed, *sizes):
    return array(normal(seed, *sizes), "integers", "booleans")


TENSORS = {
    "tensor_product.t_product": Entry(
        T.t_product,
        lambda s: {"a": array(normal(1, s.n1, s.n2, 3, 2)), "x": array(normal(2, s.n2, 2, 3, 2))},
    ),
    "tensor_product.identity_tensor": Entry(
        T.identity_tensor, lambda s: {"n": count(2), "spatial_shape": shape((3, 2))}
    ),
    "tensor_product.hermitian_transpose": Entry(
        T.hermitian_transpose, lambda s: {"a": array(normal(1, s.n1, s.n2, 3, 2), "another length")}
    ),
    "tensor_product.circ": Entry(
        T.circ, lambda s: {"d": array(normal(1, s.n1, s.n2, 3, 2), "another length")}
    ),
    "tensor_product.bdiag": Entry(
        T.bdiag,
        lambda s: {
            "d_hat": array(normal(1, s.n1, s.n2, 3, 2), "another length", "complex numbers")
        },
    ),
    "tensor_product.mat_vec": Entry(
        T.mat_vec, lambda s: {"x": array(normal(1, s.n1, s.n2, 3, 2), "another length")}
    ),
    "tensor_product.fold": Entry(
        T.fold,
        lambda s: {
            "v": array(normal(1, 6 * s.n1, s.n2), "another length", "complex numbers"),
            "spatial_shape": shape((3, 2)),
        },
    ),
    "tensor_product.normalized_dft": Entry(
        lambda n: jnp.real(T.normalized_dft(n)), lambda s: {"n": count(3)}
    ),
}

ENTRIES = MAPS | LOSSES | PRIORS | SAMPLINGS | ESTIMATORS | TENSORS
