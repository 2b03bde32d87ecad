"""Small problems z = h(z), and their equilibria by numpy."""

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss


@ss.value_object
class Shallow(ss.FixedPointProblem):
    """z = Wᵀ σ(W z + c), σ a ReLU or tanh; for ReLU the minimiser of ½||z||² − ½||relu(W z + c)||²."""

    weights: jax.Array
    drive: jax.Array
    smooth: bool = ss.static_field(default=False)
    symmetric = True

    batch_shape = property(lambda self: self.drive.shape[:-1])
    shape = property(lambda self: (*self.batch_shape, self.weights.shape[1]))
    dtype = property(lambda self: self.drive.dtype)

    def hidden(self, z):
        before = z @ self.weights.T + jnp.expand_dims(self.drive, range(z.ndim - self.drive.ndim))
        return jnp.tanh(before) if self.smooth else jax.nn.relu(before)

    def layer(self, z):
        return self.hidden(z) @ self.weights

    def objective(self, z):
        return 0.5 * self.sum(z**2) - 0.5 * self.sum(self.hidden(z) ** 2)

    def certificate(self, z):
        omega = jnp.linalg.norm(self.weights, 2)
        moved = self.norm(z - self.layer(z))
        return jnp.where(omega < 1, 0.5 * moved**2 / jnp.abs(1 - omega**2), jnp.inf)


@ss.value_object
class Deep(ss.FixedPointProblem):
    """z = h₂(h₁(z)), h_i(z) = W_iᵀ tanh(W_i z + c): a Jacobian that is not symmetric."""

    first: jax.Array
    second: jax.Array
    drive: jax.Array

    batch_shape = property(lambda self: self.drive.shape[:-1])
    shape = property(lambda self: self.drive.shape)
    dtype = property(lambda self: self.drive.dtype)

    def layer(self, z):
        for W in (self.first, self.second):
            z = jnp.tanh(z @ W.T + self.drive) @ W
        return z


def matrix(rng, n, omega):
    """A Gaussian matrix of norm omega."""
    W = rng.normal(size=(n, n))
    return W * omega / np.linalg.norm(W, 2)


def shallow(rng, n=20, omega=0.95, dtype=np.float64, **options):
    """Four examples of sizes 0.01, 0.1, 1 and 10."""
    drive = rng.normal(size=(4, n)) * 10.0 ** np.arange(-2, 2)[:, None]
    return Shallow(jnp.asarray(matrix(rng, n, omega), dtype), jnp.asarray(drive, dtype), **options)


def deep(rng, n=6, omega=0.95, batch=3):
    """A composition of two layers."""
    W, V = (jnp.asarray(matrix(rng, n, omega)) for _ in range(2))
    return Deep(W, V, jnp.asarray(rng.normal(size=(batch, n))))


def equilibrium(problem):
    """The equilibrium of a shallow ReLU problem after 4,000 iterations in numpy."""
    W, c = np.asarray(problem.weights), np.asarray(problem.drive)
    z = np.zeros(problem.shape)
    for _ in range(4000):
        z = np.maximum(z @ W.T + c, 0) @ W
    return z
