"""Oracles in numpy and scipy; nothing here imports the library."""

import itertools

import numpy as np
from scipy.optimize import nnls


def convolution_matrix(kernel, shape, strides, pads, dilation, groups=1, *, wrap=False):
    """The matrix (outputs, inputs) of a correlation on any number of axes, entry by entry.

    Σ_{a, i} kernel[a, i, j] x[s p + d a − low, i]; positions outside the image are zero, or wrap around.
    """
    *taps, n_in, n2 = kernel.shape
    axes = range(len(shape))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    out = [(shape[i] + sum(pads[i]) - extents[i]) // strides[i] + 1 for i in axes]
    matrix = np.zeros((*out, n2, *shape, groups * n_in))
    for p, a in itertools.product(np.ndindex(*out), np.ndindex(*taps)):
        q = [strides[i] * p[i] + dilation[i] * a[i] - pads[i][0] for i in axes]
        if wrap:
            q = [q[i] % shape[i] for i in axes]
        if any(not 0 <= q[i] < shape[i] for i in axes):
            continue
        for i, j in np.ndindex(n_in, n2):
            matrix[(*p, j, *q, j // (n2 // groups) * n_in + i)] += kernel[(*a, i, j)]
    return matrix.reshape(int(np.prod(out)) * n2, -1)


def patch_rows(x, taps, strides, pads, dilation, *, wrap=False):
    """Rows (positions of all images, taps · n1) with row · kernel[..., j] the correlation's output j.

    Σ_{a, i} kernel[a, i, j] x[b, s p + d a − low, i]; positions outside the image are zero, or wrap around.
    """
    batch, *shape, n1 = x.shape
    axes = range(len(shape))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    out = [(shape[i] + sum(pads[i]) - extents[i]) // strides[i] + 1 for i in axes]
    rows = np.zeros((batch, *out, *taps, n1))
    for p, a in itertools.product(np.ndindex(*out), np.ndindex(*taps)):
        q = [strides[i] * p[i] + dilation[i] * a[i] - pads[i][0] for i in axes]
        if wrap:
            q = [q[i] % shape[i] for i in axes]
        if all(0 <= q[i] < shape[i] for i in axes):
            rows[(slice(None), *p, *a)] = x[(slice(None), *q)]
    return rows.reshape(batch * int(np.prod(out)), -1)


def implicit_step(rows, cotangent, tau):
    """(AᵀA + I/τ)⁻¹ Aᵀ G."""
    hessian = rows.T @ rows + np.eye(rows.shape[1]) / tau
    return np.linalg.solve(hessian, rows.T @ cotangent)


def textbook_conjugate_gradients(hessian, right, num_iters):
    """Hestenes and Stiefel's iteration for one right-hand side, from zero."""
    d, r = np.zeros_like(right), right.copy()
    p = r.copy()
    for _ in range(num_iters):
        image = hessian @ p
        alpha = (r @ r) / (p @ image)
        d = d + alpha * p
        following = r - alpha * image
        p = following + (following @ following) / (r @ r) * p
        r = following
    return d


def nnls_layer(kernel, x, bias, ridge):
    """argmin_{z>=0} ½||K z − x||² − <b, z> + (λ/2)||z||² for K = kernel (n1, n2), by scipy's NNLS.

    With RᵀR = KᵀK + λI and q = Kᵀx + b the objective is ½||R z − R⁻ᵀq||² and a constant.
    """
    hessian = kernel.T @ kernel + ridge * np.eye(kernel.shape[1])
    upper = np.linalg.cholesky(hessian).T
    z, _ = nnls(upper, np.linalg.solve(upper.T, kernel.T @ x + bias))
    return z


def nnls_by_pivoting(kernel, x, ridge, support):
    """The same without a bias, for λ > 0 and hundreds of outputs: by block pivoting from a support.

    On the support H z = Kᵀx, H = KᵀK + λI; elsewhere z = 0 and H z >= Kᵀx. What breaks a sign changes side.
    """
    hessian, right = kernel.T @ kernel + ridge * np.eye(kernel.shape[1]), kernel.T @ x
    for _ in range(50):
        z = np.zeros_like(right)
        z[support] = np.linalg.solve(hessian[np.ix_(support, support)], right[support])
        wrong = np.where(support, z < 0, hessian @ z - right < -1e-13 * np.max(np.abs(right)))
        if not np.any(wrong):
            return z
        support = support ^ wrong
    raise ArithmeticError("no support was found")


def objective(kernel, x, bias, ridge, z):
    """F of eq. 5 for a dense layer, without the prior."""
    fit = 0.5 * np.sum((kernel @ z - x) ** 2)
    return fit - bias @ z + 0.5 * ridge * np.sum(z**2)


def prox_gradient(kernel, x, bias, ridge, prox, step, num_iters):
    """z_0 = 0, z ← prox(z − η (Kᵀ(K z − x) − b + λ z), η), every iterate."""
    z = np.zeros(kernel.shape[1])
    path = [z]
    for _ in range(num_iters):
        z = prox(z - step * (kernel.T @ (kernel @ z - x) - bias + ridge * z), step)
        path.append(z)
    return np.array(path)
