"""A training step of the tables' networks against torch's of the same plain network, on the same cores.

    TORCH_PYTHON=PYTHON python -m benchmarks.training_step

torch needs an environment of its own, PYTHON in it; without one, the steps are compared with the network's
own step with dropout. Both sides have all cores of the process, and take samples in turns.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import measure
from benchmarks.convex import Process
from benchmarks.measure import Timing
from benchmarks.record import HERE, Figure, Goal, Options, main
from benchmarks.training import step_of
from experiments.networks import (
    NAMES,
    VGG16,
    AlexNet,
    AlexNetConfig,
    BlockConfig,
    LeNet,
    LeNetConfig,
    Method,
    VGG16Config,
)

GOALS: dict[Method, Goal | None] = {
    "none": None,
    "dropout": Goal("≤", 1.3),
    "prox-sg": Goal("≤", 2.5),
    "prox-gd-no-dropout": None,
    "ms2gd": None,
}
BATCHES = {"lenet": 128, "alexnet": 128, "vgg16": 32}
LABELS = {"lenet": "LeNet", "alexnet": "AlexNet", "vgg16": "VGG16"}
PEER = HERE / "_training_peer.py"
SECONDS = 0.3
"""A sample repeats its step until it has lasted about so long."""


def step_and_data(network: str, method: Method, batch: int) -> Callable[[], Any]:
    """A step of one network on random images of 32×32×3 pixels."""
    block = BlockConfig(method)
    rngs = nnx.Rngs(0, dropout=1)
    if network == "lenet":
        model: Any = LeNet(LeNetConfig(variant="D-D", block=block), rngs=rngs)
    elif network == "alexnet":
        model = AlexNet(AlexNetConfig(), rngs=rngs)
    else:
        model = VGG16(VGG16Config(block=block), rngs=rngs)
    step, state = step_of(model)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, 32, 32, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 10, batch))
    return functools.partial(step, state, images, labels)


def in_turns(
    ours: Mapping[str, Callable[[], Any]],
    theirs: Callable[[int], float] | None,
    rounds: int,
    target: float = SECONDS,
) -> dict[str, Timing]:
    """Samples of each call and of the peer's step, "torch", which takes so many steps at a time."""
    repeats = {}
    for name, call in ours.items():
        measure.seconds_of(call, 1)
        repeats[name] = max(1, round(target / measure.seconds_of(call, 1)))
    if theirs is not None:
        theirs(1)
        repeats["torch"] = max(1, round(target / theirs(1)))
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name in samples:
            time.sleep(0.05)  # the threads of the side before go on spinning for a while
            call = ours.get(name)
            seconds = theirs if call is None else functools.partial(measure.seconds_of, call)
            assert seconds is not None
            samples[name].append(seconds(repeats[name]))
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def benchmark(options: Options) -> Sequence[Figure]:
    """LeNet with dropout, solvers of 10 iterations and neither; AlexNet, VGG16 with dropout; 32×32 pixels."""
    peer = None
    if "TORCH_PYTHON" in os.environ and not options.quick:
        peer = Process(os.environ["TORCH_PYTHON"], str(PEER), environment={})
    figures = []
    for network in ("lenet",) if options.quick else BATCHES:
        methods: Sequence[Method] = list(GOALS) if network == "lenet" else ["dropout"]
        methods = methods[:2] if options.quick else methods
        figures += _figures(network, methods, peer, options)
    if peer is not None:
        peer.close()
    return figures


def _figures(
    network: str, methods: Sequence[Method], peer: Process | None, options: Options
) -> list[Figure]:
    batch = 8 if options.quick else BATCHES[network]
    calls = {method: step_and_data(network, method, batch) for method in methods}

    def theirs(steps: int) -> float:
        assert peer is not None
        return peer.ask(network=network, batch=batch, steps=steps)

    target = 0.0 if options.quick else SECONDS
    times = in_turns(calls, None if peer is None else theirs, options.rounds, target)
    seconds = {name: timing.median for name, timing in times.items()}
    against, other = ("torch, dropout", "torch") if peer is not None else ("dropout", "dropout")
    return [
        Figure(
            f"training step of {LABELS[network]}, batch {batch}, {_what(method)}",
            against,
            times[method].over(times[other]),
            goal=GOALS[method] if network == "lenet" and peer is not None else None,
            detail={"seconds": seconds},
        )
        for method in methods
        if method != other
    ]


def _what(method: Method) -> str:
    if method in ("none", "dropout"):
        return NAMES[method]
    return f"two blocks of {NAMES[method]}, 10 iterations"


if __name__ == "__main__":
    main("training_step", benchmark, None)
