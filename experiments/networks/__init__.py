"""The networks of the tables, with dropout or a solver in the layers under study.

Every network has `features`, its deterministic part, and `head`, the part that may sample. `blocks`
replaces plain layers by solvers with the same parameters, so a network can be trained plain first.
"""

from experiments.networks.alexnet import AlexNet as AlexNet
from experiments.networks.alexnet import AlexNetConfig as AlexNetConfig
from experiments.networks.blocks import BEHIND_DROPOUT as BEHIND_DROPOUT
from experiments.networks.blocks import FULL as FULL
from experiments.networks.blocks import NAMES as NAMES
from experiments.networks.blocks import PLAIN as PLAIN
from experiments.networks.blocks import BlockConfig as BlockConfig
from experiments.networks.blocks import ConvReLU as ConvReLU
from experiments.networks.blocks import DropoutReLU as DropoutReLU
from experiments.networks.blocks import DropoutSolver as DropoutSolver
from experiments.networks.blocks import HiddenLayer as HiddenLayer
from experiments.networks.blocks import Method as Method
from experiments.networks.blocks import Variant as Variant
from experiments.networks.blocks import has_stochastic_solver as has_stochastic_solver
from experiments.networks.blocks import hidden_layer as hidden_layer
from experiments.networks.blocks import set_mode as set_mode
from experiments.networks.blocks import solver_of as solver_of
from experiments.networks.blocks import swap_conv as swap_conv
from experiments.networks.blocks import swap_hidden as swap_hidden
from experiments.networks.equilibrium import EQUILIBRIUM_NAMES as EQUILIBRIUM_NAMES
from experiments.networks.equilibrium import EquilibriumMethod as EquilibriumMethod
from experiments.networks.equilibrium import EquilibriumNet as EquilibriumNet
from experiments.networks.equilibrium import EquilibriumNetConfig as EquilibriumNetConfig
from experiments.networks.lenet import LeNet as LeNet
from experiments.networks.lenet import LeNetConfig as LeNetConfig
from experiments.networks.modern import MODERN_NAMES as MODERN_NAMES
from experiments.networks.modern import ModernConfig as ModernConfig
from experiments.networks.modern import ModernName as ModernName
from experiments.networks.network import Network as Network
from experiments.networks.vgg import VGG16 as VGG16
from experiments.networks.vgg import VGG16Config as VGG16Config
