"""Oracles in numpy and scipy; nothing here imports the library."""

import numpy as np
from scipy.optimize import nnls


def nnls_layer(kernel, x, bias, ridge):
    """argmin_{z>=0} ½||K z − x||² − <b, z> + (λ/2)||z||² for K = kernel (n1, n2), by scipy's NNLS.

    With RᵀR = KᵀK + λI and q = Kᵀx + b the objective is ½||R z − R⁻ᵀq||² and a constant.
    """
    hessian = kernel.T @ kernel + ridge * np.eye(kernel.shape[1])
    upper = np.linalg.cholesky(hessian).T
    z, _ = nnls(upper, np.linalg.solve(upper.T, kernel.T @ x + bias))
    return z


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
