r"""A block of a network as a convex problem: its objective, gradient, terms and certificate.

    minimise_z  P(z) = F(z) + g(z),
    F(z) = (1/n1) Σ_{i=1..n1} f_i(z) + (λ/2) ||z||²
         = ½ ||A* z − x||² − <b, z> + (λ/2) ||z||²                         (Bibi et al. 2019, eq. 5)

x is the block's input, A its linear map, b its bias, g the prior whose proximal operator is the
activation. Leading axes of x are batch axes: one problem for each example.
"""

from stochsolvers.problems._layer_problem import LayerProblem as LayerProblem
