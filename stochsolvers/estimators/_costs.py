r"""How long the equal forms of ∇F take, from shapes alone; `forms` chooses by it.

The unit is one multiply-add of a convolution. The constants are a fit to measurements on two CPU cores of
the shapes in `benchmarks.forms`, forward and gradient together.
"""

import math

from stochsolvers.estimators._hessians import TRIANGLE, gram_torus, num_rims, padding_pixels
from stochsolvers.linear_maps import Conv, Dense

_CALL = 3.0e5  # a convolution or transform, whatever its size
_PRODUCT_CALL = 3.0e4  # a matrix product, likewise
_GRAM_CALL = 1.5e6  # a Gram matrix and its derivative, likewise
_PASS = 10.0  # an entry of an elementwise pass
_PATCH = 43.0  # an entry of the patches that a convolution gathers
_DENSE = 2.2  # a multiply-add of a matrix product
_GRAM_TAPS = 1.6  # a multiply-add of the Gram kernel
_SYMBOL = 21.0  # a multiply-add of its transform
_FFT = 5.8  # a point of a real FFT, for each halving of the grid
_COMPLEX = 23.0  # a complex multiply-add of a batch of matrix products
_SYMBOL_ENTRY = 87.0  # an entry of the symbol that they read
_RIM_CALL = 3.7e5  # a strip of padding
_RIM = 15.0  # a multiply-add of a strip's product
_RIM_ENTRY = 31.0  # an entry that a strip's update moves


def dense_cost(A: Dense, form: str, batch: int, num_calls: int) -> float:
    """Of `num_calls` gradients of a dense map, the setting up of the form included."""
    n1, n2 = A.in_features, A.out_features
    if form == "literal":
        product = 2 * n1 * n2
        call = 2 * _PRODUCT_CALL + batch * (_DENSE * product + _PASS * (n1 + 3 * n2))
        return num_calls * call
    triangle = 0.625 if n2 >= 2 * TRIANGLE else 0.75 if n2 >= TRIANGLE else 1.0
    call = _PRODUCT_CALL + batch * (_DENSE * n2**2 + _PASS * 3 * n2)
    return _GRAM_CALL + _DENSE * triangle * n1 * n2**2 + num_calls * call


def conv_cost(A: Conv, form: str, batch: int, num_calls: int) -> float:
    """The same for a convolution."""
    *sizes, inputs, n2 = A.kernel.shape
    groups = A.feature_group_count
    n1, block = inputs * groups, n2 // groups
    taps, pixels = math.prod(sizes), math.prod(A.out_shape[:-1])
    circular = A.padding == "CIRCULAR"

    def wrapped(reach):  # pixels of an image that is padded with its other side
        return math.prod(n + r for n, r in zip(A.spatial_shape, reach, strict=True)) * circular

    if form == "literal":
        copies = wrapped([k - 1 for k in A.dilated_kernel_shape])
        call = 2 * pixels * taps * inputs * n2 + _PATCH * pixels * taps * (n1 + n2)
        call += _PASS * (pixels * (n1 + 3 * n2) + copies * (n1 + n2))
        return num_calls * (2 * _CALL + batch * call)
    gram_taps = math.prod(2 * k - 1 for k in sizes)
    setup = _GRAM_TAPS * gram_taps * taps * inputs * block * n2
    strips = 2 * _RIM * taps * padding_pixels(A) * inputs * n2
    strips += num_rims(A) * _RIM_ENTRY * pixels * n2
    shared = _PASS * 3 * pixels * n2 + strips
    calls = num_rims(A) * _RIM_CALL
    if form == "gram":
        copies = wrapped([2 * k - 2 for k in A.dilated_kernel_shape])
        call = pixels * gram_taps * (block * n2 + _PATCH * n2) + _PASS * copies * n2
        return setup + num_calls * (_CALL + calls + batch * (call + shared))
    points = math.prod(gram_torus(A))
    symbol = 0.5 * points * block * n2
    call = 2 * _FFT * n2 * points * math.log2(points + 1) + _COMPLEX * symbol
    fixed = 3 * _CALL + calls + _SYMBOL_ENTRY * symbol
    return setup + _SYMBOL * gram_taps * symbol + num_calls * (fixed + batch * (call + shared))
