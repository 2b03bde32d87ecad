"""Solver layers for Flax Linen."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Conv, Dense, LinearMap, Transposed, dense_general
from stochsolvers.linen._following import FollowingNorm
from stochsolvers.losses import Loss, Squares
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solution, Solver
from stochsolvers.surgery import _fold

STATE = "solver_state"
RECORDS = "solver_records"


class SolverLayer(nn.Module, kw_only=True):
    """What the solver layers share, the attributes of `SolverDense`; not for use on its own.

    Attributes:
      plain_class: the layer of Linen that it is a twin of.
    """

    plain_class: ClassVar[Any]

    solver: Solver
    prior: Prior = NonNegative()
    ridge: Scalar = 0.0
    loss: Loss = Squares()
    normalize: bool = False
    output: _layers.Output = "activation"
    deterministic: bool = False
    rng_collection: str = "dropout"
    following: FollowingNorm | None = None

    @classmethod
    def from_layer(cls, layer: nn.Module, *, solver: Solver, **options: Any) -> Self:
        """The solver twin of a layer: its options, its name and its parameter tree.

        Args:
          layer: of the class that it is a twin of, without a call of its own.
          solver: of the twin.
          **options: the twin's other attributes, such as `prior` and `ridge`.

        Raises:
          ValueError: for another layer, and for a subclass with a call of its own, which would be lost.
        """
        return cls(solver=solver, **(plain_options(layer, cls.plain_class) | options))

    def __post_init__(self) -> None:
        _layers.Settings.of(self).check(type(self).__name__)
        super().__post_init__()

    def __call__(self, inputs: Array, **options: Any) -> Array:
        """The solver's last iterate, or its pre-activation; options as in `solve`."""
        _checks.activations(f"inputs of {type(self).__name__}", inputs)
        return _layers.output_of(self, self.solve(inputs, **options))

    def assembled(self, inputs: Array) -> tuple[LinearMap, Array, Array | None]:
        """A, and x and b in the layer's dtype."""
        raise TypeError("a solver layer defines assembled")

    def problem(self, inputs: Array, *, skip: Array | None = None) -> LayerProblem:
        """The convex problem that the layer solves at these inputs, for objectives and certificates.

        Of a layer bound to variables, or `layer.apply(variables, inputs, method="problem")`.
        """
        linear_map, inputs, bias = self.assembled(inputs)
        settings = _layers.Settings.of(self)
        problem = settings.problem(linear_map, inputs, bias, skip)
        if not settings.normalize:
            return problem
        kept = self._kept_constant(problem.linear_map)
        constant = _layers.current_constant(settings, problem.linear_map, *kept)
        return settings.prepared(problem, constant)[0]

    def solve(
        self,
        inputs: Array,
        *,
        skip: Array | None = None,
        deterministic: bool | None = None,
        certify: bool = False,
    ) -> Solution:
        """The layer's output with the solver's residuals; see `stochsolvers.nnx.SolverLinear.solve`."""
        layer: Any = self
        if deterministic is None:
            deterministic = layer.deterministic
        sampled = layer.solver.stochastic and not deterministic
        settings = _layers.Settings.of(self)
        linear_map, inputs, bias = self.assembled(inputs)
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

    def _with_following(self, kernel: Array, bias: Array | None) -> tuple[Array, Array | None]:
        layer: Any = self
        if layer.following is None or self.is_initializing():
            return kernel, bias
        return _fold.folded(kernel, bias, self._affine(), axis=self.output_axis())

    @nn.nowrap
    def output_axis(self) -> int:
        """The kernel's axis of the features of the output."""
        return -1

    def _affine(self) -> tuple[Array, Array]:
        """(s, t) of the normalisation behind the layer."""
        following: Any = self.following  # pyright: ignore[reportAttributeAccessIssue]
        return following.affine(following.arrays(self.scope))

    def in_its_place(self, inputs: Array, output: Array, plain: Callable[[], Array]) -> Array:
        """What a layer returns in whose place the solver runs, the plain layer's bits for one iteration.

        Before a normalisation y ↦ s y + t that is the u with s u + t = w. Where the library's convolution
        adds in another order than XLA's it is y + (w − w₁), with the first iterate w₁.

        Args:
          inputs: of the layer.
          output: the pre-activation w.
          plain: computes the plain layer's output y.
        """
        layer: Any = self
        linear_map, inputs, bias = self.assembled(inputs)
        if self.is_initializing() or (
            layer.following is None and not _adds_in_another_order(linear_map)
        ):
            return output
        problem = _layers.Settings.of(self).problem(linear_map, inputs, bias, None)
        fold = _fold.identity(output) if layer.following is None else self._affine()
        with _layers.precision_context(layer.precision):
            return _fold.unfolded(output, plain(), problem, fold)

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
        if refresh:
            now = _layers.fingerprint(settings, linear_map)
            if self.is_initializing():
                now = jnp.zeros_like(now)  # weights may be about to be loaded
            if not (self.is_initializing() and kept_before):
                self.put_variable(STATE, "lipschitz", constant())
                self.put_variable(STATE, "reference", now)
        return self.get_variable(STATE, "lipschitz"), self.get_variable(STATE, "reference")


def _adds_in_another_order(linear_map: LinearMap) -> bool:
    """Whether it is a transposed convolution, or one that `_convolution` pads first: small, or unpadded."""
    if isinstance(linear_map, Transposed):
        return True
    if not isinstance(linear_map, Conv):
        return False
    sizes = zip(linear_map.in_shape, linear_map.dilated_kernel_shape, strict=False)
    is_padded = any(map(any, linear_map.pads)) or max(linear_map.kernel.shape[:-2]) == 1
    return any(n < k for n, k in sizes) or not is_padded


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
      following: set by `replace_layers`: a batch normalisation behind the layer, with which it is one map.
    """

    plain_class = nn.Dense

    @nn.compact
    def assembled(self, inputs: Array) -> tuple[LinearMap, Array, Array | None]:
        """A, and x and b in the layer's dtype."""
        _layers.refuse(
            "SolverDense", dot_general=self.dot_general, dot_general_cls=self.dot_general_cls
        )
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        kernel, bias = self._with_following(kernel, bias)
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs, kernel, bias = promoted
        return Dense(kernel), inputs, bias


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
      following: set by `replace_layers`: a batch normalisation behind the layer, with which it is one map.
    """

    plain_class = nn.Conv

    @nn.compact
    def assembled(self, inputs: Array) -> tuple[LinearMap, Array, Array | None]:
        """A, and x and b in the layer's dtype."""
        _layers.refuse(
            "SolverConv",
            conv_general_dilated=self.conv_general_dilated,
            conv_general_dilated_cls=self.conv_general_dilated_cls,
        )
        size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        _layers.pixels_of(self, inputs, len(size))
        n1 = jnp.shape(inputs)[-1]
        shape = (*size, n1 // self.feature_group_count, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        kernel, bias = self._with_following(kernel, bias)
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs, kernel, bias = promoted
        return linear_map_of(self, kernel, jnp.shape(inputs)), inputs, bias


class SolverDenseGeneral(SolverLayer, nn.DenseGeneral, kw_only=True):
    """`nn.DenseGeneral` over the trailing axes of its inputs, and its activation, as a solver.

    Attributes:
      solver, prior, ridge, loss, normalize, output, deterministic, rng_collection, following: as in
        `SolverDense`.
    """

    plain_class = nn.DenseGeneral

    @nn.compact
    def assembled(self, inputs: Array) -> tuple[LinearMap, Array, Array | None]:
        """A, and x and b in the layer's dtype."""
        _layers.refuse(
            "SolverDenseGeneral",
            dot_general=self.dot_general,
            dot_general_cls=self.dot_general_cls,
            batch_dims=tuple(self.batch_dims) or None,
        )
        ndim, shape = jnp.ndim(inputs), jnp.shape(inputs)
        axes = (self.axis,) if isinstance(self.axis, int) else tuple(self.axis)
        axes = tuple(axis % ndim for axis in axes)
        if axes != tuple(range(ndim - len(axes), ndim)):
            _checks.fail("axis of SolverDenseGeneral", "the trailing axes, in order", self.axis)
        features = (self.features,) if isinstance(self.features, int) else tuple(self.features)
        own = shape[ndim - len(axes) :]
        kernel = self.param(
            "kernel", self._kernel_init(len(own)), (*own, *features), self.param_dtype
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", self._bias_init, features, self.param_dtype)
        kernel, bias = self._with_following(kernel, bias)
        promoted: Any = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        inputs, kernel, bias = promoted
        return dense_general(kernel, own, axis=tuple(range(len(own)))), inputs, bias

    @nn.nowrap
    def _kernel_init(self, num_axes: int) -> Any:
        """As the plain layer draws it: of a matrix."""

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
            matrix = math.prod(shape[:num_axes]), math.prod(shape[num_axes:])
            return _reshaped(self.kernel_init(key, matrix, dtype), shape)

        return init

    @nn.nowrap
    def _bias_init(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Any:
        return _reshaped(self.bias_init(key, (math.prod(shape),), dtype), shape)


def _reshaped(value: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(value, meta.AxisMetadata):
        return meta.replace_boxed(value, jnp.reshape(value.unbox(), shape))
    return jnp.reshape(value, shape)


def plain_options(layer: Any, kind: type) -> dict[str, Any]:
    """The attributes that a plain layer's class defines, and its name.

    Raises:
      ValueError: for another class, and for a layer with a call of its own.
    """
    known = (kind.__call__, SolverLayer.__call__)  # pyright: ignore[reportFunctionMemberAccess]
    if not isinstance(layer, kind) or type(layer).__call__ not in known:
        got = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
        _checks.fail("layer", f"an nn.{kind.__name__} without a call of its own", got)
    names = [field.name for field in dataclasses.fields(kind) if field.name != "parent"]  # pyright: ignore
    return {name: getattr(layer, name) for name in names}


def linear_map_of(layer: Any, kernel: Array, shape: tuple[int, ...]) -> LinearMap:
    """The linear map A of a Flax layer with this kernel, for inputs of this shape, batch axes included.

    Args:
      layer: an `nn.Dense`, `Conv`, `ConvTranspose`, `DenseGeneral` or `Einsum`.
      kernel: its parameter.
      shape: of its inputs.

    Raises:
      ValueError: for another layer, and for unsupported options.
    """
    shape = _checks.shape("shape of linear_map_of", shape)
    if isinstance(layer, nn.Dense):
        return Dense(kernel)
    if isinstance(layer, nn.DenseGeneral):
        return dense_general(kernel, tuple(shape), axis=layer.axis, batch_axis=layer.batch_dims)
    if isinstance(layer, nn.Einsum) and layer.einsum_str is not None:
        return _layers.einsum_map(layer.einsum_str, kernel, shape)
    if isinstance(layer, nn.ConvTranspose):
        return _layers.conv_transpose_map(layer, kernel, shape)
    if not isinstance(layer, nn.Conv):
        _checks.fail("layer", "a linear layer of Linen", type(layer).__name__)
    return _layers.conv_map(layer, kernel, shape[1 - kernel.ndim : -1])
