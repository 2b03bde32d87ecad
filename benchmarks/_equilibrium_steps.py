"""A training step of the network of `experiments.opteq`: equilibria, four iterations, plain layers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import measure
from benchmarks.record import Figure, Goal, Options
from experiments.networks import EquilibriumMethod, EquilibriumNet, EquilibriumNetConfig

BATCH, WIDTH = 64, 32
METHODS: tuple[EquilibriumMethod, ...] = ("equilibrium", "unrolled", "plain")


def training_step(
    method: EquilibriumMethod, pixels: int, width: int
) -> tuple[Callable[..., Any], Any]:
    """A compiled step of AdamW, and its state."""
    config = EquilibriumNetConfig((pixels, pixels, 3), 10, method, width)
    model = EquilibriumNet(config, rngs=nnx.Rngs(0))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adamw(2e-3, weight_decay=1e-3)

    @jax.jit
    def step(state, images, labels):
        params, rest, moments = state

        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
            return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

        gradient, rest = jax.grad(loss, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), rest, moments

    return step, (params, rest, optimizer.init(params))


def training_figures(options: Options) -> Sequence[Figure]:
    """Batches of 64 images of 32×32×3 pixels, 76,010 parameters; each side goes on from its last step."""
    pixels, width, batch = (8, 4, 8) if options.quick else (32, WIDTH, BATCH)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, pixels, pixels, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, batch))
    calls = {}
    for method in METHODS:
        step, state = training_step(method, pixels, width)
        calls[method] = functools.partial(_advance, step, [state], images, labels)
    times = measure.interleaved(calls, rounds=options.rounds)
    seconds = {name: timing.median for name, timing in times.items()}
    what = (
        f"training step, convolutional equilibria of width {width}, tolerance 1e-2, batch {batch}"
    )
    return [
        Figure(
            what,
            "a plain network of as many parameters",
            times["equilibrium"].over(times["plain"]),
            goal=Goal("≤", 6),
            detail={"seconds": seconds},
        ),
        Figure(
            what,
            "four iterations, unrolled",
            times["equilibrium"].over(times["unrolled"]),
            goal=Goal("≤", 1.5),
            detail={"seconds": seconds},
        ),
    ]


def _advance(step: Callable[..., Any], states: list[Any], images: Any, labels: Any) -> Any:
    """The next state, in the place of the last one."""
    states[0] = step(states[0], images, labels)
    return states[0]
