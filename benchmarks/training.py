"""A training step of LeNet, its two hidden layers as Prox-SG solvers, against the dropout network.

python -m benchmarks.training
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stochsolvers as ss
from benchmarks import measure
from benchmarks.record import Figure, Goal, Options, main
from experiments.networks import NAMES, BlockConfig, LeNet, LeNetConfig, Method

BATCH = 128
METHODS: tuple[Method, ...] = (
    *("dropout", "prox-sg", "prox-gd", "fista", "ms2gd", "expected-smoothness", "importance"),
)


def training_step(method: Method, pixels: int) -> tuple[Callable[..., Any], Any]:
    """A compiled step of SGD with momentum, and its state."""
    config = LeNetConfig((pixels, pixels, 3), 10, "D-D", BlockConfig(method))
    model = LeNet(config, rngs=nnx.Rngs(0, dropout=1))
    model.train()
    ss.nnx.refresh_lipschitz(model)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    @jax.jit
    def step(state, images, labels):
        params, rest, momentum = state

        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

        gradient, rest = jax.grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradient, momentum)
        return optax.apply_updates(params, updates), rest, momentum

    return step, (params, rest, optimizer.init(params))


def benchmark(options: Options) -> Sequence[Figure]:
    """LeNet, batch 128 of 32×32×3 pixels, two solvers of 10 iterations; the constants kept."""
    pixels, batch = (16, 8) if options.quick else (32, BATCH)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, pixels, pixels, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, batch))
    calls = {}
    for method in METHODS[:2] if options.quick else METHODS:
        step, state = training_step(method, pixels)
        calls[method] = functools.partial(step, state, images, labels)
    times = measure.interleaved(calls, rounds=options.rounds)
    seconds = {name: timing.median for name, timing in times.items()}
    return [
        Figure(
            f"training step of LeNet, batch {batch}, two blocks of {NAMES[method]}, 10 iterations",
            "dropout in their place",
            times[method].over(times["dropout"]),
            goal=Goal("≤", 2) if method == "prox-sg" else None,
            detail={"seconds": seconds},
        )
        for method in list(calls)[1:]
    ]


if __name__ == "__main__":
    main("training", benchmark, None)
