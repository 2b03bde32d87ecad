"""Interleaved timing, the machine's own rates, and compiled memory."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_SECONDS = 0.05
"""A sample repeats its call until it has lasted about so long."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call of one side, one sample a round.

    Attributes:
      samples: in the order of the rounds.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median sample, in seconds."""
        return statistics.median(self.samples)

    def over(self, other: "Timing") -> float:
        """The median over rounds of this side's time over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.samples, other.samples, strict=True))


def interleaved(
    sides: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float | None = None,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Time every side once a round, so that whatever else the machine does hits all of them alike.

    Args:
      sides: calls without arguments; what they return is waited for.
      rounds: samples of each side, after one call to compile and one to choose the repetitions.
      seconds: about how long a sample lasts, by default `SAMPLE_SECONDS`; longer calls are made once.
      pause: seconds before each sample, for sides of several libraries: the threads of the one before go on
        spinning for a while, at the expense of the next.
    """
    seconds = SAMPLE_SECONDS if seconds is None else seconds
    for call in sides.values():
        seconds_of(call, 1)
    repeats = {
        name: max(1, round(seconds / max(seconds_of(call, 1), 1e-7)))
        for name, call in sides.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            time.sleep(pause)
            samples[name].append(seconds_of(call, repeats[name]))
    return {name: Timing(tuple(times)) for name, times in samples.items()}


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """The mean time of so many calls, each waited for."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def matmul_rate(size: int = 2048, rounds: int = 5) -> float:
    """Floating-point operations a second of a square float32 matrix product."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), jnp.float32)
    product = jax.jit(jnp.matmul)
    timing = interleaved({"product": lambda: product(x, x)}, rounds=rounds)["product"]
    return 2.0 * size**3 / timing.median


def bandwidth(megabytes: int = 256, rounds: int = 5) -> float:
    """Bytes a second read and written by an elementwise pass over an array beyond the caches."""
    x = jnp.ones(megabytes * 2**20 // 4, jnp.float32)
    scale = jax.jit(lambda x: x * 1.5)
    timing = interleaved({"pass": lambda: scale(x)}, rounds=rounds)["pass"]
    return 2.0 * x.nbytes / timing.median


def temporary_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that the compiled function allocates beside its arguments and results."""
    compiled: Any = function if hasattr(function, "lower") else jax.jit(function)
    analysis = compiled.lower(*args).compile().memory_analysis()
    assert analysis is not None
    return int(analysis.temp_size_in_bytes)


def value_and_gradient(layer: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Value and gradient, with respect to all arguments, of half the output's sum of squares."""

    @jax.jit
    def both(*args: jax.Array) -> Any:
        every = tuple(range(len(args)))
        return jax.value_and_grad(lambda *args: 0.5 * jnp.sum(layer(*args) ** 2), every)(*args)

    return both
