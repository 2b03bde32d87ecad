"""The two ways to take an implicit step, as values."""

from typing import Any, Literal, TypeAlias, get_args

from stochsolvers import _checks
from stochsolvers._typing import Scalar, real, static_field, value_object

Form = Literal["auto", "rows", "parameters", "patches"]


@value_object
class Exact:
    r"""d = (AᵀA + I/τ)⁻¹ Aᵀ G by a Cholesky factorisation, for dense layers and convolutions.

    Of N rows (examples, times positions of a convolution), m parameters for each output (the bias is one)
    and n outputs, the forms take, in multiplications,

    | form | system | count |
    |---|---|---|
    | rows | d = Aᵀ (A Aᵀ + I/τ)⁻¹ G | N² (m + min(m, n)) + N³ |
    | parameters | (AᵀA + I/τ) d = AᵀG | m² (N + n) + m³ |
    | patches | the same of a convolution, without its N × m patches in memory | c + m² n + m³ |

    beside the N m n of backpropagation's own AᵀG. c ≤ N m² is that of the Gram matrix of patches: of two taps
    along the first spatial axis only the distance matters but at the borders, so that of k² pairs about k
    are multiplied, and of a k × k filter k times the inputs are held in memory in the place of k² times.
    "auto" takes the form with the smallest count; "rows" only for N ≤ m, because with more rows than
    parameters most of G cancels in Aᵀ(A Aᵀ + I/τ)⁻¹G where τ is large; and not "parameters" for convolutions,
    "patches" being the same at a smaller count.

    The relative round-off of d is at most of the order of ε (1 + τ λ_max(AᵀA)). Where it makes the system, of
    order k, indefinite, k ε tr(AᵀA) is added to 1/τ: the step is finite as long as τ tr(AᵀA)² does not
    overflow, and NaN beyond.

    Args:
      tau: τ > 0, the step size; traced.
      form: "auto", "rows", "parameters", or of convolutions "patches".

    References:
      Frerix et al. 2018, eq. 13; the rows' form is the Woodbury identity.
    """

    tau: Scalar = 1.0
    form: Form = static_field(default="auto")

    def __post_init__(self):
        object.__setattr__(self, "tau", _checked_tau("Exact", self.tau))
        _checks.member("form of Exact", self.form, get_args(Form))


@value_object
class ConjugateGradients:
    r"""`num_iters` steps of conjugate gradients on (AᵀA + I/τ) d = AᵀG from d = 0.

    Each output's column of parameters is a system of its own, with its own step lengths. Of N rows, m
    parameters for each output and n outputs, T iterations cost the smallest of N² (m + T n) in the space of
    the rows, m² n T and the Gram matrix in that of the parameters, and 2 T N m n without either; they are the
    same iterates. For maps other than dense ones and convolutions, and for `through`, all parameters are one
    system. The step is NaN where (τ AᵀA)² overflows.

    Args:
      tau: τ > 0, the step size; traced.
      num_iters: T ≥ 1, structure.

    References:
      Frerix et al. 2018, section 4.3; Hestenes and Stiefel 1952.
    """

    tau: Scalar = 1.0
    num_iters: int = static_field(default=3)

    def __post_init__(self):
        object.__setattr__(self, "tau", _checked_tau("ConjugateGradients", self.tau))
        count = _checks.count("num_iters of ConjugateGradients", self.num_iters)
        object.__setattr__(self, "num_iters", count)


ImplicitStep: TypeAlias = Exact | ConjugateGradients


def checked_step(step: Any) -> ImplicitStep:
    """The step, or an error for what is none."""
    if not isinstance(step, Exact | ConjugateGradients):
        expected = "an Exact or ConjugateGradients of stochsolvers.proxprop"
        _checks.fail("step of proximal backpropagation", expected, repr(step))
    return step


def _checked_tau(name: str, tau: Any) -> Scalar:
    if not _checks.is_real(tau):
        _checks.fail(f"tau of {name}", "a number > 0", repr(tau))
    _checks.rank(f"tau of {name}", tau, 0)
    _checks.positive(f"tau of {name}", tau)
    _checks.finite(f"tau of {name}", tau)
    return real(tau)
