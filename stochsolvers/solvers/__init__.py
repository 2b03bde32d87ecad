"""Solvers of layer problems: one file an algorithm, one class an algorithm, two loops for all."""

from stochsolvers.solvers._base import Solver as Solver
from stochsolvers.solvers._loop import Step as Step
from stochsolvers.solvers._run import Run as Run
from stochsolvers.solvers._solution import Solution as Solution
from stochsolvers.solvers._solution import Status as Status
from stochsolvers.solvers.anderson import Anderson as Anderson
from stochsolvers.solvers.coordinate_descent import NSync as NSync
from stochsolvers.solvers.coordinate_descent import nsync as nsync
from stochsolvers.solvers.derivatives import Implicit as Implicit
from stochsolvers.solvers.derivatives import Remat as Remat
from stochsolvers.solvers.derivatives import Truncated as Truncated
from stochsolvers.solvers.derivatives import Unrolled as Unrolled
from stochsolvers.solvers.fixed_point import FixedPoint as FixedPoint
from stochsolvers.solvers.gradient_descent import ProxGD as ProxGD
from stochsolvers.solvers.gradient_descent import prox_gd as prox_gd
from stochsolvers.solvers.semi_stochastic import MS2GD as MS2GD
from stochsolvers.solvers.semi_stochastic import ms2gd as ms2gd
from stochsolvers.solvers.stochastic_gradient import ProxSG as ProxSG
from stochsolvers.solvers.stochastic_gradient import prox_sg as prox_sg
from stochsolvers.step_sizes import InverseExpectedSmoothness as InverseExpectedSmoothness
from stochsolvers.step_sizes import InverseLipschitz as InverseLipschitz
from stochsolvers.step_sizes import InverseSeparable as InverseSeparable
from stochsolvers.step_sizes import StepSizeRule as StepSizeRule
from stochsolvers.step_sizes import exponential_decay as exponential_decay
