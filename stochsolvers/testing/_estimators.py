"""The contract of an estimator of ∇F."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers._typing import Array
from stochsolvers.estimators import Estimator
from stochsolvers.problems import LayerProblem
from stochsolvers.testing import _chance
from stochsolvers.testing import _common as common


def check_estimator(
    estimator: Estimator,
    problem: LayerProblem,
    *,
    law: tuple[Any, Any] | None = None,
    num_keys: int = 4096,
    error_probability: float = 1e-9,
) -> None:
    r"""Hold an estimator to its contract, on a small problem.

    - E[∇Ψ(z)] = ∇F(z): exactly where the law of the draws is given; else by the mean over keys, within the
      empirical Bernstein bound, with the range that was seen;
    - E‖∇Ψ(z) − ∇Ψ(y)‖² ≤ 2 𝓛 (F(z) − F(y) − <∇F(y), z − y>) at random pairs, 𝓛 its `expected_smoothness`,
      if it has one (a ValueError says that it has none);
    - every example has a draw of its own (not if it has an attribute `shared` that is true);
    - `prepare(problem)` gives the same estimates, the same key gives the same, `vmap` over keys is a loop;
    - draws, if a law is given, are its outcomes, with its frequencies (χ²);
    - a path of problems and numbers compiles once.

    Args:
      estimator: the estimator.
      problem: a problem of a few features; a batch of two or more examples shows more.
      law: all draws of one example, stacked, and their probabilities, at the points where the problem is
        asked; for estimators whose draws do not depend on z.
      num_keys: random draws.
      error_probability: of a right estimator that is called biased, or of a right law.

    Raises:
      AssertionError: in words, with the numbers.

    References:
      Maurer and Pontil 2009, Empirical Bernstein bounds, theorem 4.
    """
    name = type(estimator).__name__
    kind = isinstance(estimator, Estimator)
    common.require(kind, name, "an Estimator", repr(estimator))
    common.passes_as_a_value(name, estimator)
    with common.float64():
        estimator = common.cast(estimator, jnp.float64)
        problem = common.cast(problem, jnp.float64)
        seen = _evaluate(name, estimator, problem, num_keys)
        _check_consistency(name, estimator, problem, seen)
        _check_mean(name, problem, seen, error_probability)
        _check_examples(name, estimator, problem, seen)
        if law is not None:
            _check_law(name, estimator, problem, law, num_keys, error_probability)
        _check_smoothness(name, seen)


class _Seen(NamedTuple):
    """Estimates of ∇F at z and y for many keys, and what they are compared with."""

    keys: Array
    z: Array
    estimates: np.ndarray  # (keys, *batch, …)
    moved: np.ndarray  # their differences for the same draw at y
    gradient: np.ndarray
    bregman: np.ndarray
    smoothness: np.ndarray | None


def _evaluate(name: str, estimator: Estimator, problem: LayerProblem, num_keys: int) -> _Seen:
    z, y = (common.normal(seed, problem.shape) for seed in (1, 2))
    keys = jax.random.split(jax.random.key(0), num_keys)
    shape = jax.eval_shape(lambda: estimator(keys[0], problem, z))
    common.same_shape(f"{name}(key, problem, z)", shape, problem.shape)
    common.same_dtype(f"{name}(key, problem, z)", shape, problem.dtype)
    smooth = _has_smoothness(name, estimator, problem)

    def evaluate(estimator, problem, keys):
        def one(key):
            draw = estimator.draw(key, problem, z)
            at = estimator.gradient(problem, z, draw)
            return at, at - estimator.gradient(problem, y, draw)

        gradient = problem.gradient(y)
        bregman = problem.smooth(z) - problem.smooth(y) - problem.sum(gradient * (z - y))
        constant = estimator.expected_smoothness(problem) if smooth else None
        return *jax.vmap(one)(keys), problem.gradient(z), bregman, constant

    path = [(common.scaled(estimator, f), common.scaled(problem, f), keys) for f in (1.0, 0.9)]
    *results, constant = common.traced_once(name, evaluate, path)[0]
    constant = None if constant is None else np.asarray(constant)
    estimates, moved, gradient, bregman = map(np.asarray, results)
    return _Seen(keys, z, estimates, moved, gradient, bregman, constant)


def _has_smoothness(name: str, estimator: Estimator, problem: LayerProblem) -> bool:
    try:
        jax.eval_shape(estimator.expected_smoothness, problem)
    except ValueError:
        return False
    except Exception as error:
        common.broke(f"{name}.expected_smoothness", "a constant or ValueError", f"{error!r}")
    return True


def _check_consistency(name: str, estimator: Estimator, problem: LayerProblem, seen: _Seen) -> None:
    words = "that of jit and vmap"

    @jax.jit
    def prepared(key):
        ready = estimator.prepare(problem)
        return ready.gradient(problem, seen.z, ready.draw(key, problem, seen.z))

    for i in (0, 1):
        got = common.attempt(name, estimator, seen.keys[i], problem, seen.z)
        common.close(f"{name}(key, problem, z) without jit", got, seen.estimates[i], words=words)
        what = f"{name}.prepare(problem)"
        got = common.attempt(what, prepared, seen.keys[i])
        common.close(what, got, seen.estimates[i], words="the same estimates")


def _check_mean(name: str, problem: LayerProblem, seen: _Seen, probability: float) -> None:
    count = len(seen.estimates)
    flat = seen.estimates.reshape(count, -1)
    gradient = seen.gradient.ravel()
    mean, spread = flat.mean(axis=0), np.ptp(flat, axis=0)
    tail = math.log(4 * flat.shape[1] / probability)
    bound = np.sqrt(2 * flat.var(axis=0, ddof=1) * tail / count)
    bound += 7 * spread * tail / (3 * (count - 1)) + 1e-10 * (1 + np.abs(gradient))
    off = np.abs(mean - gradient)
    at = np.argmax(off - bound)
    words = f"∇F(z) = {gradient[at]:.6g} within {bound[at]:.2g} (E[∇Ψ(z)] = ∇F(z))"
    what = f"mean of {name} over {count} keys"
    common.require(off <= bound, what, words, f"{mean[at]:.6g} in entry {at}")


def _check_examples(name: str, estimator: Estimator, problem: LayerProblem, seen: _Seen) -> None:
    """Two examples that are alike get different estimates for some key, if anything is random."""
    batch = problem.batch_shape
    if math.prod(batch) < 2 or getattr(estimator, "shared", False):
        return
    if np.ptp(seen.estimates, axis=0).max() <= 1e-12 * np.abs(seen.estimates).max():
        return  # nothing is sampled
    event = problem.inputs.shape[len(batch) :]
    first = problem.inputs.reshape(-1, *event)[0]
    same = LayerProblem(
        problem.linear_map, jnp.broadcast_to(first, problem.inputs.shape), loss=problem.loss
    )
    z = jnp.broadcast_to(seen.z.reshape(-1, *problem.shape[len(batch) :])[0], problem.shape)
    function = jax.jit(jax.vmap(lambda key: estimator(key, same, z)))
    rows = np.asarray(function(seen.keys[:64])).reshape(64, math.prod(batch), -1)
    differ = np.any(np.abs(rows[:, 1:] - rows[:, :1]) > 1e-9, axis=(0, 2))
    words = "a draw for each example (or an attribute shared = True)"
    got = "the same estimates for two equal examples under 64 keys"
    common.require(differ, f"draws of {name}", words, got)


def _check_law(
    name: str,
    estimator: Estimator,
    problem: LayerProblem,
    law: tuple[Any, Any],
    num_keys: int,
    probability: float,
) -> None:
    draws, chances = np.asarray(law[0]), np.asarray(law[1], np.float64)
    batch = problem.batch_shape
    event = problem.inputs.shape[len(batch) :]
    A, x = problem.linear_map, problem.inputs.reshape(-1, *event)[0]
    one = LayerProblem(A, x, loss=problem.loss, ridge=problem.ridge)
    z = common.normal(4, one.shape)
    estimates = jax.jit(jax.vmap(lambda draw: estimator.gradient(one, z, draw)))
    mean = np.tensordot(chances, np.asarray(estimates(jnp.asarray(draws))), axes=1)
    words = "∇F(z), exactly over the law of the draws"
    common.close(f"mean of {name}", mean, one.gradient(z), rtol=1e-8, words=words)
    keys = jax.random.split(jax.random.key(1), num_keys)
    drawn = jax.jit(jax.vmap(lambda key: estimator.draw(key, one, z)))(keys)
    what = f"draws of {name}"
    _chance.same_law(what, np.asarray(drawn), draws, chances, probability)


def _check_smoothness(name: str, seen: _Seen) -> None:
    if seen.smoothness is None:
        return
    batch = seen.bregman.ndim
    axes = tuple(range(1 + batch, seen.moved.ndim))
    squares = np.sum(seen.moved**2, axis=axes)
    count = len(squares)
    error = 6 * squares.std(axis=0) / math.sqrt(count)
    bound = 2 * seen.smoothness * seen.bregman
    what = f"{name}.expected_smoothness"
    common.require(np.isfinite(seen.smoothness), what, "a number", seen.smoothness)
    excess = np.atleast_1d(squares.mean(axis=0) - error - bound)
    at = np.argmax(excess)
    mean = np.ravel(squares.mean(axis=0))[at]
    least = mean / (2 * np.ravel(seen.bregman)[at])
    words = f"𝓛 >= {least:.6g}, from E‖∇Ψ(z) − ∇Ψ(y)‖² = {mean:.6g} at two points"
    common.require(excess <= 1e-9 * (1 + mean), what, words, f"{float(seen.smoothness):.6g}")
