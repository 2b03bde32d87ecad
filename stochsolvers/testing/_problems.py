"""Small problems to put an object into, and what a certificate of one must hold."""

from typing import Any

import jax
import numpy as np
from jax import lax

from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import Prior
from stochsolvers.solvers import ProxGD
from stochsolvers.testing import _common as common


def map_between(before: tuple[int, ...], n2: int) -> LinearMap:
    """A random map of the last axis to n2 features, whose inputs have that shape."""
    n1 = before[-1]
    kernel = common.normal(11, (n1, n2)) / n1**0.5
    if len(before) == 1:
        return Dense(kernel)
    spatial: Any = (1,) * (3 - len(before)) + before[:-1]
    return Conv(kernel.reshape((1,) * len(spatial) + kernel.shape), spatial)


def small_problem(**factors: Any) -> LayerProblem:
    """Four inputs, three outputs, two examples, a bias and a ridge, unless given otherwise."""
    options = {"bias": common.normal(13, (3,)), "ridge": 0.3} | factors
    A = options.pop("linear_map", None) or map_between((4,), 3)
    inputs = options.pop("inputs", None)
    inputs = common.normal(12, (2, *A.in_shape)) if inputs is None else inputs
    return LayerProblem(A, inputs, **options)


def check_certificate(what: str, problem: LayerProblem) -> None:
    """Certificates of an early iterate and of a late one: finite, at least the gap, and small at the end.

    400 iterations with momentum at 1e-5 of the step are about the first one of that step.
    """
    step = 1 / (problem.loss.smoothness * _squared_norm(problem.linear_map) + problem.ridge)

    @jax.jit
    def solved(problem, steps):
        def solve(step):
            return ProxGD(num_iters=400, step_size=step, momentum=True).solve(None, problem).value

        def look(z):
            return problem.objective(z), problem.certificate(z), problem.gradient(z)

        return lax.map(look, jax.vmap(solve)(steps))

    steps = np.asarray(step) * np.array([1e-5, 1.0])
    seen = common.attempt(f"solution of a problem with {what}", solved, problem, steps)
    (first, best), (early, late), (_, gradient) = map(np.asarray, seen)
    common.require(np.isfinite(gradient), f"∇F of a problem with {what}", "numbers", gradient)
    common.require(np.isfinite(best), f"objective of a solution with {what}", "a number", best)
    small = 1e-9 * (1 + np.abs(best))
    expected = f"at least P(z) − min P >= {np.max(first - best):.8g}"
    at = f"certificate of a problem with {what}"
    common.require(early >= first - best - small, at, expected, early)
    common.require(np.isfinite(early), f"{at} and a ridge", "a number", early)
    common.require(late <= 1e-4 * (1 + np.abs(best)), f"{at} after 400 iterations", "about 0", late)


def _squared_norm(A: LinearMap) -> float:
    """‖A‖² of a map that takes the last axis through its kernel, at every pixel."""
    kernel: Any = A.kernel  # pyright: ignore[reportAttributeAccessIssue]
    return float(np.linalg.norm(np.asarray(kernel).reshape(kernel.shape[-2:]), 2)) ** 2


def expand_to_map(prior: Prior, shape: tuple[int, ...]) -> LayerProblem:
    """A problem whose outputs have the shape that a prior is for."""
    n1 = max(shape[-1], 2)
    A = map_between((*shape[:-1], n1), shape[-1])
    x = common.normal(12, A.in_shape)
    return LayerProblem(A, x, bias=common.normal(13, shape[-1:]), prior=prior, ridge=0.5)
