"""What the first report on a network costs, and the second: most of the first was compilation.

python -m benchmarks.reports
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.record import Figure, Goal, Options, main

FIRST, CERTIFIED = Goal("≤", 8.0), Goal("≤", 4.0)  # seconds

_LIPSCHITZ = """
from flax import nnx
import jax, json, time
import stochsolvers as ss
from benchmarks._networks import ResNet, UNet
model = {make}
times = []
for _ in range(2):
    start = time.perf_counter()
    report = ss.lipschitz_report(model, (1, {pixels}, {pixels}, 3))
    times.append(time.perf_counter() - start)
print(json.dumps(dict(times=times, bound=report.bound, product=report.product, rows=len(report.rows))))
"""
_CERTIFY = """
from flax import nnx
import jax, json, time
import jax.numpy as jnp
import stochsolvers as ss
make = ss.nnx.SolverLinear
model = nnx.Sequential(
    nnx.Conv(3, 16, (3, 3), strides=2, rngs=nnx.Rngs(0)),
    nnx.relu,
    lambda x: x.reshape(len(x), -1),
    make(4096, {width}, solver=ss.ProxGD(10), ridge=0.1, rngs=nnx.Rngs(1)),
)
images = jax.random.normal(jax.random.key(1), (16, 32, 32, 3))
times = []
for _ in range(2):
    start = time.perf_counter()
    report = ss.certify(model, images)
    times.append(time.perf_counter() - start)
print(json.dumps(dict(times=times, gap=report.rows[0].gap_max, rows=len(report.rows))))
"""


def benchmark(options: Options) -> Sequence[Figure]:
    """Each in new processes without a compilation cache: first and second call."""
    quick = options.quick
    small = "nnx.Rngs(0), (4, 8)" if quick else "nnx.Rngs(0)"
    pixels = 8 if quick else 32
    runs = 1 if quick else max(1, min(options.rounds, 3))
    figures: list[Figure] = []
    for name, make in (("ResNet-18", "ResNet"), ("a U-Net", "UNet")):
        code = _LIPSCHITZ.format(make=f"{make}({small})", pixels=pixels)
        results = [_fresh(code) for _ in range(runs)]
        what = f"`lipschitz_report` of {name}, {pixels}×{pixels} pixels"
        goal = FIRST if make == "ResNet" else None
        figures += _figures(what, results, goal)
    results = [_fresh(_CERTIFY.format(width=16 if quick else 256)) for _ in range(runs)]
    what = f"`certify` of a solver layer 4096→{16 if quick else 256} after a convolution"
    return [*figures, *_figures(what, results, CERTIFIED)]


def _figures(what: str, results: Sequence[dict[str, Any]], goal: Goal | None) -> Sequence[Figure]:
    detail = dict(results[0], times=[result["times"] for result in results])
    first, second = (statistics.median(result["times"][i] for result in results) for i in (0, 1))
    return [
        Figure(f"{what}, first call", "", first, unit=" s", goal=goal, detail=detail),
        Figure(f"{what}, second call", "", second, unit=" s", detail=detail),
    ]


def _fresh(code: str) -> dict[str, Any]:
    """What a program prints that runs in a process of its own."""
    hidden = ("JAX_COMPILATION_CACHE_DIR", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    main("reports", benchmark, None)
