"""The implicit derivative at convergence against the unrolled one, and what each keeps in memory.

python -m benchmarks.derivatives
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import stochsolvers as ss
from benchmarks import measure
from benchmarks.dense import arrays
from benchmarks.record import Figure, Goal, Options, main

SIZE, ITERATIONS, RIDGE = (512, 512, 128), 100, 0.1
KINDS: dict[str, dict[str, Any]] = {
    "unrolled": {"derivative": "unrolled"},
    "remat": {"derivative": "remat"},
    "truncated to 10": {"derivative": ss.Truncated(10)},
    "implicit": {"derivative": "implicit"},
    "implicit to 1e-3": {"derivative": ss.Implicit(1e-3)},
    "implicit, with momentum to a tolerance of 3e-4": {
        "derivative": "implicit",
        "momentum": True,
        "tol": 3e-4,
    },
}


def benchmark(options: Options) -> Sequence[Figure]:
    """Derivatives through 100 iterations of dense Prox-GD."""
    size = (64, 32, 8) if options.quick else SIZE
    args, step = arrays(*size)

    def solved(settings, kernel, bias, inputs):
        problem = ss.LayerProblem(ss.Dense(kernel), inputs, bias=bias, ridge=RIDGE)
        step_size = 1.0 / (1.0 / step + RIDGE)
        settings = {"num_iters": ITERATIONS, **settings}
        return ss.prox_gd(problem, step_size=step_size, **settings).value

    calls = {
        name: measure.value_and_gradient(functools.partial(solved, settings))
        for name, settings in KINDS.items()
    }
    at_optimum = {"num_iters": 50 * ITERATIONS, "derivative": ss.Implicit(1e-7)}
    _, exact = measure.value_and_gradient(functools.partial(solved, at_optimum))(*args)
    forward = jax.jit(functools.partial(solved, {}))
    times = measure.interleaved(
        {name: functools.partial(call, *args) for name, call in calls.items()}
        | {"forward only": functools.partial(forward, *args)},
        rounds=options.rounds,
    )
    memory = {name: measure.temporary_bytes(call, *args) for name, call in calls.items()}
    seconds = {side: timing.median for side, timing in times.items()}
    figures = []
    for name, call in calls.items():
        implicit, same_forward = name.startswith("implicit"), name == "implicit"
        error = max(
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            for a, b in zip(call(*args)[1], exact, strict=True)
        )
        what = f"dense Prox-GD, {size}, λ = {RIDGE}, value and gradient, {name}"
        against = f"unrolled, {ITERATIONS} iterations"
        if name != "unrolled":
            figures += [
                Figure(
                    what,
                    against,
                    times[name].over(times["unrolled"]),
                    goal=Goal("≤", 1 / 3) if implicit else None,
                    floor=times["forward only"].over(times["unrolled"]) if same_forward else None,
                    detail={"seconds": seconds},
                ),
                Figure(
                    f"{what}: peak memory",
                    against,
                    memory[name] / memory["unrolled"],
                    goal=Goal("≤", 0.1) if implicit else None,
                    detail={"bytes": memory},
                ),
            ]
        figures.append(
            Figure(f"{what}: relative error of the gradient", "at the optimum", error, "")
        )
    return figures


if __name__ == "__main__":
    main("derivatives", benchmark, None)
