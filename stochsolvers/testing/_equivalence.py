"""Equality, or equality in law, of one iteration of a solver and a plain block."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from stochsolvers import _checks
from stochsolvers.sampling import num_sampled
from stochsolvers.testing import _chance
from stochsolvers.testing import _common as common

_MOST = 512  # outcomes


def assert_equivalent(
    layer: Any,
    block: Callable[..., Any],
    inputs: Any,
    *,
    tau: int | float | None = None,
    sampled: bool = False,
    num_keys: int | None = None,
    error_probability: float = 1e-9,
    rtol: float | None = None,
    **options: Any,
) -> None:
    r"""Require that a layer (one iteration of a solver, say) is a plain block.

    | call | layer | block | compared |
    |---|---|---|---|
    | `(layer, block, x)` | x ↦ y | x ↦ y | the outputs |
    | `(layer, block, x, tau=τ)` | (key, x) ↦ y | x ↦ y, without dropout | the law, n − τ features dropped |
    | `(layer, block, x, sampled=True)` | (key, x) ↦ y | (key, x) ↦ y | the laws of both, from samples |

    With `tau` the law is enumerated: the C(n, τ) outcomes block((n/τ) m ⊙ x), one for each mask m of τ ones,
    all equally likely. Every output of the layer must be one of them, with about its frequency (χ² test).
    With `sampled` the outcomes are those seen of the block, and the layer must have them about as often.

    Args:
      layer: a function; an `nnx.Module`, called with `rngs=key` where it samples; or a pair (Linen module,
        variables), applied with `rngs={"dropout": key}`.
      block: a function, as in the table; a plain `nnx.Module` is one of x.
      inputs: x, features last; one example where a law is compared.
      tau: features that dropout keeps: a count (int) or a fraction (float).
      sampled: both sample.
      num_keys: random keys; enough for the outcomes by default.
      error_probability: with which equal laws are called different.
      rtol: relative to the largest entry; by default a small multiple of round-off.
      **options: to the layer's call, such as `deterministic=True`.

    Raises:
      AssertionError: where they differ, with the numbers.
      ValueError: for too many outcomes, 512 at most.

    References:
      Bibi et al. 2019, propositions 1, 2 and 6.
    """
    function = _as_function(layer, keyed=sampled or tau is not None, options=options)
    what = type(layer[0] if isinstance(layer, tuple) else layer).__name__
    what = getattr(layer, "__name__", what)
    inputs = jnp.asarray(inputs)
    if tau is None and not sampled:
        got = common.attempt(what, function, inputs)
        words = "the outputs of the block"
        expected = block(inputs)
        common.same_dtype(f"output of {what}", got, expected.dtype)
        common.close(f"output of {what}", got, expected, rtol=rtol, words=words)
        return
    rtol = 1e-4 if rtol is None else rtol
    if tau is not None:
        outcomes, chances = _enumerated(block, inputs, tau)
        num_keys = 40 * len(outcomes) + 1000 if num_keys is None else num_keys
    else:
        num_keys = 4096 if num_keys is None else num_keys
        outcomes = _sampled(block, inputs, num_keys, seed=1)
        _compare_samples(what, function, inputs, outcomes, error_probability, rtol)
        return
    samples = common.attempt(what, _sampled, function, inputs, num_keys, seed=0)
    where = f"output of {what}"
    _chance.same_law(where, samples, outcomes, chances, error_probability, rtol=rtol)


def _as_function(layer: Any, *, keyed: bool, options: dict[str, Any]) -> Callable[..., Any]:
    if isinstance(layer, tuple) and isinstance(layer[0], nn.Module):
        module, variables = layer
        collection = getattr(module, "rng_collection", "dropout")

        def apply(*args):
            key, x = args if keyed else (None, *args)
            rngs = {} if key is None else {collection: key}
            return module.apply(variables, x, rngs=rngs, **options)

        return apply
    if isinstance(layer, nnx.Module):
        graph, state = nnx.split(layer)

        def call(*args):
            key, x = args if keyed else (None, *args)
            rngs = {} if key is None else {"rngs": key}
            return nnx.merge(graph, state)(x, **rngs, **options)

        return call
    if not callable(layer):
        _checks.fail("layer", "a function, an nnx.Module, or (Linen module, variables)", layer)
    return lambda *args: layer(*args, **options)


def _enumerated(
    block: Callable[..., Any], inputs: jax.Array, tau: int | float
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of the block for all masks with τ ones, and their probabilities."""
    n = inputs.shape[-1]
    kept = int(num_sampled(tau, n))
    number = math.comb(n, kept)
    if number > _MOST:
        _checks.fail("number of masks", f"at most {_MOST}, with fewer features", number)
    masks = np.array(
        [[i in subset for i in range(n)] for subset in itertools.combinations(range(n), kept)]
    )
    outputs = [
        block(jnp.where(mask, inputs, 0) * jnp.asarray(n / kept, inputs.dtype)) for mask in masks
    ]
    return np.stack([np.asarray(y) for y in outputs]), np.full(number, 1 / number)


def _sampled(
    function: Callable[..., Any], inputs: jax.Array, num_keys: int, *, seed: int
) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), num_keys)
    return np.asarray(jax.jit(jax.vmap(lambda key: function(key, inputs)))(keys))


def _compare_samples(
    what: str,
    function: Callable[..., Any],
    inputs: jax.Array,
    theirs: np.ndarray,
    error_probability: float,
    rtol: float,
) -> None:
    """The two-sample χ² test: N samples of each, Σ (m_j − n_j)² / (m_j + n_j) over the outcomes."""
    number = len(theirs)
    mine = common.attempt(what, _sampled, function, inputs, number, seed=0)
    common.same_shape(f"output of {what}", mine[0], theirs.shape[1:])
    flat = theirs.reshape(number, -1).astype(np.float64)
    allowed = rtol * max(float(np.max(np.abs(flat))), 1e-30)
    first = np.unique(np.round(flat / (8 * allowed)), axis=0, return_index=True)[1]
    if len(first) > 2 * _MOST:
        _checks.fail("number of outcomes", f"at most {_MOST}, with fewer features", len(first))
    outcomes = _chance.merged(flat[first], np.ones(len(first)), allowed)[0]
    both = mine.reshape(number, -1).astype(np.float64), flat
    counts = []
    for samples in both:
        off = np.max(np.abs(samples[:, None] - outcomes[None]), axis=2)
        nearest = np.argmin(off, axis=1)
        distance = off[np.arange(number), nearest]
        i = int(np.argmax(distance))
        words = f"one of the {len(outcomes)} outcomes of the block, the nearest "
        words += f"{np.array2string(outcomes[nearest[i]], precision=6)}"
        got = np.array2string(samples[i], precision=6)
        common.require(distance <= 2 * allowed, f"output of {what}", words, got)
        counts.append(np.bincount(nearest, minlength=len(outcomes)))
    m, n = counts
    statistic, t = float(np.sum((m - n) ** 2 / (m + n))), math.log(1 / error_probability)
    degrees = len(outcomes) - 1
    bound = degrees + 2 * math.sqrt(degrees * t) + 2 * t
    worst = int(np.argmax((m - n) ** 2 / (m + n)))
    words = (
        f"that of the block, χ² <= {bound:.4g} (error probability {error_probability:g}), an outcome "
        f"with frequency {n[worst] / number:.4g}"
    )
    got = f"χ² = {statistic:.4g}, with frequency {m[worst] / number:.4g}"
    common.require(statistic <= bound, f"law of the output of {what}", words, got)
