r"""How long the equal forms of ∇F take, from shapes alone; `forms` chooses by it.

The unit is one multiply-add of a convolution. The constants are fits to measurements on two CPU cores of
the shapes in `benchmarks.forms`, one to the solves alone, one to their values and gradients.
"""

import math
from typing import NamedTuple

from stochsolvers._symmetric import TRIANGLE
from stochsolvers.estimators._hessians import gram_torus, num_rims, padding_pixels
from stochsolvers.linear_maps import Conv, Dense


class Rates(NamedTuple):
    """What each kind of work counts for.

    Attributes:
      call: a convolution or a transform, whatever its size.
      product_call: a matrix product, likewise.
      gram_call: a Gram matrix, likewise.
      entry: an entry of an elementwise pass.
      patch: an entry of the patches that a convolution gathers.
      dense: a multiply-add of a matrix product.
      gram: a multiply-add of a Gram matrix.
      gram_taps: a multiply-add of the Gram kernel.
      symbol: a multiply-add of its transform.
      fft: a point of a real FFT, for each halving of the grid.
      complex: a complex multiply-add of a batch of matrix products.
      symbol_entry: an entry of the symbol that they read.
      rim_call: a strip of padding.
      rim: a multiply-add of a strip's product.
      rim_entry: an entry that a strip's update moves.
    """

    call: float
    product_call: float
    gram_call: float
    entry: float
    patch: float
    dense: float
    gram: float
    gram_taps: float
    symbol: float
    fft: float
    complex: float
    symbol_entry: float
    rim_call: float
    rim: float
    rim_entry: float


SOLVE = Rates(
    call=1.5e6, product_call=2.4e5, gram_call=1.4e6, entry=9.9, patch=14.0, dense=1.2, gram=1.4,
    gram_taps=1.4, symbol=8.4, fft=25.0, complex=17.0, symbol_entry=14.0, rim_call=7.5e5, rim=2.2,
    rim_entry=19.0,
)  # fmt: skip
"""Of a solve that nothing differentiates."""

GRADIENT = Rates(
    call=2.2e5, product_call=1.6e5, gram_call=1.0e6, entry=40.0, patch=9.6, dense=0.86, gram=0.59,
    gram_taps=2.3, symbol=7.8, fft=6.2, complex=18.0, symbol_entry=27.0, rim_call=1.0e6, rim=1.2,
    rim_entry=33.0,
)  # fmt: skip
"""Of a solve and its derivatives in reverse mode."""


def dense_cost(A: Dense, form: str, batch: int, num_calls: int, rates: Rates) -> float:
    """Of `num_calls` gradients of a dense map, the setting up of the form included."""
    n1, n2 = A.in_features, A.out_features
    if form == "literal":
        product = 2 * n1 * n2
        call = 2 * rates.product_call + batch * (
            rates.dense * product + rates.entry * (n1 + 3 * n2)
        )
        return num_calls * call
    triangle = 0.625 if n2 >= 2 * TRIANGLE else 0.75 if n2 >= TRIANGLE else 1.0
    call = rates.product_call + batch * (rates.dense * n2**2 + rates.entry * 3 * n2)
    return rates.gram_call + rates.gram * triangle * n1 * n2**2 + num_calls * call


def conv_cost(A: Conv, form: str, batch: int, num_calls: int, rates: Rates) -> float:
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
        call = 2 * pixels * taps * inputs * n2 + rates.patch * pixels * taps * (n1 + n2)
        call += rates.entry * (pixels * (n1 + 3 * n2) + copies * (n1 + n2))
        return num_calls * (2 * rates.call + batch * call)
    gram_taps = math.prod(2 * k - 1 for k in sizes)
    setup = rates.gram_taps * gram_taps * taps * inputs * block * n2
    strips = 2 * rates.rim * taps * padding_pixels(A) * inputs * n2
    strips += num_rims(A) * rates.rim_entry * pixels * n2
    shared = rates.entry * 3 * pixels * n2 + strips
    calls = num_rims(A) * rates.rim_call
    if form == "gram":
        copies = wrapped([2 * k - 2 for k in A.dilated_kernel_shape])
        call = pixels * gram_taps * (block * n2 + rates.patch * n2) + rates.entry * copies * n2
        return setup + num_calls * (rates.call + calls + batch * (call + shared))
    points = math.prod(gram_torus(A))
    symbol = 0.5 * points * block * n2
    call = 2 * rates.fft * n2 * points * math.log2(points + 1) + rates.complex * symbol
    fixed = 3 * rates.call + calls + rates.symbol_entry * symbol
    return setup + rates.symbol * gram_taps * symbol + num_calls * (fixed + batch * (call + shared))
