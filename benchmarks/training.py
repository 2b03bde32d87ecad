"""A training step of LeNet: solvers in its two hidden layers against dropout, seeds at once against alone.

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
from experiments.training.training_step import stack

BATCH = 128
METHODS: tuple[Method, ...] = (
    *("dropout", "prox-sg", "prox-gd", "fista", "ms2gd", "expected-smoothness", "importance"),
)


def training_step(method: Method, pixels: int, seed: int = 0) -> tuple[Callable[..., Any], Any]:
    """A compiled step of SGD with momentum of the LeNet, and its state."""
    config = LeNetConfig((pixels, pixels, 3), 10, "D-D", BlockConfig(method))
    return step_of(LeNet(config, rngs=nnx.Rngs(seed, dropout=1)))


def step_of(model: Any) -> tuple[Callable[..., Any], Any]:
    """A compiled step of SGD with momentum of a network, and its state."""
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
    figures = [
        Figure(
            f"training step of LeNet, batch {batch}, two blocks of {NAMES[method]}, 10 iterations",
            "dropout in their place",
            times[method].over(times["dropout"]),
            goal=Goal("≤", 2) if method == "prox-sg" else None,
            detail={"seconds": seconds},
        )
        for method in list(calls)[1:]
    ]
    return figures + [
        _seeds_at_once(method, pixels, images, labels, options.rounds) for method in METHODS[:2]
    ]


def _seeds_at_once(
    method: Method, pixels: int, images: jax.Array, labels: jax.Array, rounds: int
) -> Figure:
    """One step vmapped over two seeds, as by --seeds-at-once, against a step of each."""
    step, first = training_step(method, pixels)
    second = training_step(method, pixels, seed=1)[1]
    stacked, both_images, both_labels = (
        stack(pair) for pair in ((first, second), (images, images), (labels, labels))
    )
    together = jax.jit(jax.vmap(step))
    times = measure.interleaved(
        {
            "together": lambda: together(stacked, both_images, both_labels),
            "alone": lambda: [step(state, images, labels) for state in (first, second)],
        },
        rounds=rounds,
    )
    return Figure(
        f"training step of LeNet, batch {len(labels)}, {NAMES[method]}, two seeds at once",
        "a step of one, then of the other",
        times["together"].over(times["alone"]),
        detail={"seconds": {name: timing.median for name, timing in times.items()}},
    )


if __name__ == "__main__":
    main("training", benchmark, None)
