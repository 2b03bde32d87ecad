"""Convex programs of networks in numpy and scipy, float64, from dense matrices."""

import itertools

import numpy as np
from scipy.optimize import linprog, minimize, nnls


def brute_force_patterns(X):
    """All sign patterns of full-dimensional cells, as strings of 0 and 1, by linear programs."""

    def margin(signs):
        rows = np.array([s * x for s, x in zip(signs, X, strict=False) if np.any(x)])
        if len(rows) == 0:
            return 1.0
        # maximise t with s_j x_j·g ≥ t, |g| ≤ 1
        cost = np.append(np.zeros(X.shape[1]), -1.0)
        system = np.hstack([-rows, np.ones((len(rows), 1))])
        bounds = [(-1, 1)] * X.shape[1] + [(None, 1)]
        return -linprog(cost, system, np.zeros(len(rows)), bounds=bounds).fun

    cells = [()]
    for x in X:
        sides = (1, -1) if np.any(x) else (1,)
        longer = [(*cell, s) for cell in cells for s in sides]
        cells = [cell for cell in longer if margin(cell) > 1e-7]
    return {"".join("1" if s > 0 else "0" for s in cell) for cell in cells}


def strings(mask):
    """The columns of a mask as strings."""
    return ["".join("1" if b else "0" for b in column) for column in np.asarray(mask).T]


def gated_matrix(X, mask):
    """[D_1 X, …, D_P X], shape (n, P d); sums over patches for X of shape (n, K, d)."""
    X, mask = np.asarray(X, float), np.asarray(mask, float)
    if X.ndim == 2:
        X, mask = X[:, None], mask[:, None]
    return np.einsum("nkd,nkp->npd", X, mask).reshape(len(X), -1)


def cone_projection(v, G):
    """argmin ||u − v|| over G u ≥ 0."""
    a, _ = nnls(G.T, -v, maxiter=1000)
    return v + G.T @ a


def cone_optimum(blocks, cones, y, beta):
    r"""Value, dual value and U of min ½||Σ A_b (v_b − w_b) − y||² + β Σ ||·||, G_b v_b ≥ 0, G_b w_b ≥ 0.

    The dual, max θ·y − ½||θ||² with ||Π_b(±A_bᵀθ)|| ≤ β, by SLSQP; v_b is along Π_b where that holds with
    equality, by non-negative least squares.
    """
    pairs = [(s, A, G) for s in (1, -1) for A, G in zip(blocks, cones, strict=True)]

    def projections(theta):
        return [cone_projection(s * (A.T @ theta), G) for s, A, G in pairs]

    def slack(theta):
        return beta**2 - np.array([p @ p for p in projections(theta)])

    def slope(theta):
        return np.array(
            [-2 * s * (A @ p) for (s, A, _), p in zip(pairs, projections(theta), strict=True)]
        )

    largest = np.sqrt(np.max(beta**2 - slack(y)))
    theta = y * min(1.0, beta / largest)
    for tolerance in (1e-9, 1e-15):
        theta = minimize(
            lambda t: 0.5 * t @ t - t @ y,
            theta,
            jac=lambda t: t - y,
            constraints={"type": "ineq", "fun": slack, "jac": slope},
            method="SLSQP",
            options={"ftol": tolerance, "maxiter": 300},
        ).x
    found = projections(theta)
    norms = np.array([np.linalg.norm(p) for p in found])
    theta = theta * min(1.0, beta / norms.max())
    active = np.nonzero(norms > beta * (1 - 1e-4))[0]
    columns = [pairs[i][0] * pairs[i][1] @ found[i] / norms[i] for i in active]
    # at the optimum Σ c_b A_b p_b = y − θ
    c = nnls(np.array(columns).T, y - theta, maxiter=1000)[0] if len(active) else []
    U = np.zeros((2, len(blocks), blocks[0].shape[1]))
    for i, scale in zip(active, c, strict=True):
        U[i // len(blocks), i % len(blocks)] = scale * found[i] / norms[i]
    fit = sum(A @ (v - w) for A, v, w in zip(blocks, *U, strict=True)) - y
    value = 0.5 * fit @ fit + beta * np.sum(np.linalg.norm(U, axis=-1))
    return value, theta @ y - 0.5 * theta @ theta, U


def relu_blocks(X, mask):
    """D_i X and (2 D_i − I) X of every pattern; rows of all patches for X of shape (n, K, d)."""
    X, mask = np.asarray(X, float), np.asarray(mask)
    patches = X.reshape(len(X), -1, X.shape[-1])
    masks = mask.reshape(len(X), -1, mask.shape[-1])
    blocks = [np.sum(patches * masks[..., i, None], axis=1) for i in range(mask.shape[-1])]
    signs = [np.where(masks[..., i, None], 1.0, -1.0) for i in range(mask.shape[-1])]
    return blocks, [(s * patches).reshape(-1, X.shape[-1]) for s in signs]


def network_objective(W, a, X, y, beta):
    """½||(X W)₊ a − y||² + (β/2)(||W||² + ||a||²); summed over patches for X of shape (n, K, d)."""
    hidden = np.maximum(np.asarray(X) @ W, 0)
    hidden = hidden.sum(1) if np.ndim(X) == 3 else hidden
    return 0.5 * np.sum((hidden @ a - y) ** 2) + 0.5 * beta * (np.sum(W**2) + np.sum(a**2))


def network_of(U):
    """W, a of the network that U = (V, W) is."""
    flat = np.asarray(U).reshape(-1, np.shape(U)[-1])
    signs = np.repeat([1.0, -1.0], len(flat) // 2)
    norms = np.sqrt(np.linalg.norm(flat, axis=1))
    kept = norms > 0
    return (flat[kept] / norms[kept, None]).T, signs[kept] * norms[kept]


def best_of_lbfgs(X, y, beta, rng, *, width, starts):
    """The least objective of a network that L-BFGS finds, all starts side by side as one sum."""
    d = X.shape[1]

    def values_and_slopes(flat):
        weights = flat.reshape(starts, d + 1, width)
        W, a = weights[:, :d], weights[:, d]
        hidden = np.maximum(X @ W, 0)
        r = np.einsum("snw,sw->sn", hidden, a) - y
        values = 0.5 * np.sum(r**2, axis=1) + 0.5 * beta * np.sum(weights**2, axis=(1, 2))
        inner = r[:, :, None] * a[:, None] * (hidden > 0)
        slopes = np.concatenate([X.T @ inner, np.einsum("snw,sn->sw", hidden, r)[:, None]], axis=1)
        return values, slopes + beta * weights

    def total(flat):
        values, slopes = values_and_slopes(flat)
        return values.sum(), slopes.ravel()

    begin = rng.normal(size=starts * (d + 1) * width)
    options = {"maxiter": 300, "maxfun": 600}
    end = minimize(total, begin, jac=True, method="L-BFGS-B", options=options).x
    return values_and_slopes(end)[0].min()


def proximal_optimum(A, loss_and_slope, penalty, shrink, shape, smoothness, iterations=20000):
    """Argmin of loss(A z) + penalty(z) by accelerated proximal gradient steps with restarts."""
    L = smoothness * np.linalg.norm(A, 2) ** 2
    new = z = v = np.zeros(shape)
    t = 1.0
    for _ in range(iterations):
        slope = loss_and_slope(v)[1]
        new = shrink(v - slope / L, 1 / L)
        if np.sum((v - new) * (new - z)) > 0:
            t, v = 1.0, new
        else:
            following = 0.5 * (1 + np.sqrt(1 + 4 * t * t))
            v, t = new + (t - 1) / following * (new - z), following
        if np.max(np.abs(new - z)) < 1e-15 and np.max(np.abs(v - new)) < 1e-15:
            break
        z = new
    return new, loss_and_slope(new)[0] + penalty(new)


def all_subsets(n):
    """Booleans (n, 2ⁿ)."""
    return np.array(list(itertools.product([False, True], repeat=n))).T
