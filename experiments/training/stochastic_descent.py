"""SGD on a ReLU network of as many neurons as a convex program has gates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stochsolvers as ss

RATES = (0.1, 0.03, 0.01, 0.003, 0.001)


def best_descent(seed, X, y, problem, validation, epochs, batch):
    """Scores of SGD on a ReLU network of the same width, at the rate with the least final objective."""
    descents = [_descent(seed, X, y, problem, validation, epochs, batch, rate) for rate in RATES]
    return min(descents, key=lambda scores: np.nan_to_num(scores[-1][0], nan=np.inf))


def _descent(seed, X, y, problem, validation, epochs, batch, rate):
    """Objective and validation accuracy after each epoch."""
    first, second = jax.random.split(jax.random.key(seed))
    width, classes = problem.patterns.num, len(y)
    network: Any = ss.convex.Network(
        jax.random.normal(first, (X.shape[1], width)) * np.sqrt(2 / X.shape[1]),
        jax.random.normal(second, (width, classes)) * np.sqrt(1 / width),
    )
    steps, (held, labels) = len(X) // batch, validation
    optimiser = optax.sgd(optax.cosine_decay_schedule(rate, epochs * steps), momentum=0.9)

    def objective(network, X, y, part):
        return network.objective(X, y, problem.beta * part, loss=problem.loss)

    @jax.jit
    def epoch(key, network, state):
        order = jax.random.permutation(key, len(X))[: steps * batch].reshape(steps, batch)

        def step(carry, chosen):
            network, state = carry
            slope = jax.grad(objective)(network, X[chosen], y[:, chosen], batch / len(X))
            slope = jax.tree.map(lambda g: g / batch, slope)
            updates, state = optimiser.update(slope, state)
            return (optax.apply_updates(network, updates), state), None

        (network, state), _ = jax.lax.scan(step, (network, state), order)
        trained: Any = network
        hits = jnp.argmax(trained(held), axis=0) == labels
        return network, state, objective(network, X, y, 1.0), 100 * jnp.mean(hits)

    state, every = optimiser.init(network), []
    for k in range(epochs):
        key = jax.random.fold_in(jax.random.key(seed), k)
        network, state, *scores = epoch(key, network, state)
        every.append([float(score) for score in scores])
    return every
