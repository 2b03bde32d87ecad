"""An interior point for small cone programs, in float64 on the host."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts are loaded where they are first used

from stochsolvers import _checks
from stochsolvers._typing import value_object
from stochsolvers.convex import _bound
from stochsolvers.convex._algorithm import Algorithm
from stochsolvers.convex._relu_problem import ReLUProblem
from stochsolvers.losses import Loss, Squares

_GROW, _CENTRED, _EXACT, _LARGEST = 20.0, 1e-3, 1e-4, 1e13


@value_object
class InteriorPoint(Algorithm):
    r"""A barrier method for `ReLUProblem`: gaps of 1e-8, for up to some hundred patterns.

    For growing τ it minimises, over the 2P weights u_i and by Newton's method,

        τ (Σ_j ℓ((F u)_j, y_j) + β Σ t_i) − Σ log(t_i² − ||u_i||²) − Σ log(G_i u_i)_j,

    in which t_i = (1 + w_i)/(τβ), w_i = √(1 + (τβ ||u_i||)²), is known. The Hessian is τ Fᵀ diag(ℓ'') F plus
    blocks of size d,

        (τβ/t_i) (I − (τβ)² u_i u_iᵀ / (w_i (1 + w_i))) + G_iᵀ diag(G_i u_i)⁻² G_i:

    one n × n system a step. At the minimum the gap is ν/τ, ν = 4P + 2Pn; the multipliers are 1/(τ (G_i
    u_i)_j), near the end those of projections onto the cones, and the gap that is reported is that of the
    dual point which they and the residual ∂ℓ give. It runs in float64 on the host, not within `jit`, and
    starts from the gates, which have to be strictly inside their cones. A warm start in the cones is one more
    point to choose the best from.

    Args:
      max_iters: the most Newton steps.

    References:
      Boyd and Vandenberghe, Convex Optimization, 2004, section 11.3.
    """

    def check(self, problem: Any) -> None:
        """Refuse what is no `ReLUProblem`, joint outputs, and traced arrays."""
        if not isinstance(problem, ReLUProblem):
            _checks.fail("problem of InteriorPoint", "a ReLUProblem", type(problem).__name__)
        if problem.joint:
            _checks.fail(
                "problem of InteriorPoint", "outputs of programs of their own", "joint ones"
            )
        if not _bound.is_concrete(problem):
            _checks.fail("problem of InteriorPoint", "arrays that are known", "traced ones")

    def minimise(self, problem: Any, init: Any, tol: Any, progress: Any) -> "Interior":
        """Of all programs of a batch, one after the other."""
        targets = np.asarray(problem.inputs, np.float64)
        F, G, rows, gates = _blocks(problem)
        tol, cap, beta = float(tol), int(self.max_iters), float(problem.beta)
        programs = [
            _Program(F, G, y, beta, problem.loss) for y in targets.reshape(-1, targets.shape[-1])
        ]
        points = _known_points(problem, init, len(programs))
        each = [
            _minimise(program, gates, point, tol, cap, progress)
            for program, point in zip(programs, points, strict=True)
        ]
        U, s, a, done, steps = (np.stack(part) for part in zip(*each, strict=True))
        multipliers = np.zeros((*a.shape[:2], len(rows)))
        multipliers[..., rows] = a
        parts = _halves(U), s, _halves(multipliers), done, steps
        batch = targets.shape[:-1]
        return Interior(*(part.reshape((*batch, *part.shape[1:])) for part in parts))


class Interior(NamedTuple):
    """U, the dual point s, its multipliers a, whether the gap was met, and Newton steps, of each program."""

    value: np.ndarray
    point: np.ndarray
    multipliers: np.ndarray
    done: np.ndarray
    iterations: np.ndarray


class _Program(NamedTuple):
    """Blocks F_i = ±D_i X and G_i, shapes (2P, n, d) and (2P, m, d); y; β; ℓ."""

    F: np.ndarray
    G: np.ndarray
    y: np.ndarray
    beta: float
    loss: Loss


def _halves(array: np.ndarray) -> np.ndarray:
    """Those of V and those of W, shape (C, 2, P, ·)."""
    return array.reshape(len(array), 2, -1, array.shape[-1])


def _blocks(problem: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """F, G without the rows of data of zeros, which rows are left, and gates of norm 1, shape (P, d)."""
    X, mask = np.asarray(problem.X, np.float64), np.asarray(problem.patterns.mask)
    X, mask = X.reshape(len(X), -1, X.shape[-1]), mask.reshape(len(X), -1, mask.shape[-1])
    F = np.einsum("nkd,nkp->pnd", X, mask.astype(np.float64), optimize=True)
    X, signs = X.reshape(-1, X.shape[-1]), np.where(mask, 1.0, -1.0).reshape(-1, mask.shape[-1])
    rows = np.any(X != 0, axis=1)
    G = signs.T[:, rows, None] * X[rows]
    gates = np.asarray(problem.patterns.gates, np.float64).T
    gates = gates / np.maximum(np.linalg.norm(gates, axis=1, keepdims=True), 1e-300)
    least = least_margin(problem)
    if least <= 0:
        _checks.fail("gates of InteriorPoint", "gates strictly inside their cones", least)
    return np.concatenate([F, -F]), np.concatenate([G, G]), rows, gates


def least_margin(problem: Any) -> float:
    """min (G_i g_i)_j over the data that are not zero; above 0 where all gates are inside their cones."""
    X, mask = np.asarray(problem.X, np.float64), np.asarray(problem.patterns.mask)
    margins = np.where(mask, 1.0, -1.0) * (X @ np.asarray(problem.patterns.gates, np.float64))
    return float(margins[np.any(X != 0, axis=-1)].min(initial=np.inf))


def _known_points(problem: Any, init: Any, num: int) -> list[np.ndarray | None]:
    """The warm start of each program, None outside the cones."""
    if init is None:
        return [None] * num
    inside = np.isfinite(np.asarray(problem.objective(init))).reshape(-1)
    points = np.asarray(init, np.float64).reshape(num, -1, np.shape(init)[-1])
    return [u if is_inside else None for u, is_inside in zip(points, inside, strict=True)]


def _minimise(program, gates, known, tol, cap, progress):
    F, G, y = program.F, program.G, program.y
    largest = np.sqrt((F**2).sum((1, 2)).max())
    u = 1e-3 * np.linalg.norm(y) / max(largest, 1e-300) / len(F) * np.concatenate([gates, gates])
    nu = 2 * len(F) + G.shape[0] * G.shape[1]
    zero = max(_expanded(program, np.zeros(len(y)))[0], 1e-300)
    tau = nu / zero
    best, lower, done, k = (np.inf, u), (-np.inf, y, np.zeros(G.shape[:2])), False, 0
    if known is not None:
        best = _objective(program, known)[0], known
    while k < cap and not done and tau < _LARGEST * nu / zero:
        u, steps = _centre(program, u, tau, cap - k)
        k += steps
        primal, residual = _objective(program, u)
        best = min(best, (primal, u), key=operator.itemgetter(0))
        exact = best[0] - lower[0] <= _EXACT * best[0]
        dual = _dual(program, u, residual, tau, exact)
        lower = max(lower, dual, key=operator.itemgetter(0))
        if progress is not None:
            progress(k, best[0], best[0] - lower[0])
        done = best[0] - lower[0] <= tol * best[0]
        tau *= _GROW
    return best[1], lower[1], lower[2], np.asarray(done), np.asarray(k)


def _objective(program, u):
    """P(u) and ∂ℓ."""
    value, residual, _ = _expanded(program, _predicted(program, u))
    return value + program.beta * np.linalg.norm(u, axis=1).sum(), residual


def _predicted(program, u):
    return np.einsum("pnd,pd->n", program.F, u)


def _expanded(program, prediction):
    """Σ ℓ, ∂ℓ and ℓ'' at a prediction."""
    if isinstance(program.loss, Squares):  # without compiling anything
        r = prediction - program.y
        return 0.5 * r @ r, r, np.ones(len(r))
    with jax.enable_x64(True):
        value, r, curvature = _expansion(program.loss, prediction, program.y)
    return float(value), np.asarray(r), np.maximum(np.asarray(curvature), 0.0)


@jax.jit
def _expansion(loss, prediction, y):
    def slope(u):
        return loss.derivative(u, y)

    r, curvature = jax.jvp(slope, (prediction,), (jnp.ones_like(prediction),))
    return jnp.sum(loss.value(prediction, y)), r, curvature


def _dual(program, u, s, tau, exact):
    """D(s), s = ∂ℓ(F u, y), and a, scaled to ||−F_iᵀ s + G_iᵀ a_i|| ≤ β.

    a = 1/(τ G u), whose digits are those of G u; near the end those of the projections onto the cones.
    """
    F, G, y, beta, loss = program
    s = _bound.loss_terms(loss, "dual_projection", s, y)
    images = -np.einsum("pnd,n->pd", F, s)
    a = 1.0 / (tau * np.einsum("pnd,pd->pn", G, u))
    if exact:
        for i in np.flatnonzero(np.linalg.norm(images, axis=1) > beta):
            a[i] = scipy.optimize.nnls(G[i].T, -images[i], maxiter=100 * sum(G[i].shape))[0]
    sides = np.einsum("pnd,pn->pd", G, a) + images
    scale = min(1.0, beta / max(np.linalg.norm(sides, axis=1).max(), 1e-300))
    s, a = scale * s, scale * a
    value = -float(np.sum(_bound.loss_terms(loss, "conjugate", s, y)))
    return -np.inf if np.isnan(value) else value, s, a


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
    slack = np.einsum("pnd,pd->pn", program.G, u)
    if slack.size and slack.min() <= 0:
        return np.inf
    b, t, _ = _heights(program, u, tau)
    value, *_ = _expanded(program, _predicted(program, u))
    return tau * value + (b * t - np.log(2.0 * t / b)).sum() - np.log(slack).sum()


def _newton(program, u, tau):
    """The step −(H + τ Fᵀ diag(ℓ'') F)⁻¹ of the gradient, H of blocks, and its decrement."""
    F, G = program.F, program.G
    b, t, w = _heights(program, u, tau)
    slack = np.einsum("pnd,pd->pn", G, u)
    _, residual, curvature = _expanded(program, _predicted(program, u))
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
    base, through = half[:, :, 0], half[:, :, 1:] * np.sqrt(curvature)
    system = np.eye(len(curvature)) / tau + np.einsum(
        "pin,pim->nm", through, through, optimize=True
    )
    middle = np.linalg.solve(system, np.einsum("pin,pi->n", through, base))
    lifted = np.einsum("pin,n->pi", through, middle) - base
    step = np.linalg.solve(R, lifted[:, :, None])[:, :, 0]
    return step, -float((gradient * step).sum())
