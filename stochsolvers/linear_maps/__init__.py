r"""Linear maps of layers, with exact adjoints: the first factor of a layer's problem.

A map A takes n1 input features to n2 output features. Leading axes of its argument are batch axes,
features come last, and spatial axes stand just before them, as in Flax. For every x and z

    <A(x), z> = <x, A.adjoint(z)>.

| map | of |
|---|---|
| `Dense` | a matrix; the case of a 1 × 1 grid (Bibi et al. 2019, lemma 1) |
| `Conv` | a convolution on one to three spatial axes |
| `conv_transpose` | Flax's transposed convolution |
| `Contraction`, `dense_general` | a general contraction, Flax's `Einsum` and `LinearGeneral` |
| `A.T` | the adjoint of any map |
| `linear_map` | any linear function, matrix-free |

`LinearMap` is the base class for maps of your own.
"""

from stochsolvers.linear_maps._base import LinearMap as LinearMap
from stochsolvers.linear_maps._base import Matrix as Matrix
from stochsolvers.linear_maps._base import Transposed as Transposed
from stochsolvers.linear_maps._base import size as size
from stochsolvers.linear_maps._base import written_out as written_out
from stochsolvers.linear_maps._contraction import Contraction as Contraction
from stochsolvers.linear_maps._contraction import dense_general as dense_general
from stochsolvers.linear_maps._conv import Conv as Conv
from stochsolvers.linear_maps._conv import Padding as Padding
from stochsolvers.linear_maps._conv_transpose import conv_transpose as conv_transpose
from stochsolvers.linear_maps._dense import Dense as Dense
from stochsolvers.linear_maps._function import linear_map as linear_map
