r"""Lipschitz constants of layers from the Fourier transform of their kernels.

Squared or not: a name with "lipschitz" is the paper's L = ||A||², the squared norm, which the steps 1/L need;
a name with "spectral" is the norm ||A|| itself; singular values are not squared.

| function                            | gives                     | of                                    |
|-------------------------------------|---------------------------|---------------------------------------|
| `spectral_norm`                     | ||A||                     | the layer as it is                    |
| `spectral_norm_bracket`             | lower ≤ ||A|| ≤ upper     | the layer as it is                    |
| `operator_bracket`                  | lower ≤ ||A||² ≤ upper    | the layer as it is                    |
| `lipschitz_constant`, `_bracket`    | L = ||A||²                | lemma 2: exact for circular and dense |
| `singular_values`                   | all σ                     | lemma 2, or as it is ("operator")     |
| `frequency_norms`                   | σ₁(Â(f)) at every f       | lemma 2                               |
| `stable_rank`, `condition_number`   | ||A||_F²/||A||², σ₁/σ_n   | the layer as it is                    |

A circular convolution is block-diagonalised by the DFT (Bibi et al. 2019, eq. 21), with
one n2 × n1 block Â(f) per frequency f, so that

    L = ||A||² = max_f λ_max(Â(f) Â(f)ᴴ)                                   (Bibi et al. 2019, lemma 2).

A stride s keeps one output in s², which folds the s² frequencies that alias into one block
[Â(f_1), …, Â(f_{s²})] / s. Groups give blocks of their own. A dense map is the grid of one point.

Under zero padding the formula on the layer's own grid (`grid="layer"`, the paper's choice) is an
approximation that can be too small. `grid="padded"` evaluates it on a torus that holds the whole
linear convolution, n + d (k − 1) points along an axis, rounded up to the strides; the layer is a corner
of that torus' map, so the value is an upper bound whatever the padding.

The formula costs an eigendecomposition for every frequency. `lipschitz_constant` finds the same number
from the taps of the kernel for a fraction of that, and `lipschitz_bracket` encloses it, round-off
included.

A.T has the constants of A with inputs and outputs exchanged. A map of a user's own is written out if its
matrix has up to 2^22 entries; a larger one is known from its products alone, and `Bracket.method` says how
the ends were obtained.

The mathematics is in the files of this folder, `_formula` first; `machinery` makes it fast and bounds its
round-off.
"""

from stochsolvers.lipschitz._bracket import lipschitz_bracket as lipschitz_bracket
from stochsolvers.lipschitz._clip import clip_singular_values as clip_singular_values
from stochsolvers.lipschitz._constant import lipschitz_constant as lipschitz_constant
from stochsolvers.lipschitz._convexity import strong_convexity as strong_convexity
from stochsolvers.lipschitz._features import (
    feature_lipschitz_constants as feature_lipschitz_constants,
)
from stochsolvers.lipschitz._features import (
    output_lipschitz_constants as output_lipschitz_constants,
)
from stochsolvers.lipschitz._formula import frequency_norms as frequency_norms
from stochsolvers.lipschitz._formula import singular_values as singular_values
from stochsolvers.lipschitz._norm import condition_number as condition_number
from stochsolvers.lipschitz._norm import spectral_norm as spectral_norm
from stochsolvers.lipschitz._norm import spectral_norm_bracket as spectral_norm_bracket
from stochsolvers.lipschitz._norm import spectral_penalty as spectral_penalty
from stochsolvers.lipschitz._norm import stable_rank as stable_rank
from stochsolvers.lipschitz._operator import operator_bracket as operator_bracket
from stochsolvers.lipschitz._state import LipschitzState as LipschitzState
from stochsolvers.lipschitz._state import lipschitz_refresh as lipschitz_refresh
from stochsolvers.lipschitz._state import lipschitz_state as lipschitz_state
from stochsolvers.lipschitz._state import remembered_constant as remembered_constant
from stochsolvers.lipschitz._torus import is_exact as is_exact
from stochsolvers.lipschitz._tracked import NormState as NormState
from stochsolvers.lipschitz._tracked import full_norm as full_norm
from stochsolvers.lipschitz._tracked import kept_norm as kept_norm
from stochsolvers.lipschitz._tracked import norm_refresh as norm_refresh
from stochsolvers.lipschitz._tracked import norm_state as norm_state
from stochsolvers.lipschitz._tracked import norm_step as norm_step
from stochsolvers.lipschitz._tracked import normalising_factor as normalising_factor
from stochsolvers.lipschitz._types import Bracket as Bracket
from stochsolvers.lipschitz._types import Grid as Grid
