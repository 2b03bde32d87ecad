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
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.problems import LayerProblem

Form: TypeAlias = Literal["auto", "literal", "gram", "fourier"]
FORMS = ("auto", "literal", "gram", "fourier")

_TRIANGLE = 256  # a symmetric product of at least so many columns computes one triangle
# costs in multiply-adds of a convolution, measured on a two-core CPU
_FFT_POINT = 20.0  # one point of a real FFT, for each halving of the grid
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

    hessian: "Dense | Conv | _Spectrum | _Toeplitz"
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


Gradient: TypeAlias = LiteralGradient | QuadraticGradient


def gradient_form(problem: LayerProblem, form: Form, *, num_calls: int) -> Gradient:
    """∇F in one of its equal forms, as a value to be called many times.

    Args:
      problem: the layer's problem.
      form: "literal", "gram", "fourier", or "auto" for the cheapest of them for these shapes.
      num_calls: how often ∇F or its curvature will be evaluated, for "auto".

    Raises:
      ValueError: at trace time, for an unknown form, or one that the linear map does not have:
        "fourier" for `Dense`; "gram" and "fourier" for strides, for padding wider than the output, and
        for maps other than `Dense` and `Conv`.
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
    if len(possible) == 1:
        return possible[0]
    return min(possible, key=lambda form: form_cost(problem, form, num_calls))


def form_cost(problem: LayerProblem, form: Form, num_calls: int) -> float:
    """Work of `num_calls` gradients, in multiply-adds of a convolution; what all forms share is left out.

    Of a `Dense` or a `Conv`.
    """
    A, batch = problem.linear_map, math.prod(problem.batch_shape)
    n2 = A.out_features
    if isinstance(A, Dense):
        if form == "literal":
            return _DENSE * num_calls * 2 * batch * A.in_features * n2
        triangle = 0.625 if n2 >= 2 * _TRIANGLE else 0.75 if n2 >= _TRIANGLE else 1.0
        return _DENSE * (triangle * A.in_features * n2**2 + num_calls * batch * n2**2)
    assert isinstance(A, Conv)
    *sizes, inputs, outputs = A.kernel.shape
    taps, pixels = math.prod(sizes), math.prod(A.out_shape[:-1])
    block = n2 // A.feature_group_count
    if form == "literal":
        return float(num_calls * 2 * batch * pixels * taps * inputs * outputs)
    gram_taps = math.prod(2 * k - 1 for k in sizes)
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


def _hessian(linear_map: LinearMap, form: Form) -> "Dense | Conv | _Spectrum | _Toeplitz":
    """A A* as an operator."""
    if isinstance(linear_map, Dense):
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        return Dense(symmetric_product(linear_map.kernel, precision))
    assert isinstance(linear_map, Conv)
    kernel = gram_kernel(linear_map)
    circular = linear_map.padding == "CIRCULAR"
    if form == "fourier":
        whole = _Spectrum.of(kernel, linear_map)
    else:
        extents = [k - 1 for k in linear_map.dilated_kernel_shape]
        whole = Conv(
            kernel,
            linear_map.out_shape[:-1],
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
      Kernel (*(2k − 1), n2 / groups, n2), with the groups and dilation of `conv`.
    """
    *taps, inputs, n2 = conv.kernel.shape
    groups, axes = conv.feature_group_count, len(taps)
    blocks = jnp.moveaxis(conv.kernel.reshape(*taps, inputs, groups, n2 // groups), -2, 0)
    spatial = "DHW"[-axes:]
    images = f"N{spatial}C"

    def one_group(kernel):
        # the filters j' as a batch of images, correlated with the filters j: δ runs backwards
        products = lax.conv_general_dilated(
            jnp.moveaxis(kernel, -1, 0),
            kernel,
            (1,) * axes,
            [(k - 1, k - 1) for k in taps],
            dimension_numbers=(images, f"{spatial}IO", images),
        )
        return jnp.moveaxis(lax.rev(products, tuple(range(1, axes + 1))), 0, -2)

    gram = one_group(blocks[0])[None] if groups == 1 else jax.vmap(one_group)(blocks)
    return jnp.moveaxis(gram, 0, -2).reshape(*(2 * k - 1 for k in taps), n2 // groups, n2)


@value_object
class _Rim:
    """B B*, B the map from a strip of padding to the outputs beside it, as an update of all outputs."""

    strip: Conv
    corner: tuple[int, ...] = static_field()

    def subtract_from(self, image: Array, z: Array) -> Array:
        sizes = zip(self.corner, self.strip.out_shape, strict=False)
        window = (..., *(slice(start, start + n) for start, n in sizes), slice(None))
        return image.at[window].add(-self.strip(self.strip.adjoint(z[window])))


def _padding_pixels(conv: Conv) -> int:
    """How many zeros are padded."""
    if conv.padding == "CIRCULAR":
        return 0
    padded = math.prod(n + sum(p) for n, p in zip(conv.spatial_shape, conv.pads, strict=True))
    return padded - math.prod(conv.spatial_shape)


def _rims(conv: Conv) -> tuple[_Rim, ...]:
    """The strips of zero padding, two for each spatial axis.

    On an axis, a strip is as long as the padded image on the axes after it, and as the image, padded by the
    layer, on the axes before it, so that every pixel of padding is in one strip.
    """
    if conv.padding == "CIRCULAR":
        return ()
    rims, shape, pads = [], conv.spatial_shape, conv.pads
    padded = tuple(n + sum(p) for n, p in zip(shape, pads, strict=True))
    for axis, side in itertools.product(range(len(shape)), (0, 1)):
        width, reach = pads[axis][side], conv.dilated_kernel_shape[axis] - 1
        if not width:
            continue
        before, after = range(axis), range(axis + 1, len(shape))
        strip = Conv(
            conv.kernel,
            (*(shape[i] for i in before), width, *(padded[i] for i in after)),
            padding=(*pads[:axis], ((0, reach), (reach, 0))[side], *((0, 0) for _ in after)),
            kernel_dilation=conv.kernel_dilation,
            feature_group_count=conv.feature_group_count,
        )
        start = (0, conv.out_shape[axis] - width)[side]
        rims.append(_Rim(strip, (*(0 for _ in before), start, *(0 for _ in after))))
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
    """Convolution with the Gram kernel on a torus, z ↦ irfft(Ĝ(f) rfft(z)), cropped to z's grid."""

    symbol: Array  # (*torus, groups, n2 / groups, n2 / groups), of the last axis the half spectrum
    torus: tuple[int, ...] = static_field()

    @classmethod
    def of(cls, kernel: Array, conv: Conv) -> "_Spectrum":
        """Ĝ(f) = Σ_δ G[δ] exp(2πi f·δ), with integer phases so that no digit is lost."""
        shape = _torus(conv)
        *taps, block, n2 = kernel.shape
        symbol, blocks, spatial = kernel.reshape(*taps, block, n2 // block, block), "igj", "abc"
        for axis in reversed(range(len(taps))):
            half = shape[axis] // 2 + 1 if axis == len(taps) - 1 else shape[axis]
            phases = _phases(
                shape[axis], half, conv.kernel_dilation[axis], taps[axis], kernel.dtype
            )
            old = spatial[: len(taps)]
            new = old.replace(old[axis], "f")
            equation = f"f{old[axis]},{old}{blocks}->{new}gij"
            symbol, blocks = jnp.einsum(equation, phases, symbol.astype(phases.dtype)), "gij"
        return cls(symbol, shape)

    def __call__(self, z: Array) -> Array:
        groups, block = self.symbol.shape[-3:-1]
        axes = tuple(range(1, len(self.torus) + 1))
        flat = z.reshape(-1, *z.shape[-1 - len(axes) :])
        spectrum = jnp.fft.rfftn(flat, s=self.torus, axes=axes)
        spectrum = spectrum.reshape(*spectrum.shape[:-1], groups, block)
        spectrum = jnp.einsum("b...gi,...gij->b...gj", spectrum, self.symbol)
        spectrum = spectrum.reshape(*spectrum.shape[:-2], groups * block)
        image = jnp.fft.irfftn(spectrum, s=self.torus, axes=axes)
        return image[:, *(slice(n) for n in flat.shape[1:-1])].reshape(z.shape)


def _phases(period: int, num_frequencies: int, dilation: int, taps: int, dtype) -> Array:
    """exp(2πi f δ / N) for f = 0 … F − 1 and the centred taps δ, shape (F, taps)."""
    delta = dilation * (jnp.arange(taps) - taps // 2)
    turns = (jnp.arange(num_frequencies)[:, None] * delta[None]) % period
    angle = (2.0 * math.pi / period) * turns.astype(dtype)
    return lax.complex(jnp.cos(angle), jnp.sin(angle))


def _torus(conv: Conv) -> tuple[int, ...]:
    """The layer's own grid, or one on which the taps of G do not wrap around: out + k − 1, 5-smooth."""
    if conv.padding == "CIRCULAR":
        return conv.spatial_shape
    sizes = zip(conv.out_shape, conv.dilated_kernel_shape, strict=False)
    return tuple(_five_smooth(n + k - 1) for n, k in sizes)


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
