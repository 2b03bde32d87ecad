r"""Two-layer networks trained by minibatches, on the objective of the convex programs.

    minimise_{W, a}  Σ_c ( Σ_j ½(f_c(x_j) − y_cj)² + (β/2) Σ_i (||w_ci||² + a_ci²) ),   f_c(x) = Σ_i a_ci φ_i(w_ci·x)

with φ(u) = max(u, 0), or φ_i(u) = 1[x·g_i ≥ 0] u for fixed gates g_i: P neurons for each of C outputs. A step
is of Adam, or of SGD with Nesterov's momentum of 0.9, on the n-th part of this objective, its sum over j taken
over a minibatch of B data times n/B. The rate falls to zero along a cosine.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

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


def initial(key: jax.Array, outputs: int, width: int, features: int) -> Weights:
    """Normal weights of variance 2/d and 1/P, so that predictions are of the size of a datum's mean square."""
    first, second = jax.random.split(key)
    hidden = math.sqrt(2 / features) * jax.random.normal(first, (outputs, width, features))
    output = jax.random.normal(second, (outputs, width)) / math.sqrt(width)
    return Weights(hidden, output)


def predict(weights: Weights, X: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """f(x) of each datum, shape (C, n)."""
    outputs, width, features = weights.hidden.shape
    products = X @ weights.hidden.reshape(-1, features).T
    products = products.reshape(len(X), outputs, width)
    if mask is None:
        neurons = jnp.maximum(products, 0)
    else:
        neurons = jnp.where(mask[:, None, :], products, 0)
    return jnp.einsum("ncp,cp->cn", neurons, weights.output)


def penalty(weights: Weights) -> jax.Array:
    """½ (||W||² + ||a||²)."""
    return 0.5 * (jnp.sum(weights.hidden**2) + jnp.sum(weights.output**2))


@jax.jit
def objective(weights: Weights, data: Data, beta: jax.Array) -> jax.Array:
    """The objective on all data."""
    errors = predict(weights, data.X, data.mask) - data.y
    return 0.5 * jnp.sum(errors**2) + beta * penalty(weights)


def train(
    key: jax.Array,
    data: Data,
    beta: float,
    *,
    width: int,
    optimizer: Optimizer,
    rate: float,
    epochs: int,
    batch_size: int,
) -> Iterator[Record]:
    """Train a network; what is done between the records is not in their seconds.

    Args:
      key: of the initial weights and the order of the data.
      data: what it is trained on.
      beta: β.
      width: P.
      optimizer: "adam" or "sgd".
      rate: the first learning rate.
      epochs: passes over all data but those that fill no batch, in a new order each.
      batch_size: B.
    """
    seconds, start = 0.0, time.perf_counter()
    first, order = jax.random.split(key)
    weights = initial(first, len(data.y), width, data.X.shape[1])
    state = _transformation(optimizer).init(weights)
    run = compiled_epoch(optimizer, batch_size)
    beta, rate = jnp.asarray(beta, jnp.float32), jnp.asarray(rate, jnp.float32)
    for epoch in range(1, epochs + 1):
        progress = jnp.asarray([epoch - 1, epoch], jnp.float32) / epochs
        weights, state = jax.block_until_ready(
            run(jax.random.fold_in(order, epoch), weights, state, data, beta, rate, progress)
        )
        seconds += time.perf_counter() - start
        yield Record(epoch, seconds, weights)
        start = time.perf_counter()


def _transformation(optimizer: Optimizer) -> optax.GradientTransformation:
    if optimizer == "adam":
        return optax.scale_by_adam()
    return optax.trace(MOMENTUM, nesterov=True)


@functools.cache
def compiled_epoch(optimizer: Optimizer, batch_size: int) -> Callable[..., Any]:
    """(key, weights, state, data, β, first rate, progress before and after) -> weights and state after it."""

    def loss(weights, X, y, mask, beta, count):
        errors = predict(weights, X, mask) - y
        return 0.5 * jnp.sum(errors**2) / len(X) + beta / count * penalty(weights)

    def epoch(key, weights, state, data, beta, rate, progress):
        count = len(data.X)
        batches = count // batch_size
        order = jax.random.permutation(key, count)[: batches * batch_size]
        rates = rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.linspace(*progress, batches, endpoint=False)))

        def step(carry, batch):
            weights, state = carry
            rows, rate = batch
            mask = None if data.mask is None else data.mask[rows]
            gradient = jax.grad(loss)(weights, data.X[rows], data.y[:, rows], mask, beta, count)
            updates, state = _transformation(optimizer).update(gradient, state, weights)
            weights = jax.tree.map(lambda w, update: w - rate * update, weights, updates)
            return (weights, state), None

        batches = order.reshape(batches, batch_size), rates
        return jax.lax.scan(step, (weights, state), batches)[0]

    return jax.jit(epoch)
