"""What the Flax layers share: from a layer's arrays and options to a problem and its solution."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks
from stochsolvers._kept_constants import constant_and_fingerprint as constant_and_fingerprint
from stochsolvers._kept_constants import current_constant as current_constant
from stochsolvers._kept_constants import fingerprint as fingerprint
from stochsolvers._kept_constants import is_current as is_current
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.linear_maps import Contraction, Conv, LinearMap, Padding, conv_transpose
from stochsolvers.lipschitz import lipschitz_constant
from stochsolvers.losses import Loss
from stochsolvers.problems import LayerProblem
from stochsolvers.prox import Prior
from stochsolvers.solvers import Solution, Solver
from stochsolvers.step_sizes import InverseLipschitz


def conv_map(
    layer: Any,
    kernel: Array,
    spatial_shape: tuple[int, ...],
    *,
    what: str = "a solver convolution",
) -> Conv:
    """A `Conv` with the options of a Flax convolution, for inputs of these pixels.

    Raises:
      ValueError: for unsupported options.
    """
    rank = _spatial_rank(layer, kernel)
    if any(d != 1 for d in np.broadcast_to(layer.input_dilation or 1, (rank,))):
        _checks.fail(f"input_dilation of {what}", "1", layer.input_dilation)
    if layer.mask is not None:
        _checks.fail(f"mask of {what}", "None", f"an array of shape {layer.mask.shape}")
    padding = layer.padding
    if isinstance(padding, int):
        padding = ((padding, padding),) * rank
    elif not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    elif padding.upper() in ("SAME", "VALID"):  # Flax takes these in small letters too
        padding = padding.upper()
    return Conv(
        kernel,
        cast(Any, tuple(spatial_shape)),
        strides=cast(Any, _for_each_axis(layer.strides, rank)),
        padding=cast(Padding, padding),
        kernel_dilation=cast(Any, _for_each_axis(layer.kernel_dilation, rank)),
        feature_group_count=layer.feature_group_count,
    )


def conv_transpose_map(layer: Any, kernel: Array, inputs_shape: tuple[int, ...]) -> LinearMap:
    """The map of a Flax transposed convolution, for inputs of this shape."""
    if layer.mask is not None:
        _checks.fail("mask of a transposed convolution", "None", "an array")
    rank = _spatial_rank(layer, kernel)
    return conv_transpose(
        kernel,
        tuple(inputs_shape[-rank - 1 : -1]),
        strides=_for_each_axis(layer.strides, rank),
        padding=layer.padding,
        kernel_dilation=_for_each_axis(layer.kernel_dilation, rank),
        transpose_kernel=layer.transpose_kernel,
    )


def einsum_map(equation: str, kernel: Array, inputs_shape: tuple[int, ...]) -> LinearMap:
    """The map of a Flax einsum layer, for inputs of this shape."""
    equation = equation.replace(" ", "")
    labels = equation.split(",")[0].replace("...", "")
    return Contraction(equation, kernel, tuple(inputs_shape[len(inputs_shape) - len(labels) :]))


def pixels_of(
    layer: Any, inputs: Array, rank: int, expected: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """The spatial shape of a convolution's inputs.

    Raises:
      ValueError: for inputs of too few axes, and of another shape than the expected one.
    """
    shape, name = jnp.shape(inputs), type(layer).__name__
    if len(shape) < rank + 1:
        axes = {1: "W", 2: "H, W", 3: "D, H, W"}.get(rank, "spatial")
        _checks.fail(f"shape of {name}'s inputs", f"(..., {axes}, features)", shape)
    pixels = tuple(shape[-rank - 1 : -1])
    if expected not in (None, pixels):
        _checks.fail("spatial shape of the inputs", expected, pixels)
    return pixels


def _spatial_rank(layer: Any, kernel: Array) -> int:
    """The number of spatial axes of a Flax convolution."""
    size = layer.kernel_size
    rank = 1 if isinstance(size, int) else len(size)
    if kernel.ndim != rank + 2:  # of a stack of layers
        _checks.fail("kernel of a convolution", f"{rank + 2} axes", kernel.shape)
    return rank


def _for_each_axis(value: Any, rank: int) -> tuple[int, ...]:
    """One number for each spatial axis, as Flax reads it: None is 1."""
    value = 1 if value is None else value
    return (value,) * rank if isinstance(value, int) else tuple(value)


Output: TypeAlias = Literal["activation", "pre_activation"]


@value_object
class Settings:
    """What a solver layer is besides its parameters.

    Attributes:
      solver: how the problem is solved.
      prior: g.
      ridge: λ.
      loss: ℓ.
      normalize: whether the problem is solved in normalised units, see `LayerProblem.normalized`.
      output: z_K, or the w_K with prox_g(w_K) = z_K.
    """

    solver: Solver
    prior: Prior
    ridge: Scalar
    loss: Loss
    normalize: bool = static_field(default=False)
    output: Output = static_field(default="activation")

    @classmethod
    def of(cls, layer: Any) -> "Settings":
        """Those of a layer with attributes of these names."""
        return cls(*(getattr(layer, field.name) for field in dataclasses.fields(cls)))  # pyright: ignore

    def check(self, layer: str) -> "Settings":
        """Refuse what is no solver, no prior, no weight and no loss, at construction."""
        if not isinstance(self.loss, Loss):
            _checks.fail(f"loss of {layer}", "a Loss such as losses.Huber()", repr(self.loss))
        if not isinstance(self.solver, Solver):
            _checks.fail(f"solver of {layer}", "a Solver such as ProxGD(10)", repr(self.solver))
        if not isinstance(self.prior, Prior):
            _checks.fail(
                f"prior of {layer}", "a Prior such as prox.NonNegative()", repr(self.prior)
            )
        _checks.non_negative("ridge", self.ridge)
        _checks.rank("ridge", self.ridge, 0)
        if not isinstance(self.normalize, bool):
            _checks.fail(f"normalize of {layer}", "True or False", repr(self.normalize))
        _checks.member(f"output of {layer}", self.output, get_args(Output))
        return self

    def problem(
        self, linear_map: LinearMap, inputs: Array, bias: Array | None, skip: Array | None
    ) -> LayerProblem:
        """The problem before it is normalised; `skip` joins the bias, as in a residual block."""
        if skip is not None:
            batch_shape = jnp.shape(inputs)[: jnp.ndim(inputs) - len(linear_map.in_shape)]
            _checks.broadcastable("skip", skip, (*batch_shape, *linear_map.out_shape))
            before = range(jnp.ndim(skip) - (0 if bias is None else jnp.ndim(bias)))
            bias = skip if bias is None else jnp.expand_dims(bias, before) + skip
        return LayerProblem(
            linear_map, inputs, loss=self.loss, bias=bias, prior=self.prior, ridge=self.ridge
        )

    def constant(self, linear_map: LinearMap) -> Array | None:
        """What a layer keeps: the constant that sets the solver's step, or None for a fixed step.

        Normalised: ‖A‖², followed by the constant of the normalised problem if that is not known from ‖A‖².
        """
        problem = self._empty(lax.stop_gradient(linear_map))
        if not self.normalize or self._is_inverse_lipschitz():
            return self.solver.step_constant(problem)
        squared_norm = lipschitz_constant(problem.linear_map)
        own = self.solver.step_constant(problem.normalized(squared_norm))
        return squared_norm if own is None else jnp.append(squared_norm, own)

    def prepared(
        self, problem: LayerProblem, constant: Array | None
    ) -> tuple[LayerProblem, Array | None]:
        """The problem to solve and the constant that sets the solver's steps on it.

        Args:
          problem: of the layer, before it is normalised.
          constant: what `constant` returned.
        """
        if not self.normalize or constant is None:
            return problem, constant
        normalized = problem.normalized(constant if constant.ndim == 0 else constant[0])
        if self._is_inverse_lipschitz():  # whatever its grid: the scale is that of the rule
            return normalized, normalized.squared_norm()
        own = jax.eval_shape(self.solver.step_constant, self._empty(normalized.linear_map))
        return normalized, None if own is None else constant[1:].reshape(own.shape)

    def _is_inverse_lipschitz(self) -> bool:
        return type(self.solver.rule()) is InverseLipschitz

    def _empty(self, linear_map: LinearMap) -> LayerProblem:
        inputs = jnp.zeros(linear_map.in_shape, linear_map.dtype)
        return LayerProblem(linear_map, inputs, ridge=self.ridge, loss=self.loss)


def refuse(layer: str, **options: Any) -> None:
    """An error for options of the plain layer that a solver does not support and would ignore."""
    for name, value in options.items():
        if value is not None:
            _checks.fail(f"{name} of {layer}", "the default", value)


_observer: contextvars.ContextVar[Callable[..., Any] | None] = contextvars.ContextVar(
    "_observer", default=None
)


@contextlib.contextmanager
def observed_by(observe: Callable[..., Any]) -> Iterator[None]:
    """Within it, layers record `observe(solver, problem, solution, gap, constant, deterministic)`."""
    token = _observer.set(observe)
    try:
        yield
    finally:
        _observer.reset(token)


def observer() -> Callable[..., Any] | None:
    """What layers record within `observed_by`, else None."""
    return _observer.get()


def precision_context(precision: Any) -> contextlib.AbstractContextManager[Any]:
    """Matrix products at a layer's `precision`; None is JAX's default."""
    if precision is None:
        return contextlib.nullcontext()
    if not isinstance(precision, str | jax.lax.Precision):
        _checks.fail("precision of a solver layer", "a name or a jax.lax.Precision", precision)
    name = precision if isinstance(precision, str) else precision.name.lower()
    return jax.default_matmul_precision(name)


def run(
    settings: Settings,
    key: Array | None,
    problem: LayerProblem,
    *,
    kept: Array | None,
    reference: Array | None,
    deterministic: bool,
    precision: Any,
    dtype: Any,
    certify: bool = False,
    record: Callable[[Any], object] | None = None,
) -> Solution:
    """Solve, and give the value the dtype that the plain layer's output would have.

    Args:
      settings: of the layer.
      key: random key; None where nothing is sampled.
      problem: the layer's problem, before it is normalised.
      kept: what `Settings.constant` returned when the layer last computed it, or None.
      reference: the `fingerprint` of the map that it was computed from, or None.
      deterministic: sample nothing.
      precision: of the layer's matrix products.
      dtype: of the value.
      certify: fill in the certificate, of the value as returned.
      record: takes the measurements of the solve; None measures nothing.
    """
    solver, pre_activation = settings.solver, settings.output == "pre_activation"
    with precision_context(precision):
        constant = current_constant(settings, problem.linear_map, kept, reference)
        problem, constant = settings.prepared(problem, constant)
        solution = solver.solve(
            key,
            problem,
            step_constant=constant,
            deterministic=deterministic,
            pre_activation=pre_activation,
        )
    certify = certify or solution.certificate is not None  # of the value as it is returned
    solution = dataclasses.replace(solution, value=jnp.asarray(solution.value, dtype))
    if pre_activation:
        w = jnp.asarray(solution.pre_activation, dtype)
        solution = dataclasses.replace(solution, pre_activation=w)
    observe = observer()
    rounded = solution.value.dtype != problem.dtype
    if solution.certificate is not None and not rounded and (record is None or observe is None):
        return solution
    if not certify and (record is None or observe is None):
        return solution
    if record is None or observe is None:
        gap = problem.certificate(solution.value)
    else:  # which needs the same norms as the certificate
        record(seen := observe(solver, problem, solution, None, constant, deterministic))
        gap = seen.gap
    return dataclasses.replace(solution, certificate=gap) if certify else solution


def output_of(layer: Any, solution: Solution) -> Array:
    """What the layer's call returns of a solution."""
    output = solution.value if layer.output == "activation" else solution.pre_activation
    return cast(Array, output)
