r"""Random subsets of features: τ-nice, Bernoulli, serial and fixed-size importance samplings.

A sampling S is a random subset of {0, …, n−1} with inclusion probabilities p_i = P(i ∈ S); its mask m
has m_i = 1[i ∈ S]. Every function takes the key first, and draws independently for every entry of
`batch_shape`. Masks are boolean; none of them scales anything.
"""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, Scalar, as_float


def num_sampled(tau: int | float | Array, n: int, *, what: str = "tau") -> int | Array:
    """τ as a count in 1..n: an integer is the count itself, a float the fraction τ / n.

    A fraction is rounded to the nearest count (ties to the even one), so that dropout at rate p is
    τ = 1.0 − p (Bibi et al. 2019, proposition 1 and table 5). A traced integer passes through
    unchecked.

    Raises:
      ValueError: if the count falls outside 1..n.
    """
    n = _checks.count("n", n, minimum=0)
    if isinstance(tau, jax.Array) and isinstance(tau, jax.core.Tracer):
        if not jnp.issubdtype(tau.dtype, jnp.integer):
            _checks.fail(what, "an integer count where it is traced", tau.dtype)
        return tau
    if isinstance(tau, jax.Array | np.ndarray) and tau.ndim == 0:
        tau = tau.item() if jnp.issubdtype(tau.dtype, np.number) else tau
    if isinstance(tau, float | np.floating):
        if not 0.0 < tau <= 1.0:
            _checks.fail(what, "a fraction in (0, 1] or a count", tau)
        rounded = round(float(tau) * n)
        if rounded < 1:
            _checks.fail(what, f"a fraction that leaves at least 1 of {n} features", tau)
        return rounded
    return _checks.count(what, tau, maximum=n)


def canonical_tau(tau: Any) -> Any:
    """A known fraction as a Python float, so that it stays known where it is traced; else τ as it is.

    Raises:
      ValueError: for a known τ that no number of features has: ≤ 0, or a fraction above 1.
    """
    known = isinstance(tau, jax.Array | np.generic | np.ndarray)
    if known and not isinstance(tau, jax.core.Tracer) and jnp.ndim(tau) == 0:
        if jnp.issubdtype(jnp.result_type(tau), jnp.floating):
            tau = float(tau)
        elif isinstance(tau, np.integer):
            tau = int(tau)
    if isinstance(tau, float) and not 0.0 < tau <= 1.0:
        _checks.fail("tau", "a fraction in (0, 1] or a count", tau)
    if isinstance(tau, int) and tau < 1:
        _checks.fail("tau", "an integer >= 1 or a fraction in (0, 1]", tau)
    return tau


def tau_nice_mask(key: Array, tau: int | Array, n: int, batch_shape: tuple[int, ...] = ()) -> Array:
    r"""Mask of a τ-nice sampling: exactly τ ones, all subsets of size τ equally likely.

    The τ smallest of n random integers are kept, whose high bits are independent and whose low ⌈log₂ n⌉
    bits are their positions, so that no two are equal. Where the τ-th and the (τ+1)-th smallest differ in
    their high bits, every subset is as likely as any other by symmetry. That they agree has a probability
    of at most n 2^{⌈log₂ n⌉ − 32}, which bounds the total variation to the uniform law.

    Args:
      key: random key.
      tau: τ in 1..n, may be traced.
      n: number of features.
      batch_shape: shape of independent draws.

    Returns:
      boolean array, shape (*batch_shape, n).

    Example:
      >>> ss.sampling.tau_nice_mask(jax.random.key(0), 3, 8, (2,)).sum(axis=-1).tolist()
      [3, 3]

    References:
      Bibi et al. 2019, definition 3.1.
    """
    tau = num_sampled(tau, n)
    scores = _distinct_integers(key, (*_batch(batch_shape), n))
    return scores <= _order_statistic(scores, tau)


def _batch(batch_shape: tuple[int, ...]) -> tuple[int, ...]:
    """`batch_shape`, of which a dimension may be symbolic."""
    if not isinstance(batch_shape, tuple | list):
        _checks.fail("batch_shape", "a tuple of integers", _checks.named(batch_shape))
    for n in batch_shape:
        if isinstance(n, jax.Array) or not hasattr(n, "__jax_array__"):  # which symbolic sizes have
            _checks.count("batch_shape", n, minimum=0)
    return tuple(batch_shape)


def _order_statistic(integers: Array, rank: int | Array) -> Array:
    r"""The rank-th smallest along the last axis, t = max{u : |{i : s_i < u}| < rank}, shape (..., 1).

    Its 32 bits are found from the highest on, each by one count. A count compares single bytes: where the
    bytes before differ from those of t, they decide, and the byte becomes 0 or 255.
    """
    edge = (*integers.shape[:-1], 1)
    columns = _columns(integers)

    def append_byte(level, t):
        least = t << 8
        shifted = columns >> (24 - 8 * level).astype(jnp.uint32)
        byte = jnp.maximum(shifted, least[..., None]) - least[..., None]
        byte = jnp.minimum(byte, 255).astype(jnp.uint8)

        def add_bit(k, u):
            trial = u | (jnp.uint8(128) >> k.astype(jnp.uint8))
            return jnp.where(_count(byte < trial[..., None]) < rank, trial, u)

        low = lax.fori_loop(0, 8, add_bit, varying(jnp.zeros(edge, jnp.uint8), integers))
        return least | low.astype(jnp.uint32)

    return lax.fori_loop(0, 4, append_byte, varying(jnp.zeros(edge, jnp.uint32), integers))


def _columns(integers: Array) -> Array:
    """The last axis as at most 32 rows of 2^j columns, filled up with the largest integer.

    Of 32 columns at least, or of one: narrower ones take longer on CPU.
    """
    n = integers.shape[-1]
    width = 1 if n <= 32 else max(32, 2 ** (-(-n // 32) - 1).bit_length())
    filling = [(0, 0)] * (integers.ndim - 1) + [(0, -n % width)]
    filled = jnp.pad(integers, filling, constant_values=jnp.uint32(2**32 - 1))
    return filled.reshape(*integers.shape[:-1], -(-n // width), width)


def _count(flags: Array) -> Array:
    """How many of `_columns` are True, shape (..., 1).

    Columns are added up in bytes, then halves: several times faster on CPU than the sum of a row.
    """
    counts = jnp.sum(flags, axis=-2, dtype=jnp.uint8).astype(jnp.int32)
    while counts.shape[-1] > 1:
        half = counts.shape[-1] // 2
        counts = counts[..., :half] + counts[..., half:]
    return counts


def _distinct_integers(key: Array, shape: tuple[int, ...]) -> Array:
    """Random integers, distinct along the last axis: their low bits are their positions."""
    _checks.random_key("key", key)
    low_bits = _position_bits(shape[-1])
    bits = jax.random.bits(key, shape, jnp.uint32)
    position = lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return (bits >> low_bits << low_bits) | position


def _position_bits(n: int) -> int:
    return max(n - 1, 1).bit_length()


def tau_nice_indices(key: Array, tau: int, n: int) -> Array:
    """Indices (τ,), ascending, of the ones of `tau_nice_mask`: a subset shared by a whole batch."""
    n = _checks.count("n", n)
    tau = _checks.count("tau", tau, maximum=n)
    return jnp.nonzero(tau_nice_mask(key, tau, n), size=tau)[0]


def bernoulli_mask(
    key: Array, keep_probability: Scalar, n: int, batch_shape: tuple[int, ...] = ()
) -> Array:
    """Mask of independent coins, p_i = `keep_probability` in [0, 1]: ordinary dropout's mask."""
    _checks.random_key("key", key)
    n = _checks.count("n", n, minimum=0)
    _checks.non_negative("keep_probability", keep_probability)
    _checks.at_most("keep_probability", keep_probability, 1, "a probability")
    shape = (*_batch(batch_shape), n)
    _checks.broadcastable("keep_probability", keep_probability, shape)
    return jax.random.bernoulli(key, as_float(keep_probability), shape)


def serial_mask(key: Array, probabilities: Array) -> Array:
    """Mask of a serial sampling: exactly one feature, i with probability p_i (shape (..., n)).

    None where a probability is NaN.
    """
    _checks.random_key("key", key)
    probabilities = _features("probabilities", probabilities)
    known = ~jnp.isnan(jnp.sum(probabilities, axis=-1, keepdims=True))
    index = jax.random.categorical(key, jnp.log(probabilities), axis=-1)
    features = jnp.arange(probabilities.shape[-1])
    return known & (index[..., None] == jnp.expand_dims(features, range(index.ndim)))


def inclusion_probabilities(scores: Array, tau: int | Array) -> Array:
    r"""Inclusion probabilities of size τ proportional to scores: p_i = min(1, c s_i), Σ p_i = τ.

    Exact after one sort: with the k largest scores at their cap of 1, c = (τ − k) / Σ_{others} s.
    Scores below 1e-6 of their mean are raised to it, so that no feature is lost for ever. NaN where a score
    is NaN or infinite.

    Args:
      scores: non-negative, shape (..., n).
      tau: τ in 1..n.
    """
    scores = _features("scores", scores)
    n = scores.shape[-1]
    tau = num_sampled(tau, n)
    floor = 1e-6 * jnp.mean(scores, axis=-1, keepdims=True)
    tiny = jnp.finfo(scores.dtype).tiny
    scores = jnp.maximum(scores, jnp.maximum(floor, tiny * n))
    largest = jnp.max(scores, axis=-1, keepdims=True)
    scores = scores / largest
    descending = _descending(lax.stop_gradient(scores))
    tails = jnp.flip(jnp.cumsum(jnp.flip(descending, -1), axis=-1), -1)
    capped = jnp.expand_dims(jnp.arange(n), range(scores.ndim - 1))
    scale = (
        jnp.asarray(tau - capped, tails.dtype) / tails
    )  # c if exactly k = 0, 1, … scores are capped
    too_large = (scale * descending > 1.0) & (capped < tau)
    # the capped set is the longest prefix in which every member exceeds its share
    num_capped = jnp.sum(jnp.cumprod(too_large, axis=-1), axis=-1, keepdims=True)
    num_capped = jnp.minimum(num_capped, n - 1)
    # again as a sum over the uncapped, which has the derivative
    uncapped = scores <= jnp.take_along_axis(descending, num_capped, axis=-1)
    rest = jnp.asarray(tau - jnp.sum(~uncapped, axis=-1, keepdims=True), scores.dtype)
    share = rest / jnp.sum(jnp.where(uncapped, scores, 0.0), axis=-1, keepdims=True)
    p = jnp.where(uncapped, jnp.clip(share * scores, 0.0, 1.0), 1.0)
    return jnp.where(jnp.isfinite(largest), p, jnp.nan)


def _features(what: str, array: Array) -> Array:
    """Real floating-point numbers with an axis of at least one feature."""
    _checks.floating(what, array)
    if jnp.ndim(array) < 1 or jnp.shape(array)[-1] < 1:
        _checks.fail(f"shape of {what}", "(..., n) with n >= 1", jnp.shape(array))
    return jnp.asarray(array)


def _descending(scores: Array) -> Array:
    """Positive numbers sorted as the integers of their bits: the same order, several times faster."""
    integer = jnp.dtype(f"uint{8 * scores.dtype.itemsize}")
    ascending = jnp.sort(lax.bitcast_convert_type(scores, integer), axis=-1)
    return jnp.flip(lax.bitcast_convert_type(ascending, scores.dtype), axis=-1)


def systematic_mask(offset: Array, probabilities: Array) -> Array:
    r"""Systematic sampling: i ∈ S iff an integer lies in [c_{i−1} − u, c_i − u), c = cumsum(p).

    For u uniform on [0, 1) the inclusion probabilities are p_i, and |S| = Σ p_i whenever that sum is
    an integer (Madow 1949), up to the round-off of the cumulative sum. Features with p_i = 1 are
    always in, and do not enter the sum. Where a p or the u is NaN, none is in.

    Args:
      offset: u, shape (...,).
      probabilities: p, shape (..., n), entries in [0, 1].
    """
    probabilities = _features("probabilities", probabilities)
    _checks.floating("offset", offset)
    if jnp.shape(offset) != probabilities.shape[:-1]:
        _checks.fail("shape of offset", probabilities.shape[:-1], jnp.shape(offset))
    known = ~jnp.isnan(jnp.sum(probabilities, axis=-1) + offset)[..., None]
    certain = probabilities >= 1.0
    shared = jnp.where(certain, 0.0, probabilities)
    total = jnp.round(jnp.sum(shared, axis=-1, keepdims=True))
    ends = jnp.cumsum(shared, axis=-1)
    # the last edge is an integer in exact arithmetic: make it one, so that |S| is exact as well
    ends = jnp.minimum(ends, total).at[..., -1].set(total[..., 0])
    # ⌈c − u⌉ without the subtraction, which for u next to 1 would round to the integer below
    whole = jnp.floor(ends)
    counts = whole + (ends - whole > offset[..., None]).astype(whole.dtype)
    return known & (certain | (jnp.diff(counts, axis=-1, prepend=0.0) > 0.5))


def fixed_size_mask(key: Array, probabilities: Array) -> Array:
    """Mask with |S| = Σ p_i and inclusion probabilities p_i: systematic in a random order."""
    _checks.random_key("key", key)
    probabilities = _features("probabilities", probabilities)
    order_key, offset_key = jax.random.split(key)
    shape = probabilities.shape
    # sorting plain integers that carry their positions is several times faster than `argsort`
    places = jnp.uint32(2 ** _position_bits(shape[-1]) - 1)
    order = (jnp.sort(_distinct_integers(order_key, shape), axis=-1) & places).astype(jnp.int32)
    offset = jax.random.uniform(offset_key, shape[:-1], probabilities.dtype)
    mask = systematic_mask(offset, jnp.take_along_axis(probabilities, order, axis=-1))
    place = functools.partial(_scattered, shape[-1])
    for _ in shape[:-1]:  # `jnp.put_along_axis`, for batches of symbolic size too
        place = jax.vmap(place)
    return place(order, mask)


def _scattered(n: int, places: Array, values: Array) -> Array:
    """The array of length n with the values at their places, and False elsewhere."""
    return jnp.zeros(n, bool).at[places].set(values)
