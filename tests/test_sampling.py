"""Samplings: exact counts, uniformity over subsets, exact inclusion probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from stochsolvers import sampling

KEY = jax.random.key(7)
# a test at fixed keys either passes for ever or not: this level only has to be credible
SIGNIFICANCE = 1e-4


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 37, 64])
def test_tau_nice_has_exactly_tau_ones(n):
    draws = jax.jit(lambda key, tau: sampling.tau_nice_mask(key, tau, n, (50,)))
    for tau in range(1, n + 1):
        mask = draws(jax.random.fold_in(KEY, tau), tau)
        assert mask.dtype == bool
        assert mask.shape == (50, n)
        np.testing.assert_array_equal(np.sum(mask, axis=-1), tau)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_tau_nice_batches(batch):
    mask = sampling.tau_nice_mask(KEY, 2, 5, batch)
    assert mask.shape == (*batch, 5)
    np.testing.assert_array_equal(np.sum(mask, axis=-1), np.full(batch, 2))
    np.testing.assert_array_equal(sampling.tau_nice_mask(KEY, 0.4, 5, batch), mask)


@pytest.mark.optimized
def test_tau_nice_at_a_wide_layer():
    mask = sampling.tau_nice_mask(KEY, 2048, 4096, (64,))
    np.testing.assert_array_equal(np.sum(mask, axis=-1), 2048)


@pytest.mark.parametrize("bits", [0, 2**32 - 1])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_tau_nice_counts_exactly_even_if_all_random_integers_are_equal(n, bits, monkeypatch):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, bits, dtype))
    for tau in range(1, n + 1):
        assert np.sum(sampling.tau_nice_mask(KEY, tau, n)) == tau


@pytest.mark.parametrize("n", [1, 2, 31, 33, 100, 255, 256, 257, 1025, 3000])
def test_tau_nice_keeps_the_smallest_scores(n, monkeypatch):
    """Against sorting: random high bits, equal ones, clusters, and the ends of the range."""
    rng = np.random.default_rng(n)
    bits = rng.integers(0, 2**32, (7, n), dtype=np.uint32)
    bits[1] >>= 8
    bits[2] |= 0xFFFFFF00
    bits[3] = 0x7FFFFFFF + (bits[3] & 0x100FF)
    bits[4] = np.where(bits[4] & 1, 0, 2**32 - 1)
    bits[5] = np.sort(bits[5])[::-1]
    bits[6] = 0x01000000
    low_bits = max(n - 1, 1).bit_length()
    scores = (bits >> low_bits << low_bits) | np.arange(n, dtype=np.uint32)
    rank = np.argsort(np.argsort(scores, axis=-1), axis=-1)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(bits, dtype))
    draws = jax.jit(jax.vmap(lambda tau: sampling.tau_nice_mask(KEY, tau, n, (7,))))
    taus = np.unique(np.clip([1, 2, n // 10, n // 2, n - 1, n], 1, n))
    for tau, mask in zip(taus, draws(taus), strict=True):
        np.testing.assert_array_equal(mask, rank < tau)


def subset_codes(masks):
    """The number of each subset among all subsets of its size."""
    masks = np.asarray(masks)
    n, tau = masks.shape[-1], int(masks[(0,) * (masks.ndim - 1)].sum())
    subsets = list(itertools.combinations(range(n), tau))
    code = np.full(2**n, -1)
    for number, subset in enumerate(subsets):
        code[sum(2**i for i in subset)] = number
    return code[masks @ 2 ** np.arange(n)], len(subsets)


def p_value(counts, probabilities=None):
    counts = np.asarray(counts)
    expected = None if probabilities is None else np.asarray(probabilities) * counts.sum()
    return scipy.stats.chisquare(counts, expected).pvalue


@pytest.mark.parametrize(("n", "tau"), [(5, 2), (6, 5), (4, 1)])
def test_tau_nice_is_uniform_over_all_subsets(n, tau):
    codes, number = subset_codes(sampling.tau_nice_mask(KEY, tau, n, (20000,)))
    assert p_value(np.bincount(codes, minlength=number)) > SIGNIFICANCE


def test_tau_nice_draws_are_independent_between_examples():
    codes, number = subset_codes(sampling.tau_nice_mask(KEY, 2, 5, (20000, 2)))
    pairs = np.bincount(codes[:, 0] * number + codes[:, 1], minlength=number**2)
    assert p_value(pairs) > SIGNIFICANCE
    # and along the first batch axis: every example and its successor
    pairs = np.bincount(codes[:-1, 0] * number + codes[1:, 0], minlength=number**2)
    assert p_value(pairs) > SIGNIFICANCE


def test_tau_nice_draws_are_independent_between_folded_keys():
    keys = jax.vmap(lambda k: jax.random.fold_in(KEY, k))(jnp.arange(20000))
    codes, number = subset_codes(jax.vmap(lambda key: sampling.tau_nice_mask(key, 2, 5))(keys))
    assert p_value(np.bincount(codes, minlength=number)) > SIGNIFICANCE
    pairs = np.bincount(codes[:-1] * number + codes[1:], minlength=number**2)
    assert p_value(pairs) > SIGNIFICANCE


def test_tau_nice_compiles_once_for_all_tau():
    traces = []

    @jax.jit
    def draw(key, tau):
        traces.append(tau)
        return sampling.tau_nice_mask(key, tau, 6, (4,))

    for tau in range(1, 7):
        mask = draw(KEY, jnp.asarray(tau))
        np.testing.assert_array_equal(mask, sampling.tau_nice_mask(KEY, tau, 6, (4,)))
    assert len(traces) == 1


def test_tau_nice_subsets_grow_with_tau_for_one_key():
    """The τ smallest of the same scores: a smaller subset lies inside a larger one."""
    masks = np.stack([sampling.tau_nice_mask(KEY, tau, 6, (4,)) for tau in range(1, 7)])
    assert np.all(masks[1:] >= masks[:-1])


def test_tau_nice_indices_are_a_uniform_subset():
    keys = jax.random.split(KEY, 20000)
    indices = np.asarray(jax.vmap(lambda key: sampling.tau_nice_indices(key, 2, 5))(keys))
    assert indices.shape == (20000, 2)
    masks = np.any(indices[:, :, None] == np.arange(5), axis=1)
    np.testing.assert_array_equal(masks.sum(axis=-1), 2)
    codes, number = subset_codes(masks)
    assert p_value(np.bincount(codes, minlength=number)) > SIGNIFICANCE


@pytest.mark.parametrize(
    ("tau", "n", "expected"),
    [
        (1, 5, 1),
        (5, 5, 5),
        (np.int64(3), 5, 3),
        (jnp.asarray(3), 5, 3),
        (np.asarray(2), 5, 2),
        (1.0, 5, 5),
        (0.5, 120, 60),
        (np.float32(0.5), 84, 42),
        (1, 1, 1),
        # Bibi et al. 2019, table 5: dropout rates of a layer with 512 inputs
        (1.0 - 0.0, 512, 512),
        (1.0 - 0.1, 512, 461),
        (1.0 - 0.5, 512, 256),
        (1.0 - 0.9, 512, 51),
        (1.0 - 0.95, 512, 26),
    ],
)
def test_num_sampled(tau, n, expected):
    number = sampling.num_sampled(tau, n)
    assert number == expected
    assert isinstance(number, int)


@pytest.mark.parametrize(
    "tau", [0, -1, 6, 0.0, -0.5, 1.5, float("nan"), 0.05, True, "x", None, jnp.asarray(9)]
)
def test_num_sampled_refuses(tau):
    with pytest.raises(ValueError, match="tau: expected"):
        sampling.num_sampled(tau, 5)
    with pytest.raises(ValueError, match="share: expected"):
        sampling.num_sampled(tau, 5, what="share")


def test_a_traced_fraction_is_refused():
    with pytest.raises(ValueError, match="integer count where it is traced"):
        jax.eval_shape(lambda tau: sampling.num_sampled(tau, 5), jnp.asarray(0.5))


@pytest.mark.parametrize("tau", [0, 6, 1.5])
def test_samplings_refuse_counts_out_of_range(tau):
    with pytest.raises(ValueError, match="tau"):
        sampling.tau_nice_mask(KEY, tau, 5)
    with pytest.raises(ValueError, match="tau"):
        sampling.tau_nice_indices(KEY, tau, 5)


def test_bernoulli_is_independent_coins():
    mask = np.asarray(sampling.bernoulli_mask(KEY, 0.3, 3, (20000,)))
    assert mask.shape == (20000, 3)
    law = [0.3 ** bin(code).count("1") * 0.7 ** (3 - bin(code).count("1")) for code in range(8)]
    counts = np.bincount(mask @ [1, 2, 4], minlength=8)
    assert p_value(counts, law) > SIGNIFICANCE


def test_serial_is_one_feature_with_its_probability():
    probabilities = np.array([[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]])
    mask = np.asarray(
        sampling.serial_mask(KEY, jnp.broadcast_to(jnp.asarray(probabilities), (20000, 2, 3)))
    )
    np.testing.assert_array_equal(mask.sum(axis=-1), 1)
    counts = mask.sum(axis=0)
    assert p_value(counts[0], probabilities[0]) > SIGNIFICANCE
    assert p_value(counts[1, :2], probabilities[1, :2]) > SIGNIFICANCE
    assert counts[1, 2] == 0
    joint = np.einsum("si,sj->ij", mask[:, 0], mask[:, 1])[:, :2]
    law = np.outer(probabilities[0], probabilities[1, :2])
    assert p_value(joint.ravel(), law.ravel()) > SIGNIFICANCE


def by_bisection(scores, tau):
    """min(1, c s_i) with c such that they sum to τ."""
    scores = scores / scores.max()
    low, high = 0.0, 2 * tau / scores.min()
    for _ in range(300):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if np.minimum(1, middle * scores).sum() > tau else (middle, high)
    return np.minimum(1, high * scores)


scores = st.lists(st.floats(1e-3, 1e3) | st.sampled_from([1.0, 2.0]), min_size=6, max_size=6)
inclusion = jax.jit(sampling.inclusion_probabilities)


@given(scores, st.integers(1, 6))
def test_inclusion_probabilities(scores, tau):
    scores = np.array(scores)
    p = np.asarray(inclusion(jnp.asarray(scores), tau))
    np.testing.assert_allclose(p.sum(), tau, rtol=1e-12)
    assert np.all((p > 0) & (p <= 1))
    np.testing.assert_allclose(p, by_bisection(scores, tau), rtol=1e-10)
    ratio = (p / scores)[p < 1 - 1e-12]
    if len(ratio):
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)
        assert np.all(scores[p >= 1] >= scores[p < 1].max() * (1 - 1e-12))


@pytest.mark.optimized
@given(st.lists(scores, min_size=2, max_size=2), st.integers(1, 6))
def test_inclusion_probabilities_in_single_precision(scores, tau):
    p = inclusion(jnp.asarray(scores, jnp.float32), tau)
    assert p.dtype == jnp.float32
    assert p.shape == (2, 6)
    np.testing.assert_allclose(np.sum(p, axis=-1), tau, rtol=1e-5)
    expected = [by_bisection(np.array(row), tau) for row in scores]
    np.testing.assert_allclose(p, expected, rtol=1e-4)


def test_inclusion_probabilities_of_zero_scores():
    p = np.asarray(inclusion(jnp.array([[0.0] * 6, [0, 0, 0, 1.0, 2.0, 1.0]]), 4))
    np.testing.assert_allclose(p[0], 4 / 6, rtol=1e-12)  # nothing known: uniform
    np.testing.assert_allclose(p[1], [1 / 3] * 3 + [1] * 3, rtol=1e-12)
    p = np.asarray(inclusion(jnp.array([0.0, 0, 0, 1.0, 2.0, 1.0]), 1))
    assert np.all(p > 0)
    np.testing.assert_allclose(p, [0, 0, 0, 0.25, 0.5, 0.25], atol=1e-5)


def exact_inclusion(probabilities):
    """∫ 1[i ∈ S(u)] du over [0, 1): the mask is constant between the breakpoints of u."""
    edges = np.concatenate([[0, 1], np.cumsum(probabilities) % 1])
    edges = np.unique(np.clip(edges, 0, 1))
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    masks = sampling.systematic_mask(
        jnp.asarray(middles), jnp.broadcast_to(jnp.asarray(probabilities), (len(middles), 6))
    )
    return np.asarray(masks), lengths


@pytest.mark.optimized
@given(scores, st.integers(1, 6), st.permutations(range(6)))
def test_systematic_sampling_is_exact(scores, tau, order):
    p = by_bisection(np.array(scores), tau)[list(order)]
    masks, lengths = exact_inclusion(p)
    np.testing.assert_allclose(lengths @ masks, p, atol=1e-12)
    long = lengths > 1e-12  # shorter pieces are round-off in the edges themselves
    np.testing.assert_array_equal(masks[long].sum(axis=-1), tau)


@pytest.mark.optimized
@pytest.mark.parametrize("offset", [0.0, 0.5, 1 - 2**-53])
def test_systematic_sampling_at_the_ends_of_the_interval(offset):
    for p in ([0.5, 0.5, 0.5, 0.5], [1.0, 0.25, 0.75, 0.0], [1.0, 1.0, 1.0, 1.0]):
        mask = sampling.systematic_mask(jnp.asarray(offset), jnp.asarray(p))
        assert np.sum(mask) == np.sum(p)
        assert np.all(np.asarray(mask) <= (np.asarray(p) > 0))
        assert np.all(np.asarray(mask) >= (np.asarray(p) == 1))


def test_fixed_size_sampling():
    p = np.array([1.0, 0.9, 0.6, 0.3, 0.15, 0.05])
    masks = np.asarray(sampling.fixed_size_mask(KEY, jnp.broadcast_to(jnp.asarray(p), (20000, 6))))
    np.testing.assert_array_equal(masks.sum(axis=-1), 3)
    deviation = np.abs(masks.mean(axis=0) - p)
    assert np.all(deviation <= 4 * np.sqrt(p * (1 - p) / 20000))
    assert len(np.unique(masks, axis=0)) >= 8  # in a random order: not only adjacent ones skip
    single = sampling.fixed_size_mask(KEY, jnp.asarray(p))
    assert single.shape == (6,)
    assert np.sum(single) == 3


@pytest.mark.optimized
def test_fixed_size_sampling_counts_in_single_precision(rng):
    raw = jnp.asarray(rng.exponential(size=(500, 120)) ** 3, jnp.float32)
    masks = jax.jit(sampling.fixed_size_mask)(KEY, inclusion(raw, 60))
    np.testing.assert_array_equal(np.sum(masks, axis=-1), 60)
