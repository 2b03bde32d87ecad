"""One call from a problem to its equilibrium."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.problems import Problem
from stochsolvers.solvers import Anderson, Solution, Solver
from stochsolvers.solvers.derivatives import DerivativeLike, Remat, Unrolled


def solve(
    problem: Problem,
    *,
    solver: Solver | None = None,
    init: Array | None = None,
    derivative: DerivativeLike = "implicit",
    certify: bool = False,
) -> Solution:
    r"""The equilibrium z* = h(z*) of each example.

    Args:
      problem: an `EquilibriumProblem`, its `hidden()` form, a `DeepProblem` or another problem that the
        solver takes, such as a `LayerProblem`.
      solver: `FixedPoint`, `Anderson`, `ProxGD`, …; by default `Anderson` with the tolerance 1e-5 (1e-9 in
        float64), at most 200 iterations. `Solution.status` says for each example whether it was met.
      init: z_0, zero by default; the equilibrium at a nearby kernel or drive as a warm start.
      derivative: "implicit", `Implicit(...)`, `Truncated(n)`, "unrolled" or "remat", for a solver that does
        not name its own. With the last two the default solver is 30 iterations of `Anderson`, for there is no
        reverse mode through a stopping test.
      certify: also return a bound on G(z_K) − min G, see the problem's `certificate`.

    Returns:
      `Solution`.

    Raises:
      ValueError: at trace time, for what is no problem, a derivative other than the solver's own, and a
        `certify` of a problem without an objective.
    """
    if not isinstance(problem, Problem):
        wanted = "a problem such as EquilibriumProblem"
        _checks.fail("problem of equilibrium.solve", wanted, type(problem).__name__)
    resolved = with_derivative(solver, derivative, problem.dtype)
    return resolved.solve(None, problem, init=init, certify=certify)


def with_derivative(solver: Solver | None, derivative: DerivativeLike, dtype: Any) -> Solver:
    """The solver, or the default one, with this derivative."""
    if solver is None:
        if derivative in ("unrolled", "remat") or isinstance(derivative, Unrolled | Remat):
            return Anderson(30, derivative=derivative)
        tol = 1e-5 if jnp.finfo(dtype).bits <= 32 else 1e-9
        return Anderson(200, tol=tol, derivative=derivative)
    if not isinstance(solver, Solver):
        _checks.fail("solver of equilibrium.solve", "a Solver such as Anderson(50)", repr(solver))
    if solver.derivative is None:
        return dataclasses.replace(solver, derivative=derivative)
    if derivative not in ("implicit", solver.derivative):
        _checks.fail("derivative of equilibrium.solve", solver.derivative, derivative)
    return solver
