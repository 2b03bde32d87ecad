"""Solvers of layer problems: one file an algorithm, one shared scan."""

from stochsolvers.solvers._loop import Solution as Solution
from stochsolvers.solvers.configurations import MS2GD as MS2GD
from stochsolvers.solvers.configurations import NSync as NSync
from stochsolvers.solvers.configurations import ProxGD as ProxGD
from stochsolvers.solvers.configurations import ProxSG as ProxSG
from stochsolvers.solvers.configurations import Solver as Solver
from stochsolvers.solvers.derivatives import Implicit as Implicit
from stochsolvers.solvers.derivatives import Remat as Remat
from stochsolvers.solvers.derivatives import Truncated as Truncated
from stochsolvers.solvers.derivatives import Unrolled as Unrolled
from stochsolvers.solvers.ms2gd import ms2gd as ms2gd
from stochsolvers.solvers.nsync import InverseSeparable as InverseSeparable
from stochsolvers.solvers.nsync import nsync as nsync
from stochsolvers.solvers.prox_gd import prox_gd as prox_gd
from stochsolvers.solvers.prox_sg import prox_sg as prox_sg
from stochsolvers.solvers.step_sizes import InverseExpectedSmoothness as InverseExpectedSmoothness
from stochsolvers.solvers.step_sizes import InverseLipschitz as InverseLipschitz
from stochsolvers.solvers.step_sizes import StepSizeRule as StepSizeRule
from stochsolvers.solvers.step_sizes import exponential_decay as exponential_decay
from stochsolvers.solvers.stopping import Status as Status
