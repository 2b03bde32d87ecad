"""The contract of a solver."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from flax import nnx

from stochsolvers import linen as solver_linen
from stochsolvers import nnx as solver_nnx
from stochsolvers._typing import Array
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import L1
from stochsolvers.solvers import (
    Implicit,
    ProxGD,
    Remat,
    Solution,
    Solver,
    Status,
    Truncated,
    Unrolled,
)
from stochsolvers.testing import _common as common
from stochsolvers.testing import _problems as problems

_ITERATIONS = 3000  # in which a solver must come to the optimum of a small problem


def check_solver(
    solver: Solver, problem: LayerProblem | None = None, key: Array | None = None
) -> None:
    r"""Hold a solver to its contract, on a small problem.

    - `solve` returns what `Solution` says, the same with and without `jit`, the same for the same key;
      `vmap` over problems and keys is a loop;
    - other inputs, weights and numbers of the solver compile nothing again, jitted and eager;
    - derivatives, unrolled, are those of differences, and so are "remat" and `Truncated(K)`; implicit ones
      are those of the exact solution, for solvers that do not sample;
    - with a tolerance, for these, the status is CONVERGED, and DIVERGED where inputs are NaN;
    - an example of NaN is reported, not raised, eager and jitted, and spoils no other;
    - `deterministic=True` needs no key and converges to the optimum: its certificate goes to zero;
    - it runs in an NNX and a Linen layer, with equal results.

    Args:
      solver: the solver, of few iterations.
      problem: of a few features, two or more examples and a ridge; by default 4 inputs, 3 outputs and an L1
        prior.
      key: random key.

    Raises:
      AssertionError: in words, with the numbers.
    """
    name = type(solver).__name__
    common.require(isinstance(solver, Solver), name, "a Solver", repr(solver))
    common.passes_as_a_value(name, solver)
    with common.float64():
        key = jax.random.key(0) if key is None else key
        given = problems.small_problem(prior=L1(0.05)) if problem is None else problem
        _check_all(name, solver, common.as_arrays(common.cast(given, jnp.float64)), key)


def _check_all(name: str, solver: Solver, problem: LayerProblem, key: Array) -> None:
    plain = dataclasses.replace(solver, tol=None, derivative=None)
    _check_static_numbers(name, solver)
    _check_solution(name, plain, problem, key)
    bad = _with_a_bad_example(problem)
    jitted = _check_compilations(name, plain, problem, bad, key)
    if bad is not None:
        _check_bad_values(name, plain, problem, bad, key, jitted)
    _check_convergence(name, plain, problem)
    _check_derivatives(name, plain, problem, key)
    if not solver.stochastic:
        _check_tolerance(name, plain, problem)
    _check_layers(name, plain, key)


def _check_static_numbers(name: str, solver: Solver) -> None:
    for field in dataclasses.fields(solver):
        value, role = getattr(solver, field.name), field.metadata.get("role")
        fine = not (role == "static" and isinstance(value, float))
        words = "a number that is traced (not a static field), so that all values compile once"
        common.require(fine, f"{name}.{field.name}", words, f"the static {value!r}")

    if "step_size" in {field.name for field in dataclasses.fields(solver)}:
        field = next(f for f in dataclasses.fields(solver) if f.name == "step_size")
        fine = field.metadata.get("role") != "static"
        words = "a field that is traced (not static), so that all steps compile once"
        common.require(fine, f"{name}.step_size", words, "a static field")


def _check_solution(name: str, solver: Solver, problem: LayerProblem, key: Array) -> None:
    """Shapes, dtypes, keys, and P of the last iterate."""
    batch = problem.batch_shape
    what = f"{name}.solve"
    solve = functools.partial(solver.solve, key, problem)
    solution = common.attempt(what, solve)
    common.same_shape(f"value of {what}", solution.value, problem.shape)
    common.same_dtype(f"value of {what}", solution.value, problem.dtype)
    count = len(solution.residuals)
    common.same_shape(f"residuals of {what}", solution.residuals, (count, *batch))
    common.same_shape(f"finite of {what}", solution.finite, batch)
    common.require(solution.finite, f"iterates of {what}", "all finite", solution.finite)
    zero, both = jnp.zeros(problem.shape), f"{what} with init and trace_objective"
    traced = common.attempt(both, solve, init=zero, trace_objective=True)
    last = _objective(problem, traced.value)
    common.require(solution.objectives is None, f"objectives of {what}", None, "values")
    words = "P(z_K)"
    close = common.close
    close(f"objectives of {what}, the last", traced.objectives[-1], last, words=words)
    again = solver.solve(key, problem)
    common.require(
        jnp.array_equal(again.value, solution.value), f"{what} with the same key", "the same value",
        f"a difference of {jnp.max(jnp.abs(again.value - solution.value)):.3g}",
    )  # fmt: skip
    words = "that without init"
    close(f"{what} with init = 0", traced.value, solution.value, rtol=1e-9, words=words)
    for dtype in (jnp.float32, jnp.bfloat16):
        narrow = common.cast(problem, dtype)
        kind = jnp.dtype(dtype).name
        built = jax.eval_shape(_solved_anew, solver, key, narrow)
        common.same_dtype(f"value of {what} in {kind}", built, jnp.float32)
    other = solver.solve(jax.random.fold_in(key, 1), problem).value
    differ = not jnp.array_equal(other, solution.value)
    words = "another value" if solver.stochastic else "the same value (it does not sample)"
    common.require(
        differ == solver.stochastic, f"{what} with another key", words, f"equal: {not differ}"
    )
    first = common.attempt(
        f"{what}(None, …, deterministic=True)", solver.solve, None, problem, deterministic=True
    ).value
    second = solver.solve(key, problem, deterministic=True).value
    words = "that of every other key"
    close(f"{what} with deterministic=True", second, first, words=words)


def _solved_anew(solver: Solver, key: Array, problem: LayerProblem) -> Array:
    """The solution of the problem by its constructor, which converts narrow dtypes."""
    problem = LayerProblem(
        problem.linear_map, problem.inputs, loss=problem.loss, bias=problem.bias,
        prior=problem.prior, ridge=problem.ridge,
    )  # fmt: skip
    return solver.solve(key, problem).value


_LOWERED = [0]  # programs that were handed to the compiler, in this process


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
        _LOWERED[0] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


def _check_compilations(
    name: str, solver: Solver, problem: LayerProblem, bad: LayerProblem | None, key: Array
) -> Solution:
    """The last solution under jit, of the problem with a bad example if there is one."""
    cases = [
        (common.scaled(solver, f), jax.random.fold_in(key, i), common.scaled(problem, f))
        for i, f in enumerate((1.0, 0.9, 0.8))
    ]
    again = 0
    for i, (one, folded, case) in enumerate(cases):
        before = _LOWERED[0]
        one.solve(folded, case)
        again += i > 0 and _LOWERED[0] > before
    words = "1 for other inputs, weights, keys and numbers of the solver"
    common.require(again == 0, f"compilations of {name}.solve", words, again + 1)

    path = [(common.scaled(solver, f), key, common.scaled(problem, f)) for f in (1.0, 0.9)]
    more = [] if bad is None else [(path[0][0], key, common.scaled(bad, 1.0))]
    jitted = common.traced_once(f"{name}.solve", type(solver).solve, [*path, *more])
    for (one, _, case), got in zip(path, jitted[:2], strict=True):
        words = "that without jit"
        value = one.solve(key, case).value
        common.close(f"{name}.solve under jit", got.value, value, rtol=1e-9, words=words)
    keys = jax.random.split(key, 2)
    cases = [common.scaled(problem, f) for f in (1.0, 0.9)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)
    what = f"{name}.solve under vmap"
    function = jax.jit(jax.vmap(lambda key, problem: solver.solve(key, problem).value))
    batched = common.attempt(what, function, keys, stacked)
    loop = np.stack([solver.solve(k, p).value for k, p in zip(keys, cases, strict=True)])
    common.close(what, batched, loop, rtol=1e-9, words="that of a loop")
    return jitted[-1]


def _with_a_bad_example(problem: LayerProblem) -> LayerProblem | None:
    """The problem with NaN for its first example; None where it has one example alone."""
    if not problem.batch_shape:
        return None
    inputs = np.array(problem.inputs)
    inputs[0] = np.nan
    return dataclasses.replace(problem, inputs=jnp.asarray(inputs))


def _check_bad_values(
    name: str,
    solver: Solver,
    problem: LayerProblem,
    bad: LayerProblem,
    key: Array,
    jitted: Solution,
) -> None:
    good = np.asarray(solver.solve(key, problem).value)
    what = f"{name}.solve at an input of NaN"
    eager = common.attempt(f"{what} without jit", solver.solve, key, bad)
    for solution, how in ((eager, "without jit"), (jitted, "under jit")):
        words = "finite=False for that example alone"
        expected = np.ones(problem.batch_shape, bool)
        expected[0] = False
        fine = np.asarray(solution.finite) == expected
        common.require(fine, f"{what} {how}", words, solution.finite)
        words = "the values of the other examples, as without it"
        value = np.asarray(solution.value)[1:]
        common.close(f"{what} {how}", value, good[1:], rtol=1e-9, words=words)


@jax.jit
def _objective(problem: LayerProblem, z: Array) -> Array:
    return problem.objective(z)


@jax.jit
def _reference(problem: LayerProblem, weight: Array) -> tuple[Array, Array, Array]:
    """argmin P to all digits, min P, and <w, sin z> there."""
    solver = ProxGD(num_iters=_ITERATIONS, momentum=True, form="literal")
    z = solver.solve(None, problem).value
    return z, problem.objective(z), _loss_of(z, weight)


def _loss_of(z: Array, weight: Array) -> Array:
    return jnp.vdot(jnp.sin(z), weight)


def _weight(problem: LayerProblem) -> Array:
    return common.normal(21, problem.shape)


def _check_convergence(name: str, solver: Solver, problem: LayerProblem) -> None:
    """Solves that start where the last one ended."""
    z = solver.solve(None, problem, deterministic=True).value
    count = len(solver.solve(None, problem, deterministic=True).residuals)
    for _ in range(math.ceil(_ITERATIONS / count)):
        z = solver.solve(None, problem, init=z, deterministic=True).value
    best = np.asarray(_reference(problem, _weight(problem))[1])
    got = np.asarray(_objective(problem, z))
    what = f"objective after {_ITERATIONS} iterations of {name} along ∇F"
    scale = 1 + np.abs(best)
    at = int(np.argmax(got - best))
    words = f"min P = {best.flat[at]:.8g}"
    common.require(got - best <= 1e-5 * scale, what, words, f"{got.flat[at]:.8g}")
    gap = np.asarray(problem.certificate(z))
    what = f"certificate after {_ITERATIONS} iterations of {name} along ∇F"
    common.require(gap <= 1e-3 * scale, what, "about 0", gap)


def _check_derivatives(name: str, solver: Solver, problem: LayerProblem, key: Array) -> None:
    """Of <w, sin z> along a random direction of all arrays of the problem."""
    way = common.scaled(common.directions(problem), 0.1)
    weight = _weight(problem)

    def loss(problem, derivative, run):
        one = dataclasses.replace(solver, derivative=derivative, **run)
        return _loss_of(one.solve(key, problem).value, weight)

    def along(derivative, **run):
        gradient = jax.jit(jax.grad(lambda p: loss(p, derivative, run)))
        what = f"derivative of {name}.solve ({type(derivative).__name__})"
        parts = jax.tree.map(np.vdot, common.attempt(what, gradient, problem), way)
        return what, sum(jax.tree.leaves(parts))

    def differences(function):
        return common.slope(function, problem, way, 1e-6)

    # of the values that users get, whose program is there
    unrolled = differences(lambda p: _loss_of(solver.solve(key, p).value, weight))
    for derivative in (Unrolled(), Remat(), Truncated(10**6)):
        what, got = along(derivative)
        common.close(what, got, unrolled, rtol=1e-4, words="that of differences")
    if not solver.stochastic:
        exact = differences(lambda p: _reference(p, weight)[2])
        for count in ("num_iters", "num_outer"):
            if count in {field.name for field in dataclasses.fields(solver)}:
                what, got = along(Implicit(tol=1e-9), **{count: _ITERATIONS})
                words = "that of differences of the exact solution"
                common.close(what, got, exact, rtol=1e-3, words=words)
                break


def _check_tolerance(name: str, solver: Solver, problem: LayerProblem) -> None:
    if "num_iters" not in {field.name for field in dataclasses.fields(solver)}:
        return
    stops = dataclasses.replace(solver, tol=1e-9, num_iters=_ITERATIONS)
    what = f"{name} with a tolerance"
    solution = common.attempt(what, stops.solve, None, problem)
    words = f"{Status.CONVERGED} (CONVERGED)"
    common.require(solution.status == Status.CONVERGED, f"status of {what}", words, solution.status)
    common.same_shape(
        f"residuals of {what}", solution.residuals, (_ITERATIONS, *problem.batch_shape)
    )
    words = "the optimum"
    best = _reference(problem, _weight(problem))[0]
    common.close(f"value of {what}", solution.value, best, rtol=1e-4, words=words)
    bad = dataclasses.replace(problem, inputs=jnp.full_like(problem.inputs, jnp.nan))
    solution = common.attempt(f"{what} at inputs of NaN", stops.solve, None, bad)
    words = f"{Status.DIVERGED} (DIVERGED)"
    got = np.asarray(solution.status)
    common.require(got == Status.DIVERGED, f"status of {what} at inputs of NaN", words, got)


def _check_layers(name: str, solver: Solver, key: Array) -> None:
    x = common.normal(22, (2, 4))
    options: dict[str, Any] = {"prior": L1(0.05), "ridge": 0.3, "param_dtype": jnp.float64}
    what = f"{name} in stochsolvers.nnx.SolverLinear"
    make = functools.partial(solver_nnx.SolverLinear, 4, 3, solver=solver, rngs=nnx.Rngs(0))
    layer = common.attempt(what, make, **options)
    for deterministic in (True, False):
        mode = f"{what}, deterministic={deterministic}"
        value = common.attempt(mode, layer, x, deterministic=deterministic, rngs=key)
        alone = solver.solve(key, layer.problem(x), deterministic=deterministic).value
        common.close(mode, value, alone, rtol=1e-9, words="the solver's value")
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    what = f"{name} in stochsolvers.linen.SolverDense"
    make_linen = functools.partial(solver_linen.SolverDense, 3, solver=solver)
    module = common.attempt(what, make_linen, **options)
    attempt: Any = functools.partial(module.apply, {"params": params}, x, deterministic=True)
    value = common.attempt(what, attempt)
    words = "the value of the NNX layer"
    common.close(what, value, layer(x, deterministic=True), rtol=1e-9, words=words)
