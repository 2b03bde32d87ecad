"""The solver layer of `nnx.ConvTranspose`."""

from typing import Any

from flax import nnx

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import LinearMap
from stochsolvers.losses import Loss, Squares
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solver


class SolverConvTranspose(SolverLayer, nnx.ConvTranspose):
    r"""`nnx.ConvTranspose` and its activation, as a solver; whole feature maps are sampled.

        minimise ½||A* z − x||² − <b, z> + (λ/2)||z||² + g(z),   A = `stochsolvers.conv_transpose(...)`,

    so that A* is a convolution, with which each iteration predicts the input from the larger image z.

    Args:
      in_features: n1.
      out_features: n2.
      kernel_size: (kh, kw), or one number for each of 1 to 3 spatial axes.
      strides: as in `nnx.ConvTranspose`.
      spatial_shape: of the inputs, as in `SolverConv`.
      solver, prior, ridge, loss, normalize, output: as in `SolverLinear`. The pre-activation is
        y + (w_K − w_1), y the plain layer's output, from which the library's w_1 can differ in the last bit.
      deterministic, rng_collection, rngs: likewise.
      **options: those of `nnx.ConvTranspose`; `mask` is refused.
    """

    plain_class = nnx.ConvTranspose
    rounds_as_plain = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        strides: Any = None,
        *,
        solver: Solver,
        spatial_shape: tuple[int, ...] | int | None = None,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        loss: Loss = Squares(),  # noqa: B008
        normalize: bool = False,
        output: _layers.Output = "activation",
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        _layers.refuse(
            "SolverConvTranspose",
            mask=options.get("mask"),
            preferred_element_type=options.get("preferred_element_type"),
        )
        nnx.ConvTranspose.__init__(
            self, in_features, out_features, kernel_size, strides, rngs=rngs, **options
        )
        if spatial_shape is not None:
            rank = self._kernel_ndim() - 2
            spatial_shape = _checks.counts("spatial_shape", spatial_shape, rank)
        self.spatial_shape = spatial_shape
        self.init_stochastic(deterministic, rng_collection, rngs)
        self._init_solver(_layers.Settings(solver, prior, ridge, loss, normalize, output))

    def _kept_map(self) -> LinearMap | None:
        if self.spatial_shape is None:
            return None
        shape = (*self.spatial_shape, self.in_features)
        return _layers.conv_transpose_map(self, self._folded_kernel(), shape)

    def _kernel_ndim(self) -> int:
        return len(self.kernel_size) + 2

    def _output_axis(self) -> int:
        return -2 if self.transpose_kernel else -1

    def _linear_map(self, kernel: Array, inputs: Array) -> LinearMap:
        _layers.pixels_of(self, inputs, kernel.ndim - 2, self.spatial_shape)
        return _layers.conv_transpose_map(self, kernel, inputs.shape)

    def _plain_call(self, inputs: Array) -> Array:
        return nnx.ConvTranspose.__call__(self, inputs)
