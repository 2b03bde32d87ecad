"""The implicit derivative at convergence against the unrolled one, and what each keeps in memory.

python -m benchmarks.derivatives
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp

import stochsolvers as ss
from benchmarks import measure
from benchmarks.dense import arrays, value_and_gradient
from benchmarks.record import Figure, Goal, Options, main

SIZE, ITERATIONS = (512, 512, 128), 100


def benchmark(options: Options) -> Sequence[Figure]:
    """Derivatives through 100 iterations of dense Prox-GD."""
    size = (64, 32, 8) if options.quick else SIZE
    args, step = arrays(*size)

    def solved(derivative, kernel, bias, inputs):
        problem = ss.LayerProblem(ss.Dense(kernel), inputs, bias=bias, ridge=0.1)
        step_size = 1.0 / (1.0 / step + 0.1)
        return ss.prox_gd(
            problem, step_size=step_size, num_iters=ITERATIONS, derivative=derivative
        ).value

    kinds = {
        "unrolled": "unrolled",
        "remat": "remat",
        "truncated to 10": ss.Truncated(10),
        "implicit": "implicit",
    }
    calls = {
        name: value_and_gradient(functools.partial(solved, kind)) for name, kind in kinds.items()
    }
    gradients = {name: call(*args)[1] for name, call in calls.items()}
    times = measure.interleaved(
        {name: functools.partial(call, *args) for name, call in calls.items()},
        rounds=options.rounds,
    )
    memory = {name: measure.temporary_bytes(call, *args) for name, call in calls.items()}
    figures = []
    for name in list(kinds)[1:]:
        implicit = name == "implicit"
        error = max(
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            for a, b in zip(gradients[name], gradients["unrolled"], strict=True)
        )
        what = f"dense Prox-GD, {size}, λ = 0.1, value and gradient, {name}"
        against = f"unrolled, {ITERATIONS} iterations"
        figures += [
            Figure(
                what,
                against,
                times[name].over(times["unrolled"]),
                goal=Goal("≤", 1 / 3) if implicit else None,
                detail={"seconds": {side: timing.median for side, timing in times.items()}},
            ),
            Figure(
                f"{what}: peak memory",
                against,
                memory[name] / memory["unrolled"],
                goal=Goal("≤", 0.1) if implicit else None,
                detail={"bytes": memory},
            ),
            Figure(f"{what}: relative difference of the gradient", against, error, ""),
        ]
    return figures


if __name__ == "__main__":
    main("derivatives", benchmark, None)
