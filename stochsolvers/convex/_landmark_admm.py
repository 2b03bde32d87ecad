"""ADMM for gated programs with many data: conjugate gradients preconditioned by columns of the kernel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, static_field, value_object
from stochsolvers.convex import _fista, _kernel_admm
from stochsolvers.convex._algorithm import Iterate, Progress, start
from stochsolvers.convex._kernel_admm import KernelADMM

_SHARE = 0.31
"""λ̄ / λ_max, about."""


@value_object
class LandmarkADMM(KernelADMM):
    r"""`KernelADMM` without the n × n matrix K: (K + ρI) r = ρ q by conjugate gradients from the last r.

    The preconditioner is μI + C W⁻¹ Cᵀ, μ = ρ + the mean of the diagonal that is left, C = K_{:, S} the
    columns of m landmarks S, evenly spaced data, and W = K_{S, S} (Nyström). A step of conjugate gradients
    costs one product with A and one with A*. Whatever their accuracy, the fixed point is the optimum and
    every r a dual point.

    Args:
      max_iters: the most iterations, traced.
      landmarks: m.
      steps: of conjugate gradients in an iteration.

    References:
      Williams and Seeger, Using the Nyström method to speed up kernel machines, 2001; Frangella, Tropp and
      Udell, Randomized Nyström preconditioning, 2023.
    """

    landmarks: int = static_field(default=500, kw_only=True)
    steps: int = static_field(default=4, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _checks.count("landmarks", self.landmarks)
        _checks.count("steps", self.steps)

    def check(self, problem: Any) -> None:
        """As of `KernelADMM`, without patches."""
        super().check(problem)
        if problem.X.ndim == 3:
            _checks.fail(
                "X of LandmarkADMM", "data of shape (n, d), without patches", problem.X.shape
            )

    def minimise(
        self, problem: Any, init: Array | None, tol: Array, progress: Progress | None
    ) -> Iterate:
        """See the class."""
        largest = _fista.power_estimate(problem)
        rho = _kernel_admm.penalty_of(problem, _SHARE * largest)
        precondition = _nystrom(problem, self.landmarks, rho)

        def product(r):
            return problem.linear_map.adjoint(problem.linear_map(r)) + rho * r

        def solve(right, guess):
            return _conjugate_gradients(problem, product, precondition, right, guess, self.steps)

        first, cap = start(problem, init), jnp.asarray(self.max_iters)
        return _kernel_admm.run(problem, solve, rho, first, init is None, cap, tol, progress)


def _nystrom(problem: Any, landmarks: int, rho: Array) -> Any:
    """v ↦ (μI + BᵀB)⁻¹ v, BᵀB = C W⁻¹ Cᵀ, by Woodbury's formula."""
    X, D = problem.X, problem.patterns.mask.astype(problem.dtype)
    n, eps = len(X), float(jnp.finfo(problem.dtype).eps)
    chosen = (jnp.arange(min(landmarks, n)) * n) // min(landmarks, n)
    columns = (X @ X[chosen].T) * (D @ D[chosen].T)
    W = columns[chosen]
    jitter = 1e3 * eps * jnp.trace(W) / len(W)
    lower = jnp.linalg.cholesky(W + (jitter + eps) * jnp.eye(len(W), dtype=W.dtype))
    B = lax.linalg.triangular_solve(lower, columns.T, left_side=True, lower=True)
    diagonal = jnp.sum(X**2, -1) * jnp.sum(D, -1)
    mu = rho + jnp.maximum(jnp.mean(diagonal - jnp.sum(B**2, 0)), 0.0)
    inner = jnp.linalg.cholesky(B @ B.T + mu * jnp.eye(len(W), dtype=W.dtype))

    def apply(v):
        image = v @ B.T
        solved = jax.scipy.linalg.cho_solve((inner, True), image.reshape(-1, image.shape[-1]).T).T
        return (v - solved.reshape(image.shape) @ B) / mu

    return apply


def _conjugate_gradients(
    problem: Any, product: Any, precondition: Any, right: Array, guess: Array, steps: int
) -> Array:
    """A fixed number of steps for M x = right, each program with its own lengths."""

    def dot(a, b):
        total = problem.sum(a * b)
        return jnp.expand_dims(total, tuple(range(total.ndim, a.ndim)))

    def positive(number):
        return jnp.where(number > 0, number, 1.0)

    def step(_, state):
        x, r, p, size = state
        image = product(p)
        length = size / positive(dot(p, image))
        x, r = x + length * p, r - length * image
        z = precondition(r)
        following = dot(r, z)
        return x, r, z + following / positive(size) * p, following

    r = right - product(guess)
    z = precondition(r)
    return lax.fori_loop(0, steps, step, (guess, r, z, dot(r, z)))[0]
