r"""Convex programs for two-layer networks: a trained network, and how far from optimal it is.

The weights of a gated network are the variable of a `LayerProblem` whose map is its gated data,

    minimise_V  Σ_j ℓ((Σ_i D_i X v_i)_j, y_j) + β Σ_i ||v_i||₂,       D_i = diag(1[X g_i ≥ 0]).

| | |
|---|---|
| `Patterns`, `sample_patterns`, `enumerate_patterns` | gates and the activation patterns they make of data |
| `GatedMap` | the map A*(V) = Σ_i D_i X v_i |
| `GatedProblem` | the program of a network with fixed gates |
| `solve`, `regularization_path` | the optimum with its duality gap; for several β |
| `KernelADMM`, `LandmarkADMM`, `FISTA` | solvers of gated programs |
| `ConeADMM`, `InteriorPoint` | solvers of cone programs |
| `ReLUProblem` | the program of a ReLU network: the same with cones |
| `ThreeLayerProblem` | the program of parallel three-layer networks, on small data |
| `whitened` | data on which a network is one with batch normalisation |

References:
  Pilanci and Ergen 2020, Neural networks are convex regularizers; Mishkin, Sahiner and Pilanci 2022, Fast
  convex optimization for two-layer ReLU networks.
"""

from stochsolvers.convex._cone_admm import ConeADMM as ConeADMM
from stochsolvers.convex._enumeration import enumerate_patterns as enumerate_patterns
from stochsolvers.convex._fista import FISTA as FISTA
from stochsolvers.convex._gated_map import GatedMap as GatedMap
from stochsolvers.convex._interior_point import InteriorPoint as InteriorPoint
from stochsolvers.convex._kernel_admm import KernelADMM as KernelADMM
from stochsolvers.convex._landmark_admm import LandmarkADMM as LandmarkADMM
from stochsolvers.convex._patterns import Patterns as Patterns
from stochsolvers.convex._patterns import sample_patterns as sample_patterns
from stochsolvers.convex._problems import GatedProblem as GatedProblem
from stochsolvers.convex._relu_problem import ReLUProblem as ReLUProblem
from stochsolvers.convex._solve import regularization_path as regularization_path
from stochsolvers.convex._solve import solve as solve
from stochsolvers.convex._three_layer import ThreeLayerProblem as ThreeLayerProblem
from stochsolvers.convex._whitened import Whitened as Whitened
from stochsolvers.convex._whitened import whitened as whitened
