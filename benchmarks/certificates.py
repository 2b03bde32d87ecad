"""What a certificate costs beside the layer and the solve it is of, and how far above the true gap it is.

python -m benchmarks.certificates
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from benchmarks import measure
from benchmarks.dense import arrays
from benchmarks.record import Figure, Goal, Options, main

ITERATIONS, AT_OPTIMUM, RIDGE = 10, 500, 1e-3
LOOP_RIDGE, LOOP_LIMIT = 0.1, 1000
GOAL = Goal("≤", 3)

Maker = Callable[[jax.Array], ss.LinearMap]


def benchmark(options: Options) -> Sequence[Figure]:
    """Certificates after 10 iterations of Prox-GD: a square dense layer and two convolutions."""
    n1, n2, batch = (64, 32, 8) if options.quick else (512, 512, 128)
    channels, pixels, images = (4, 8, 2) if options.quick else (64, 32, 32)
    (kernel, _, inputs), _ = arrays(n1, n2, batch)
    rng = np.random.default_rng(0)
    taps = rng.standard_normal((3, 3, channels, channels)) / (3 * channels**0.5)
    maps = rng.standard_normal((images, pixels, pixels, channels))
    figures = list(_layer(f"dense, {(n1, n2, batch)}", ss.Dense, kernel, inputs, options))
    for padding in ("SAME", "CIRCULAR")[: 1 if options.quick else 2]:
        shape = f"3×3 @ {pixels}×{pixels}, {padding}, batch {images}"
        make = functools.partial(ss.Conv, spatial_shape=(pixels, pixels), padding=padding)
        arguments = jnp.asarray(taps, jnp.float32), jnp.asarray(maps, jnp.float32)
        figures += _layer(f"convolution {channels}→{channels}, {shape}", make, *arguments, options)
    return figures


def _layer(
    name: str, make: Maker, kernel: jax.Array, inputs: jax.Array, options: Options
) -> Sequence[Figure]:
    norm = ss.lipschitz_constant(make(kernel), grid="padded")
    step = 1.0 / (norm + RIDGE)

    @jax.jit
    def plain(kernel, inputs):
        return jax.nn.relu(make(kernel)(inputs))

    @jax.jit
    def solved(kernel, inputs):
        problem = ss.LayerProblem(make(kernel), inputs, ridge=RIDGE)
        return ss.prox_gd(problem, step_size=step, num_iters=ITERATIONS).value

    @jax.jit
    def certified(z, kernel, inputs):
        return ss.LayerProblem(make(kernel), inputs, ridge=RIDGE).certificate(z)

    convexity = ss.lipschitz.strong_convexity(make(kernel), upper=norm)

    @jax.jit
    def certified_with_constants(z, kernel, inputs):
        problem = ss.LayerProblem(make(kernel), inputs, ridge=RIDGE)
        return problem.certificate(z, squared_norm=norm, strong_convexity=convexity)

    z = solved(kernel, inputs)
    times = measure.interleaved(
        {
            "plain": functools.partial(plain, kernel, inputs),
            "solve": functools.partial(solved, kernel, inputs),
            "certificate": functools.partial(certified, z, kernel, inputs),
            "with constants": functools.partial(certified_with_constants, z, kernel, inputs),
        },
        rounds=options.rounds,
    )
    detail: dict[str, Any] = {"seconds": {side: time.median for side, time in times.items()}}
    what, after = f"certificate of {name}, λ = {RIDGE}", f"{ITERATIONS} iterations of Prox-GD"
    figures = [
        Figure(f"{what}, time", other, times["certificate"].over(times[side]), detail=detail)
        for side, other in (("plain", "one plain layer"), ("solve", after))
    ]
    known = times["with constants"].over(times["solve"])
    figures.append(Figure(f"{what}, L and μ known, time", after, known, goal=GOAL, detail=detail))
    figures.append(_in_the_loop(name, make, kernel, inputs, options))
    bound, gap = np.asarray(certified(z, kernel, inputs)), _gap(make, kernel, inputs, z, step)
    reached = f"{what}, after {after}, over"
    detail = {"certificate": float(np.median(bound)), "gap": float(np.median(gap))}
    return [
        *figures,
        Figure(reached, "the true gap, median", float(np.median(bound / gap)), detail=detail),
    ]


def _in_the_loop(
    name: str, make: Maker, kernel: jax.Array, inputs: jax.Array, options: Options
) -> Figure:
    """Stopping at a gap against as many iterations without a test."""

    @functools.partial(jax.jit, static_argnames="num_iters")
    def solved(kernel, inputs, gap_tol, num_iters):
        problem = ss.LayerProblem(make(kernel), inputs, ridge=LOOP_RIDGE)
        return ss.prox_gd(problem, num_iters=num_iters, momentum=True, gap_tol=gap_tol)

    zero = jnp.zeros(ss.LayerProblem(make(kernel), inputs).shape)
    gap_tol = 1e-4 * float(jnp.mean(ss.LayerProblem(make(kernel), inputs).objective(zero)))
    taken = int(jnp.max(solved(kernel, inputs, gap_tol, LOOP_LIMIT).iterations))
    times = measure.interleaved(
        {
            "gap": functools.partial(solved, kernel, inputs, gap_tol, LOOP_LIMIT),
            "plain": functools.partial(solved, kernel, inputs, None, taken),
        },
        rounds=options.rounds,
    )
    detail = {"seconds": {side: time.median for side, time in times.items()}, "iterations": taken}
    return Figure(
        f"FISTA of {name}, λ = {LOOP_RIDGE}, until the certified gap is 1e-4 P(0)",
        f"its {taken} iterations alone",
        times["gap"].over(times["plain"]),
        detail=detail,
    )


def _gap(make: Maker, kernel: jax.Array, inputs: jax.Array, z: jax.Array, step: jax.Array) -> Any:
    """P(z) − P(z*) in float64, at most the gap, for z* from FISTA in float32."""
    problem = ss.LayerProblem(make(kernel), inputs, ridge=RIDGE)
    best = ss.prox_gd(problem, step_size=step, num_iters=AT_OPTIMUM, momentum=True).value
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(array), jnp.float64) for array in (kernel, inputs, z, best))
        kernel, inputs, z, best = wide
        problem = ss.LayerProblem(make(kernel), inputs, ridge=RIDGE)
        return np.asarray(problem.objective(z) - problem.objective(best))


if __name__ == "__main__":
    main("certificates", benchmark, None)
