"""The library's whole contract, by its own public checks, over the catalogue."""

import functools
import inspect
import typing

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import stochsolvers as ss
from stochsolvers import testing
from stochsolvers.nnx._solver_layer import SolverLayer

WORDING = r"(?s)^\S.*: expected .+, got .+\.$"


def each(entries):
    return pytest.mark.parametrize("name", entries.keys())


@each(catalogue.MAPS)
def test_maps(name):
    testing.check_linear_map(catalogue.MAPS[name])


@each(catalogue.LOSSES)
def test_losses(name):
    testing.check_loss(*catalogue.LOSSES[name])


@each(catalogue.PRIORS)
def test_priors(name):
    testing.check_prior(catalogue.PRIORS[name], catalogue.SHAPES.get(name, (4,)))


@each(catalogue.ESTIMATORS)
def test_estimators(name):
    estimator, law = catalogue.ESTIMATORS[name]
    testing.check_estimator(estimator, catalogue.PROBLEM, law=law)


@each(catalogue.STEP_SIZES)
def test_step_sizes(name):
    rule, estimator = catalogue.STEP_SIZES[name]
    report = testing.check_step_size(rule, catalogue.PROBLEM, estimator)
    assert report.safe is not None
    assert report.first <= report.safe * (1 + 1e-9)


@each(catalogue.SOLVERS)
def test_solvers(name):
    testing.check_solver(catalogue.SOLVERS[name], catalogue.PROBLEM)


@each(catalogue.LAYERS | catalogue.EQUILIBRIA)
def test_layers(name):
    layer, inputs, variables = (catalogue.LAYERS | catalogue.EQUILIBRIA)[name]()
    testing.check_layer(layer, inputs, variables=variables)


@each(catalogue.EQUIVALENCES)
def test_equivalences(name):
    layer, block, inputs, options = catalogue.EQUIVALENCES[name]()
    testing.assert_equivalent(layer, block, inputs, **options)


MEMBERS = {
    "linear_maps": (ss.LinearMap, catalogue.MAPS),
    "losses": (ss.Loss, catalogue.LOSSES),
    "prox": (ss.Prior, catalogue.PRIORS),
    "estimators": (ss.Estimator, catalogue.ESTIMATORS),
    "step_sizes": (ss.StepSizeRule, catalogue.STEP_SIZES),
    "solvers": (ss.Solver, catalogue.SOLVERS),
    "nnx": (nnx.Module, catalogue.LAYERS | catalogue.EQUIVALENCES | catalogue.EQUILIBRIA),
    "linen": (nn.Module, catalogue.LAYERS | catalogue.EQUILIBRIA),
}


def makes(member, base):
    """Whether a member of a module is, or returns, an instance of the base class."""
    if inspect.isclass(member):
        return issubclass(member, base) and not inspect.isabstract(member)
    if not inspect.isfunction(member) or typing.get_type_hints(member).get("return") is None:
        return False
    result = typing.get_type_hints(member)["return"]
    return inspect.isclass(result) and issubclass(result, base)


@pytest.mark.parametrize("room", MEMBERS)
def test_the_catalogue_is_complete(room):
    """A member that is exported is in `tests/catalogue.py` under its name."""
    base, entries = MEMBERS[room]
    listed = {name.split()[0].removeprefix(f"{room}.") for name in entries}
    exported = {
        name
        for name, member in vars(getattr(ss, room)).items()
        if not name.startswith("_") and makes(member, base)
    }
    helpers = {"written_out", "fold_batch_norm", "StepSizeRule"}  # they return what they are given
    others = {  # no solver layers, and where their tests are
        "test_proxprop_layers": {"ProxPropLinear", "ProxPropConv", "ProxPropDense"},
        "test_spectral_tools": {"SpectralNorm"},
        "surgery": {"ReplacedLayers"},
    }
    if room == "linen":
        others["test_linen_parity"] = {
            "AdditiveDropout",
            "ImportanceDropout",
            "OutputDropout",
            "TauNiceDropout",
            "SolverResNetBlock",
        }
    missing = exported - listed - helpers - set().union(*others.values())
    assert not missing, f"add {sorted(missing)} to tests/catalogue.py"


@each(catalogue.SOLVERS)
def test_solvers_have_one_signature(name):
    solver = catalogue.SOLVERS[name]
    for method in ("solve", "step", "init", "schedule", "step_constant"):
        mine, base = (inspect.signature(getattr(c, method)) for c in (type(solver), ss.Solver))
        assert list(mine.parameters) == list(base.parameters)
    if isinstance(solver, ss.FixedPoint | ss.Anderson):
        return  # values alone, without a function
    function = getattr(ss, type(solver).__name__.lower().replace("prox", "prox_"))
    parameters = list(inspect.signature(function).parameters)
    assert parameters[: 1 + solver.stochastic] == ["key"] * solver.stochastic + ["problem"]
    options = inspect.signature(function).parameters.values()
    assert all(p.kind == p.KEYWORD_ONLY for p in list(options)[1 + solver.stochastic :])


@each(catalogue.ESTIMATORS)
def test_estimators_have_one_signature(name):
    kind = type(catalogue.ESTIMATORS[name][0])
    for method in ("draw", "gradient", "expected_smoothness", "prepare", "__call__"):
        mine, base = (inspect.signature(getattr(c, method)) for c in (kind, ss.Estimator))
        assert list(mine.parameters) == list(base.parameters)


@each(catalogue.MAPS)
def test_maps_say_what_they_expected(name):
    A = catalogue.MAPS[name]
    for product, shape in ((A, A.in_shape), (A.adjoint, A.out_shape)):
        with pytest.raises(ValueError, match=WORDING):
            product(jnp.ones((*shape[:-1], shape[-1] + 1)))


@each(catalogue.LOSSES)
def test_problems_say_what_they_expected_of_losses(name):
    loss, _ = catalogue.LOSSES[name]
    with pytest.raises(ValueError, match="loss of LayerProblem: expected an instance of Loss, got"):
        ss.LayerProblem(catalogue.MAPS["Dense"], jnp.ones(4), loss=type(loss))


@each(catalogue.PRIORS)
def test_priors_say_what_they_expected(name):
    prior, shape = catalogue.PRIORS[name], catalogue.SHAPES.get(name, (4,))
    for v, step in (
        (jnp.ones(shape), -1.0),
        (jnp.ones(shape, int), 1.0),
        (jnp.ones(shape), [1.0] * 7),
    ):
        with pytest.raises(ValueError, match=WORDING):
            prior.prox(v, jnp.asarray(step))


def _draw(kind, tau):
    kind(tau).draw(jax.random.key(0), catalogue.PROBLEM, jnp.zeros((2, 3)))


@each(catalogue.ESTIMATORS)
def test_estimators_say_what_they_expected(name):
    estimator, _ = catalogue.ESTIMATORS[name]
    if "tau" in vars(estimator):
        for tau in (0, 9, 1.5, True):
            with pytest.raises(ValueError, match=WORDING):
                _draw(type(estimator), tau)


@each(catalogue.SOLVERS)
def test_solvers_say_what_they_expected(name):
    solver, problem, key = catalogue.SOLVERS[name], catalogue.PROBLEM, jax.random.key(0)
    with pytest.raises(ValueError, match=r"shape of init: expected \(2, 3\), got \(3,\)"):
        solver.solve(key, problem, init=jnp.zeros(3))
    for count in ("num_iters", "num_outer", "num_inner"):
        if count in vars(solver):
            for wrong in (0, 2.0, True):
                with pytest.raises(ValueError, match=f"{count}: expected an integer >= 1, got"):
                    type(solver)(**vars(solver) | {count: wrong})
    for wrong in (-1.0, "fast"):
        with pytest.raises(ValueError, match=WORDING):
            type(solver)(**vars(solver) | {"step_size": wrong, "derivative": None})
    if solver.stochastic:
        with pytest.raises(ValueError, match="key: expected a random key"):
            solver.solve(None, problem)


@functools.cache
def with_first_entry(name):
    """(key, value) -> z and where it is finite, for a kernel with this first entry: eager and jitted."""
    solver, problem = catalogue.SOLVERS[name], catalogue.PROBLEM

    def solve(key, value):
        kernel = problem.linear_map.kernel.at[0, 0].set(value)
        case = ss.LayerProblem(ss.Dense(kernel), problem.inputs, prior=problem.prior)
        solution = solver.solve(key, case)
        return solution.value, solution.finite

    return solve, jax.jit(solve)


@each(catalogue.SOLVERS)
@pytest.mark.parametrize("value", [jnp.inf, jnp.nan, 1e30])
def test_kernels_out_of_range_are_reported_eager_and_jitted(name, value):
    """Never raised; the same example is not finite, or all of it is."""
    solve, jitted_solve = with_first_entry(name)
    key, value = jax.random.key(0), jnp.float32(value)
    (eager, fine), (jitted, also_fine) = solve(key, value), jitted_solve(key, value)
    np.testing.assert_array_equal(fine, also_fine)
    np.testing.assert_array_equal(np.isfinite(eager), np.isfinite(jitted))
    assert not np.any(fine & ~np.all(np.isfinite(eager), axis=-1))


@each(catalogue.ESTIMATORS)
def test_estimators_promote_no_ranks(name):
    estimator, problem = catalogue.ESTIMATORS[name][0], catalogue.PROBLEM
    z = jnp.zeros(problem.shape, problem.dtype)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(estimator, jax.random.key(0), problem, z)
        ready = estimator.prepare(problem)
        jax.eval_shape(ready, jax.random.key(0), problem, z)


@each(catalogue.SOLVERS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_solvers_promote_no_ranks(name, deterministic):
    solver = catalogue.SOLVERS[name]

    def solve(key, problem):
        return solver.solve(key, problem, deterministic=deterministic)

    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(solve, jax.random.key(0), catalogue.PROBLEM)


def test_a_skip_connection_promotes_no_ranks():
    layer, _, inputs, _ = catalogue.EQUIVALENCES["nnx.SolverResNetBlock"]()
    with jax.numpy_rank_promotion("raise"):
        assert layer(inputs).shape == inputs.shape


def test_convolutions_of_nnx_and_linen_are_the_same():
    layer, inputs, _ = catalogue.LAYERS["nnx.SolverConv"]()
    module = catalogue.LAYERS["linen.SolverConv"]().layer
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    testing.assert_equivalent((module, {"params": params}), layer, inputs, rtol=1e-5)


@each(catalogue.LAYERS)
def test_layers_are_solver_layers_of_one_interface(name):
    layer = catalogue.LAYERS[name]().layer
    kind = SolverLayer if isinstance(layer, nnx.Module) else nn.Module
    assert isinstance(layer, kind)
    solve = list(inspect.signature(layer.solve).parameters)
    assert [p for p in solve if p != "rngs"] == ["inputs", "skip", "deterministic", "certify"]
