"""Gates and patterns: sampled, enumerated exactly, and kept in pairs."""

import math

import convex_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stochsolvers.convex import Patterns, enumerate_patterns, sample_patterns


def count(n, r):
    return 2 * sum(math.comb(n - 1, k) for k in range(r))


def check_pairs(X, patterns):
    """Each pattern once, with a gate that is strictly inside its cell."""
    X = np.asarray(X, float)
    heights, mask = X @ np.asarray(patterns.gates), np.asarray(patterns.mask)
    some = np.any(X != 0, axis=-1)
    assert np.all((heights > 0)[some] == mask[some])
    assert np.all(heights[some] != 0)
    assert np.all(mask[~some])
    assert len(set(oracles.strings(mask.reshape(-1, patterns.num)))) == patterns.num


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 1), (8, 2), (8, 3), (8, 5), (8, 8), (5, 9), (20, 4), (60, 3), (16, 6)]
)
def test_counts_in_general_position(rng, shape):
    X = rng.normal(size=shape)
    patterns = enumerate_patterns(X)
    assert patterns.num == count(shape[0], min(shape))
    check_pairs(X, patterns)


def degenerate(rng, case):
    integers = rng.integers(-2, 3, (9, 3)).astype(float)
    if case == "with a bias, equal and opposite rows, zeros":
        integers[:, 2] = 1
        integers[3], integers[5], integers[7] = integers[2], -2 * integers[4], 0
    elif case == "of low rank":
        return rng.normal(size=(9, 2)) @ rng.normal(size=(2, 5))
    elif case == "of four features":
        return rng.integers(-1, 2, (8, 4)).astype(float)
    elif case == "collinear points":
        return np.stack([np.arange(8.0), 2 * np.arange(8.0) - 3, np.ones(8)], axis=1)
    elif case == "of very different sizes":
        return integers * 10.0 ** rng.integers(-12, 12, (9, 1))
    return integers


CASES = (
    "integers",
    "with a bias, equal and opposite rows, zeros",
    "of low rank",
    "of four features",
    "collinear points",
    "of very different sizes",
)


@pytest.mark.parametrize("case", CASES)
def test_degenerate_data_by_linear_programs(rng, case):
    X = degenerate(rng, case)
    patterns = enumerate_patterns(X)
    check_pairs(X, patterns)
    unit = X / np.where(np.any(X, axis=1), np.linalg.norm(X, axis=1), 1)[:, None]
    assert set(oracles.strings(patterns.mask)) == oracles.brute_force_patterns(unit)


def test_more_integers_by_dense_sampling(rng):
    """Cells of integer data are wide: a hundred thousand gates find them all."""
    for _ in range(3):
        X = rng.integers(-1, 2, (12, 4)).astype(float)
        X = X[np.any(X, axis=1)]
        found = np.packbits(X @ rng.normal(size=(4, 100_000)) > 0, axis=0)
        assert enumerate_patterns(X).num == np.unique(found, axis=1).shape[1]


def test_patterns_of_patches(rng):
    X = rng.normal(size=(4, 3, 2))
    patterns = enumerate_patterns(X)
    assert patterns.num == count(12, 2)
    assert patterns.mask.shape == (4, 3, patterns.num)
    check_pairs(X, patterns)


def test_data_that_are_all_zero():
    patterns = enumerate_patterns(np.zeros((3, 2)))
    assert patterns.num == 1
    assert np.all(patterns.mask)


def test_single_precision_keeps_the_patterns(rng):
    X = rng.normal(size=(30, 3)).astype(np.float32)
    patterns = enumerate_patterns(X)
    assert patterns.gates.dtype == jnp.float32
    assert patterns.num == count(30, 3)


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "convolutional"])
def test_sampled_patterns(rng, kind):
    X = rng.normal(size=(12, 18))
    options = {"num_nonzero": 2, "image_shape": (3, 3, 2), "kernel_size": (2, 1)}
    patterns = sample_patterns(jax.random.key(0), X, 50, kind=kind, **options)
    check_pairs(X, patterns)
    assert 25 < patterns.num <= 50
    assert np.all(np.any(patterns.mask, axis=0))
    gates = np.asarray(patterns.gates)
    sizes = np.sum(gates != 0, axis=0)
    assert np.all(sizes == {"gaussian": 18, "sparse": 2, "convolutional": 4}[kind])
    if kind == "convolutional":
        windows = np.any(gates.reshape(3, 3, 2, -1) != 0, axis=2)
        assert np.all(windows.any(1).sum(0) == 2)
        assert np.all(windows.any(0).sum(0) == 1)
        assert len({tuple(w.ravel()) for w in np.moveaxis(windows, -1, 0)}) == 6
    again = sample_patterns(jax.random.key(0), X, 50, kind=kind, **options)
    assert np.array_equal(again.gates, gates)


def test_sampling_finds_each_pattern_once(rng):
    X = rng.normal(size=(5, 2))
    patterns = sample_patterns(jax.random.key(1), X, 400)
    everything = set(oracles.strings(enumerate_patterns(X).mask)) - {"00000"}
    assert set(oracles.strings(patterns.mask)) == everything
    assert patterns.num == len(everything)
    assert sample_patterns(jax.random.key(1), rng.normal(size=(5, 3, 2)), 9).mask.ndim == 3


def test_pairs_stay_together(rng):
    X = jnp.asarray(rng.normal(size=(7, 3)))
    patterns = sample_patterns(jax.random.key(0), X, 20)
    part = patterns[jnp.array([3, 1])]
    assert np.array_equal(part.gates, patterns.gates[:, [3, 1]])
    assert np.array_equal(part.mask, patterns.mask[:, [3, 1]])
    assert patterns[-1].num == patterns[2].num == 1
    assert np.array_equal(patterns[-1].gates[:, 0], patterns.gates[:, -1])
    both = part.concatenate(patterns)
    assert both.num == patterns.num + 2
    assert both.unique().num == patterns.num
    new = rng.normal(size=(4, 3))
    assert np.array_equal(patterns.apply(new).mask, new @ np.asarray(patterns.gates) >= 0)
    assert np.array_equal(patterns.apply(new).gates, patterns.gates)
    assert patterns.num_data == 7
    assert [one.num for one in patterns] == [1] * patterns.num
    # one datum that no gate is active on is no error, and patterns pass through jit
    assert not np.any(jax.jit(lambda p, x: p.apply(x).mask)(part, -100 * part.gates[:, :1].T)[0, 0])


GATES, MASK = np.ones((2, 3)), np.ones((4, 3), bool)
BAD = {
    "a gate that is not finite": lambda: Patterns(np.full((2, 3), np.nan), MASK),
    "gates that are no matrix": lambda: Patterns(np.ones(3), MASK),
    "a mask of another number of gates": lambda: Patterns(GATES, MASK[:, :2]),
    "a mask of numbers": lambda: Patterns(GATES, MASK.astype(float)),
    "a mask that is false everywhere": lambda: Patterns(GATES, ~MASK),
    "no gates": lambda: Patterns(np.ones((2, 0)), np.ones((4, 0), bool)),
    "data of other features": lambda: Patterns(GATES, MASK).apply(np.ones((4, 3))),
    "patterns of other data": lambda: Patterns(GATES, MASK).concatenate(Patterns(GATES, MASK[:2])),
    "data that are not finite": lambda: enumerate_patterns(np.full((2, 2), np.inf)),
    "integers": lambda: enumerate_patterns(np.ones((2, 2), int)),
    "no features": lambda: sample_patterns(jax.random.key(0), np.ones((3, 0)), 2),
    "too many patterns": lambda: enumerate_patterns(np.random.default_rng(0).normal(size=(60, 9))),
    "traced data": lambda: jax.jit(lambda X: enumerate_patterns(X).mask)(np.ones((2, 2))),
    "an unknown kind": lambda: sample_patterns(jax.random.key(0), GATES, 2, kind="dense"),
    "no image": lambda: sample_patterns(jax.random.key(0), GATES, 2, kind="convolutional"),
    "a window too wide": lambda: sample_patterns(
        jax.random.key(0), GATES, 2, kind="convolutional", image_shape=(3, 1), kernel_size=4
    ),
    "more entries than features": lambda: sample_patterns(
        jax.random.key(0), GATES, 2, kind="sparse", num_nonzero=4
    ),
    "only inactive gates": lambda: [
        sample_patterns(jax.random.key(k), np.ones((1, 1)), 1) for k in range(8)
    ],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    with pytest.raises(ValueError, match=r"(?s)^\S.*: expected .+, got .+\.$"):
        BAD[case]()
