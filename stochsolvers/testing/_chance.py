"""Whether random arrays have a given discrete law: every one an outcome, with its frequency."""

import math

import numpy as np

from stochsolvers.testing import _common as common


def same_law(
    what: str,
    samples: np.ndarray,
    outcomes: np.ndarray,
    chances: np.ndarray,
    error_probability: float,
    *,
    rtol: float = 1e-5,
) -> None:
    r"""Require that every sample is one of the outcomes, and that the frequencies are about right.

    With N samples, Σ (n_j − N p_j)² / (N p_j) has about the law χ² with k = outcomes − 1 degrees, which is
    above k + 2 √(k t) + 2 t with probability at most e^{−t}. Outcomes that coincide are one.

    Args:
      what: named in errors.
      samples: shape (N, …).
      outcomes: shape (M, …).
      chances: their probabilities, shape (M,).
      error_probability: e^{−t}.
      rtol: within which arrays are equal, relative to the largest entry.

    References:
      Laurent and Massart 2000, lemma 1.
    """
    shape, outcomes = outcomes.shape[1:], outcomes.reshape(len(outcomes), -1).astype(np.float64)
    common.same_shape(what, samples[0], shape)
    samples = samples.reshape(len(samples), -1).astype(np.float64)
    allowed = rtol * max(float(np.max(np.abs(outcomes), initial=0.0)), 1e-30)
    outcomes, chances = merged(outcomes, chances, allowed)
    off = np.max(np.abs(samples[:, None] - outcomes[None]), axis=2, initial=0.0)
    nearest = np.argmin(off, axis=1)
    distance = off[np.arange(len(off)), nearest]
    i = int(np.argmax(distance))
    words = f"one of its {len(outcomes)} outcomes, the nearest {_show(outcomes[nearest[i]])}"
    common.require(distance <= allowed, what, words, _show(samples[i]))
    counts = np.bincount(nearest, minlength=len(outcomes))
    expected = len(samples) * chances
    few = (
        f"at least {math.ceil(5 / chances.min())} keys for outcomes as rare as {chances.min():.2g}"
    )
    common.require(expected >= 5, f"number of keys for {what}", few, len(samples))
    statistic = float(np.sum((counts - expected) ** 2 / expected))
    degrees, t = len(outcomes) - 1, math.log(1 / error_probability)
    bound = degrees + 2 * math.sqrt(degrees * t) + 2 * t
    worst = int(np.argmax(np.abs(counts - expected) / np.sqrt(expected)))
    words = (
        f"a χ² of at most {bound:.4g} (error probability {error_probability:g}), the outcome "
        f"{_show(outcomes[worst])} with frequency {chances[worst]:.4g}"
    )
    got = f"{statistic:.4g}, with frequency {counts[worst] / len(samples):.4g}"
    common.require(statistic <= bound, f"law of {what}", words, got)


def merged(
    outcomes: np.ndarray, chances: np.ndarray, allowed: float
) -> tuple[np.ndarray, np.ndarray]:
    """The different ones among the outcomes, with the sums of their probabilities."""
    kept: list[int] = []
    totals: list[float] = []
    for i, outcome in enumerate(outcomes):
        near = [
            j
            for j, k in enumerate(kept)
            if np.max(np.abs(outcome - outcomes[k]), initial=0.0) <= allowed
        ]
        if near:
            totals[near[0]] += float(chances[i])
        else:
            kept.append(i)
            totals.append(float(chances[i]))
    return outcomes[kept], np.array(totals)


def _show(array: np.ndarray) -> str:
    few = ", ".join(f"{x:.6g}" for x in array[:6])
    return f"({few}{', …' if array.size > 6 else ''})"
