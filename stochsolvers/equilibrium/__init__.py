r"""Equilibrium networks: layers that are solutions of z = h(z), and of a convex problem.

    h(z) = Wᵀσ(W z + c),  σ = prox_g,  c = U x + b        z* = argmin G,  G(z) = ½||z||² − S(W z + c)

Every prior's prox is an activation σ, elementwise or not, and ||W|| < 1 makes G strongly convex. The layer is
proximal gradient descent in its hidden units s = σ(W z + c): an equilibrium layer is a solver layer run to
convergence.

| | |
|---|---|
| `EquilibriumProblem` | one layer: h, G, certificates of the gap and of the distance to z* |
| `HiddenProblem` | the same in the hidden units, for `ProxGD` and FISTA |
| `DeepProblem` | compositions, plain and averaged |
| `Regularized` | a prior of z, composed into a `DeepProblem` |
| `normalized`, `normalized_refresh` | a map with a certified bound on its norm; the same through training |
| `SequentialAveraging` | of all equilibria at ω = 1, the one of least prior |
| `solve` | the solution, by any solver, differentiated in any way |

References:
  Xie, Wang, Ling, Li, Liu and Lin 2023, Optimization induced equilibrium networks; Bai, Kolter and Koltun
  2019, Deep equilibrium models; Winston and Kolter 2020, Monotone operator equilibrium networks.
"""

from stochsolvers.equilibrium._certifier import EquilibriumCertifier as EquilibriumCertifier
from stochsolvers.equilibrium._deep import DeepProblem as DeepProblem
from stochsolvers.equilibrium._deep import Regularized as Regularized
from stochsolvers.equilibrium._hidden import HiddenProblem as HiddenProblem
from stochsolvers.equilibrium._norms import normalized as normalized
from stochsolvers.equilibrium._norms import normalized_refresh as normalized_refresh
from stochsolvers.equilibrium._problem import EquilibriumProblem as EquilibriumProblem
from stochsolvers.equilibrium._solve import solve as solve
from stochsolvers.solvers.sequential_averaging import SequentialAveraging as SequentialAveraging
