r"""The largest response of a unit neuron to a dual point, and bounds on it, in float64 on the host.

    M(Θ) = max_{||u|| ≤ 1} ||Θ (X u)₊||₂,      Θ of shape (C, n);   for one output max |θᵀ(X u)₊|

A dual point Θ is feasible for networks of any width with weight decay β where M(Θ) ≤ β.

- Over all arrangement patterns D_i, with cones K_i = {u: G_i u ≥ 0}, G_i = (2D_i − I)X, one output's maximum
  is exact: max_{u ∈ K_i, ||u|| ≤ 1} pᵀu = min_{a ≥ 0} ||p + G_iᵀa|| for p = ±XᵀD_iθ, and any a ≥ 0 bounds it.
- For any γ ∈ [0, 1], τ > 0 and μ > λ_max(Q), since t₊ ≤ t/2 + t²/(4τ) + τ/4 and −t₊ ≤ −γ t,

      max_{||u|| ≤ 1} vᵀ(X u)₊ ≤ ¼ Σ_{v_k > 0} v_k τ_k + ½ μ + ½ bᵀ(μ I − Q)⁻¹ b,
      b = ½ X₊ᵀv₊ − X₋ᵀ(γ ∘ |v₋|),      Q = ½ X₊ᵀ diag(v₊/τ) X₊,

  convex in (γ, τ): minimised by L-BFGS. Every value of γ and τ is a bound, so its accuracy proves nothing.

Upper bounds end with a slack of a few units of round-off of the numbers that they are made of.

References:
  Pilanci and Ergen 2020 (the dual); Boyd and Vandenberghe 2004, appendix B (the maximum over the ball).
"""

import numpy as np
import scipy  # its parts are loaded where they are first used

_EPS = float(np.finfo(np.float64).eps)


def exact_response(X: np.ndarray, theta: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
    """M(Θ) from above over all patterns, mask of shape (n, P); exact for one output, with the best units."""
    if len(theta) == 1:
        positive, negative = (_exact_of_sign(X, v, mask) for v in (theta[0], -theta[0]))
        return max(positive[0], negative[0]), np.concatenate([positive[1], negative[1]], axis=1)
    bounds = [min(_spectral(X, theta, D), _rows(X, theta, D)) for D in mask.T]
    return max(bounds, default=0.0), np.zeros((X.shape[1], 0))


def _exact_of_sign(X: np.ndarray, v: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
    """max_u vᵀ(X u)₊; cells whose ||XᵀD_iv|| is below the largest value so far need no cone."""
    directions = X.T @ (mask * v[:, None])
    sizes = np.linalg.norm(directions, axis=0) + _round_off(X, v)
    best, found = 0.0, []
    for i in np.argsort(-sizes):
        if sizes[i] <= best:
            break
        residual, slack = _in_cone(X, v, mask[:, i], directions[:, i])
        value = float(np.linalg.norm(residual))
        best = max(best, value + slack)
        if value > 0:
            found.append((value, residual / value))
    found.sort(key=lambda pair: -pair[0])
    units = [unit for value, unit in found[:8] if value > 0.5 * best]
    return best, np.array(units).reshape(-1, X.shape[1]).T


def _in_cone(
    X: np.ndarray, v: np.ndarray, D: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, float]:
    """argmin ||p + Gᵀa|| over a ≥ 0, p = XᵀDv, as p + Gᵀa; and the round-off of its norm."""
    G = np.where(D, 1.0, -1.0)[:, None] * X
    multipliers, _ = nnls(G.T, -direction)
    return direction + G.T @ multipliers, _round_off(X, v) + _round_off(X, multipliers)


def _spectral(X: np.ndarray, theta: np.ndarray, D: np.ndarray) -> float:
    return float(np.linalg.norm((theta * D) @ X, 2)) + _round_off(X, np.linalg.norm(theta, axis=0))


def _rows(X: np.ndarray, theta: np.ndarray, D: np.ndarray) -> float:
    signed = np.stack([theta, -theta])
    found = [[_in_cone(X, v, D, X.T @ (D * v)) for v in pair] for pair in signed.swapaxes(0, 1)]
    each = [max(float(np.linalg.norm(p)) + slack for p, slack in pair) for pair in found]
    return float(np.linalg.norm(each)) * (1 + 8 * _EPS)


def nnls(A: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """argmin_{a ≥ 0} ||A a − target|| and its residual; by gradient steps where the active set cycles."""
    scale = np.linalg.norm(A, 2) if A.size else 0.0
    if scale == 0 or not np.any(target):
        return np.zeros(A.shape[1]), float(np.linalg.norm(target))
    try:
        return scipy.optimize.nnls(A, target)
    except RuntimeError:
        a = np.zeros(A.shape[1])
        for _ in range(1000):
            a = np.maximum(a - A.T @ (A @ a - target) / scale**2, 0)
        return a, float(np.linalg.norm(A @ a - target))


def bounded_response(X: np.ndarray, theta: np.ndarray, *, max_iters: int = 200) -> float:
    """M(Θ) from above for any number of data: the root of the sum of squares over outputs for several."""
    each = [max(_relaxed(X, v, max_iters), _relaxed(X, -v, max_iters)) for v in theta]
    slack = _round_off(X, np.linalg.norm(theta, axis=0))
    crude = float(np.linalg.norm(theta, 2) * np.linalg.norm(X, 2)) + slack
    return min(float(np.linalg.norm(each)) * (1 + 8 * _EPS), crude)


def _relaxed(X: np.ndarray, v: np.ndarray, max_iters: int) -> float:
    """The bound of the module, minimised over γ = sigmoid(s) and τ = exp(t)."""
    plus = v > 0
    if not plus.any():
        return 0.0
    num = int(plus.sum())
    args = X[plus], v[plus], X[~plus], -v[~plus]
    tau = np.linalg.norm(args[0], axis=1) / np.sqrt(X.shape[1])
    tau = np.maximum(tau, 1e-6 * max(float(tau.max()), 1e-30))
    start = np.concatenate([np.log(tau), np.zeros(len(v) - num)])
    bounds = [(float(t) - 20, float(t) + 20) for t in start[:num]] + [(-40, 40)] * (len(v) - num)
    options = {"maxiter": max_iters, "ftol": 1e-9}
    result = scipy.optimize.minimize(
        _relaxation, start, args, "L-BFGS-B", jac=True, bounds=bounds, options=options
    )
    values = [_relaxation(point, *args) for point in (start, result.x)]
    slack = (len(v) + 8 * X.shape[1]) * 4 * _EPS * X.shape[1] ** 0.5  # of Q and its eigenvalues
    best = min(value for value, _ in values if np.isfinite(value))
    return best * (1 + slack) + _round_off(X, v)


def _relaxation(
    point: np.ndarray, Xp: np.ndarray, vp: np.ndarray, Xm: np.ndarray, vm: np.ndarray
) -> tuple[float, np.ndarray]:
    """The bound at (log τ, logit γ) and its gradient there."""
    num = len(vp)
    tau, gamma = np.exp(point[:num]), 1 / (1 + np.exp(-point[num:]))
    b = 0.5 * Xp.T @ vp - Xm.T @ (vm * gamma)
    Q = 0.5 * Xp.T @ ((vp / tau)[:, None] * Xp)
    largest, u = _largest_in_ball(b, Q)
    value = 0.25 * float(vp @ tau) + largest
    slope_tau = 0.25 * vp * (tau - (Xp @ u) ** 2 / tau)
    slope_gamma = -vm * (Xm @ u) * gamma * (1 - gamma)
    return value, np.concatenate([slope_tau, slope_gamma])


def _largest_in_ball(b: np.ndarray, Q: np.ndarray) -> tuple[float, np.ndarray]:
    """min_μ ½ μ + ½ bᵀ(μ I − Q)⁻¹ b over μ > λ_max(Q), and u = (μ I − Q)⁻¹ b."""
    values, vectors = np.linalg.eigh(Q)
    c = vectors.T @ b
    top, norm = float(values[-1]), float(np.linalg.norm(b))
    lower = top + 1e-10 * (abs(top) + norm) + 1e-300
    upper = lower + norm

    def excess(mu: float) -> float:
        return 1 - 1 / max(float(np.linalg.norm(c / (mu - values))), 1e-300)

    mu = lower
    if excess(lower) > 0:
        mu = float(scipy.optimize.brentq(excess, lower, upper))  # pyright: ignore[reportArgumentType]
    u = vectors @ (c / (mu - values))
    return 0.5 * mu + 0.5 * float(c @ (c / (mu - values))), u


def _round_off(X: np.ndarray, v: np.ndarray) -> float:
    """A bound on the error of ||Xᵀv|| with X and v as they are, computed in any order."""
    n, d = X.shape
    return 2 * (n + d + 4) * _EPS * float(np.linalg.norm(np.abs(X).T @ np.abs(v)))
