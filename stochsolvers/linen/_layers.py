"""Solver layers for Flax Linen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Dense, LinearMap, dense_general
from stochsolvers.losses import Loss, Squares
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solution, Solver

STATE = "solver_state"
RECORDS = "solver_records"


class SolverLayer(nn.Module):
    """What the two solver layers share; not for use on its own."""

    def __post_init__(self) -> None:
        _layers.Settings.of(self).check(type(self).__name__)
        super().__post_init__()

    def __call__(self, inputs: Array, **options: Any) -> Array:
        """The solver's last iterate, or its pre-activation; options as in `solve`."""
        layer: Any = self
        return _layers.output_of(layer, layer.solve(inputs, **options))

    def _solve(
        self,
        linear_map: LinearMap,
        inputs: Array,
        bias: Array | None,
        skip: Array | None,
        deterministic: bool | None,
        certify: bool,
    ) -> Solution:
        layer: Any = self
        if deterministic is None:
            deterministic = layer.deterministic
        sampled = layer.solver.stochastic and not deterministic
        settings = _layers.Settings.of(self)
        problem = settings.problem(linear_map, inputs, bias, skip)
        kept, reference = self._kept_constant(problem.linear_map)
        records = self.is_mutable_collection(RECORDS) and not self.is_initializing()
        return _layers.run(
            settings,
            self.make_rng(layer.rng_collection) if sampled else None,
            problem,
            kept=kept,
            reference=reference,
            deterministic=bool(deterministic),
            precision=layer.precision,
            dtype=inputs.dtype,
            certify=certify,
            record=functools.partial(self.sow, RECORDS, "solves") if records else None,
        )

    def _kept_constant(self, linear_map: LinearMap) -> tuple[Array | None, Array | None]:
        settings = _layers.Settings.of(self)

        def constant():
            return settings.constant(linear_map)

        refresh = self.is_mutable_collection(STATE)
        kept_before = all(self.has_variable(STATE, name) for name in ("lipschitz", "reference"))
        if not (refresh or kept_before):
            return None, None
        if jax.eval_shape(constant) is None:  # a fixed step
            return None, None
        now = _layers.fingerprint(settings, linear_map)
        kept = self.variable(STATE, "lipschitz", constant)
        reference = self.variable(STATE, "reference", lambda: jnp.zeros_like(now))  # no kernel yet
        if refresh and not self.is_initializing():
            kept.value, reference.value = constant(), now
        return kept.value, reference.value


class SolverDense(SolverLayer, nn.Dense, kw_only=True):
    """`nn.Dense` and its activation, as a solver; see `stochsolvers.nnx.SolverLinear`.

    Attributes:
      solver: a configuration such as `ProxSG(tau=0.5, num_iters=10)`.
      prior: g, whose prox is the activation; ReLU by default.
      ridge: λ.
      loss: ℓ between A* z and the input; half the squared distance by default.
      normalize, output: as in `stochsolvers.nnx.SolverLinear`.
      deterministic: use the full gradient.
      rng_collection: name of the random stream.
    """

    solver: Solver
    prior: Prior = NonNegative()
    ridge: Scalar = 0.0
    loss: Loss = Squares()
    normalize: bool = False
    output: _layers.Output = "activation"
    deterministic: bool = False
    rng_collection: str = "dropout"

    @nn.compact
    def solve(
        self,
        inputs: Array,
        *,
        skip: Array | None = None,
        deterministic: bool | None = None,
        certify: bool = False,
    ) -> Solution:
        """The layer's output with the solver's residuals; see `stochsolvers.nnx.SolverLinear.solve`."""
        _layers.refuse(
            "SolverDense", dot_general=self.dot_general, dot_general_cls=self.dot_general_cls
        )
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs, kernel, bias = promoted
        return self._solve(Dense(kernel), inputs, bias, skip, deterministic, certify)


class SolverConv(SolverLayer, nn.Conv, kw_only=True):
    """`nn.Conv` and its activation, as a solver; see `stochsolvers.nnx.SolverConv`.

    Attributes:
      solver: a configuration such as `ProxGD(num_iters=10)`.
      prior: g, whose prox is the activation; ReLU by default.
      ridge: λ.
      loss: ℓ between A* z and the input; half the squared distance by default.
      normalize, output: as in `stochsolvers.nnx.SolverLinear`.
      deterministic: use the full gradient.
      rng_collection: name of the random stream.
    """

    solver: Solver
    prior: Prior = NonNegative()
    ridge: Scalar = 0.0
    loss: Loss = Squares()
    normalize: bool = False
    output: _layers.Output = "activation"
    deterministic: bool = False
    rng_collection: str = "dropout"

    @nn.compact
    def solve(
        self,
        inputs: Array,
        *,
        skip: Array | None = None,
        deterministic: bool | None = None,
        certify: bool = False,
    ) -> Solution:
        """The layer's output with the solver's residuals; see `stochsolvers.nnx.SolverLinear.solve`."""
        _layers.refuse(
            "SolverConv",
            conv_general_dilated=self.conv_general_dilated,
            conv_general_dilated_cls=self.conv_general_dilated_cls,
        )
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        if jnp.ndim(inputs) < len(size) + 1:
            names = {1: "W", 2: "H, W", 3: "D, H, W"}.get(len(size), "spatial")
            wanted = f"(..., {names}, features)"
            _checks.fail("shape of SolverConv's inputs", wanted, jnp.shape(inputs))
        n1 = jnp.shape(inputs)[-1]
        shape = (*size, n1 // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs, kernel, bias = promoted
        linear_map = linear_map_of(self, kernel, jnp.shape(inputs))
        return self._solve(linear_map, inputs, bias, skip, deterministic, certify)


def linear_map_of(layer: Any, kernel: Array, shape: tuple[int, ...]) -> LinearMap:
    """The linear map A of a Flax layer with this kernel, for inputs of this shape, batch axes included.

    Args:
      layer: an `nn.Dense`, `Conv`, `ConvTranspose`, `DenseGeneral` or `Einsum`.
      kernel: its parameter.
      shape: of its inputs.

    Raises:
      ValueError: for unsupported options.
    """
    if isinstance(layer, nn.Dense):
        return Dense(kernel)
    if isinstance(layer, nn.DenseGeneral):
        return dense_general(kernel, tuple(shape), axis=layer.axis, batch_axis=layer.batch_dims)
    if isinstance(layer, nn.Einsum) and layer.einsum_str is not None:
        return _layers.einsum_map(layer.einsum_str, kernel, shape)
    if isinstance(layer, nn.ConvTranspose):
        return _layers.conv_transpose_map(layer, kernel, shape)
    return _layers.conv_map(layer, kernel, shape[1 - kernel.ndim : -1])
