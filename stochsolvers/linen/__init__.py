"""Solver layers for Flax Linen: the parameter trees of `nn.Dense` and `nn.Conv`.

The random stream is `rng_collection` ("dropout" by default). The Lipschitz constant is kept in the
collection "solver_state", beside the parameters: `apply(..., mutable=["solver_state"])` computes it,
which the paper does once an epoch, and from then on `apply` reads it. Until then, and where the
collection is not given, the constant is computed at every call. The collection "solver_records" is
written where it is mutable, for `certify`, and is never part of a model's variables.
"""

from stochsolvers.linen._blocks import SolverResNetBlock as SolverResNetBlock
from stochsolvers.linen._blocks import fold_batch_norm as fold_batch_norm
from stochsolvers.linen._blocks import refresh_lipschitz as refresh_lipschitz
from stochsolvers.linen._conv_transpose import SolverConvTranspose as SolverConvTranspose
from stochsolvers.linen._dropout import AdditiveDropout as AdditiveDropout
from stochsolvers.linen._dropout import ImportanceDropout as ImportanceDropout
from stochsolvers.linen._dropout import OutputDropout as OutputDropout
from stochsolvers.linen._dropout import TauNiceDropout as TauNiceDropout
from stochsolvers.linen._equilibrium import DeepEquilibrium as DeepEquilibrium
from stochsolvers.linen._equilibrium import Equilibrium as Equilibrium
from stochsolvers.linen._equilibrium import EquilibriumConv as EquilibriumConv
from stochsolvers.linen._equilibrium import EquilibriumLinear as EquilibriumLinear
from stochsolvers.linen._layers import SolverConv as SolverConv
from stochsolvers.linen._layers import SolverDense as SolverDense
from stochsolvers.linen._layers import SolverDenseGeneral as SolverDenseGeneral
from stochsolvers.linen._layers import linear_map_of as linear_map_of
from stochsolvers.linen._proxprop import ProxPropConv as ProxPropConv
from stochsolvers.linen._proxprop import ProxPropDense as ProxPropDense
from stochsolvers.linen._replace import Replaced as Replaced
from stochsolvers.linen._replace import replace_layers as replace_layers
from stochsolvers.linen._replace import restore_layers as restore_layers
from stochsolvers.linen._replaced import ReplacedLayers as ReplacedLayers
from stochsolvers.linen._reports import certify as certify
from stochsolvers.linen._reports import lipschitz_report as lipschitz_report
from stochsolvers.linen._spectral import SpectralNorm as SpectralNorm
