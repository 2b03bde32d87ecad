"""Prox-GD of a convolution against one plain convolution layer, in every form.

python -m benchmarks.convolution
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stochsolvers as ss
from benchmarks import measure
from benchmarks.record import Figure, Goal, Options, main

CHANNELS, PIXELS, BATCH, ITERATIONS = 64, 32, 32, 10
FORMS: dict[Any, Any] = {"SAME": ("literal", "fourier"), "CIRCULAR": ("literal", "gram", "fourier")}
AGAINST = "one plain layer, flax.nnx.Conv"
DIRECTIONS: dict[str, Callable[[Any], Any]] = {
    "forward": jax.jit,
    "value and gradient": measure.value_and_gradient,
}


def benchmark(options: Options) -> Sequence[Figure]:
    """Convolution 64→64, 3×3, on 32×32 pixels, 10 iterations of Prox-GD."""
    channels, pixels, batch = (4, 8, 2) if options.quick else (CHANNELS, PIXELS, BATCH)
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 3, channels, channels)) / (3 * channels**0.5))
    inputs = jnp.asarray(rng.standard_normal((batch, pixels, pixels, channels)))
    kernel, inputs = kernel.astype(jnp.float32), inputs.astype(jnp.float32)
    step = 1.0 / ss.lipschitz_constant(ss.Conv(kernel, (pixels, pixels)), grid="padded")
    figures = []
    for padding, forms in FORMS.items():
        layer = nnx.Conv(
            channels, channels, (3, 3), padding=padding, use_bias=False, rngs=nnx.Rngs(0)
        )

        layer.kernel[...] = kernel
        graphdef, weights = nnx.split(layer)

        def plain(kernel, inputs, graphdef=graphdef, weights=weights):
            return jax.nn.relu(nnx.merge(graphdef, weights)(inputs))

        def solved(form, kernel, inputs, padding=padding):
            A = ss.Conv(kernel, inputs.shape[1:3], padding=padding)
            problem = ss.LayerProblem(A, inputs)
            return ss.prox_gd(problem, step_size=step, num_iters=ITERATIONS, form=form).value

        def ours(kernel, inputs, padding=padding):
            return jax.nn.relu(ss.Conv(kernel, inputs.shape[1:3], padding=padding)(inputs))

        functions: dict[str, Any] = {"plain": plain, "ours": ours}
        for form in ("auto", *forms):
            functions[form] = functools.partial(solved, form)
        for form in forms:
            np.testing.assert_allclose(
                solved(form, kernel, inputs), solved("literal", kernel, inputs), atol=1e-4
            )
        shape = (
            f"convolution {channels}→{channels}, 3×3 @ {pixels}×{pixels}, {padding}, batch {batch}"
        )
        for direction, transform in DIRECTIONS.items():
            times = measure.interleaved(
                {
                    name: functools.partial(transform(function), kernel, inputs)
                    for name, function in functions.items()
                },
                rounds=options.rounds,
            )
            detail = {"seconds": {name: timing.median for name, timing in times.items()}}
            figures += [
                Figure(
                    f"Prox-GD of a {shape}, {ITERATIONS} iterations, form {form}, {direction}",
                    AGAINST,
                    times[form].over(times["plain"]),
                    goal=Goal("≤", 19) if (form, direction) == ("auto", "forward") else None,
                    floor=2.0 * ITERATIONS - 1 if form == "literal" else None,
                    detail=detail,
                )
                for form in ("auto", *forms)
            ]
            ratio = times["ours"].over(times["plain"])
            figures.append(Figure(f"{shape}, {direction}", AGAINST, ratio, detail=detail))
    return figures


if __name__ == "__main__":
    main("convolution", benchmark, None)
