r"""Dense layers and convolutions as maps of their parameters: rows times columns, one column for each output.

The forms of the system (AᵀA + I/τ) d = AᵀG, and the choice among them by operation counts.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.linear_maps import Conv, Dense, LinearMap
from stochsolvers.proxprop import _patches, _systems
from stochsolvers.proxprop._steps import ConjugateGradients, Exact, Form, ImplicitStep

Pair = tuple[Array, Array | None]
"""What belongs to the kernel's columns (..., m, n) and to the bias (..., n), or None without one."""


def check_exact(linear_map: LinearMap, form: Form) -> None:
    """Refuse maps and forms that have no exact step."""
    name = type(linear_map).__name__
    if not isinstance(linear_map, Dense | Conv):
        expected = "ConjugateGradients (Exact is for dense maps and convolutions)"
        _checks.fail(f"step of proximal backpropagation of a {name}", expected, "Exact")
    if form == "patches" and not isinstance(linear_map, Conv):
        _checks.fail(f"form of Exact for a {name}", "'auto', 'rows' or 'parameters'", repr(form))


def of(linear_map: Dense | Conv, inputs: Array, cotangent: Array, *, bias: bool) -> "Columns":
    """The system of a map at inputs and a cotangent of its outputs, both with batch axes."""
    kind = OfDense if isinstance(linear_map, Dense) else OfConv
    return kind(linear_map, inputs, cotangent, bias)  # pyright: ignore


class Columns(abc.ABC):
    """The system of one batch; arrays may have a leading axis of groups.

    Attributes:
      num_rows: N, examples times positions.
      num_parameters: m, of one output, with the bias.
      num_outputs: n, of one group.
      bias: whether there is one.
      gram_count: multiplications of `gram`.
    """

    num_rows: int
    num_parameters: int
    num_outputs: int
    bias: bool
    gram_count: int

    @abc.abstractmethod
    def rows(self) -> Array:
        """The rows (..., N, m), without the bias's ones."""

    @abc.abstractmethod
    def outputs(self) -> Array:
        """G, shape (..., N, n)."""

    @abc.abstractmethod
    def gram(self) -> Array:
        """AᵀA, shape (..., m, m), with the bias last."""

    @abc.abstractmethod
    def adjoint(self) -> Pair:
        """AᵀG."""

    @abc.abstractmethod
    def gram_product(self, pair: Pair) -> Pair:
        """AᵀA v without AᵀA."""

    @abc.abstractmethod
    def kernel_and_bias(self, pair: Pair) -> tuple[list[Array], Array | None]:
        """As the map's own arrays."""

    def step(self, step: ImplicitStep, tau: Array) -> Pair:
        """d of both."""
        if isinstance(step, ConjugateGradients):
            return self._conjugate_gradients(step.num_iters, tau)
        return self._exact(step, tau)

    def _exact(self, step: Exact, tau: Array) -> Pair:
        N, m, n = self.num_rows, self.num_parameters, self.num_outputs
        form = step.form
        if form == "auto":
            by_rows = N**2 * (m + min(m, n)) + N**3
            by_gram = self.gram_count + m**2 * n + m**3
            form = "rows" if by_rows <= by_gram and m >= N else "patches"
        if form == "rows":
            return _systems.exact_by_rows(self.rows(), self.outputs(), tau, self.bias)
        gram = self._plain_gram() if form == "parameters" else self.gram()
        return self._split(_systems.exact_by_gram(gram, self._joined(self.adjoint()), tau))

    def _conjugate_gradients(self, T: int, tau: Array) -> Pair:
        N, m, n = self.num_rows, self.num_parameters, self.num_outputs
        by_rows, by_gram = N**2 * (m + T * n), self.gram_count + m**2 * n * T
        if by_rows <= min(by_gram, 2 * T * N * m * n):
            return _systems.conjugate_gradients_by_rows(
                self.rows(), self.outputs(), tau, self.bias, T
            )
        gram = tau * self.gram() if by_gram <= 2 * T * N * m * n else None

        def product(columns: Array) -> Array:
            if gram is not None:
                return _systems.product(gram, columns)
            return tau * self._joined(self.gram_product(self._split(columns)))

        right = tau * self._joined(self.adjoint())
        return self._split(_systems.conjugate_gradients(product, right, T))

    def _plain_gram(self) -> Array:
        """AᵀA from all rows."""
        rows = self.rows()
        if self.bias:
            rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], -1)
        return _systems.product(rows.mT, rows)

    def _joined(self, pair: Pair) -> Array:
        columns, bias = pair
        return columns if bias is None else jnp.concatenate([columns, bias[..., None, :]], -2)

    def _split(self, columns: Array) -> Pair:
        return (columns[..., :-1, :], columns[..., -1, :]) if self.bias else (columns, None)


class OfDense(Columns):
    """Of x ↦ x W + b."""

    def __init__(self, A: Dense, inputs: Array, cotangent: Array, bias: bool):
        self.bias = bias
        self._rows = inputs.reshape(-1, A.in_features)
        self._outputs = cotangent.reshape(-1, A.out_features)
        self.num_rows, self.num_parameters = len(self._rows), A.in_features + bias
        self.num_outputs = A.out_features
        self.gram_count = self.num_rows * self.num_parameters**2

    def rows(self) -> Array:
        return self._rows

    def outputs(self) -> Array:
        return self._outputs

    def gram(self) -> Array:
        return self._plain_gram()

    def adjoint(self) -> Pair:
        return self._adjoint_of(self._outputs)

    def gram_product(self, pair: Pair) -> Pair:
        columns, bias = pair
        outputs = self._rows @ columns
        return self._adjoint_of(outputs if bias is None else outputs + bias[None])

    def _adjoint_of(self, outputs: Array) -> Pair:
        return self._rows.T @ outputs, jnp.sum(outputs, 0) if self.bias else None

    def kernel_and_bias(self, pair: Pair) -> tuple[list[Array], Array | None]:
        return [pair[0]], pair[1]


class OfConv(Columns):
    """Of a convolution, with an axis of groups where there are several."""

    def __init__(self, A: Conv, inputs: Array, cotangent: Array, bias: bool):
        self.bias, self._map = bias, A
        self._inputs = inputs.reshape(-1, *A.in_shape)
        self._cotangent = cotangent.reshape(-1, *A.out_shape)
        examples = len(self._inputs)
        self.num_rows = self._cotangent[..., 0].size
        self.num_parameters = A.kernel[..., 0].size + bias
        self.num_outputs = A.out_features // A.feature_group_count
        self.gram_count = _patches.gram_count(A, examples)

    def rows(self) -> Array:
        return self._one_group(_patches.patches(self._map, self._inputs))

    def outputs(self) -> Array:
        return self._one_group(_patches.outputs_of(self._map, self._cotangent))

    def gram(self) -> Array:
        return self._one_group(_patches.patch_gram(self._map, self._inputs, bias=self.bias))

    def adjoint(self) -> Pair:
        return self._adjoint_of(self._cotangent)

    def gram_product(self, pair: Pair) -> Pair:
        (kernel,), bias = self.kernel_and_bias(pair)
        outputs = self._correlated(kernel)
        if bias is not None:
            outputs = outputs + jnp.expand_dims(bias, tuple(range(outputs.ndim - 1)))
        return self._adjoint_of(outputs)

    def kernel_and_bias(self, pair: Pair) -> tuple[list[Array], Array | None]:
        columns, bias = pair
        grouped = columns if columns.ndim == 3 else columns[None]
        kernel = _patches.kernel_of(self._map, grouped)
        return [kernel], None if bias is None else bias.reshape(-1)

    def _adjoint_of(self, outputs: Array) -> Pair:
        kernel = jax.vjp(self._correlated, self._map.kernel)[1](outputs)[0]
        columns = self._one_group(_patches.columns_of(self._map, kernel))
        if not self.bias:
            return columns, None
        groups = self._map.feature_group_count
        sums = jnp.sum(outputs, tuple(range(outputs.ndim - 1)))
        return columns, self._one_group(sums.reshape(groups, -1))

    def _correlated(self, kernel: Array) -> Array:
        return dataclasses.replace(self._map, kernel=kernel)(self._inputs)

    def _one_group(self, array: Any) -> Any:
        return array[0] if self._map.feature_group_count == 1 else array
