"""Dense Prox-GD against one plain layer, and against jaxopt's unrolled ProximalGradient.

python -m benchmarks.dense
"""

import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from benchmarks import measure
from benchmarks.record import Figure, Goal, Options, main

SIZE = (4096, 512, 128)
PEER_SIZES = (((4096, 512, 128), 5.0), ((400, 120, 128), 4.0), ((512, 512, 128), 1.6))
FORWARD, BACKWARD = {10: 4.5, 30: 7.0}, {10: 5.0, 30: 8.0}
PEER_ITERATIONS = 10

Arrays = tuple[jax.Array, jax.Array, jax.Array]


def arrays(n1: int, n2: int, batch: int) -> tuple[Arrays, jax.Array]:
    """Kernel, bias and inputs, and the step 1/L."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((n1, n2)) / np.sqrt(n1)
    bias, inputs = rng.standard_normal(n2), rng.standard_normal((batch, n1))
    step = 1.0 / np.linalg.norm(kernel, 2) ** 2
    made = (jnp.asarray(array, jnp.float32) for array in (kernel, bias, inputs))
    return tuple(made), jnp.float32(step)  # type: ignore[return-value]


def plain(kernel: jax.Array, bias: jax.Array, inputs: jax.Array) -> jax.Array:
    """One layer."""
    return jax.nn.relu(inputs @ kernel + bias)


def solved(
    step: jax.Array, num_iters: int, kernel: jax.Array, bias: jax.Array, inputs: jax.Array
) -> jax.Array:
    """The layer as a solver."""
    problem = ss.LayerProblem(ss.Dense(kernel), inputs, bias=bias)
    return ss.prox_gd(problem, step_size=step, num_iters=num_iters).value


def in_jaxopt(
    step: jax.Array, num_iters: int, kernel: jax.Array, bias: jax.Array, inputs: jax.Array
) -> jax.Array:
    """The same iterations by jaxopt, the derivative unrolled."""
    jaxopt: Any = importlib.import_module("jaxopt")

    def smooth(z, kernel, bias, inputs):
        return 0.5 * jnp.sum((z @ kernel.T - inputs) ** 2) - jnp.sum(z * bias)

    solver = jaxopt.ProximalGradient(
        smooth,
        prox=lambda v, _, scaling=1.0: jax.nn.relu(v),
        stepsize=float(step),  # it branches on the value
        maxiter=num_iters,
        tol=0.0,
        acceleration=False,
        implicit_diff=False,
        unroll=True,
    )
    z0 = jnp.zeros((len(inputs), kernel.shape[1]))
    return solver.run(z0, None, kernel, bias, inputs).params


def flops(n1: int, n2: int, batch: int, num_iters: int) -> tuple[float, float]:
    """Operations, in units of one plain layer, of a forward pass and of one with its gradient.

    c = x W costs 1, one triangle of W ᵀW n2/(2·batch)·2 halves, an iteration n2/n1. Backward, an
    iteration costs as much twice, W (Ḡ + Ḡᵀ) the whole square, and c two layers; a plain layer 3.
    """
    gram, iteration = n2 / batch, n2 / n1
    forward = 1 + gram / 2 + (num_iters - 1) * iteration
    backward = 2 + gram + 2 * (num_iters - 1) * iteration
    return forward, (forward + backward) / 3


def benchmark(options: Options) -> Sequence[Figure]:
    """Dense Prox-GD, forward and with its gradient."""
    size = (256, 32, 16) if options.quick else SIZE
    peers = (((64, 32, 16), 1.0),) if options.quick else PEER_SIZES
    return [*_against_plain(size, options.rounds), *_against_jaxopt(peers, options.rounds)]


def _against_plain(size: tuple[int, int, int], rounds: int) -> Iterator[Figure]:
    args, step = arrays(*size)
    layers = {k: functools.partial(solved, step, k) for k in FORWARD}
    for kind, wrap, goals in (
        ("forward", jax.jit, FORWARD),
        ("value and gradient", measure.value_and_gradient, BACKWARD),
    ):
        calls = {"plain": wrap(plain), **{str(k): wrap(layer) for k, layer in layers.items()}}
        times = measure.interleaved(
            {name: functools.partial(call, *args) for name, call in calls.items()}, rounds=rounds
        )
        for k, bound in goals.items():
            yield Figure(
                f"dense Prox-GD, {size}, {k} iterations, {kind}",
                "one plain layer",
                times[str(k)].over(times["plain"]),
                goal=Goal("≤", bound),
                floor=flops(*size, k)[kind != "forward"],
                detail={"seconds": {name: timing.median for name, timing in times.items()}},
            )


def _against_jaxopt(sizes: Sequence[Any], rounds: int) -> Iterator[Figure]:
    for size, bound in sizes:
        args, step = arrays(*size)
        ours = measure.value_and_gradient(functools.partial(solved, step, PEER_ITERATIONS))
        theirs = measure.value_and_gradient(functools.partial(in_jaxopt, step, PEER_ITERATIONS))
        (value, gradient), (other, other_gradient) = ours(*args), theirs(*args)
        np.testing.assert_allclose(value, other, rtol=1e-4)
        for ours_part, theirs_part in zip(gradient, other_gradient, strict=True):
            np.testing.assert_allclose(
                ours_part, theirs_part, atol=1e-3 * float(jnp.max(jnp.abs(theirs_part)))
            )
        times = measure.interleaved(
            {"ours": lambda: ours(*args), "jaxopt": lambda: theirs(*args)},  # noqa: B023
            rounds=rounds,
        )
        memory = [measure.temporary_bytes(side, *args) for side in (ours, theirs)]
        what = f"dense Prox-GD, {size}, {PEER_ITERATIONS} iterations, value and gradient"
        yield Figure(
            what,
            "jaxopt's ProximalGradient, unrolled",
            times["jaxopt"].over(times["ours"]),
            goal=Goal("≥", bound),
            detail={"seconds": {name: timing.median for name, timing in times.items()}},
        )
        yield Figure(
            f"{what}: peak memory",
            "the same",
            memory[0] / memory[1],
            goal=Goal("≤", 0.5),
            detail={"bytes": dict(zip(("ours", "jaxopt"), memory, strict=True))},
        )


if __name__ == "__main__":
    main("dense", benchmark, None)
