r"""Estimators of ∇F as values: which features are sampled, and how the sample is weighted.

An estimator of the first kind draws random weights w over the n1 input features with E[w] = 1, and
returns

    ∇Ψ(z) = A(w ⊙ ∂ℓ(A* z, x)) − b + λ z,      E[∇Ψ(z)] = ∇F(z),

with the residual A* z − x in the place of ∂ℓ for squares.

One proximal step from z = 0 with it is a dropout layer, and the law of w says which one:

| estimator | w_i | one iteration from 0 is |
|---|---|---|
| `Full` | 1 | linear → activation |
| `TauNice` | (n1/τ) 1[i ∈ S], \|S\| = τ | dropout of exactly n1 − τ inputs → linear → activation |
| `Bernoulli` | 1[i ∈ S] / q | ordinary dropout with keep rate q → linear → activation |
| `SerialImportance` | 1[i = j] / p_i | one input kept, P(j = i) = p_i |
| `Importance` | 1[i ∈ S] / p_i, \|S\| = τ | non-uniform dropout with inclusion probabilities p_i |

`VarianceReduced` corrects any of them by its own value at an anchor (additive dropout), and
`OutputCoordinates` samples the n2 outputs of ∇F instead (dropout after the linear map).

`forms` is how the full gradient represents itself. Every estimator `e` has `e.draw(key, problem, z)`,
`e.gradient(problem, z, draw)`, their composition `e(key, problem, z)`, and `e.expected_smoothness(problem)`.
"""

from stochsolvers.estimators import forms as forms
from stochsolvers.estimators._base import Estimator as Estimator
from stochsolvers.estimators._base import FeatureEstimator as FeatureEstimator
from stochsolvers.estimators._base import feature_axis as feature_axis
from stochsolvers.estimators._features import Bernoulli as Bernoulli
from stochsolvers.estimators._features import Full as Full
from stochsolvers.estimators._features import TauNice as TauNice
from stochsolvers.estimators._importance import Importance as Importance
from stochsolvers.estimators._importance import ImportanceScore as ImportanceScore
from stochsolvers.estimators._importance import SerialImportance as SerialImportance
from stochsolvers.estimators._outputs import OutputCoordinates as OutputCoordinates
from stochsolvers.estimators._variance import VarianceReduced as VarianceReduced
