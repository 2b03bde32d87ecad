"""Norms, problems, step sizes, solvers, dropout, optimisers, proximal backpropagation, equilibria."""

import jax
import jax.numpy as jnp
from entries import (
    OF_RANK_ONE,
    OVERFLOW,
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
    solution,
    value,
)
from hostile import Argument, normal

import stochsolvers as ss

L = ss.lipschitz


def of_map(function, **options):
    """A function of a map, and of a kernel that the map has."""

    def call(linear_map, **options):
        return function(linear_map, **options)

    return Entry(call, lambda s: {"linear_map": value(dense(s)), **options})


def of_kernel(function, allowed=(), **options):
    return Entry(
        lambda kernel, **options: function(ss.Dense(kernel), **options),
        lambda s: {"kernel": array(normal(1, s.n1, s.n2), "another length", *allowed), **options},
    )


def ends(bracket):
    return {"lower": bracket.lower, "upper?": bracket.upper}


def remembered(state):
    """Without the round-off, which is that of the precision."""
    return {"anchor": state.anchor, "scale": state.scale, "ceiling": state.ceiling}


def with_state(function, state):
    def call(linear_map, moved, **options):
        return function(linear_map, state(moved), **options)

    return call


def first(pair):
    return ends(pair[0])


NORMS = {
    "lipschitz.lipschitz_constant": of_map(
        L.lipschitz_constant, grid=name("layer"), method=name("fast")
    ),
    "lipschitz.lipschitz_bracket": of_map(
        lambda A, grid: ends(L.lipschitz_bracket(A, grid=grid)), grid=name("layer")
    ),
    "lipschitz.operator_bracket": of_map(
        lambda A, **o: ends(L.operator_bracket(A, **o)),
        num_iters=count(4),
        key=key("None"),
        failure_probability=number(1e-6),
    ),
    "lipschitz.spectral_norm": of_map(L.spectral_norm),
    "lipschitz.spectral_norm_bracket": of_map(
        lambda A, **o: ends(L.spectral_norm_bracket(A, **o)),
        num_iters=count(4),
        key=key("None"),
        failure_probability=number(1e-6),
    ),
    "lipschitz.spectral_penalty": of_map(
        lambda A, bound: L.spectral_penalty(A, bound), bound=number(1.0)
    ),
    "lipschitz.singular_values": of_map(L.singular_values, grid=name("layer")),
    "lipschitz.frequency_norms": Entry(
        lambda linear_map, grid: L.frequency_norms(linear_map, grid=grid),
        lambda _: {"linear_map": value(conv()), "grid": name("layer")},
    ),
    "lipschitz.stable_rank": of_map(L.stable_rank),
    "lipschitz.condition_number": of_map(lambda A: {"κ?": L.condition_number(A)}),
    "lipschitz.feature_lipschitz_constants": of_map(
        L.feature_lipschitz_constants, grid=name("layer")
    ),
    "lipschitz.output_lipschitz_constants": of_map(
        L.output_lipschitz_constants, grid=name("layer")
    ),
    "lipschitz.strong_convexity": of_map(L.strong_convexity),
    "lipschitz.is_exact": Entry(
        L.is_exact, lambda s: {"linear_map": value(dense(s))}, on_host=True
    ),
    "lipschitz.full_norm": Entry(
        lambda linear_map: L.full_norm(linear_map, True), lambda s: {"linear_map": value(dense(s))}
    ),
    "lipschitz.clip_singular_values": of_map(
        lambda A, **o: L.clip_singular_values(A, **o).kernel,
        bound=number(0.8),
        taps=name("kernel"),
        tolerance=number(1e-3),
        num_iters=count(3),
    ),
    "lipschitz.lipschitz_state": of_map(
        lambda A, grid: remembered(L.lipschitz_state(A, grid=grid)), grid=name("layer")
    ),
    "lipschitz.lipschitz_refresh": Entry(
        lambda linear_map, state, tolerance: first(
            L.lipschitz_refresh(linear_map, state, tolerance=tolerance)
        ),
        lambda s: {
            "linear_map": value(dense(s)),
            "state": value(L.lipschitz_state(dense(s))),
            "tolerance": number(0.05),
        },
    ),
    "lipschitz.remembered_constant": Entry(
        L.remembered_constant,
        lambda s: {"linear_map": value(dense(s)), "state": value(L.lipschitz_state(dense(s)))},
    ),
    "lipschitz.norm_state": of_map(lambda A: L.norm_state(A).vectors),
    "lipschitz.norm_step": Entry(
        lambda linear_map, state, num_steps: L.norm_step(linear_map, state, num_steps=num_steps)[0],
        lambda s: {
            "linear_map": value(dense(s)),
            "state": value(L.norm_state(dense(s))),
            "num_steps": count(2),
        },
    ),
    "lipschitz.norm_refresh": Entry(
        lambda linear_map, state: L.norm_refresh(linear_map, state).norm,
        lambda s: {"linear_map": value(dense(s)), "state": value(L.norm_state(dense(s)))},
    ),
    "lipschitz.kept_norm": Entry(
        L.kept_norm,
        lambda s: {"linear_map": value(dense(s)), "state": value(L.norm_state(dense(s)))},
    ),
    "lipschitz.normalising_factor": Entry(
        lambda norm, bound: L.normalising_factor(norm, bound, shrink_only=True),
        lambda s: {
            "norm": array(
                jnp.float32(2.0), "a scalar", "one axis more", "another length", "booleans"
            ),
            "bound": number(1.0),
        },
    ),
}


def both_norms(kernel, image_kernel):
    """All norms of a dense map and of a convolution, by their kernels."""
    maps = {"dense": ss.Dense(kernel), "conv": ss.Conv(image_kernel, (3, 3))}
    found = {}
    for which, A in maps.items():
        found |= {
            f"{which} L": L.lipschitz_constant(A),
            f"{which} padded": L.lipschitz_constant(A, grid="padded"),
            f"{which} ‖A‖": L.spectral_norm(A),
            f"{which} bracket": ends(L.lipschitz_bracket(A)),
            f"{which} operator": ends(L.operator_bracket(A)),
            f"{which} root": ends(L.spectral_norm_bracket(A)),
            f"{which} σ": L.singular_values(A),
            f"{which} L_i": L.feature_lipschitz_constants(A),
            f"{which} L_j": L.output_lipschitz_constants(A),
            f"{which} κ?": L.condition_number(A),
            f"{which} penalty": L.spectral_penalty(A, 0.5),
            f"{which} step": L.norm_step(A, L.norm_state(A))[0],
        }
    return found


NUMBERS_OF_NORMS = {
    "lipschitz.*": Entry(
        both_norms,
        lambda s: {
            "kernel": array(normal(1, s.n1, s.n2), "another length"),
            "image_kernel": array(normal(2, 2, 2, s.n1, s.n2), "another length"),
        },
    ),
    "lipschitz.clip_singular_values of a kernel": of_kernel(
        lambda A, bound: L.clip_singular_values(A, bound).kernel, OF_RANK_ONE, bound=number(0.8)
    ),
    "lipschitz.stable_rank of a kernel": of_kernel(
        lambda A: {"rank?": L.stable_rank(A)}, ("zero everywhere", "denormal everywhere")
    ),
    "equilibrium.normalized of a kernel": of_kernel(
        lambda A, bound: ss.equilibrium.normalized(A, bound).kernel, bound=number(0.9)
    ),
}


def of_problem(kernel, x, bias, ridge, z):
    p = ss.LayerProblem(ss.Dense(kernel), x, bias=bias, ridge=ridge, prior=ss.prox.L1(0.1))
    return {
        "F": p.smooth(z),
        "P": p.objective(z),
        "∇F": p.gradient(z),
        "f_i": p.terms(z),
        "certificate?": p.certificate(z),
        "normalised": p.normalized().gradient(z),
    }


PROBLEMS = {
    "problems.LayerProblem": Entry(
        of_problem,
        lambda s: {
            "kernel": array(normal(1, s.n1, s.n2), *OVERFLOW),
            "x": array(normal(2, s.batch, s.n1)),
            "bias": array(normal(3, s.n2), "None", "a scalar"),
            "ridge": number(0.3),
            "z": array(normal(4, s.batch, s.n2), "integers", "booleans"),
        },
    ),
    "problems.LayerProblem by its factors": Entry(
        lambda linear_map, loss, prior, inputs: ss.LayerProblem(
            linear_map, inputs, loss=loss, prior=prior
        ).gradient_at_zero(),
        lambda s: {
            "linear_map": value(dense(s)),
            "loss": value(ss.losses.Huber()),
            "prior": value(ss.prox.L1()),
            "inputs": array(normal(2, s.batch, s.n1)),
        },
    ),
    "problems.NormalizedProblem": Entry(
        lambda plain, scale, z: ss.problems.NormalizedProblem(plain, scale).gradient(z),
        lambda s: {
            "plain": value(problem(s)),
            "scale": number(2.0, "NaN"),
            "z": array(normal(4, s.batch, s.n2), "integers", "booleans"),
        },
    ),
}


def steps(rule, *, estimator=None):
    def call(problem, k, **options):
        e = estimator or ss.estimators.Full()
        return ss.step_sizes.schedule_of(rule(**options), problem, e)(k)

    return call


RULES = {
    "step_sizes.InverseLipschitz": Entry(
        steps(ss.InverseLipschitz),
        lambda s: {
            "problem": value(problem(s)),
            "k": Argument(3, "other"),
            "scale": number(1.0),
            "decay": number(0.9),
            "grid": name("layer"),
        },
    ),
    "step_sizes.InverseExpectedSmoothness": Entry(
        steps(ss.InverseExpectedSmoothness, estimator=ss.estimators.TauNice(1)),
        lambda s: {
            "problem": value(problem(s)),
            "k": Argument(3, "other"),
            "scale": number(0.5),
            "decay": number(0.9),
        },
    ),
    "step_sizes.InverseSeparable": Entry(
        steps(ss.InverseSeparable, estimator=ss.estimators.OutputCoordinates(1)),
        lambda s: {
            "problem": value(problem(s)),
            "k": Argument(3, "other"),
            "scale": number(1.0),
        },
    ),
    "step_sizes.ExponentialDecay": Entry(
        lambda initial, rate: ss.step_sizes.ExponentialDecay(initial, rate)(3),
        lambda s: {"initial": number(0.1, "seven numbers"), "rate": number(0.9, "seven numbers")},
    ),
    "step_sizes.exponential_decay": Entry(
        lambda initial, rate: ss.exponential_decay(initial, rate)(3),
        lambda s: {"initial": number(0.1, "seven numbers"), "rate": number(0.9, "seven numbers")},
    ),
    "step_sizes.check": Entry(
        ss.step_sizes.check,
        lambda s: {"step_size": number(0.1, "None")},
        on_host=True,
    ),
    "step_sizes.schedule_of": Entry(
        lambda step_size, problem, estimator: ss.step_sizes.schedule_of(
            step_size, problem, estimator
        )(3),
        lambda s: {
            "step_size": number(0.1, "None", "seven numbers"),
            "problem": value(problem(s)),
            "estimator": Argument(ss.estimators.Full(), "other"),
        },
    ),
}


def solved(make, stochastic, **fixed):
    def call(problem, key=None, init=None, **options):
        solver = make(**fixed, **options)
        return solution(solver.solve(key, problem, init=init, certify=True))

    return call


def solving(stochastic, **options):
    def arguments(s):
        common = {
            "problem": value(problem(s)),
            "init": array(normal(5, s.batch, s.n2), "None", "integers", "booleans"),
        }
        return common | ({"key": key()} if stochastic else {}) | options

    return arguments


def step():
    return number(0.05, "None")


def tolerance():
    return number(1e-3, "None")


def derivative(good="unrolled"):
    return name(good, "None")


D = ss.solvers
SOLVERS = {
    "solvers.ProxGD": Entry(
        solved(ss.ProxGD, False),
        solving(False, num_iters=count(3), step_size=step(), derivative=derivative()),
    ),
    "solvers.ProxGD to a tolerance": Entry(
        solved(ss.ProxGD, False, momentum=True),
        solving(False, num_iters=count(3), tol=tolerance(), gap_tol=tolerance()),
    ),
    "solvers.FixedPoint": Entry(
        solved(ss.FixedPoint, False),
        solving(False, num_iters=count(3), step_size=step(), tol=tolerance()),
    ),
    "solvers.Anderson": Entry(
        solved(ss.Anderson, False),
        solving(False, num_iters=count(3), step_size=step(), tol=tolerance(), memory=count(2)),
        compares=False,
    ),
    "solvers.ProxSG": Entry(
        solved(ss.ProxSG, True),
        solving(
            True,
            tau=count(1, "None"),
            num_iters=count(3),
            step_size=step(),
            decay=number(0.9),
            sampling=value(None, "None"),
        ),
        compares=False,
    ),
    "solvers.MS2GD": Entry(
        solved(ss.MS2GD, True),
        solving(
            True, tau=count(1, "None"), num_outer=count(2), num_inner=count(2), step_size=step()
        ),
        compares=False,
    ),
    "solvers.NSync": Entry(
        solved(ss.NSync, True),
        solving(True, tau=count(1), num_iters=count(3), step_size=step()),
        compares=False,
    ),
    "solvers.prox_gd": Entry(
        lambda problem, **o: solution(ss.prox_gd(problem, **o)),
        lambda s: {
            "problem": value(problem(s)),
            "num_iters": count(3),
            "step_size": step(),
            "init": array(normal(5, s.batch, s.n2), "None", "integers", "booleans"),
        },
    ),
    "solvers.prox_sg": Entry(
        lambda key, problem, **o: solution(ss.prox_sg(key, problem, **o)),
        lambda s: {
            "key": key(),
            "problem": value(problem(s)),
            "num_iters": count(3),
            "tau": count(1),
        },
        compares=False,
    ),
    "solvers.ms2gd": Entry(
        lambda key, problem, **o: solution(ss.ms2gd(key, problem, **o)),
        lambda s: {
            "key": key(),
            "problem": value(problem(s)),
            "num_outer": count(2),
            "num_inner": count(2),
            "tau": count(1),
        },
        compares=False,
    ),
    "solvers.nsync": Entry(
        lambda key, problem, **o: solution(ss.nsync(key, problem, **o)),
        lambda s: {
            "key": key(),
            "problem": value(problem(s)),
            "num_iters": count(3),
            "tau": count(1),
        },
        compares=False,
    ),
    "solvers.Unrolled": Entry(ss.Unrolled, lambda s: {}, on_host=True),
    "solvers.Remat": Entry(ss.Remat, lambda s: {}, on_host=True),
    "solvers.Truncated": Entry(ss.Truncated, lambda s: {"num_iters": count(2)}, on_host=True),
    "solvers.Implicit": Entry(
        lambda **o: ss.Implicit(**o),
        lambda s: {"tol": number(1e-5), "max_iters": count(20), "unsolved": name("nan", "None")},
        on_host=True,
    ),
}


def layer_call(kernel, x, bias, solver, ridge):
    """The whole of a solve by its arrays, with a gradient."""

    def run(kernel, x, bias, ridge):
        p = ss.LayerProblem(ss.Dense(kernel), x, bias=bias, ridge=ridge)
        return ss.ProxGD(4).solve(None, p, certify=True)

    found = run(kernel, x, bias, ridge)
    slope = jax.grad(lambda W: jnp.sum(run(W, x, bias, ridge).value))(kernel)
    return solution(found) | {"slope?": slope}


NUMBERS_OF_SOLVERS = {
    "solvers.ProxGD of arrays": Entry(
        lambda kernel, x, bias, ridge: layer_call(kernel, x, bias, None, ridge),
        lambda s: {
            "kernel": array(normal(1, s.n1, s.n2)),
            "x": array(normal(2, s.batch, s.n1)),
            "bias": array(normal(3, s.n2), "None", "a scalar"),
            "ridge": number(0.3),
        },
    ),
}

DROPOUTS = {
    "dropout.tau_nice_dropout": Entry(
        ss.dropout.tau_nice_dropout,
        lambda s: {
            "key": key(),
            "x": array(normal(2, s.batch, s.n1), "one axis more", "another length", "NaN"),
            "tau": count(1),
            "spatial_ndim": count(0),
        },
        compares=False,
    ),
    "dropout.output_dropout": Entry(
        ss.dropout.output_dropout,
        lambda s: {
            "key": key(),
            "u": array(normal(2, s.batch, s.n1), "one axis more", "another length", "NaN"),
            "tau": count(1),
            "spatial_ndim": count(0),
        },
        compares=False,
    ),
    "dropout.additive_dropout": Entry(
        ss.dropout.additive_dropout,
        lambda s: {
            "key": key(),
            "A": value(dense(s)),
            "z": array(normal(2, s.batch, s.n2)),
            "tau": count(1),
        },
        compares=False,
    ),
    "dropout.importance_dropout": Entry(
        ss.dropout.importance_dropout,
        lambda s: {
            "key": key(),
            "A": value(dense(s)),
            "x": array(normal(2, s.batch, s.n1)),
            "tau": count(1),
            "by": name("gradient"),
        },
        compares=False,
    ),
}


def updated(make):
    def call(weights, gradient, **options):
        transformation = make(**options)
        params, grads = {"kernel": weights}, {"kernel": gradient}
        state = transformation.init(params)
        return transformation.update(grads, state, params)[0]

    return call


OPTIMISERS = {
    "optax.prox": Entry(
        updated(ss.optax.prox),
        lambda s: {
            "prior": value(ss.prox.L1(0.1)),
            "learning_rate": number(0.1),
            "weights": array(normal(1, s.n1, s.n2)),
            "gradient": array(normal(2, s.n1, s.n2), "None"),  # as optax masks updates
        },
    ),
    "optax.project_spectral_norm": Entry(
        updated(ss.optax.project_spectral_norm),
        lambda s: {
            "bound": number(1.0),
            "maps": function(ss.optax.dense_kernels),
            "method": name("clip"),
            "every": count(1),
            "weights": array(normal(1, s.n1, s.n2), *OF_RANK_ONE),
            "gradient": array(normal(2, s.n1, s.n2), "None", *OF_RANK_ONE),
        },
    ),
    "optax.dense_kernels": Entry(
        ss.optax.dense_kernels,
        lambda s: {
            "path": Argument("a/kernel", "other"),
            "leaf": Argument(normal(1, s.n1, s.n2), "other"),
        },
    ),
}

B = ss.proxprop


def backward(linear_map, inputs, bias, step):
    def f(inputs, bias):
        return jnp.sum(B.apply(linear_map, inputs, bias, step) ** 2)

    return {"y": B.apply(linear_map, inputs, bias, step), "d": jax.grad(f, (0, 1))(inputs, bias)}


PROXPROP = {
    "proxprop.apply": Entry(
        backward,
        lambda s: {
            "linear_map": value(dense(s)),
            "inputs": array(normal(2, s.batch, s.n1), *OVERFLOW),
            "bias": array(normal(3, s.n2), "None"),
            "step": value(B.Exact(0.5)),
        },
    ),
    "proxprop.implicit_gradient": Entry(
        lambda kernel, inputs, cotangent, step: B.implicit_gradient(
            ss.Dense(kernel), inputs, cotangent, step
        ),
        lambda s: {
            "kernel": array(normal(1, s.n1, s.n2), "NaN", "NaN everywhere"),  # no part of the step
            "inputs": array(normal(2, s.batch, s.n1), *OVERFLOW),
            "cotangent": array(normal(3, s.batch, s.n2)),
            "step": value(B.ConjugateGradients(0.5)),
        },
    ),
    "proxprop.Exact": Entry(
        lambda cotangent, **o: B.implicit_gradient(
            ss.Dense(normal(1, 4, 3)), normal(2, 2, 4), cotangent, B.Exact(**o)
        ),
        lambda s: {"cotangent": array(normal(3, 2, 3)), "tau": number(0.5), "form": name("auto")},
    ),
    "proxprop.ConjugateGradients": Entry(
        lambda cotangent, **o: B.implicit_gradient(
            ss.Dense(normal(1, 4, 3)), normal(2, 2, 4), cotangent, B.ConjugateGradients(**o)
        ),
        lambda s: {
            "cotangent": array(normal(3, 2, 3)),
            "tau": number(0.5, "1e30"),
            "num_iters": count(2),
        },
    ),
    "proxprop.checked_step": Entry(
        B.checked_step, lambda s: {"step": value(B.Exact())}, on_host=True
    ),
    "proxprop.through": Entry(
        lambda function, step, parameters, x: jax.grad(
            lambda p: jnp.sum(B.through(function, step)(p, x) ** 2)
        )(parameters),
        lambda s: {
            "function": function(lambda W, x: jnp.tanh(x @ W)),
            "step": value(B.ConjugateGradients(0.5)),
            "parameters": Argument(normal(1, s.n1, s.n2), "other"),
            "x": Argument(normal(2, s.batch, s.n1), "other"),
        },
    ),
}

Q = ss.equilibrium


def unit(s):
    return ss.Dense(0.3 * normal(1, s.n1, s.n2))


def layer(s, seed=2):
    return Q.EquilibriumProblem(unit(s), normal(seed, s.batch, s.n2))


def of_equilibrium(kernel, drive, z):
    p = Q.EquilibriumProblem(ss.Dense(kernel), drive)
    return {
        "h": p.layer(z),
        "G": p.objective(z),
        "certificate?": p.certificate(z),
        "distance?": p.distance(z),
    }


EQUILIBRIA = {
    "equilibrium.EquilibriumProblem": Entry(
        of_equilibrium,
        lambda s: {
            "kernel": array(0.3 * normal(1, s.n1, s.n2)),
            "drive": array(normal(2, s.batch, s.n2)),
            "z": array(normal(3, s.batch, s.n1), "integers", "booleans"),
        },
    ),
    "equilibrium.EquilibriumProblem by its factors": Entry(
        lambda linear_map, drive, prior: Q.EquilibriumProblem(
            linear_map, drive, prior=prior
        ).gradient_at_zero(),
        lambda s: {
            "linear_map": value(unit(s)),
            "drive": array(normal(2, s.batch, s.n2)),
            "prior": value(ss.prox.Tanh()),
        },
    ),
    "equilibrium.DeepProblem": Entry(
        lambda layers, alpha, z: Q.DeepProblem(layers, alpha).layer(z),
        lambda s: {
            "layers": value([layer(s, 2), layer(s, 3)]),
            "alpha": number(0.5),
            "z": array(normal(3, s.batch, s.n1), "integers", "booleans"),
        },
    ),
    "equilibrium.Regularized": Entry(
        lambda z, **o: Q.Regularized(**o)(z),
        lambda s: {
            "prior_or_gradient": value(ss.prox.L1(0.1), "a class"),
            "step": number(0.1),
            "contraction": number(1.0, "None"),
            "z": Argument(normal(3, s.batch, s.n1), "other"),
        },
    ),
    "equilibrium.SequentialAveraging": Entry(
        lambda problem, **o: solution(Q.SequentialAveraging(num_iters=3, **o).solve(None, problem)),
        lambda s: {
            "problem": value(layer(s)),
            "gradient": function(lambda z: z),
            "prior_step": number(0.1),
            "contraction": number(0.9),
            "step_size": step(),
        },
    ),
    "equilibrium.normalized": of_map(
        lambda A, bound: Q.normalized(A, bound).kernel, bound=number(0.9)
    ),
    "equilibrium.normalized_refresh": Entry(
        lambda linear_map, state, bound, tolerance: (
            Q.normalized_refresh(linear_map, state, bound, tolerance=tolerance)[0].kernel
        ),
        lambda s: {
            "linear_map": value(dense(s)),
            "state": value(L.lipschitz_state(dense(s), grid="padded")),
            "bound": number(0.9),
            "tolerance": number(0.05),
        },
    ),
    "equilibrium.solve": Entry(
        lambda problem, **o: solution(Q.solve(problem, certify=True, **o)),
        lambda s: {
            "problem": value(layer(s)),
            "solver": value(ss.FixedPoint(5), "None"),
            "init": array(normal(3, s.batch, s.n1), "None", "integers", "booleans"),
            "derivative": name("implicit", "None"),
        },
    ),
    "equilibrium.solve of arrays": Entry(
        lambda kernel, drive: solution(
            Q.solve(Q.EquilibriumProblem(ss.Dense(kernel), drive), certify=True)
        ),
        lambda s: {
            "kernel": array(0.3 * normal(1, s.n1, s.n2)),
            "drive": array(normal(2, s.batch, s.n2)),
        },
    ),
}

ENTRIES = (
    NORMS | NUMBERS_OF_NORMS | PROBLEMS | RULES | SOLVERS | NUMBERS_OF_SOLVERS | DROPOUTS | OPTIMISERS
    | PROXPROP | EQUILIBRIA
)  # fmt: skip
