"""The form that "auto" takes against the best one, over a grid of layers.

python -m benchmarks.forms
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from benchmarks import measure
from benchmarks.record import Figure, Goal, Options, main

ITERATIONS = 10
GOAL = Goal("≤", 1.15)
DENSE = (
    (64, 64, 8), (256, 256, 32), (784, 256, 32), (512, 512, 128), (1024, 256, 128), (256, 1024, 128),
    (4096, 256, 32), (2048, 512, 16), (400, 120, 128),
)  # fmt: skip
"""Inputs, outputs, batch."""
CONVOLUTIONS = (
    (64, 64, 16, 3, 8), (64, 64, 32, 3, 8), (64, 64, 8, 3, 8), (64, 64, 4, 3, 32), (16, 16, 32, 3, 8),
    (3, 64, 32, 3, 8), (128, 128, 8, 3, 8), (32, 32, 16, 5, 8), (64, 32, 16, 3, 8), (32, 64, 16, 3, 8),
    (8, 8, 64, 3, 4), (64, 64, 16, 1, 8), (48, 24, 24, 3, 4), (128, 64, 14, 3, 16), (16, 32, 20, 5, 8),
)  # fmt: skip
"""Input and output channels, pixels a side, taps a side, batch."""

Case = tuple[str, Callable[[jax.Array], ss.LinearMap], jax.Array, jax.Array, tuple[str, ...]]
"""A layer in words, its map from a kernel, the kernel, the inputs, its forms."""


def benchmark(options: Options) -> Sequence[Figure]:
    """Prox-GD with the form that is chosen over Prox-GD with the fastest one."""
    cases = [*_dense(options), *_convolutions(options)]
    return [
        _figure(case, direction, transform, options)
        for case in cases
        for direction, transform in (
            ("forward", jax.jit),
            ("value and gradient", measure.value_and_gradient),
        )
    ]


def _dense(options: Options) -> Iterator[Case]:
    for n1, n2, batch in DENSE[:1] if options.quick else DENSE:
        yield (
            f"dense, {(n1, n2, batch)}",
            ss.Dense,
            _normal(n1, n2) / n1**0.5,
            _normal(batch, n1),
            ("literal", "gram"),
        )


def _convolutions(options: Options) -> Iterator[Case]:
    for n1, n2, pixels, k, batch in ((4, 4, 8, 3, 2),) if options.quick else CONVOLUTIONS:
        kernel, inputs = _normal(k, k, n1, n2) / (k * n1**0.5), _normal(batch, pixels, pixels, n1)
        for padding in ("SAME", "CIRCULAR")[: 1 if options.quick else 2]:
            name = f"convolution {n1}→{n2}, {k}×{k} @ {pixels}×{pixels}, {padding}, batch {batch}"
            make = functools.partial(ss.Conv, spatial_shape=(pixels, pixels), padding=padding)
            yield name, make, kernel, inputs, ("literal", "gram", "fourier")


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def _figure(case: Case, direction: str, transform: Any, options: Options) -> Figure:
    name, make, kernel, inputs, forms = case

    def solved(form: Any, kernel: jax.Array, inputs: jax.Array) -> jax.Array:
        problem = ss.LayerProblem(make(kernel), inputs)
        return ss.prox_gd(problem, step_size=1e-2, num_iters=ITERATIONS, form=form).value

    problem = ss.LayerProblem(make(kernel), inputs)
    differentiated = transform is not jax.jit
    chosen = ss.forms.cheapest_form(problem, ITERATIONS - 1, differentiated=differentiated)
    times = measure.interleaved(
        {
            form: functools.partial(transform(functools.partial(solved, form)), kernel, inputs)
            for form in forms
        },
        rounds=options.rounds,
    )
    best = min(times, key=lambda form: times[form].median)
    return Figure(
        f"Prox-GD, {ITERATIONS} iterations, {name}, {direction}: {chosen}",
        f"the fastest form, {best}",
        times[chosen].over(times[best]),
        goal=GOAL,
        detail={"seconds": {form: time.median for form, time in times.items()}},
    )


if __name__ == "__main__":
    main("forms", benchmark, None)
