"""The calls that `benchmarks.against` times, in a process of one checkout; it answers lines of JSON."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stochsolvers as ss

KEY, SECONDS = jax.random.key(0), 0.05


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _calls() -> dict[str, Callable[[], Any]]:
    kernel, x = _normal(0, 512, 512) / 32, _normal(1, 128, 512)
    taps, images = _normal(2, 3, 3, 64, 64) / 24, _normal(3, 16, 32, 32, 64)

    def dense(kernel, x):
        return ss.LayerProblem(ss.Dense(kernel), x, ridge=0.01)

    def conv(taps, images, **options):
        return ss.LayerProblem(ss.Conv(taps, (32, 32), **options), images, ridge=0.01)

    def of_dense(solve):
        return lambda k, x: solve(dense(k, x)).value

    def of_conv(solve):
        return lambda k, x: solve(conv(k, x)).value

    def ten(p):
        return ss.prox_gd(p, num_iters=10, step_size=0.3)

    solvers = {
        "ProxGD, 10 iterations": ten,
        "FISTA, tol 1e-4": lambda p: ss.prox_gd(p, num_iters=200, momentum=True, tol=1e-4),
        "Prox-SG, 10 iterations": lambda p: ss.prox_sg(
            KEY, p, tau=256 if p.linear_map.in_features > 64 else 32, num_iters=10, step_size=0.1
        ),
        "Prox-SG shared, τ = n/8": lambda p: ss.prox_sg(
            KEY, p, num_iters=10, step_size=0.1,
            sampling=ss.estimators.TauNice(0.125, shared=True),
        ),
        "mS2GD, 3 × 4": lambda p: ss.ms2gd(
            KEY, p, tau=0.5, num_outer=3, num_inner=4, step_size=0.1
        ),
        "NSync, 10 iterations": lambda p: ss.nsync(KEY, p, tau=0.5, num_iters=10, step_size=0.1),
    }  # fmt: skip
    functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
    for name, solve in solvers.items():
        functions[f"dense, {name}"] = of_dense(solve), (kernel, x)
    for name in list(solvers)[:3]:
        functions[f"convolution, {name}"] = of_conv(solvers[name]), (taps, images)

    def slope(function):
        return jax.grad(lambda *a: 0.5 * jnp.sum(function(*a) ** 2), (0, 1))

    def implicit(p):
        return ss.prox_gd(p, num_iters=50, derivative="implicit")

    functions["dense, gradient, ProxGD"] = slope(of_dense(ten)), (kernel, x)
    functions["dense, gradient, implicit"] = slope(of_dense(implicit)), (kernel, x)
    functions["convolution, gradient, ProxGD"] = slope(of_conv(ten)), (taps, images[:4])
    z, zc = jnp.abs(_normal(4, 128, 512)), jnp.abs(_normal(5, 16, 32, 32, 64))
    functions["dense, certificate"] = (lambda k, x, z: dense(k, x).certificate(z)), (kernel, x, z)
    functions["convolution, certificate"] = (
        (lambda k, x, z: conv(k, x).certificate(z)),
        (taps, images, zc),
    )
    for size, pixels in ((64, 32), (128, 16), (256, 4)):
        weights = _normal(size, 3, 3, size, size) / (3 * size**0.5)
        functions[f"constant, {size} channels at {pixels}×{pixels}"] = (
            lambda k, n=pixels: ss.lipschitz_constant(ss.Conv(k, (n, n))),
            (weights,),
        )
    calls = {}
    for name, (function, arguments) in functions.items():
        compiled = jax.jit(function)
        calls[name] = lambda f=compiled, a=arguments: f(*a)
    small, few = kernel[:32, :16], x[:4, :32]
    problem = dense(small, few)
    calls["eager call, prox_gd"] = lambda: ss.prox_gd(problem, num_iters=3, step_size=0.1)
    solver = ss.ProxGD(3, step_size=0.1)
    calls["eager call, ProxGD.solve"] = lambda: solver.solve(None, problem)
    layer = ss.nnx.SolverLinear.from_layer(
        nnx.Linear(32, 16, rngs=nnx.Rngs(0)), solver=ss.ProxGD(3), ridge=0.1
    )
    calls["eager call, SolverLinear"] = lambda: layer(few)
    wide = ss.nnx.SolverLinear.from_layer(
        nnx.Linear(512, 512, rngs=nnx.Rngs(0)),
        solver=ss.ProxSG(0.5, 10),
        ridge=1e-3,
        rngs=nnx.Rngs(dropout=1),
    )
    graph, parameters, rest = nnx.split(wide, nnx.Param, ...)

    @jax.jit
    def train(parameters, x):
        def loss(parameters):
            return jnp.mean(nnx.merge(graph, parameters, rest, copy=True)(x) ** 2)

        return jax.value_and_grad(loss)(parameters)

    calls["training step, SolverLinear 512 → 512"] = lambda: train(parameters, x)
    return calls


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Answer questions until there are no more."""
    calls, repeats = _calls(), {}
    for line in sys.stdin:
        question = json.loads(line)
        name = question.get("name")
        if question["ask"] == "names":
            answer: Any = list(calls)
        elif question["ask"] == "compile":
            answer = _seconds(calls[name], 1)
            repeats[name] = max(1, round(SECONDS / _seconds(calls[name], 1)))
        else:
            answer = _seconds(calls[name], repeats[name])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
