"""A training step of VGG16 with every layer normalised by its own norm, against Flax's wrapper.

    python -m benchmarks.spectral_norm

Flax divides a kernel by one step of the power method on the kernel reshaped to a matrix, ours by the norm of
the layer, zero padding included, from four Krylov steps on the layer itself.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stochsolvers as ss
from benchmarks import measure
from benchmarks.record import Figure, Goal, Options, main
from experiments.networks import VGG16, VGG16Config

BATCH = 32
Side = Literal["plain", "flax", "ours"]
NAMES: dict[Side, str] = {
    "plain": "no normalisation",
    "flax": "nnx.SpectralNorm",
    "ours": "ss.nnx.SpectralNorm",
}
TRACKED_STEPS, TRACKED_BATCH = 15, 4


def network(side: Side, options: Options) -> VGG16:
    """VGG16 for 32×32×3 pixels, all of its 16 layers normalised to 1."""
    pixels, width = (8, 0.125) if options.quick else (32, 1.0)
    rngs = nnx.Rngs(0, dropout=1)
    model = VGG16(VGG16Config((pixels, pixels, 3), width=width), rngs=rngs)
    model.train()

    def normalised(layer: Any, **shape: Any) -> Any:
        if side == "flax":
            return nnx.SpectralNorm(layer, rngs=rngs)
        return ss.nnx.SpectralNorm(layer, **shape) if side == "ours" else layer

    for stage in model.features.stages:
        for block in stage:
            block.conv = normalised(block.conv, spatial_shape=pixels)
        pixels = -(-pixels // 2)
    for hidden in (model.penultimate, model.last):
        hidden.linear = normalised(hidden.linear)  # pyright: ignore
    model.classifier = normalised(model.classifier)
    return model


def training_step(model: VGG16) -> tuple[Callable[..., Any], Any]:
    """A compiled step of SGD with momentum, and its state."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    @jax.jit
    def step(state, images, labels):
        params, rest, momentum = state

        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
            return losses.mean(), nnx.split(model, nnx.Param, ...)[2]

        gradient, rest = jax.grad(loss, has_aux=True)(params)
        updates, momentum = optimizer.update(gradient, momentum)
        return optax.apply_updates(params, updates), rest, momentum

    return step, (params, rest, optimizer.init(params))


def data(batch: int, options: Options) -> tuple[jax.Array, jax.Array]:
    """Normal pixels, uniform labels."""
    rng, pixels = np.random.default_rng(0), 8 if options.quick else 32
    images = rng.standard_normal((batch, pixels, pixels, 3))
    return jnp.asarray(images, jnp.float32), jnp.asarray(rng.integers(0, 10, batch))


def benchmark(options: Options) -> Sequence[Figure]:
    """VGG16 at CIFAR's size, batch 32, SGD with momentum: 13 convolutions and 3 linear layers normalised."""
    batch = 8 if options.quick else BATCH
    images, labels = data(batch, options)
    calls = {}
    for side in NAMES:
        step, state = training_step(network(side, options))
        state = step(state, images, labels)  # the first step starts from nothing
        calls[side] = functools.partial(step, state, images, labels)
    times = measure.interleaved(calls, rounds=options.rounds)
    seconds = {name: timing.median for name, timing in times.items()}
    what = f"training step of VGG16, batch {batch}, every layer normalised by its own norm"
    return [
        Figure(
            what,
            "one power step on reshaped kernels (flax.nnx.SpectralNorm)",
            times["ours"].over(times["flax"]),
            goal=Goal("≤", 1.3),
            detail={"seconds": seconds},
        ),
        Figure(what, "no normalisation", times["ours"].over(times["plain"])),
        *_true_norms(options),
    ]


def _true_norms(options: Options) -> Iterator[Figure]:
    """What a call in training divided by, against the norm of the layer, after some steps."""
    images, labels = data(TRACKED_BATCH, options)
    count = 2 if options.quick else TRACKED_STEPS
    for side in ("flax", "ours"):
        model = network(side, options)
        step, state = training_step(model)
        for _ in range(count):
            state = step(state, images, labels)
        nnx.update(model, *state[:2])
        norms = {}
        for path, layer in nnx.iter_modules(model):
            if isinstance(layer, nnx.SpectralNorm | ss.nnx.SpectralNorm):
                norms["/".join(map(str, path))] = _normalised_norm(layer, _pixels(path, images))
        errors = [abs(norm - 1) for norm in norms.values()]
        yield Figure(
            f"norm of a layer normalised by {NAMES[side]} after {count} steps, the worst of {len(norms)}",
            "1",
            100 * max(errors),
            " % off",
            Goal("≤", 1) if side == "ours" else None,
            detail={"norms": norms},
        )


def _pixels(path: Sequence[Any], images: jax.Array) -> int:
    """Along an axis of the inputs of the layer at this path."""
    names = [str(part) for part in path]
    stage = int(names[names.index("stages") + 1]) if "stages" in names else 0
    return -(-images.shape[1] // 2**stage)


def _normalised_norm(wrapper: Any, pixels: int) -> float:
    """||A|| of the layer with the kernel of the next call in training."""
    layer = wrapper.layer_instance
    kernel = layer.kernel[...]
    if isinstance(wrapper, ss.nnx.SpectralNorm):
        A = wrapper.linear_map()
        divisor = ss.lipschitz.norm_step(
            A, wrapper.norm_state(), num_steps=wrapper.options.n_steps
        )[0]
    else:
        flat = kernel.reshape(-1, kernel.shape[-1])
        (u,) = [v[...] for key, v in wrapper.batch_stats.items() if key[-1] == "u"]
        v = u @ flat.T
        u = v @ flat / jnp.linalg.norm(v)
        divisor = jnp.linalg.norm(u)
        A = ss.nnx.linear_map_of(layer, (1, pixels, pixels, kernel.shape[-2]))
    return float(ss.spectral_norm(A) / divisor)


if __name__ == "__main__":
    main("spectral_norm", benchmark, None)
