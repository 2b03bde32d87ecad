"""One call from a convex program to its certified optimum."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from stochsolvers import _checks
from stochsolvers._compilation import LIGHT
from stochsolvers._shards import automatic
from stochsolvers._typing import Array, Scalar, join_static, split_static
from stochsolvers.convex import _bound, _inputs, _terms
from stochsolvers.convex._algorithm import Algorithm, Progress
from stochsolvers.convex._cone_admm import ConeADMM
from stochsolvers.convex._fista import FISTA
from stochsolvers.convex._interior_point import InteriorPoint, least_margin
from stochsolvers.convex._kernel_admm import KernelADMM
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.convex._program import Program
from stochsolvers.convex._relu_problem import ReLUProblem
from stochsolvers.convex._three_layer import ThreeLayerProblem
from stochsolvers.losses import Squares
from stochsolvers.solvers import Solution, Status

_MOST_DATA = 8000
"""Beyond, the n × n kernel is not factored."""
_FEW_PRODUCTS = 3 * 10**8
"""n² P d of cone programs, up to which a Newton step takes about a tenth of a second."""


def solve(
    problem: Any,
    *,
    solver: Algorithm | None = None,
    init: Array | None = None,
    tol: Scalar = 1e-4,
    certify: bool = True,
    progress: Progress | None = None,
) -> Solution:
    r"""The optimum of a convex program, to a certified relative gap: P(V) − min P ≤ tol P(V).

    Args:
      problem: a `GatedProblem`, a `ReLUProblem` or a `ThreeLayerProblem`.
      solver: `KernelADMM()`, `FISTA()`, `LandmarkADMM()` for gated programs; `ConeADMM()`,
        `InteriorPoint()`, `FISTA()` for ReLU programs; `FISTA()` for those of three layers. None takes, of
        gated programs, `KernelADMM` for squares on up to 8000 data and else `FISTA`; of ReLU programs
        `InteriorPoint` outside `jit`, where n² P d ≤ 3·10⁸ and the gates are inside the cones, else
        `ConeADMM` for squares and `FISTA` for other losses, joint outputs and patches.
      init: V_0, zero by default; the optimum for a nearby β as a warm start. `InteriorPoint` keeps it
        where it finds nothing better, and begins at the gates.
      tol: the relative gap, traced. In float32 gaps below about 1e-5 may be out of reach where β is small.
      certify: also return a bound on P(V) − min P that allows for round-off; see `Solution.certificate`. It
        is computed in float64 on the host where arrays are concrete; within `jit`, and for `FISTA` on
        cones, in their precision, and looser.
      progress: called with the iteration, the objectives and the gaps, each time, from within the compiled
        program.

    Returns:
      `Solution` with a `status`, `iterations` and a `certificate` for each program of a batch; `residuals`
      and `objectives` are those of the last iteration, shape (1, *batch). A path of β, tolerances, caps and
      warm starts compiles once. Nothing of it is differentiated: derivatives are zero. `CONVERGED` is the
      loop's own gap; the certificate, with its round-off, may be above tol P by that. `MAX_ITERS` is the cap,
      or a gap that no longer falls: then the certificate is what was reached.

    Raises:
      ValueError: at trace time, for what is no convex program, an algorithm that is not for it, a `Prior`
        as a regularizer that is neither a norm nor a ridge, and shapes that do not fit.
    """
    _inputs.number("tol", tol)
    if solver is None:
        solver = _default(problem, init, tol)
    if not isinstance(solver, Algorithm):
        _checks.fail("solver of convex.solve", "an algorithm such as KernelADMM()", repr(solver))
    solver.check(problem)
    if isinstance(problem, GatedProblem) and not _terms.has_gauge(problem):
        wanted = "a norm or a ridge; ss.ProxGD is for every prior"
        _checks.fail("regularizer of convex.solve", wanted, type(problem.prior).__name__)
    if init is not None:
        _checks.real_array("init of convex.solve", init)
        if jnp.shape(init) != problem.shape:
            _checks.fail("shape of init of convex.solve", f"{problem.shape}", jnp.shape(init))
    if isinstance(solver, InteriorPoint):
        return _on_host(problem, solver, init, tol, certify, progress)
    start = None if init is None else jnp.asarray(init, problem.dtype)
    traced, static = split_static(solver)
    tol = _inputs.scalar(tol, problem.dtype)
    concrete = _bound.is_concrete(problem, start, tol, traced)
    on_host = concrete and isinstance(problem, GatedProblem)
    on_host |= concrete and isinstance(solver, ConeADMM)
    call = _solve if concrete and jax.default_backend() == "cpu" else _solve_within
    solution, point = call(
        problem,
        traced,
        start,
        tol,
        static=static,
        certify=certify and not on_host,
        progress=progress,
    )
    if certify and on_host:
        if isinstance(problem, ReLUProblem):
            gap = _bound.cone_certificate(problem, solution.value, *point)
        else:
            gap = _bound.certificate(problem, solution.value, *point)
        solution = dataclasses.replace(solution, certificate=jnp.asarray(gap, problem.dtype))
    return solution


def _on_host(
    problem: Any,
    solver: InteriorPoint,
    init: Array | None,
    tol: Scalar,
    certify: bool,
    progress: Progress | None,
) -> Solution:
    last = solver.minimise(problem, init, tol, progress)
    rounded, gap = last.value.astype(problem.dtype), None
    value = jnp.asarray(rounded)
    if certify:
        gap = _bound.cone_certificate(problem, rounded, last.point, last.multipliers)
        gap = jnp.asarray(gap, problem.dtype)
    objective = problem.objective(value)
    status = jnp.where(last.done, Status.CONVERGED, Status.MAX_ITERS)
    return Solution(
        value=value,
        residuals=jnp.zeros((1, *problem.batch_shape), problem.dtype),
        objectives=objective[None],
        finite=jnp.isfinite(objective),
        status=status,
        iterations=jnp.asarray(last.iterations),
        certificate=gap,
    )


def _default(problem: Any, init: Array | None, tol: Scalar) -> Algorithm:
    if isinstance(problem, ReLUProblem):
        return _default_of_cones(problem, init, tol)
    if isinstance(problem, ThreeLayerProblem):
        return FISTA()
    if not isinstance(problem, GatedProblem):
        wanted = "a GatedProblem, a ReLUProblem or a ThreeLayerProblem"
        _checks.fail("problem of convex.solve", wanted, type(problem).__name__)
    if isinstance(problem.loss, Squares) and problem.inputs.shape[-1] <= _MOST_DATA:
        return KernelADMM()
    return FISTA()


def _default_of_cones(problem: ReLUProblem, init: Array | None, tol: Scalar) -> Algorithm:
    if not problem.joint:
        n, P, d = problem.y.shape[-1], problem.patterns.num, problem.X.shape[-1]
        outside = _bound.is_concrete(problem, init, _inputs.scalar(tol, problem.dtype))
        if outside and n * n * P * d <= _FEW_PRODUCTS and least_margin(problem) > 0:
            return InteriorPoint()
        if isinstance(problem.loss, Squares) and problem.X.ndim == 2:
            return ConeADMM()
    return FISTA()


def _solve_program(
    problem: Any,
    traced: list[Any],
    init: Array | None,
    tol: Array,
    *,
    static: Any,
    certify: bool,
    progress: Progress | None,
) -> tuple[Solution, tuple[Array, ...]]:
    def run(problem: Any, traced: list[Any], init: Array | None, tol: Array):
        return _minimised(problem, join_static(traced, static), init, tol, certify, progress)

    problem, init = lax.stop_gradient((problem, init))
    return automatic(run, PartitionSpec(), problem, traced, init, tol)


def _minimised(
    problem: Any,
    solver: Algorithm,
    init: Array | None,
    tol: Array,
    certify: bool,
    progress: Progress | None,
) -> tuple[Solution, tuple[Array, ...]]:
    last = solver.minimise(problem, init, tol, progress)
    last, *multipliers = last if isinstance(solver, ConeADMM) else (last,)
    finite = jnp.isfinite(last.objective)
    status = jnp.where(last.done, Status.CONVERGED, Status.MAX_ITERS)
    status = jnp.where(finite, status, Status.DIVERGED)
    gap = None
    if certify:
        if isinstance(problem, GatedProblem):
            gap = _terms.certificate(problem, last.value, last.dual.point)
        else:
            gap = problem.certificate(last.value)
    solution = Solution(
        value=last.value,
        residuals=last.moved[None],
        objectives=last.objective[None],
        finite=finite,
        status=status,
        iterations=last.iterations,
        certificate=gap,
    )
    return solution, (last.dual.point, *multipliers)


_STATIC = ("static", "certify", "progress")
_solve_within = jax.jit(_solve_program, static_argnames=_STATIC)
_solve = jax.jit(_solve_program, static_argnames=_STATIC, compiler_options=LIGHT)


def regularization_path(
    problem: Any,
    betas: Any,
    *,
    solver: Algorithm | None = None,
    tol: Scalar = 1e-4,
    certify: bool = True,
) -> list[Solution]:
    r"""The optima for each of several β, in their order, each begun at the one before.

    From β_max downwards, say β_max · 2^{-k/4}, k = 0, 1, …, each is a small step from the last, and zero is
    the first. Nothing is compiled twice.

    Args:
      problem: as of `solve`; its own β is not used.
      betas: β > 0, decreasing, shape (k,).
      solver: as of `solve`.
      tol: as of `solve`.
      certify: as of `solve`.

    Returns:
      one `Solution` for each β.
    """
    if not isinstance(problem, Program):
        _checks.fail("problem of regularization_path", "a convex program", type(problem).__name__)
    _checks.rank("betas", betas, 1)
    _checks.positive("betas", betas)
    betas = jnp.asarray(betas)
    init, solutions = jnp.zeros(problem.shape, problem.dtype), []
    for beta in betas:
        solution = solve(
            problem.with_beta(beta), solver=solver, init=init, tol=tol, certify=certify
        )
        init = solution.value
        solutions.append(solution)
    return solutions
