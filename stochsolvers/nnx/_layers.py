"""Solver layers: the parameters of `nnx.Linear` and `nnx.Conv`, the forward pass of a solver."""

from typing import Any

import jax
from flax import nnx

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Conv, Dense
from stochsolvers.losses import Loss, Squares
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solver


class SolverLinear(SolverLayer, nnx.Linear):
    r"""`nnx.Linear` and its activation, as a solver of minimise ½||Wz − x||² − <b, z> + (λ/2)||z||² + g(z).

    With `ProxGD(1, step_size=1.0)` it is activation(x W + b); with `ProxSG` of one iteration, the same
    after dropout. More iterations use the same parameters.

    Args:
      in_features: n1.
      out_features: n2.
      prior: g, whose prox is the activation; ReLU by default.
      solver: a configuration such as `ProxSG(tau=0.5, num_iters=10)`.
      ridge: λ; the paper uses 1e-3 with stochastic solvers.
      loss: ℓ between A* z and the input; half the squared distance by default.
      normalize: solve the problem with the map A/√L and the inputs √L x (`LayerProblem.normalized`): the
        default step is then 1, and the first iterate the trained layer's output. To swap a layer of a trained
        network; the paper's scaling, the default, is the one to train with sampling from scratch.
      output: "activation" for the last iterate z_K; "pre_activation" for the w_K with prox_g(w_K) = z_K, in a
        model whose own code applies the activation.
      deterministic: use the full gradient; flipped by `train()` and `eval()`.
      rng_collection: name of the random stream.
      rngs: random streams for initialisation and sampling.
      **options: those of `nnx.Linear`.

    References:
      Bibi et al. 2019, section 3.
    """

    plain_class = nnx.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        solver: Solver,
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
        dot_general = options.get("dot_general")
        _layers.refuse(
            "SolverLinear",
            dot_general=None if dot_general is jax.lax.dot_general else dot_general,
            preferred_element_type=options.get("preferred_element_type"),
        )
        nnx.Linear.__init__(self, in_features, out_features, rngs=rngs, **options)
        self.init_stochastic(deterministic, rng_collection, rngs)
        settings = _layers.Settings(solver, prior, ridge, loss, normalize, output)
        self._init_solver(settings)

    def _kept_map(self) -> Dense:
        return Dense(self._folded_kernel())

    def _linear_map(self, kernel: Array, inputs: Array) -> Dense:
        return Dense(kernel)

    def _plain_call(self, inputs: Array) -> Array:
        return nnx.Linear.__call__(self, inputs)


class SolverConv(SolverLayer, nnx.Conv):
    """`nnx.Conv` and its activation, as a solver; whole feature maps are sampled.

    Args:
      in_features: n1.
      out_features: n2.
      kernel_size: (kh, kw), or one number for each of 1 to 3 spatial axes.
      strides: as in `nnx.Conv`.
      spatial_shape: of the inputs, (H, W) for images, on which the Lipschitz constant depends. With it the
        constant is cached, as in the paper; without, it is computed at every call.
      prior: g, whose prox is the activation; ReLU by default.
      solver: a configuration such as `ProxGD(num_iters=10)`.
      ridge: λ.
      loss: ℓ between A* z and the input; half the squared distance by default.
      normalize, output: as in `SolverLinear`.
      deterministic: use the full gradient; flipped by `train()` and `eval()`.
      rng_collection: name of the random stream.
      rngs: random streams for initialisation and sampling.
      **options: those of `nnx.Conv`; `mask` and `input_dilation` are refused.
    """

    plain_class = nnx.Conv

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Any,
        strides: Any = 1,
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
        convolve = options.get("conv_general_dilated")
        _layers.refuse(
            "SolverConv",
            conv_general_dilated=None if convolve is jax.lax.conv_general_dilated else convolve,
            preferred_element_type=options.get("preferred_element_type"),
        )
        nnx.Conv.__init__(
            self, in_features, out_features, kernel_size, strides, rngs=rngs, **options
        )
        if spatial_shape is not None:
            rank = self._kernel_ndim() - 2
            spatial_shape = _checks.counts("spatial_shape", spatial_shape, rank)
        self.spatial_shape = spatial_shape
        self.init_stochastic(deterministic, rng_collection, rngs)
        settings = _layers.Settings(solver, prior, ridge, loss, normalize, output)
        self._init_solver(settings)

    def _kept_map(self) -> Conv | None:
        if self.spatial_shape is None:
            return None
        return _layers.conv_map(self, self._folded_kernel(), self.spatial_shape)

    def _kernel_ndim(self) -> int:
        return len(self.kernel_size) + 2

    def _plain_call(self, inputs: Array) -> Array:
        return nnx.Conv.__call__(self, inputs)

    def _linear_map(self, kernel: Array, inputs: Array) -> Conv:
        pixels = _layers.pixels_of(self, inputs, kernel.ndim - 2, self.spatial_shape)
        return _layers.conv_map(self, kernel, pixels)
