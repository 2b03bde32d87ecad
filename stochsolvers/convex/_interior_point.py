"""An interior point for small cone programs, in float64 on the host."""

import operator
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize

from stochsolvers import _checks
from stochsolvers._typing import value_object
from stochsolvers.convex import _bound
from stochsolvers.convex._algorithm import Algorithm
from stochsolvers.convex._relu_problem import ReLUProblem
from stochsolvers.losses import Squares

_GROW, _CENTRED, _EXACT, _LARGEST = 20.0, 1e-3, 1e-4, 1e13


@value_object
class InteriorPoint(Algorithm):
    r"""A barrier method for `ReLUProblem` with squares: gaps of 1e-8, for up to some hundred patterns.

    For growing τ it minimises, over the 2P weights u_i and by Newton's method,

        τ (½||F u − y||² + β Σ t_i) − Σ log(t_i² − ||u_i||²) − Σ log(G_i u_i)_j,

    in which t_i = (1 + w_i)/(τβ), w_i = √(1 + (τβ ||u_i||)²), is known. The Hessian is τ FᵀF plus blocks of
    size d,

        (τβ/t_i) (I − (τβ)² u_i u_iᵀ / (w_i (1 + w_i))) + G_iᵀ diag(G_i u_i)⁻² G_i:

    one n × n system a step. At the minimum the gap is ν/τ, ν = 4P + 2Pn; the multipliers are 1/(τ (G_i
    u_i)_j), near the end those of projections onto the cones, and the gap that is reported is that of the
    dual point which they and the residual give. It runs in float64 on the host, not within `jit`, and
    starts from the gates, which have to be strictly inside their cones.

    Args:
      max_iters: the most Newton steps.

    References:
      Boyd and Vandenberghe, Convex Optimization, 2004, section 11.3.
    """

    def check(self, problem: Any) -> None:
        """Refuse what is no cone program with squares, traced arrays, and patches."""
        if not isinstance(problem, ReLUProblem):
            _checks.fail("problem of InteriorPoint", "a ReLUProblem", type(problem).__name__)
        if not isinstance(problem.loss, Squares):
            _checks.fail("loss of InteriorPoint", "Squares()", repr(problem.loss))
        if not _bound.is_concrete(problem):
            _checks.fail("problem of InteriorPoint", "arrays that are known", "traced ones")
        if problem.X.ndim == 3:
            _checks.fail(
                "X of InteriorPoint", "data of shape (n, d), without patches", problem.X.shape
            )

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
        stacked = [np.stack(part) for part in zip(*each, strict=True)]
        return Interior(*(part.reshape((*batch, *part.shape[1:])) for part in stacked))


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


def _minimise(X, mask, gates, y, beta, tol, cap, progress):
    P, d = gates.shape
    rows = np.any(X != 0, axis=1)
    signs = np.where(mask.T, 1.0, -1.0)[:, :, None]
    G = (signs * X)[:, rows]
    D = np.where(mask.T[:, :, None], X, 0.0)
    program = _Program(np.concatenate([D, -D]), np.concatenate([G, G]), y, beta)
    gates = gates / np.maximum(np.linalg.norm(gates, axis=1, keepdims=True), 1e-300)
    margins = np.einsum("pnd,pd->pn", G, gates)
    if margins.size and margins.min() <= 0:
        _checks.fail("gates of InteriorPoint", "gates strictly inside their cones", margins.min())
    size = 1e-3 * np.linalg.norm(y) / max(np.linalg.norm(X), 1e-300) / P
    u = size * np.concatenate([gates, gates])
    nu = 4 * P + program.G.shape[0] * program.G.shape[1]
    tau = nu / max(0.5 * y @ y, 1e-300)
    best, lower, done, k = (np.inf, u), (-np.inf, y, None), False, 0
    while k < cap and not done and tau < _LARGEST * nu / (0.5 * y @ y):
        u, steps = _centre(program, u, tau, cap - k)
        k += steps
        residual = np.einsum("pnd,pd->n", program.F, u) - y
        primal = 0.5 * residual @ residual + beta * np.linalg.norm(u, axis=1).sum()
        best = min(best, (primal, u), key=operator.itemgetter(0))
        exact = best[0] - lower[0] <= _EXACT * best[0]
        lower = max(lower, _dual(program, u, tau, exact), key=operator.itemgetter(0))
        if progress is not None:
            progress(k, best[0], best[0] - lower[0])
        done = best[0] - lower[0] <= tol * best[0]
        tau *= _GROW
    multipliers = np.zeros((2 * P, len(X)))
    multipliers[:, rows] = lower[2]
    value = best[1].reshape(2, P, d)
    return value, lower[1], multipliers.reshape(2, P, -1), np.asarray(done), np.asarray(k)


def _dual(program, u, tau, exact):
    """D(s), s = F u − y, and a, scaled to ||−F_iᵀ s + G_iᵀ a_i|| ≤ β.

    a = 1/(τ G u), whose digits are those of G u; near the end those of the projections onto the cones.
    """
    F, G, y, beta = program
    s = np.einsum("pnd,pd->n", F, u) - y
    images = -np.einsum("pnd,n->pd", F, s)
    a = 1.0 / (tau * np.einsum("pnd,pd->pn", G, u))
    if exact:
        for i in np.flatnonzero(np.linalg.norm(images, axis=1) > beta):
            a[i] = scipy.optimize.nnls(G[i].T, -images[i], maxiter=100 * sum(G[i].shape))[0]
    sides = np.einsum("pnd,pn->pd", G, a) + images
    scale = min(1.0, beta / np.linalg.norm(sides, axis=1).max())
    s, a = scale * s, scale * a
    return -(s @ y + 0.5 * s @ s), s, a


def _centre(program, u, tau, cap):
    """Newton steps with a line search, until the decrement is small."""
    value = _barrier(program, u, tau)
    for k in range(1, cap + 1):
        step, decrement = _newton(program, u, tau)
        if not np.isfinite(decrement) or decrement <= _CENTRED:
            return u, k
        length = 1.0
        while _barrier(program, u + length * step, tau) > value - 0.1 * length * decrement:
            length *= 0.5
            if length < 1e-10:
                return u, k
        u = u + length * step
        value = _barrier(program, u, tau)
    return u, cap


def _heights(program, u, tau):
    """τβ, t_i and w_i."""
    b = tau * program.beta
    w = np.sqrt(1.0 + b**2 * (u**2).sum(1))
    return b, (1.0 + w) / b, w


def _barrier(program, u, tau):
    F, G, y, _ = program
    slack = np.einsum("pnd,pd->pn", G, u)
    if slack.size and slack.min() <= 0:
        return np.inf
    b, t, _ = _heights(program, u, tau)
    residual = np.einsum("pnd,pd->n", F, u) - y
    return (
        0.5 * tau * residual @ residual + (b * t - np.log(2.0 * t / b)).sum() - np.log(slack).sum()
    )


def _newton(program, u, tau):
    """The step −(H + τ FᵀF)⁻¹ of the gradient, H of blocks, and its decrement."""
    F, G, y, _ = program
    b, t, w = _heights(program, u, tau)
    slack = np.einsum("pnd,pd->pn", G, u)
    residual = np.einsum("pnd,pd->n", F, u) - y
    gradient = tau * np.einsum("pnd,n->pd", F, residual) + (b / t)[:, None] * u
    gradient -= np.einsum("pnd,pn->pd", G, 1.0 / slack)
    # R of H = RᵀR from a QR factorisation: H itself has twice the digits that float64 has
    norms = np.linalg.norm(u, axis=1)
    unit = u / np.where(norms > 0, norms, 1.0)[:, None]
    outer = np.einsum("p,pi,pj->pij", 1.0 - 1.0 / np.sqrt(w), unit, unit)
    root = np.sqrt(b / t)[:, None, None] * (np.eye(u.shape[1]) - outer)
    R: Any = np.linalg.qr(np.concatenate([G / slack[:, :, None], root], 1), mode="r")
    half = np.linalg.solve(
        R.transpose(0, 2, 1), np.concatenate([gradient[:, :, None], F.transpose(0, 2, 1)], 2)
    )
    base, through = half[:, :, 0], half[:, :, 1:]
    system = np.eye(len(y)) / tau + np.einsum("pin,pim->nm", through, through, optimize=True)
    middle = np.linalg.solve(system, np.einsum("pin,pi->n", through, base))
    lifted = np.einsum("pin,n->pi", through, middle) - base
    step = np.linalg.solve(R, lifted[:, :, None])[:, :, 0]
    return step, -float((gradient * step).sum())
