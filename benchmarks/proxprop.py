"""A training step of proximal backpropagation against one of backpropagation, MLP and ConvNet.

python -m benchmarks.proxprop
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from threadpoolctl import threadpool_limits

import stochsolvers as ss
from benchmarks import measure
from benchmarks.record import HERE, Figure, Goal, Options, main
from experiments.networks.proxprop import (
    BATCH_SIZE,
    DEFAULTS,
    LABELS,
    Kind,
    ProxPropConfig,
    ProxPropNet,
)
from experiments.output import runs
from experiments.training.training_step import Rates, optimizer

STORED = HERE.parent / "experiments" / "results" / "proxprop_mlp_cifar10" / runs.ROWS
IN_PARAMETERS = "conjugate gradients of the parameters, 3 steps"
GOALS = {
    ("mlp", "exact"): Goal("≤", 1.15),
    ("mlp", "cg3"): Goal("≤", 1.3),
    ("convnet", "exact"): Goal("≤", 2.2),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _in_parameters(kernel: jax.Array, bias: jax.Array, x: jax.Array, tau: float) -> jax.Array:
    """x W + b, whose step is that of `ConjugateGradients(tau, 3)` by products with x and xᵀ alone."""
    return x @ kernel + bias


def _backward(tau: float, saved: Any, g: jax.Array) -> tuple[jax.Array, ...]:
    kernel, x = saved
    rows = jnp.concatenate([x, jnp.ones_like(x[:, :1])], 1)
    d, r = jnp.zeros((rows.shape[1], g.shape[1])), rows.T @ g
    p, size = r, jnp.sum(r**2, 0)
    for _ in range(3):
        image = rows.T @ (rows @ p) + p / tau
        alpha = size / jnp.sum(p * image, 0)
        d, r = d + alpha * p, r - alpha * image
        before, size = size, jnp.sum(r**2, 0)
        p = r + size / before * p
    return d[:-1], d[-1], g @ kernel.T


_in_parameters.defvjp(
    lambda kernel, bias, x, tau: (_in_parameters(kernel, bias, x, tau), (kernel, x)), _backward
)


class _InParameters(nnx.Linear):
    """The textbook's layer, for comparison."""

    tau = 0.05

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        bias = self.bias
        assert bias is not None
        return _in_parameters(self.kernel[...], bias[...], inputs, self.tau)


def _model(kind: Kind, side: str, pixels: int, width: float, tau: float) -> ProxPropNet:
    step = {
        "exact": ss.proxprop.Exact(tau),
        "cg3": ss.proxprop.ConjugateGradients(tau, 3),
        "cg10": ss.proxprop.ConjugateGradients(tau, 10),
    }.get(side)
    config = ProxPropConfig(kind, (pixels, pixels, 3), 10, step, width)
    model = ProxPropNet(config, rngs=nnx.Rngs(0))
    if side == IN_PARAMETERS:
        features: Any = model.features
        features.layers = nnx.List(
            [
                _InParameters(layer.in_features, layer.out_features, rngs=nnx.Rngs(0))
                for layer in features.layers
            ]
        )
    return model


def training_step(model: ProxPropNet, kind: Kind) -> tuple[Callable[..., Any], Any]:
    """A compiled step of the paper's optimiser, and its state."""
    graph, params = nnx.split(model)
    paper = DEFAULTS[kind]
    rates = Rates(paper["plain"], paper["momentum"], 0.0)
    descent = optimizer(rates, paper["optimizer"])

    @jax.jit
    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, memory = state

        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, d = jax.value_and_grad(loss)(params)
        updates, memory = descent.update(d, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    return step, (params, descent.init(params))


def benchmark(options: Options) -> Sequence[Figure]:
    """The paper's networks, batch 500 of 32×32×3 pixels in [0, 1]."""
    with threadpool_limits(1, "blas"):
        figures = [*_steps("mlp", options), *_steps("convnet", options)]
    return figures + _stored_accuracies()


def _steps(kind: Kind, options: Options) -> list[Figure]:
    pixels, batch, width = (8, 20, 0.02) if options.quick else (32, BATCH_SIZE, 1.0)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((batch, pixels, pixels, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, batch))
    sides = ["backpropagation", "exact", "cg3"] + ["cg10"] * (not options.quick)
    sides += [IN_PARAMETERS] if kind == "mlp" else []
    calls = {}
    for side in sides:
        model = _model(kind, side, pixels, width, DEFAULTS[kind]["tau"])
        step, state = training_step(model, kind)
        calls[side] = functools.partial(step, state, images, labels)
    times = measure.interleaved(calls, rounds=options.rounds)
    detail = {"seconds": {name: timing.median for name, timing in times.items()}}
    what = f"training step of the {LABELS[kind]} of proximal backpropagation, batch {batch}"
    figures = [
        Figure(
            f"{what}, {side}",
            "backpropagation",
            times[side].over(times["backpropagation"]),
            goal=GOALS.get((kind, side)),
            detail=detail,
        )
        for side in sides[1:]
    ]
    if kind == "mlp":
        ratio = times["exact"].over(times[IN_PARAMETERS])
        figures.append(Figure(f"{what}, exact", IN_PARAMETERS, ratio, goal=Goal("≤", 0.4)))
    return figures


def _stored_accuracies() -> list[Figure]:
    """Of the stored run of `experiments.proxprop`: the least difference over its seeds after one epoch."""
    if not STORED.exists():
        return []
    rows = [json.loads(line) for line in runs.read_text(STORED).splitlines()]
    first = {
        (row["method"], row["seed"]): row["validation_accuracy"]
        for row in rows
        if row["kind"] == "epoch" and row["epoch"] == 1
    }
    seeds = [seed for method, seed in first if method == "exact"]
    ahead = {seed: first["exact", seed] - first["backpropagation", seed] for seed in seeds}
    return [
        Figure(
            f"validation accuracy of the MLP on CIFAR-10 after one epoch, exact, least of {len(seeds)} seeds",
            "backpropagation, same seed",
            min(ahead.values()),
            " points",
            goal=Goal("≥", 5),
            detail={"seeds": ahead},
        )
    ]


if __name__ == "__main__":
    main("proxprop", benchmark, None)
