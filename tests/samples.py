"""One of each prior, for tests that hold for all of them; some want outputs that are matrices."""

import pytest

import stochsolvers as ss

PRIORS = (
    ss.prox.Zero(),
    ss.prox.NonNegative(),
    ss.prox.SquaredHinge(0.3),
    ss.prox.LogBarrier(0.3),
    ss.prox.SymmetricLogBarrier(0.3),
    ss.prox.IntervalLogBarrier(0.3),
    ss.prox.L1(0.3),
    ss.prox.Box(-0.3, 0.4),
    ss.prox.GroupL2(0.3),
    ss.prox.NuclearNorm(0.3),
    ss.prox.PositiveSemidefinite(),
)
each_prior = pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: type(prior).__name__)
