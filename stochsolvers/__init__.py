"""Deep layers as stochastic solvers: a block of a network is a convex problem and an algorithm.

    linear map A × loss ℓ × prior g × gradient estimator × step sizes × derivatives

One iteration of the composition is a familiar layer (dropout → linear → activation); several are a
better one, and because the problem is convex the layer can say how well it solved it.

References:
  Bibi, Ghanem, Koltun and Ranftl, Deep Layers as Stochastic Solvers, ICLR 2019.
"""

from stochsolvers import convex as convex
from stochsolvers import dropout as dropout
from stochsolvers import equilibrium as equilibrium
from stochsolvers import estimators as estimators
from stochsolvers import linear_maps as linear_maps
from stochsolvers import linen as linen
from stochsolvers import lipschitz as lipschitz
from stochsolvers import losses as losses
from stochsolvers import nnx as nnx
from stochsolvers import optax as optax
from stochsolvers import plot as plot
from stochsolvers import prox as prox
from stochsolvers import proxprop as proxprop
from stochsolvers import reports as reports
from stochsolvers import sampling as sampling
from stochsolvers import solvers as solvers
from stochsolvers import step_sizes as step_sizes
from stochsolvers import surgery as surgery
from stochsolvers import tensor_product as tensor_product
from stochsolvers._typing import static_field as static_field
from stochsolvers._typing import value_object as value_object
from stochsolvers.estimators import Estimator as Estimator
from stochsolvers.estimators import forms as forms
from stochsolvers.linear_maps import Contraction as Contraction
from stochsolvers.linear_maps import Conv as Conv
from stochsolvers.linear_maps import Dense as Dense
from stochsolvers.linear_maps import LinearMap as LinearMap
from stochsolvers.linear_maps import conv_transpose as conv_transpose
from stochsolvers.linear_maps import dense_general as dense_general
from stochsolvers.linear_maps import linear_map as linear_map
from stochsolvers.lipschitz import Bracket as Bracket
from stochsolvers.lipschitz import LipschitzState as LipschitzState
from stochsolvers.lipschitz import clip_singular_values as clip_singular_values
from stochsolvers.lipschitz import condition_number as condition_number
from stochsolvers.lipschitz import feature_lipschitz_constants as feature_lipschitz_constants
from stochsolvers.lipschitz import lipschitz_bracket as lipschitz_bracket
from stochsolvers.lipschitz import lipschitz_constant as lipschitz_constant
from stochsolvers.lipschitz import lipschitz_refresh as lipschitz_refresh
from stochsolvers.lipschitz import lipschitz_state as lipschitz_state
from stochsolvers.lipschitz import operator_bracket as operator_bracket
from stochsolvers.lipschitz import output_lipschitz_constants as output_lipschitz_constants
from stochsolvers.lipschitz import singular_values as singular_values
from stochsolvers.lipschitz import spectral_norm as spectral_norm
from stochsolvers.lipschitz import spectral_norm_bracket as spectral_norm_bracket
from stochsolvers.lipschitz import spectral_penalty as spectral_penalty
from stochsolvers.lipschitz import stable_rank as stable_rank
from stochsolvers.losses import Loss as Loss
from stochsolvers.problems import FixedPointProblem as FixedPointProblem
from stochsolvers.problems import LayerProblem as LayerProblem
from stochsolvers.prox import Prior as Prior
from stochsolvers.reports import certify as certify
from stochsolvers.reports import lipschitz_report as lipschitz_report
from stochsolvers.solvers import MS2GD as MS2GD
from stochsolvers.solvers import Anderson as Anderson
from stochsolvers.solvers import FixedPoint as FixedPoint
from stochsolvers.solvers import Implicit as Implicit
from stochsolvers.solvers import InverseExpectedSmoothness as InverseExpectedSmoothness
from stochsolvers.solvers import InverseLipschitz as InverseLipschitz
from stochsolvers.solvers import InverseSeparable as InverseSeparable
from stochsolvers.solvers import NSync as NSync
from stochsolvers.solvers import ProxGD as ProxGD
from stochsolvers.solvers import ProxSG as ProxSG
from stochsolvers.solvers import Remat as Remat
from stochsolvers.solvers import Run as Run
from stochsolvers.solvers import Solution as Solution
from stochsolvers.solvers import Solver as Solver
from stochsolvers.solvers import Status as Status
from stochsolvers.solvers import Step as Step
from stochsolvers.solvers import StepSizeRule as StepSizeRule
from stochsolvers.solvers import Truncated as Truncated
from stochsolvers.solvers import Unrolled as Unrolled
from stochsolvers.solvers import exponential_decay as exponential_decay
from stochsolvers.solvers import ms2gd as ms2gd
from stochsolvers.solvers import nsync as nsync
from stochsolvers.solvers import prox_gd as prox_gd
from stochsolvers.solvers import prox_sg as prox_sg
from stochsolvers.step_sizes import Schedule as Schedule
from stochsolvers.step_sizes import StepSizeLike as StepSizeLike

__version__ = "0.2.0"
