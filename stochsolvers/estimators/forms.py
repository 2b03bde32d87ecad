r"""Cheaper equal forms of the gradient, for solvers that need it many times.

    ∇F(z) = A(A* z − x) − b + λ z = H z + λ z − c,      H = A A*,   c = A x + b

"literal" is the left side and reads the input at every call. The other forms read it once, in c:

"gram" holds H. For `Dense` it is the matrix G = WᵀW. For a convolution of unit stride it is a convolution
with the Gram kernel of 2k − 1 taps along each spatial axis,

    G[δ; j′, j] = Σ_{a − a′ = δ} Σ_i kernel[a, i, j] kernel[a′, i, j′].

"fourier" applies the same convolution as one Hermitian matrix Ĝ(f) = Â(f) Â(f)ᴴ for each frequency of the
half spectrum, between a real FFT and its inverse (Bibi et al. 2019, lemma 1 and eq. 21).

On a torus (CIRCULAR) this is exact as it stands. Under zero padding A* z is a full correlation cropped
to the image, and only what is cropped away separates H from the zero-padded convolution with G:

    H z = G ∗ z − Σ_{rims} B B* z,

B the layer's map from one strip of padding (two for each spatial axis, below and above the image; as wide
as the padding, none under VALID) to the outputs beside it. Other linear maps have the literal form alone.

"auto" takes the cheapest, and where another one is the cheapest under differentiation, that one there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._symmetric import symmetric_product as symmetric_product
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.estimators._costs import GRADIENT, SOLVE, Rates, conv_cost, dense_cost
from stochsolvers.estimators._hessians import Spectrum, Toeplitz, hessian_of
from stochsolvers.estimators._hessians import gram_kernel as gram_kernel
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.problems import FixedPointProblem, LayerProblem, Problem

Form: TypeAlias = Literal["auto", "literal", "gram", "fourier"]
FORMS = ("auto", "literal", "gram", "fourier")


@value_object
class LiteralGradient:
    """∇F(z) = A ∂ℓ(A* z, x) − b + λ z, as the problem defines it."""

    problem: LayerProblem

    def __call__(self, z: Array) -> Array:
        """∇F(z)."""
        return self.problem.gradient(z)

    def at_zero(self) -> Array:
        """∇F(0) = A ∂ℓ(0, x) − b, at the price of the plain layer."""
        return self.problem.gradient_at_zero()

    def curvature(self, direction: Array) -> Array:
        """∇F(z + d) − ∇F(z) = A A* d + λ d for squares; ∇²F(0) d for other losses."""
        return self.hessian_at(jnp.zeros_like(direction))(direction)

    def hessian_at(self, z: Array) -> Callable[[Array], Array]:
        """d ↦ ∇²F(z) d = A(∂²ℓ(A* z, x) ⊙ A* d) + λ d."""
        A, ridge = self.problem.linear_map, self.problem.ridge
        if self.problem.is_quadratic:
            return lambda d: A(A.adjoint(d)) + ridge * d
        loss, x = self.problem.loss, self.problem.inputs
        _, second = jax.linearize(lambda u: loss.derivative(u, x), A.adjoint(z))
        return lambda d: A(second(A.adjoint(d))) + ridge * d


@value_object
class QuadraticGradient:
    """∇F(z) = H z + λ z − c."""

    hessian: Dense | Conv | Spectrum | Toeplitz
    offset: Array
    ridge: Scalar

    def __call__(self, z: Array) -> Array:
        """∇F(z)."""
        return self.curvature(z) - self.offset

    def at_zero(self) -> Array:
        """∇F(0) = −c."""
        return -self.offset

    def curvature(self, direction: Array) -> Array:
        """∇F(z + d) − ∇F(z) = H d + λ d."""
        return self.hessian(direction) + self.ridge * direction

    def hessian_at(self, z: Array) -> Callable[[Array], Array]:
        """`curvature`, the same for every z."""
        return self.curvature


@value_object
class ResidualGradient:
    """∇F(z) = z − h(z) of a problem z = h(z)."""

    problem: FixedPointProblem

    def __call__(self, z: Array) -> Array:
        """z − h(z)."""
        return self.problem.gradient(z)

    def at_zero(self) -> Array:
        """−h(0)."""
        return self.problem.gradient_at_zero()

    def hessian_at(self, z: Array) -> Callable[[Array], Array]:
        """d ↦ d − h′(z) d."""
        _, jacobian = jax.linearize(self.problem.next_point, z)
        return lambda d: d - jacobian(d)


@value_object
class TwoFormGradient:
    """∇F in one form, and in another where derivatives are taken: the cheaper one in each case."""

    plain: LiteralGradient | QuadraticGradient
    differentiated: LiteralGradient | QuadraticGradient

    def __call__(self, z: Array) -> Array:
        """∇F(z)."""
        return _by_case("__call__", self.plain, self.differentiated, (z,))

    def at_zero(self) -> Array:
        """∇F(0)."""
        return _by_case("at_zero", self.plain, self.differentiated, ())

    def curvature(self, direction: Array) -> Array:
        """∇F(z + d) − ∇F(z)."""
        return _by_case("curvature", self.plain, self.differentiated, (direction,))

    def hessian_at(self, z: Array) -> Callable[[Array], Array]:
        """d ↦ ∇²F(z) d."""
        return self.plain.hessian_at(z)


Gradient: TypeAlias = LiteralGradient | QuadraticGradient | TwoFormGradient | ResidualGradient


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_case(method: str, plain: Any, differentiated: Any, points: tuple[Array, ...]) -> Array:
    """The plain form; its derivatives, and the value beside them, are those of the other, equal one."""
    return getattr(plain, method)(*points)


@_by_case.defjvp
def _by_case_jvp(method: str, primals: Any, tangents: Any) -> tuple[Array, Array]:
    def evaluate(form, points):
        return getattr(form, method)(*points)

    return jax.jvp(evaluate, primals[1:], tangents[1:])


def gradient_form(
    problem: Problem, form: Form, *, num_calls: int, differentiable: bool = False
) -> Gradient:
    """∇F in one of its equal forms, as a value to be called many times.

    Args:
      problem: the layer's problem, or another one, which has the literal form alone.
      form: "literal", "gram", "fourier", or "auto" for the cheapest of them for these shapes.
      num_calls: how often ∇F or its curvature will be evaluated, for "auto".
      differentiable: whether derivatives may pass through all these calls: then "auto" may be one form as it
        stands and another one under differentiation.

    Raises:
      ValueError: at trace time, for an unknown form, or one that the linear map does not have:
        "fourier" for `Dense`; "gram" and "fourier" for strides, for padding wider than the output, and
        for maps other than `Dense` and `Conv`.
    """
    _checks.member("form", form, FORMS)
    num_calls = _checks.count("num_calls", num_calls, minimum=0)
    if isinstance(problem, FixedPointProblem) and form in ("auto", "literal"):
        return ResidualGradient(problem)
    if not isinstance(problem, LayerProblem):
        _checks.fail(f"problem of form {form!r}", "a LayerProblem", type(problem).__name__)
    if form == "auto":
        form = cheapest_form(problem, num_calls)
        other = cheapest_form(problem, num_calls, differentiated=True) if differentiable else form
        if other != form:
            return TwoFormGradient(_one_form(problem, form), _one_form(problem, other))
    return _one_form(problem, form)


def _one_form(problem: LayerProblem, form: Form) -> LiteralGradient | QuadraticGradient:
    if form == "literal":
        return LiteralGradient(problem)
    if not problem.is_quadratic:
        _checks.fail(f"loss of form {form!r}", "Squares", type(problem.loss).__name__)
    refusal = _refusal(problem.linear_map, form)
    if refusal:
        _checks.fail(f"linear map of form {form!r}", *refusal)
    return QuadraticGradient(
        hessian_of(problem.linear_map, form),
        -problem.gradient_at_zero(),
        jnp.asarray(problem.ridge, problem.dtype),
    )


def cheapest_form(problem: LayerProblem, num_calls: int, *, differentiated: bool = False) -> Form:
    """The fastest form over `num_calls` gradients, estimated from shapes alone.

    Args:
      problem: the layer's problem.
      num_calls: how often ∇F or its curvature will be evaluated.
      differentiated: whether the derivatives of all these calls are taken too, in reverse mode.

    "literal" where a size is symbolic (`jax.export`).
    """
    _checks.instance("problem of cheapest_form", problem, LayerProblem, "a LayerProblem")
    num_calls = _checks.count("num_calls", num_calls, minimum=0)
    if not problem.is_quadratic or not all(isinstance(n, int) for n in problem.batch_shape):
        return "literal"
    forms: tuple[Form, ...] = ("literal", "gram", "fourier")
    possible: list[Form] = [
        f for f in forms if f == "literal" or not _refusal(problem.linear_map, f)
    ]
    if len(possible) == 1:
        return possible[0]
    rates = GRADIENT if differentiated else SOLVE
    return min(possible, key=lambda form: form_cost(problem, form, num_calls, rates))


def form_cost(problem: LayerProblem, form: Form, num_calls: int, rates: Rates = SOLVE) -> float:
    """The time of `num_calls` gradients of a `Dense` or a `Conv`, in multiply-adds of a convolution."""
    _checks.instance("problem of form_cost", problem, LayerProblem, "a LayerProblem")
    _checks.member("form", form, FORMS[1:])
    num_calls = _checks.count("num_calls", num_calls, minimum=0)
    A, batch = problem.linear_map, math.prod(problem.batch_shape)
    if isinstance(A, Dense):
        return dense_cost(A, form, batch, num_calls, rates)
    _checks.instance("map of form_cost", A, Conv, "a Dense or a Conv")
    assert isinstance(A, Conv)
    return conv_cost(A, form, batch, num_calls, rates)


def _refusal(linear_map: LinearMap, form: Form) -> tuple[str, object] | None:
    """What the form expects of the map and what it got, or None where it holds."""
    if isinstance(linear_map, Dense):
        return ("a convolution", "Dense") if form == "fourier" else None
    if not isinstance(linear_map, Conv):
        return "a Dense or a Conv", type(linear_map).__name__
    if max(linear_map.strides) > 1:
        return f"strides {(1,) * len(linear_map.strides)}", linear_map.strides
    sizes = zip(linear_map.pads, linear_map.out_shape, strict=False)
    if linear_map.padding != "CIRCULAR" and any(max(pads) > size for pads, size in sizes):
        return f"padding no wider than the output {linear_map.out_shape[:-1]}", linear_map.pads
    return None
