r"""Cheaper equal forms of the gradient, for solvers that need it many times.

    ∇F(z) = A(A* z − x) − b + λ z = H z + λ z − c,      H = A A*,   c = A x + b

"literal" is the left side and reads the input at every call. The other forms read it once, in c:

"gram" holds H. For `Dense` it is the matrix G = WᵀW. For a convolution of unit stride it is a convolution
with the Gram kernel of 2k − 1 taps in each direction,

    G[δ; j′, j] = Σ_{a − a′ = δ} Σ_i kernel[a, i, j] kernel[a′, i, j′].

"fourier" applies the same convolution as one Hermitian matrix Ĝ(f) = Â(f) Â(f)ᴴ for each frequency of the
half spectrum, between a real FFT and its inverse (Bibi et al. 2019, lemma 1 and eq. 21).

On a torus (CIRCULAR) this is exact as it stands. Under zero padding A* z is a full correlation cropped
to the image, and only what is cropped away separates H from the zero-padded convolution with G:

    H z = G ∗ z − Σ_{rims} B B* z,

B the layer's map from one strip of padding (above, below, left, right of the image; as wide as the
padding, none under VALID) to the outputs beside it.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.linear_maps import Conv, Dense
from stochsolvers.problems import LayerProblem

Form: TypeAlias = Literal["auto", "literal", "gram", "fourier"]
FORMS = ("auto", "literal", "gram", "fourier")

_TRIANGLE = 256  # a symmetric product of at least so many columns computes one triangle
# costs in multiply-adds of a convolution, measured on a two-core CPU
_FFT_POINT = 20.0  # one point of a real two-dimensional FFT, for each halving of the grid
_COMPLEX = 5.5  # a complex multiply-add in a product of small matrices
_DENSE = 0.5  # a multiply-add in a dense matrix product


@value_object
class LiteralGradient:
    """∇F(z) = A ∂ℓ(A* z, x) − b + λ z, as the problem defines it."""

    problem: LayerProblem

    def __call__(self, z: Array) -> Array:
        """∇F(z)."""
        return self.problem.gradient(z)

    def at_zero(self) -> Array:
        """∇F(0) = A ∂ℓ(0, x) − b, at the price of the plain layer."""
        if self.problem.is_quadratic:
            return -_offset(self.problem)
        x = self.problem.inputs
        slope = self.problem.linear_map(self.problem.loss.derivative(jnp.zeros_like(x), x))
        return self.problem.with_bias_and_ridge(slope, jnp.zeros_like(slope))

    def curvature(self, z: Array) -> Callable[[Array], Array]:
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

    hessian: "Dense | Conv | _Spectrum | _Toeplitz"
    offset: Array
    ridge: Scalar

    def __call__(self, z: Array) -> Array:
        """∇F(z)."""
        return self.hessian(z) + self.ridge * z - self.offset

    def at_zero(self) -> Array:
        """∇F(0) = −c."""
        return -self.offset

    def curvature(self, z: Array) -> Callable[[Array], Array]:
        """d ↦ H d + λ d, the same for every z."""
        return lambda d: self.hessian(d) + self.ridge * d


Gradient: TypeAlias = LiteralGradient | QuadraticGradient


def gradient_form(problem: LayerProblem, form: Form, *, num_calls: int) -> Gradient:
    """∇F in one of its equal forms, as a value to be called many times.

    Args:
      problem: the layer's problem.
      form: "literal", "gram", "fourier", or "auto" for the cheapest of them for these shapes.
      num_calls: how often ∇F or its curvature will be evaluated, for "auto".

    Raises:
      ValueError: at trace time, for an unknown form, or one that the linear map does not have:
        "fourier" for `Dense`; "gram" and "fourier" for strides, and for padding wider than the output.
    """
    _checks.member("form", form, FORMS)
    if form == "auto":
        form = cheapest_form(problem, num_calls)
    if form == "literal":
        return LiteralGradient(problem)
    if not problem.is_quadratic:
        _checks.fail(f"loss of form {form!r}", "Squares", type(problem.loss).__name__)
    refusal = _refusal(problem.linear_map, form)
    if refusal:
        _checks.fail(f"linear map of form {form!r}", *refusal)
    return QuadraticGradient(
        _hessian(problem.linear_map, form),
        _offset(problem),
        jnp.asarray(problem.ridge, problem.dtype),
    )


def cheapest_form(problem: LayerProblem, num_calls: int) -> Form:
    """The form with the least operations over `num_calls` gradients, from shapes alone.

    "literal" where a size is symbolic (`jax.export`).
    """
    if not problem.is_quadratic or not all(isinstance(n, int) for n in problem.batch_shape):
        return "literal"
    forms: tuple[Form, ...] = ("literal", "gram", "fourier")
    possible: list[Form] = [
        f for f in forms if f == "literal" or not _refusal(problem.linear_map, f)
    ]
    return min(possible, key=lambda form: form_cost(problem, form, num_calls))


def form_cost(problem: LayerProblem, form: Form, num_calls: int) -> float:
    """Work of `num_calls` gradients, in multiply-adds of a convolution; what all forms share is left out."""
    A, batch = problem.linear_map, math.prod(problem.batch_shape)
    n2 = A.out_features
    if isinstance(A, Dense):
        if form == "literal":
            return _DENSE * num_calls * 2 * batch * A.in_features * n2
        triangle = 0.625 if n2 >= 2 * _TRIANGLE else 0.75 if n2 >= _TRIANGLE else 1.0
        return _DENSE * (triangle * A.in_features * n2**2 + num_calls * batch * n2**2)
    taps, inputs, outputs = A.kernel.shape[0] * A.kernel.shape[1], A.kernel.shape[2], n2
    pixels, block = math.prod(A.out_shape[:2]), n2 // A.feature_group_count
    if form == "literal":
        return float(num_calls * 2 * batch * pixels * taps * inputs * outputs)
    gram_taps = (2 * A.kernel.shape[0] - 1) * (2 * A.kernel.shape[1] - 1)
    setup = gram_taps * taps * inputs * block * n2
    rims = 2 * taps * _padding_pixels(A) * inputs * outputs
    if form == "gram":
        return setup + num_calls * batch * (pixels * gram_taps * block * outputs + rims)
    points = math.prod(_torus(A))
    transform = 2 * _FFT_POINT * math.log2(points + 1) * points * n2
    product = 0.5 * points * _COMPLEX * block * n2
    symbol = points * gram_taps * block * n2
    return setup + symbol + num_calls * batch * (transform + product + rims)


def _offset(problem: LayerProblem) -> Array:
    """c = A x + b."""
    image = problem.linear_map(problem.inputs)
    return -problem.with_bias_and_ridge(-image, jnp.zeros_like(image))


def _refusal(linear_map: Dense | Conv, form: Form) -> tuple[str, object] | None:
    """What the form expects of the map and what it got, or None where it holds."""
    if isinstance(linear_map, Dense):
        return ("a convolution", "Dense") if form == "fourier" else None
    if linear_map.strides != (1, 1):
        return "strides (1, 1)", linear_map.strides
    sizes = zip(linear_map.pads, linear_map.out_shape, strict=False)
    if linear_map.padding != "CIRCULAR" and any(max(pads) > size for pads, size in sizes):
        return f"padding no wider than the output {linear_map.out_shape[:2]}", linear_map.pads
    return None


def _hessian(linear_map: Dense | Conv, form: Form) -> "Dense | Conv | _Spectrum | _Toeplitz":
    """A A* as an operator."""
    if isinstance(linear_map, Dense):
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        return Dense(symmetric_product(linear_map.kernel, precision))
    kernel = gram_kernel(linear_map)
    circular = linear_map.padding == "CIRCULAR"
    if form == "fourier":
        whole = _Spectrum.of(kernel, linear_map)
    else:
        extents = [
            d * (n - 1)
            for d, n in zip(linear_map.kernel_dilation, linear_map.kernel.shape[:2], strict=True)
        ]
        whole = Conv(
            kernel,
            (linear_map.out_shape[0], linear_map.out_shape[1]),
            padding="CIRCULAR" if circular else [(e, e) for e in extents],
            kernel_dilation=linear_map.kernel_dilation,
            feature_group_count=linear_map.feature_group_count,
        )
    rims = _rims(linear_map)
    return _Toeplitz(whole, rims) if rims else whole


def symmetric_product(matrix: Array, precision: str | None = None) -> Array:
    r"""WᵀW for W (n1, n2), in little more than half the work of a general product where n2 is large.

        [W₁ W₂]ᵀ[W₁ W₂] = [W₁ᵀW₁, W₁ᵀW₂; (W₁ᵀW₂)ᵀ, W₂ᵀW₂],    recursively.

    Its derivative is dWᵀW + (dWᵀW)ᵀ, whose transpose is the one product W (Ḡ + Ḡᵀ).
    """
    return _symmetric_product(precision, matrix)


def _product(precision, left, right):
    return jnp.matmul(left.T, right, precision=precision)


def _symmetric_product_value(precision, matrix):
    n2 = matrix.shape[1]
    if n2 < _TRIANGLE:
        return _product(precision, matrix, matrix)
    left, right = matrix[:, : n2 // 2], matrix[:, n2 // 2 :]
    across = _product(precision, left, right)
    return jnp.block(
        [
            [_symmetric_product_value(precision, left), across],
            [across.T, _symmetric_product_value(precision, right)],
        ]
    )


_symmetric_product = jax.custom_jvp(_symmetric_product_value, nondiff_argnums=(0,))


@_symmetric_product.defjvp
def _symmetric_product_jvp(precision, primals, tangents):
    (matrix,), (tangent,) = primals, tangents
    half = _product(precision, matrix, tangent)
    return _symmetric_product(precision, matrix), half + half.T


def gram_kernel(conv: Conv) -> Array:
    r"""G[δ; j′, j] = Σ_{a − a′ = δ} Σ_i kernel[a, i, j] kernel[a′, i, j′], δ = −(k − 1) … k − 1.

    Returns:
      HWIO kernel (2kh − 1, 2kw − 1, n2 / groups, n2), with the groups and dilation of `conv`.
    """
    kh, kw, inputs, n2 = conv.kernel.shape
    groups = conv.feature_group_count
    blocks = jnp.moveaxis(conv.kernel.reshape(kh, kw, inputs, groups, n2 // groups), 3, 0)

    def one_group(kernel):
        # the filters j' as a batch of images, correlated with the filters j: δ runs backwards
        products = lax.conv_general_dilated(
            jnp.moveaxis(kernel, 3, 0),
            kernel,
            (1, 1),
            ((kh - 1, kh - 1), (kw - 1, kw - 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.moveaxis(products[:, ::-1, ::-1], 0, 2)

    gram = one_group(blocks[0])[None] if groups == 1 else jax.vmap(one_group)(blocks)
    return jnp.moveaxis(gram, 0, 3).reshape(2 * kh - 1, 2 * kw - 1, n2 // groups, n2)


@value_object
class _Rim:
    """B B*, B the map from a strip of padding to the outputs beside it, as an update of all outputs."""

    strip: Conv
    corner: tuple[int, int] = static_field()

    def subtract_from(self, image: Array, z: Array) -> Array:
        rows, columns = (
            slice(start, start + n)
            for start, n in zip(self.corner, self.strip.out_shape[:2], strict=True)
        )
        beside = z[..., rows, columns, :]
        return image.at[..., rows, columns, :].add(-self.strip(self.strip.adjoint(beside)))


def _padding_pixels(conv: Conv) -> int:
    """How many zeros are padded."""
    if conv.padding == "CIRCULAR":
        return 0
    padded = math.prod(n + sum(p) for n, p in zip(conv.spatial_shape, conv.pads, strict=True))
    return padded - math.prod(conv.spatial_shape)


def _rims(conv: Conv) -> tuple[_Rim, ...]:
    """The strips of zero padding: full rows above and below, the image's height left and right."""
    if conv.padding == "CIRCULAR":
        return ()
    (top, bottom), (left, right) = conv.pads
    height, width = conv.spatial_shape
    rows, columns = (extent - 1 for extent in conv.dilated_kernel_shape)
    out_height, out_width, _ = conv.out_shape
    full = width + left + right

    def rim(shape, padding, corner):
        strip = Conv(
            conv.kernel,
            shape,
            padding=padding,
            kernel_dilation=conv.kernel_dilation,
            feature_group_count=conv.feature_group_count,
        )
        return _Rim(strip, corner)

    rims = []
    if top:
        rims.append(rim((top, full), ((0, rows), (0, 0)), (0, 0)))
    if bottom:
        rims.append(rim((bottom, full), ((rows, 0), (0, 0)), (out_height - bottom, 0)))
    if left:
        rims.append(rim((height, left), ((top, bottom), (0, columns)), (0, 0)))
    if right:
        rims.append(rim((height, right), ((top, bottom), (columns, 0)), (0, out_width - right)))
    return tuple(rims)


@value_object
class _Toeplitz:
    """A A* under zero padding: the convolution with the Gram kernel less the rims."""

    whole: "Conv | _Spectrum"
    rims: tuple[_Rim, ...]

    def __call__(self, z: Array) -> Array:
        image = self.whole(z)
        for rim in self.rims:
            image = rim.subtract_from(image, z)
        return image


@value_object
class _Spectrum:
    """Convolution with the Gram kernel on a torus, z ↦ irfft2(Ĝ(f) rfft2(z)), cropped to z's grid."""

    symbol: Array  # (P, Q, groups, n2 / groups, n2 / groups), Q the half spectrum
    torus: tuple[int, int] = static_field()

    @classmethod
    def of(cls, kernel: Array, conv: Conv) -> "_Spectrum":
        """Ĝ(f) = Σ_δ G[δ] exp(2πi f·δ), with integer phases so that no digit is lost."""
        shape, (dh, dw) = _torus(conv), conv.kernel_dilation
        taps_h, taps_w, block, n2 = kernel.shape
        rows = _phases(shape[0], shape[0], dh, taps_h, kernel.dtype)
        columns = _phases(shape[1], shape[1] // 2 + 1, dw, taps_w, kernel.dtype)
        groups = kernel.reshape(taps_h, taps_w, block, n2 // block, block)
        partial = jnp.einsum("qb,abigj->aqgij", columns, groups)
        return cls(jnp.einsum("pa,aqgij->pqgij", rows, partial), shape)

    def __call__(self, z: Array) -> Array:
        height, width, n2 = z.shape[-3:]
        groups = self.symbol.shape[2]
        flat = z.reshape(-1, height, width, n2)
        spectrum = jnp.fft.rfft2(flat, s=self.torus, axes=(1, 2))
        spectrum = spectrum.reshape(*spectrum.shape[:3], groups, n2 // groups)
        spectrum = jnp.einsum("bpqgi,pqgij->bpqgj", spectrum, self.symbol)
        spectrum = spectrum.reshape(*spectrum.shape[:3], n2)
        image = jnp.fft.irfft2(spectrum, s=self.torus, axes=(1, 2))
        return image[:, :height, :width].reshape(z.shape)


def _phases(period: int, num_frequencies: int, dilation: int, taps: int, dtype) -> Array:
    """exp(2πi f δ / N) for f = 0 … F − 1 and the centred taps δ, shape (F, taps)."""
    delta = dilation * (jnp.arange(taps) - taps // 2)
    turns = (jnp.arange(num_frequencies)[:, None] * delta) % period
    angle = (2.0 * math.pi / period) * turns.astype(dtype)
    return lax.complex(jnp.cos(angle), jnp.sin(angle))


def _torus(conv: Conv) -> tuple[int, int]:
    """The layer's own grid, or one on which the taps of G do not wrap around: out + k − 1, 5-smooth."""
    if conv.padding == "CIRCULAR":
        return conv.spatial_shape
    rows, columns = (
        _five_smooth(n + k - 1)
        for n, k in zip(conv.out_shape[:2], conv.dilated_kernel_shape, strict=True)
    )
    return rows, columns


def _five_smooth(n: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least n."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
