r"""Convex programs for two-layer networks: train one, and say how far it is from optimal.

The weights of a gated network are the variable of a `LayerProblem` whose map is its gated data,

    minimise_V  Σ_j ℓ((Σ_i D_i X v_i)_j, y_j) + β Σ_i ||v_i||₂,       D_i = diag(1[X g_i ≥ 0]),

and those of a ReLU network are the same with cones, (2 D_i − I) X v_i ≥ 0.

| | |
|---|---|
| `Patterns`, `sample_patterns`, `enumerate_patterns` | gates and the patterns they make of data |
| `GatedMap` | the map A*(V) = Σ_i D_i X v_i |
| `GatedProblem` | the program of a network with fixed gates |
| `ReLUProblem` | the program of a ReLU network: the same with cones |
| `ThreeLayerProblem` | the program of parallel three-layer networks, on small data |
| `whitened` | data on which a network is one with batch normalisation |
| `solve`, `regularization_path` | the optimum to a certified relative gap; for several β |
| `KernelADMM`, `LandmarkADMM`, `FISTA` | solvers of gated programs; `FISTA` of all programs |
| `ConeADMM`, `InteriorPoint` | solvers of the programs of ReLU networks |
| `Network`, `GatedNetwork` | two-layer networks as values |
| `recover`, `from_network`, `as_network` | from a program's value to its network, and back |
| `to_nnx`, `to_linen` | Flax modules |
| `decompose`, `prune` | a ReLU network from a gated one; fewest neurons |
| `network_gap`, `separate` | how far a network is from its global optimum; neurons that would lower it |
| `train_network` | a ReLU network, beyond its sampled program |
| `ConvexReLURegressor`, `ConvexReLUClassifier` | estimators, with scikit-learn |

References:
  Pilanci and Ergen 2020, Neural networks are convex regularizers; Mishkin, Sahiner and Pilanci 2022, Fast
  convex optimization for two-layer ReLU networks.
"""

from typing import Any

from stochsolvers.convex._cone_admm import ConeADMM as ConeADMM
from stochsolvers.convex._decompose import Decomposition as Decomposition
from stochsolvers.convex._decompose import decompose as decompose
from stochsolvers.convex._enumeration import enumerate_patterns as enumerate_patterns
from stochsolvers.convex._fista import FISTA as FISTA
from stochsolvers.convex._flax import to_linen as to_linen
from stochsolvers.convex._flax import to_nnx as to_nnx
from stochsolvers.convex._gap import NetworkGap as NetworkGap
from stochsolvers.convex._gap import network_gap as network_gap
from stochsolvers.convex._gated_map import GatedMap as GatedMap
from stochsolvers.convex._interior_point import InteriorPoint as InteriorPoint
from stochsolvers.convex._kernel_admm import KernelADMM as KernelADMM
from stochsolvers.convex._landmark_admm import LandmarkADMM as LandmarkADMM
from stochsolvers.convex._network import GatedNetwork as GatedNetwork
from stochsolvers.convex._network import Network as Network
from stochsolvers.convex._patterns import Patterns as Patterns
from stochsolvers.convex._patterns import sample_patterns as sample_patterns
from stochsolvers.convex._problems import GatedProblem as GatedProblem
from stochsolvers.convex._prune import prune as prune
from stochsolvers.convex._recover import as_network as as_network
from stochsolvers.convex._recover import from_network as from_network
from stochsolvers.convex._recover import recover as recover
from stochsolvers.convex._relu_problem import ReLUProblem as ReLUProblem
from stochsolvers.convex._separate import separate as separate
from stochsolvers.convex._solve import regularization_path as regularization_path
from stochsolvers.convex._solve import solve as solve
from stochsolvers.convex._three_layer import ThreeLayerProblem as ThreeLayerProblem
from stochsolvers.convex._training import Training as Training
from stochsolvers.convex._training import train_network as train_network
from stochsolvers.convex._whitened import Whitened as Whitened
from stochsolvers.convex._whitened import whitened as whitened


def __getattr__(name: str) -> Any:
    """The estimators, which need scikit-learn."""
    if name not in ("ConvexReLUClassifier", "ConvexReLURegressor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stochsolvers.convex import _sklearn

    return getattr(_sklearn, name)
