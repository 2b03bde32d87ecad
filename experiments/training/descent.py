r"""Two-layer networks trained by minibatches, on the objective of the convex programs.

    minimise  Σ_c ( Σ_j ½(f_c(x_j) − y_cj)² + (β/2) Σ_i (||w_ci||² + a_ci²) ),   f_c(x) = Σ_i a_ci φ_i(w_ci·x)

with φ(u) = max(u, 0), or φ_i(u) = 1[x·g_i ≥ 0] u for fixed gates g_i: P neurons for each of C outputs. A
step is of Adam, or of SGD with Nesterov's momentum of 0.9, on the n-th part of this objective, its sum over j
taken over a minibatch of B data times n/B. The rate falls to zero along a cosine. Initial weights are normal,
of variance 2/mean ||x_j||² and 1/P, so that f is of size 1 on the data, and then balanced: ||w_ci|| = |a_ci|,
the same function with the least weight decay.
"""

import functools
import math
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Optimizer = Literal["adam", "sgd"]
MOMENTUM = 0.9


class Weights(NamedTuple):
    """W, shape (C, P, d), and a, shape (C, P)."""

    hidden: jax.Array
    output: jax.Array


class Data(NamedTuple):
    """X (n, d), y (C, n), and the mask (n, P) of the gates, None for ReLU."""

    X: jax.Array
    y: jax.Array
    mask: jax.Array | None = None


class Record(NamedTuple):
    """Weights after an epoch, and the seconds since the start: compilation and training."""

    epoch: int
    seconds: float
    weights: Weights


def initial(key: jax.Array, data: Data, width: int) -> Weights:
    """Normal weights of variance 2/mean ||x_j||² and 1/P, balanced."""
    first, second = jax.random.split(key)
    outputs, features = len(data.y), data.X.shape[1]
    scale = jnp.sqrt(2 / jnp.mean(jnp.sum(data.X**2, axis=1)))
    hidden = scale * jax.random.normal(first, (outputs, width, features))
    output = jax.random.normal(second, (outputs, width)) / math.sqrt(width)
    ratio = jnp.sqrt(jnp.abs(output) / jnp.linalg.norm(hidden, axis=-1))
    return Weights(ratio[..., None] * hidden, output / ratio)


def predict(weights: Weights, X: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """f(x) of each datum, shape (C, n)."""
    outputs, width, features = weights.hidden.shape
    products = X @ weights.hidden.reshape(-1, features).T
    products = products.reshape(len(X), outputs, width)
    is_open = products > 0 if mask is None else mask[:, None, :]
    neurons = jnp.where(is_open, products, 0)
    return jnp.einsum("ncp,cp->cn", neurons, weights.output)


def penalty(weights: Weights) -> jax.Array:
    """½ (||W||² + ||a||²)."""
    return 0.5 * (jnp.sum(weights.hidden**2) + jnp.sum(weights.output**2))


@jax.jit
def objective(weights: Weights, data: Data, beta: jax.Array) -> jax.Array:
    """The objective on all data."""
    errors = predict(weights, data.X, data.mask) - data.y
    return 0.5 * jnp.sum(errors**2) + beta * penalty(weights)


class Trainer:
    """Training of networks on the same data with different rates: compiled once.

    Args:
      data: what they are trained on.
      beta: β.
      width: P.
      optimizer: "adam" or "sgd".
      batch_size: B; data that fill no batch are left out of an epoch, others each time.
    """

    def __init__(
        self, data: Data, beta: float, *, width: int, optimizer: Optimizer, batch_size: int
    ):
        self.data = data
        self.beta = jnp.asarray(beta, jnp.float32)
        start = time.perf_counter()

        def begin(key, data):
            weights = initial(key, data, width)
            return weights, _transformation(optimizer).init(weights)

        self._begin = jax.jit(begin).lower(jax.random.key(0), data).compile()
        weights, state = self._begin(jax.random.key(0), data)
        epoch = jax.jit(functools.partial(_epoch, optimizer=optimizer, batch_size=batch_size))
        rate, progress = jnp.zeros(()), jnp.zeros(2)
        arguments = jax.random.key(0), weights, state, data, self.beta, rate, progress
        self._epoch = epoch.lower(*arguments).compile()
        self.compilation = time.perf_counter() - start

    def __call__(self, key: jax.Array, rate: float, epochs: int) -> Iterator[Record]:
        """Train a network; what is done between the records is not in their seconds.

        Args:
          key: of the initial weights and the order of the data.
          rate: the first learning rate.
          epochs: passes over the data, in a new order each.
        """
        seconds, start = self.compilation, time.perf_counter()
        first, order = jax.random.split(key)
        weights, state = self._begin(first, self.data)
        for epoch in range(1, epochs + 1):
            progress = jnp.asarray([epoch - 1, epoch], jnp.float32) / epochs
            number = jax.random.fold_in(order, epoch)
            first_rate = jnp.asarray(rate, jnp.float32)
            weights, state = self._epoch(
                number, weights, state, self.data, self.beta, first_rate, progress
            )
            jax.block_until_ready(weights)
            seconds += time.perf_counter() - start
            yield Record(epoch, seconds, weights)
            start = time.perf_counter()

    def objective(self, weights: Weights) -> float:
        """The objective on all data."""
        return float(objective(weights, self.data, self.beta))


def _transformation(optimizer: Optimizer) -> optax.GradientTransformation:
    if optimizer == "adam":
        return optax.scale_by_adam()
    return optax.trace(MOMENTUM, nesterov=True)


def _epoch(key, weights, state, data, beta, rate, progress, *, optimizer, batch_size):
    """Weights and state after an epoch, which begins and ends at `progress` of all epochs."""
    count = len(data.X)
    batches = count // batch_size
    order = jax.random.permutation(key, count)[: batches * batch_size]
    angles = jnp.pi * jnp.linspace(progress[0], progress[1], batches, endpoint=False)
    rates = rate * 0.5 * (1 + jnp.cos(angles))

    def loss(weights, X, y, mask):
        errors = predict(weights, X, mask) - y
        return 0.5 * jnp.sum(errors**2) / len(X) + beta / count * penalty(weights)

    def step(carry, batch):
        weights, state = carry
        rows, rate = batch
        mask = None if data.mask is None else data.mask[rows]
        gradient = jax.grad(loss)(weights, data.X[rows], data.y[:, rows], mask)
        updates, state = _transformation(optimizer).update(gradient, state, weights)
        weights = jax.tree.map(lambda w, update: w - rate * update, weights, updates)
        return (weights, state), None

    steps = order.reshape(batches, batch_size), rates
    return jax.lax.scan(step, (weights, state), steps)[0]
