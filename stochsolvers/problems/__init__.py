r"""A block of a network as a convex problem: its objective, gradient, terms and certificate.

    minimise_z  P(z) = F(z) + g(z),
    F(z) = Σ_i ℓ((A* z)_i, x_i) − <b, z> + (λ/2) ||z||²                (Bibi et al. 2019, eq. 1 and 5)

x is the block's input, A its linear map, ℓ a loss, half the squared distance by default, b the bias, and g
the prior whose proximal operator is the activation. Leading axes of x are batch axes: one problem for each
example.
"""

from stochsolvers.problems._base import FixedPointProblem as FixedPointProblem
from stochsolvers.problems._base import Problem as Problem
from stochsolvers.problems._layer_problem import Certifier as Certifier
from stochsolvers.problems._layer_problem import LayerProblem as LayerProblem
from stochsolvers.problems._layer_problem import NormalizedProblem as NormalizedProblem
