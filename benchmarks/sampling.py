"""Masks of exact count against Bernoulli masks; shared sampling, and importance sampling, against masks.

python -m benchmarks.sampling
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import stochsolvers as ss
from benchmarks import measure
from benchmarks.dense import arrays
from benchmarks.record import Figure, Goal, Options, main

FEATURES, BATCH = 512, 128
SIZE, ITERATIONS = (4096, 512, 128), 10


def benchmark(options: Options) -> Sequence[Figure]:
    """What sampling costs."""
    return [_masks(options), *_shared(options), _importance(options)]


def _masks(options: Options) -> Figure:
    key = jax.random.key(0)
    shape = (BATCH, FEATURES)

    @jax.jit
    def bernoulli(key):
        return jax.random.bernoulli(key, 0.5, shape).astype(jnp.float32)

    @jax.jit
    def exact(key):
        return ss.sampling.tau_nice_mask(key, FEATURES // 2, FEATURES, (BATCH,))

    counts = jnp.sum(exact(key), axis=-1)
    assert bool(jnp.all(counts == FEATURES // 2))
    times = measure.interleaved(
        {"bernoulli": lambda: bernoulli(key), "exact": lambda: exact(key)}, rounds=options.rounds
    )
    return Figure(
        f"masks of exactly τ = {FEATURES // 2} of {FEATURES} ones, batch {BATCH}",
        "Bernoulli masks",
        times["exact"].over(times["bernoulli"]),
        goal=Goal("≤", 3),
        detail={"seconds": {name: timing.median for name, timing in times.items()}},
    )


def _solver(sampling, step, key, kernel, bias, inputs):
    problem = ss.LayerProblem(ss.Dense(kernel), inputs, bias=bias)
    return ss.prox_sg(key, problem, sampling=sampling, step_size=step, num_iters=ITERATIONS).value


def _times(samplings, size, rounds):
    args, step = arrays(*size)
    key, step = jax.random.key(0), step / 20
    calls = {
        name: jax.jit(functools.partial(_solver, sampling, step))
        for name, sampling in samplings.items()
    }
    return measure.interleaved(
        {name: functools.partial(call, key, *args) for name, call in calls.items()}, rounds=rounds
    )


def _shared(options: Options) -> Sequence[Figure]:
    size = (256, 32, 16) if options.quick else SIZE
    figures = []
    for fraction, goal in ((0.1, Goal("≥", 4)), (0.5, None)):
        samplings = {
            "masks": ss.estimators.TauNice(fraction),
            "shared": ss.estimators.TauNice(fraction, shared=True),
        }
        times = _times(samplings, size, options.rounds)
        figures.append(
            Figure(
                f"Prox-SG, {size}, τ/n1 = {fraction}, {ITERATIONS} iterations, shared sampling",
                "a mask for each example",
                times["masks"].over(times["shared"]),
                goal=goal,
                detail={"seconds": {name: timing.median for name, timing in times.items()}},
            )
        )
    return figures


def _importance(options: Options) -> Figure:
    size = (64, 32, 8) if options.quick else (400, 120, 128)
    samplings = {
        "masks": ss.estimators.TauNice(0.5),
        "importance": ss.estimators.Importance(0.5),
    }
    times = _times(samplings, size, options.rounds)
    return Figure(
        f"Prox-SG, {size}, τ/n1 = 0.5, {ITERATIONS} iterations, importance sampling",
        "uniform sampling",
        times["importance"].over(times["masks"]),
        detail={"seconds": {name: timing.median for name, timing in times.items()}},
    )


if __name__ == "__main__":
    main("sampling", benchmark, None)
