"""Solver layers for Flax NNX: the parameters of the plain layers, the forward pass of a solver.

`SolverLinear` and `SolverConv` subclass `nnx.Linear` and `nnx.Conv` and add no parameters, so a plain
network's parameter state loads into its solver twin unchanged. Beside the parameters they hold a
random stream and, where a problem constant sets the step, the layer's Lipschitz constant as
non-trainable `SolverState`, which `refresh_lipschitz` recomputes. `ProxPropLinear` and `ProxPropConv` have
the plain layers' parameters and values, and another backward pass.
"""

from stochsolvers.nnx._blocks import SolverResNetBlock as SolverResNetBlock
from stochsolvers.nnx._blocks import fold_batch_norm as fold_batch_norm
from stochsolvers.nnx._conv_transpose import SolverConvTranspose as SolverConvTranspose
from stochsolvers.nnx._dropout import AdditiveDropout as AdditiveDropout
from stochsolvers.nnx._dropout import ImportanceDropout as ImportanceDropout
from stochsolvers.nnx._dropout import OutputDropout as OutputDropout
from stochsolvers.nnx._dropout import TauNiceDropout as TauNiceDropout
from stochsolvers.nnx._dropout import linear_map_of as linear_map_of
from stochsolvers.nnx._equilibrium import DeepEquilibrium as DeepEquilibrium
from stochsolvers.nnx._equilibrium import EquilibriumConv as EquilibriumConv
from stochsolvers.nnx._equilibrium import EquilibriumLinear as EquilibriumLinear
from stochsolvers.nnx._equilibrium_base import Equilibrium as Equilibrium
from stochsolvers.nnx._layers import SolverConv as SolverConv
from stochsolvers.nnx._layers import SolverLinear as SolverLinear
from stochsolvers.nnx._linear_general import SolverLinearGeneral as SolverLinearGeneral
from stochsolvers.nnx._proxprop import ProxPropConv as ProxPropConv
from stochsolvers.nnx._proxprop import ProxPropLinear as ProxPropLinear
from stochsolvers.nnx._replace import replace_layers as replace_layers
from stochsolvers.nnx._replace import restore_layers as restore_layers
from stochsolvers.nnx._reports import certify as certify
from stochsolvers.nnx._reports import lipschitz_report as lipschitz_report
from stochsolvers.nnx._solver_layer import SolverRecord as SolverRecord
from stochsolvers.nnx._solver_layer import SolverState as SolverState
from stochsolvers.nnx._solver_layer import refresh_lipschitz as refresh_lipschitz
from stochsolvers.nnx._spectral import SpectralNorm as SpectralNorm
from stochsolvers.nnx._spectral import SpectralStat as SpectralStat
