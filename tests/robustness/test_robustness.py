"""Every public name is in the registry, and refuses wrong kinds of arguments in the library's wording.

`sweep.py` has all the hostile values; these are the cases that need no compilation.
"""

import cases
import entries
import entries_networks
import hostile
import jax.numpy as jnp
import pytest
import verdicts

import stochsolvers as ss

WRONG = ("a string", "a random key")
"""Of every argument, traced and not computed."""

HOSTILE = (
    ("sampling.bernoulli_mask", "keep_probability", "an integer"),
    ("step_sizes.ExponentialDecay", "rate", "an integer"),
    ("dropout.importance_dropout", "x", "1e30"),
    ("solvers.FixedPoint", "init", "-1e30"),
    ("equilibrium.normalized of a kernel", "kernel", "-1e30"),
    ("lipschitz.clip_singular_values of a kernel", "bound", "1e-30"),
    ("optax.project_spectral_norm", "gradient", "inf"),
    ("convex.Network", "X", "NaN everywhere"),
    ("convex.GatedNetwork", "gates", "NaN"),
    ("convex.GatedNetwork", "X", "NaN"),
    ("convex.to_linen", "value", "1e30"),
    ("convex.recover", "value", "1e-30 everywhere"),
    ("convex.decompose", "V", "inf"),
    ("convex.prune", "X", "zero everywhere"),
    ("convex.prune of weights", "hidden", "NaN"),
    ("convex.from_network of weights", "hidden", "NaN"),
)
"""Entries, arguments and numbers of which something was wrong, and quick to compute."""

ROOMS = sorted({name.partition(".")[0] for name in cases.ENTRIES})


def test_the_registry_is_complete():
    """A public name has an entry in `entries_*.py`, or is among those that take no arguments of a user's."""
    known = set(cases.ENTRIES) | entries.BASES | entries.RECORDS | entries_networks.INTERNAL
    names: dict[int, list[str]] = {}
    for name, member in entries.public_names():
        names.setdefault(id(member), []).append(name)
    missing = [same for same in names.values() if not known & set(same)]
    assert not missing, f"add {missing} to tests/robustness/entries_*.py"
    public = {name for same in names.values() for name in same}
    stale = {name for name in known if name not in public and not set(" *") & set(name)}
    assert not stale


@pytest.mark.parametrize("room", ROOMS)
def test_wrong_kinds_are_refused_in_one_wording(room):
    found = []
    for name, entry in cases.ENTRIES.items():
        if name.partition(".")[0] != room:
            continue
        arguments = entry.arguments(hostile.Sizes())
        for argument, (_, kind, _) in arguments.items():
            for wrong in (w for w in WRONG if w in hostile.WRONG_KINDS[kind]):
                outcome = cases.of_wrong_kind(
                    entry, argument, wrong, abstract=True, arguments=arguments
                )
                if outcome.is_defect:
                    found.append((name, argument, wrong, *outcome))
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize(("entry", "argument", "which"), HOSTILE)
def test_hostile_numbers(entry, argument, which):
    of = cases.ENTRIES[entry]
    changes = {name: change for arg, name, change in cases.numbers(of) if arg == argument}
    outcome = cases.of_numbers(of, changes[which])
    assert not outcome.is_defect, outcome


def test_singular_vectors_of_what_is_infinite():
    """LAPACK's decomposition of such a matrix does not return."""
    matrices = jnp.ones((2, 3, 2)).at[0, 1, 1].set(jnp.inf)
    found = ss.prox.NuclearNorm(0.1).prox(matrices, 1.0)
    assert jnp.all(jnp.isnan(found[0]))
    assert jnp.all(jnp.isfinite(found[1]))


def test_norms_beyond_the_range_of_their_squares():
    small, large = jnp.float32(1e-30), jnp.float32(1e30)
    for scale in (small, large):
        A = ss.Dense(scale * jnp.eye(3, 2, dtype=jnp.float32))
        lower, upper = ss.lipschitz.spectral_norm_bracket(A)
        assert 0.999 * scale < lower <= scale <= upper < 1.001 * scale
    A = ss.Dense(jnp.diag(jnp.float32([1.0, 1e30])))
    L = ss.lipschitz.feature_lipschitz_constants(A)
    assert jnp.allclose(L[0], 2.0)
    assert jnp.isinf(L[1])


def test_counts_are_no_fractions():
    for entry, argument in (("solvers.ProxGD", "num_iters"), ("convex.ConeADMM", "max_iters")):
        for wrong in ("a fraction", "True", "minus one", "NaN"):
            outcome = cases.of_wrong_kind(cases.ENTRIES[entry], argument, wrong)
            assert outcome.verdict == "clear error", outcome


def test_what_underflows_is_refused():
    """XLA takes numbers below the smallest normal one for zero."""
    v = jnp.ones(3, jnp.float32)
    for make in (
        lambda: ss.prox.L1(1e-42).prox(v, 1.0),
        lambda: ss.prox.L1().prox(v, 1e-42),
        lambda: (1e-42 * ss.prox.Tanh()).prox(v, 1.0),
        lambda: ss.prox.LeakyReLU(1e-42).prox(v, 1e39),
    ):
        with pytest.raises(ValueError, match=verdicts.WORDING):
            make()
    assert ss.prox.L1(1e-42).prox(jnp.ones(3), 1.0).dtype == jnp.float64


def test_nan_scores_are_not_lost():
    scores = jnp.float32([[1.0, 2.0, jnp.nan], [1.0, 2.0, 3.0]])
    p = ss.sampling.inclusion_probabilities(scores, 1)
    assert jnp.all(jnp.isnan(p[0]))
    assert jnp.allclose(jnp.sum(p[1]), 1)
    drawn = jnp.sum(ss.sampling.serial_mask(hostile.KEY, p), axis=-1)
    assert drawn.tolist() == [0, 1]
