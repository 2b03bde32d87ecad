"""An interior point for small cone programs, in float64 on the host."""

from typing import Any, NamedTuple

import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import value_object
from stochsolvers.convex import _bound
from stochsolvers.convex._algorithm import Algorithm
from stochsolvers.convex._relu_problem import ReLUProblem
from stochsolvers.losses import Squares

_GROW, _CENTRED = 8.0, 1e-3


@value_object
class InteriorPoint(Algorithm):
    r"""A barrier method for `ReLUProblem` with squares: gaps of 1e-8, for up to some hundred patterns.

    With t_i ≥ ||u_i|| for each of the 2P weights u_i it minimises, for growing τ, by Newton's method

        τ (½||F u − y||² + β Σ t_i) − Σ log(t_i² − ||u_i||²) − Σ log(G_i u_i)_j,

    whose Hessian is τ FᵀF plus blocks of size d + 1: one n × n system a step. At the minimum the gap is
    ν/τ, ν = 4P + 2Pn; the multipliers are a_ij = 1/(τ (G_i u_i)_j), and the gap that is reported is that of the
    dual point which they and the residual give. It runs in float64 on the host, not within `jit`, and starts from
    the gates, which have to be strictly inside their cones.

    Args:
      max_iters: the most Newton steps.

    References:
      Boyd and Vandenberghe, Convex Optimization, 2004, section 11.3.
    """

    def check(self, problem: Any) -> None:
        """Refuse what is no cone program with squares, traced arrays, and gates on the border of their cone."""
        if not isinstance(problem, ReLUProblem):
            _checks.fail("problem of InteriorPoint", "a ReLUProblem", type(problem).__name__)
        if not isinstance(problem.loss, Squares):
            _checks.fail("loss of InteriorPoint", "Squares()", repr(problem.loss))
        if not _bound.is_concrete(problem):
            _checks.fail("problem of InteriorPoint", "arrays that are known", "traced ones")
        if problem.X.ndim == 3:
            _checks.fail("X of InteriorPoint", "data of shape (n, d), without patches", problem.X.shape)

    def minimise(self, problem: Any, init: Any, tol: Any, progress: Any) -> "Interior":
        """Of all programs of a batch, one after the other."""
        del init
        X, mask = np.asarray(problem.X, np.float64), np.asarray(problem.patterns.mask)
        gates = np.asarray(problem.patterns.gates, np.float64).T
        beta, targets = float(problem.beta), np.asarray(problem.inputs, np.float64)
        tol, cap = float(tol), int(self.max_iters)
        each = [
            _minimise(X, mask, gates, y, beta, tol, cap, progress)
            for y in targets.reshape(-1, targets.shape[-1])
        ]
        batch = targets.shape[:-1]
        return Interior(*(np.stack(part).reshape(*batch, *part[0].shape) for part in zip(*each)))


class Interior(NamedTuple):
    """U, the dual point s, its multipliers a, whether the gap was met, and Newton steps, of each program."""

    value: np.ndarray
    point: np.ndarray
    multipliers: np.ndarray
    done: np.ndarray
    iterations: np.ndarray


class _Program(NamedTuple):
    """blocks F_i = ±D_i X and G_i, shapes (2P, n, d) and (2P, m, d); y; β."""

    F: np.ndarray
    G: np.ndarray
    y: np.ndarray
    beta: float


def _minimise(X, mask, gates, y, beta, tol, cap, progress):  # noqa: ANN001, ANN202
    P, d = gates.shape
    rows = np.any(X != 0, axis=1)
    signs = np.where(mask.T, 1.0, -1.0)[:, :, None]
    G = (signs * X)[:, rows]
    D = np.where(mask.T[:, :, None], X, 0.0)
    program = _Program(np.concatenate([D, -D]), np.concatenate([G, G]), y, beta)
    gates = gates / np.linalg.norm(gates, axis=1, keepdims=True)
    margins = np.einsum("pnd,pd->pn", G, gates)
    if margins.size and margins.min() <= 0:
        _checks.fail("gates of InteriorPoint", "gates strictly inside their cones", margins.min())
    size = 1e-3 * np.linalg.norm(y) / max(np.linalg.norm(X), 1e-300) / P
    u, t = size * np.concatenate([gates, gates]), np.full(2 * P, 2.0 * size)
    nu = 4 * P + program.G.shape[0] * program.G.shape[1]
    tau = nu / max(0.5 * y @ y, 1e-300)
    best, done, k = None, False, 0
    while k < cap and not done:
        u, t, steps = _centre(program, u, t, tau, cap - k)
        k += steps
        s, a, lower = _dual(program, u, tau)
        residual = np.einsum("pnd,pd->n", program.F, u) - y
        primal = 0.5 * residual @ residual + beta * np.linalg.norm(u, axis=1).sum()
        best = max(lower, -np.inf if best is None else best)
        if progress is not None:
            progress(k, primal, primal - lower)
        done = primal - lower <= tol * primal
        if tau > 1e16 * nu / max(primal, 1e-300):
            break
        tau *= _GROW
    multipliers = np.zeros((2 * P, len(X)))
    multipliers[:, rows] = a
    return u.reshape(2, P, d), s, multipliers.reshape(2, P, -1), np.asarray(done), np.asarray(k)


def _dual(program, u, tau):  # noqa: ANN001, ANN202
    """s = F u − y and a = 1/(τ G u), scaled to ||−F_iᵀ s + G_iᵀ a_i|| ≤ β; and the bound."""
    F, G, y, beta = program
    s = np.einsum("pnd,pd->n", F, u) - y
    a = 1.0 / (tau * np.einsum("pnd,pd->pn", G, u))
    sides = np.einsum("pnd,pn->pd", G, a) - np.einsum("pnd,n->pd", F, s)
    scale = min(1.0, beta / np.linalg.norm(sides, axis=1).max())
    s, a = scale * s, scale * a
    return s, a, -(s @ y + 0.5 * s @ s)


def _centre(program, u, t, tau, cap):  # noqa: ANN001, ANN202
    """Newton steps with a line search, until the decrement is small."""
    value = _barrier(program, u, t, tau)
    for k in range(1, cap + 1):
        du, dt, decrement = _newton(program, u, t, tau)
        if not np.isfinite(decrement) or decrement <= _CENTRED:
            return u, t, k
        step = 1.0
        while step > 1e-12:
            following = _barrier(program, u + step * du, t + step * dt, tau)
            if following <= value - 0.1 * step * decrement:
                break
            step *= 0.5
        else:
            return u, t, k
        u, t, value = u + step * du, t + step * dt, following
    return u, t, cap


def _barrier(program, u, t, tau):  # noqa: ANN001, ANN202
    F, G, y, beta = program
    inner, slack = t**2 - (u**2).sum(1), np.einsum("pnd,pd->pn", G, u)
    if t.min() <= 0 or inner.min() <= 0 or (slack.size and slack.min() <= 0):
        return np.inf
    residual = np.einsum("pnd,pd->n", F, u) - y
    smooth = 0.5 * residual @ residual + beta * t.sum()
    return tau * smooth - np.log(inner).sum() - np.log(slack).sum()


def _newton(program, u, t, tau):  # noqa: ANN001, ANN202
    """(H + τ FᵀF)⁻¹ of the gradient, H of blocks: one system of size n."""
    F, G, y, beta = program
    blocks, d = u.shape
    inner, slack = t**2 - (u**2).sum(1), np.einsum("pnd,pd->pn", G, u)
    residual = np.einsum("pnd,pd->n", F, u) - y
    gradient = np.zeros((blocks, d + 1))
    gradient[:, :d] = tau * np.einsum("pnd,n->pd", F, residual) + 2 * u / inner[:, None]
    gradient[:, :d] -= np.einsum("pnd,pn->pd", G, 1 / slack)
    gradient[:, d] = tau * beta - 2 * t / inner
    point = np.concatenate([-u, t[:, None]], 1)  # half the gradient of t² − ||u||²
    H = 4 * np.einsum("pi,pj->pij", point, point) / inner[:, None, None] ** 2
    H[:, np.arange(d), np.arange(d)] += 2 / inner[:, None]
    H[:, d, d] -= 2 / inner
    H[:, :d, :d] += np.einsum("pnd,pn,pne->pde", G, 1 / slack**2, G, optimize=True)
    lifted = np.concatenate([F, np.zeros((*F.shape[:2], 1))], 2)
    solved = np.linalg.solve(H, np.concatenate([gradient[:, :, None], lifted.transpose(0, 2, 1)], 2))
    base, through = solved[:, :, 0], solved[:, :, 1:]
    system = np.eye(len(y)) / tau + np.einsum("pni,pim->nm", lifted, through, optimize=True)
    middle = np.linalg.solve(system, np.einsum("pni,pi->n", lifted, base))
    step = -(base - np.einsum("pin,n->pi", through, middle))
    return step[:, :d], step[:, d], -float((gradient * step).sum())
