r"""Priors g and their proximal operators: the activation functions of a layer read as a solver.

    prox_{ηg}(v) = argmin_u ½||u − v||² + η g(u)          (Bibi et al. 2019, table 1)

| activation                   | prior g(u)                | class                         |
|------------------------------|---------------------------|-------------------------------|
| identity                     | 0                         | `Zero()`                      |
| ReLU                         | 0 if u ≥ 0, else ∞        | `NonNegative()`               |
| leaky ReLU, slope α, at η = 1| (γ/2) Σ max(−u − s, 0)²   | `SquaredHinge(1/α − 1)`       |
| ≈ softplus (within 0.31)     | −γ Σ log u                | `LogBarrier(1.0)`             |
| ≈ tanh (within 0.061)        | −γ Σ log(1 − u²)          | `SymmetricLogBarrier(0.1)`    |
| ≈ sigmoid(v − ½), within 0.05| −γ Σ (log u + log(1 − u)) | `IntervalLogBarrier(0.25)`    |
| hard tanh, ReLU6             | 0 if lo ≤ u ≤ hi, else ∞  | `Box(-1, 1)`, `Box(0, 6)`     |
| soft threshold               | γ ||u||₁                  | `L1(gamma)`                   |
| group lasso                  | γ Σ_G ||u_G||₂            | `GroupL2(gamma, axis)`        |
| low rank                     | γ ||U||_*                 | `NuclearNorm(gamma, axes)`    |
| positive semi-definite       | 0 if U = Uᵀ ⪰ 0, else ∞   | `PositiveSemidefinite(axes)`  |
| softmax                      | Σ u log u − ½||u||² on Δ  | `Entropy(axis)`               |
| sparse kin of softmax        | 0 if u ∈ Δ, else ∞        | `Simplex(axis)`               |
| norm at most r               | 0 if ||u_G||₂ ≤ r, else ∞ | `L2Ball(radius, axis)`        |
| soft threshold, shrunk       | γ ||u||₁ + (ρ/2) ||u||²   | `ElasticNet(gamma, ridge)`    |
| ReLU with a threshold        | γ Σ u if u ≥ 0, else ∞    | `NonNegativeL1(gamma)`        |

Δ is the simplex {u ≥ 0, Σ u = 1}. `2.0 * prior` is the prior 2 g. γ = 0 is the limit γ → 0, where a
class has it. The approximations hold at η = 1 and were measured on [−30, 30].

The exact priors of activations are

| activation σ = prox_g        | prior g(u)                                             | class         |
|------------------------------|--------------------------------------------------------|---------------|
| tanh                         | Σ u artanh u + ½ log(1 − u²) − ½u²                     | `Tanh()`      |
| sigmoid                      | Σ u log u + (1 − u) log(1 − u) − ½u²                   | `Sigmoid()`   |
| softplus                     | Σ Li₂(e^{−u}) − π²/6                                   | `Softplus()`  |
| ELU, 0 < α ≤ 1               | Σ_{u<0} (u + α) log(1 + u/α) − u − ½u²                 | `ELU(alpha)`  |
| softsign                     | Σ −log(1 − |u|) − |u| − ½u²                            | `Softsign()`  |
| arc tangent                  | Σ −log cos u − ½u²                                     | `Arctan()`    |
| leaky ReLU, 0 ≤ α ≤ 1        | ½ (1/α − 1) Σ min(u, 0)²                               | `LeakyReLU(α)`|
| any non-decreasing σ, σ′ ≤ 1 | sup_w u w − S(w) − ½u², S′ = σ                         | `Activation(σ)` |

In these prox at η = 1 is σ of JAX to the last bit, and prox_{ηg}(v) = σ(w) at w = `pre_activation(v, η)`.
Take them where a layer stands for σ of a trained or published network, or where its outputs are to have the
range and the tails of σ. The barriers are the paper's: take them to reproduce it, or where the time of the
prox matters: on a CPU core that of `Tanh()` took two to three times that of the barrier like tanh.

A solver with step η applies prox_{ηg}. For an indicator (ReLU, box, simplex, ball, semi-definite) and for
g = 0 that is prox_g; every other activation changes its shape with η: the leaky slope is 1/(1 + ηγ),
tanh becomes a clip to [−1, 1] as η falls: σ itself is applied to w, not to v.

Errata: in table 1 and proposition 3 the shift s is called λ, and the branch below the threshold must
read (v − γs)/(1 + γ), as continuity at v = −s shows; appendix C is written for γ = 1 only.

Range in float32: for |v| up to 3e38 and ηγ from 1e-30 to 1e30 (values and conjugates: γ), the value,
prox, conjugate and dual projection and their first derivatives are finite and keep their digits
wherever the exact result is a normal number. Numbers below 1.2e-38 count as zero, as XLA flushes
them, and with them the derivatives by η and γ that are proportional to such a number. Results on
groups and matrices keep the digits of the largest entry. Derivatives of higher order are finite for
the barriers, |v| up to 1e6 and ηγ from 1e-8 to 1e3. float16 and bfloat16 are computed and returned in
float32. The digits of `Entropy` were measured for |v| up to 1e6 and ηγ from 1e-3 to 30; it is finite from
1e-6 to 1e4.

The prox of the exact activations is within 4 units in the last place for |v| up to 1e6 and η from 1e-3 to
30 (8 in float64, where tanh of JAX is off by 6), finite with its derivatives for |v| up to 3e38.
`Activation` of a function without a class of its own multiplies the round-off of that function by up to
η − 1 for η above 2.
"""

from stochsolvers.prox._activations import ELU as ELU
from stochsolvers.prox._activations import Arctan as Arctan
from stochsolvers.prox._activations import LeakyReLU as LeakyReLU
from stochsolvers.prox._activations import Sigmoid as Sigmoid
from stochsolvers.prox._activations import Softplus as Softplus
from stochsolvers.prox._activations import Softsign as Softsign
from stochsolvers.prox._activations import Tanh as Tanh
from stochsolvers.prox._base import Prior as Prior
from stochsolvers.prox._base import Scaled as Scaled
from stochsolvers.prox._bounded import Entropy as Entropy
from stochsolvers.prox._bounded import L2Ball as L2Ball
from stochsolvers.prox._bounded import Simplex as Simplex
from stochsolvers.prox._elementwise import L1 as L1
from stochsolvers.prox._elementwise import Box as Box
from stochsolvers.prox._elementwise import IntervalLogBarrier as IntervalLogBarrier
from stochsolvers.prox._elementwise import LogBarrier as LogBarrier
from stochsolvers.prox._elementwise import NonNegative as NonNegative
from stochsolvers.prox._elementwise import SquaredHinge as SquaredHinge
from stochsolvers.prox._elementwise import SymmetricLogBarrier as SymmetricLogBarrier
from stochsolvers.prox._elementwise import Zero as Zero
from stochsolvers.prox._elementwise import leaky_relu_prior as leaky_relu_prior
from stochsolvers.prox._general import Activation as Activation
from stochsolvers.prox._grouped import GroupL2 as GroupL2
from stochsolvers.prox._grouped import NuclearNorm as NuclearNorm
from stochsolvers.prox._grouped import PositiveSemidefinite as PositiveSemidefinite
from stochsolvers.prox._sparse import ElasticNet as ElasticNet
from stochsolvers.prox._sparse import NonNegativeL1 as NonNegativeL1
