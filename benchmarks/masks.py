"""Prox-SG and mS2GD with masks of exact count against themselves with Bernoulli masks.

python -m benchmarks.masks
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from benchmarks import measure
from benchmarks.dense import arrays
from benchmarks.record import Figure, Goal, Options, main

DENSE, CONVOLUTION = (1024, 256, 128), (64, 16, 8)
"""Inputs, outputs and batch; channels, pixels a side and batch."""
FRACTIONS = (0.1, 0.5, 0.9)
GOAL = Goal("≤", 1.3)

Case = tuple[str, Any, tuple[Any, ...]]
"""A layer in words, how its problem is built, and the step 1/L with the arrays that it is built from."""

SOLVERS: dict[str, Any] = {
    "Prox-SG, 10 iterations": functools.partial(ss.prox_sg, num_iters=10),
    "mS2GD, 2 × 5 iterations": functools.partial(ss.ms2gd, num_outer=2, num_inner=5),
}


def benchmark(options: Options) -> Sequence[Figure]:
    """What it costs that every example keeps exactly τ features."""
    return [
        _figure(f"{name}, {layer}", solver, build, args, fraction, options.rounds)
        for layer, build, args in (_dense(options), _convolution(options))
        for name, solver in SOLVERS.items()
        for fraction in (FRACTIONS[1:2] if options.quick else FRACTIONS)
    ]


def _dense(options: Options) -> Case:
    n1, n2, batch = (64, 16, 8) if options.quick else DENSE
    (kernel, bias, inputs), step = arrays(n1, n2, batch)

    def build(kernel, bias, inputs):
        return ss.LayerProblem(ss.Dense(kernel), inputs, bias=bias)

    return f"{n1}→{n2}, batch {batch}", build, (step, kernel, bias, inputs)


def _convolution(options: Options) -> Case:
    channels, pixels, batch = (4, 6, 2) if options.quick else CONVOLUTION
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, channels, channels)) / (3 * channels**0.5)
    inputs = rng.standard_normal((batch, pixels, pixels, channels))
    kernel, inputs = jnp.asarray(kernel, jnp.float32), jnp.asarray(inputs, jnp.float32)

    def build(kernel, inputs):
        return ss.LayerProblem(ss.Conv(kernel, (pixels, pixels)), inputs)

    step = 1.0 / ss.lipschitz_constant(ss.Conv(kernel, (pixels, pixels)), grid="padded")
    layer = f"{channels}→{channels}, 3×3 @ {pixels}×{pixels}, batch {batch}"
    return layer, build, (step, kernel, inputs)


def _figure(
    what: str, solver: Any, build: Any, args: tuple[Any, ...], fraction: float, rounds: int
) -> Figure:
    def value(sampling, key, step, *args):
        return solver(key, build(*args), sampling=sampling, step_size=step / 20).value

    samplings = {
        "exact": ss.estimators.TauNice(fraction),
        "bernoulli": ss.estimators.Bernoulli(fraction),
    }
    key = jax.random.key(0)
    calls = {
        name: functools.partial(jax.jit(functools.partial(value, sampling)), key, *args)
        for name, sampling in samplings.items()
    }
    times = measure.interleaved(calls, rounds=rounds)
    return Figure(
        f"{what}, τ/n1 = {fraction}, masks of exactly τ ones",
        "Bernoulli masks",
        times["exact"].over(times["bernoulli"]),
        goal=GOAL,
        detail={"seconds": {name: timing.median for name, timing in times.items()}},
    )


if __name__ == "__main__":
    main("masks", benchmark, None)
