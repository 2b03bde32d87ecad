r"""Two-layer networks as values, and the networks that convex programs encode.

    f(x) = aᵀ(Wᵀx + b)₊ + c              ReLU
    f(x) = aᵀ(1[Gᵀx + h ≥ 0] ∘ (Wᵀx + b)) + c        gated ReLU, the gates (G, h) being fixed

The weights are decayed, the output bias c is not, the hidden bias b is the weight of a feature 1:

    Σ_k ℓ(f(x_k), y_k) + (β/2)(||W||² + ||b||² + ||a||²)
        ≥  Σ_k ℓ(f(x_k), y_k) + β Σ_j ||(w_j, b_j)|| ||a_j||,

with equality where ||(w_j, b_j)|| = ||a_j|| for every neuron (`balanced`). Programs over v_j = w_j a_j are in
the second form.

References:
  Pilanci and Ergen 2020, Neural networks are convex regularizers, theorem 1.
"""

import abc
import dataclasses
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks, _linalg
from stochsolvers._typing import Array, Scalar, at_least_float32, value_object
from stochsolvers.losses import Loss, Squares


@value_object
class TwoLayer(abc.ABC):
    """What ReLU and gated networks share; see the module."""

    hidden: Array
    output: Array
    hidden_bias: Array | None = None
    output_bias: Array | None = None

    def __post_init__(self):
        name = type(self).__name__
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                _checks.floating(f"{field.name} of {name}", value)
        _checks.rank(f"hidden of {name}", self.hidden, 2)
        width = jnp.shape(self.hidden)[1]
        if jnp.ndim(self.output) not in (1, 2) or jnp.shape(self.output)[0] != width:
            wanted = f"({width},) or ({width}, outputs)"
            _checks.fail(f"shape of output of {name}", wanted, jnp.shape(self.output))
        self._check_shape("hidden_bias", (width,))
        self._check_shape("output_bias", jnp.shape(self.output)[1:])
        dtype = at_least_float32(jnp.result_type(self.hidden), jnp.result_type(self.output))
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, jnp.asarray(value, dtype))

    def _check_shape(self, field: str, shape: tuple[int, ...]) -> None:
        value = getattr(self, field)
        if value is not None and jnp.shape(value) != shape:
            _checks.fail(f"shape of {field} of {type(self).__name__}", shape, jnp.shape(value))

    @property
    def width(self) -> int:
        """Number of neurons m, those that are zero included."""
        return self.hidden.shape[1]

    @property
    def num_features(self) -> int:
        """Number of features d of the data."""
        return self.hidden.shape[0]

    @abc.abstractmethod
    def neurons(self, X: Any) -> Array:
        """Outputs of the hidden neurons on data X, shape (..., n, m) for X of shape (..., n, d)."""

    def __call__(self, X: Any) -> Array:
        """f(X), shape (n,) or (C, n): the data are on the last axis."""
        value = self.neurons(X) @ self.output
        if self.output_bias is not None:
            value = value + jnp.expand_dims(
                self.output_bias, range(value.ndim - self.output.ndim + 1)
            )
        return value if self.output.ndim == 1 else jnp.swapaxes(value, -1, -2)

    def _linear(self, X: Any, weights: Array, bias: Array | None) -> Array:
        _checks.real_array(f"data of {type(self).__name__}", X)
        _checks.trailing(f"data of {type(self).__name__}", X, (self.num_features,))
        value = jnp.asarray(X, self.hidden.dtype) @ weights
        return value if bias is None else value + jnp.expand_dims(bias, range(value.ndim - 1))

    def penalty(self) -> Array:
        """½ (||W||² + ||b||² + ||a||²)."""
        decayed = (self.hidden, self.hidden_bias, self.output)
        return 0.5 * sum(jnp.sum(w**2) for w in decayed if w is not None)  # pyright: ignore

    def objective(self, X: Any, y: Any, beta: Scalar, *, loss: Loss = Squares()) -> Array:  # noqa: B008 - immutable
        r"""Σ_k ℓ(f(x_k), y_k) + (β/2)(||W||² + ||b||² + ||a||²).

        Args:
          X: data, shape (n, d).
          y: targets, shape (n,), or (C, n) for C outputs.
          beta: β ≥ 0.
          loss: ℓ.
        """
        value = self(X)
        if jnp.shape(y) != value.shape:
            _checks.fail("shape of y", value.shape, jnp.shape(y))
        return jnp.sum(loss.value(value, jnp.asarray(y, value.dtype))) + beta * self.penalty()

    def sizes(self) -> tuple[Array, Array]:
        """||(w_j, b_j)|| and ||a_j|| for each neuron."""
        hidden = self.hidden.T
        if self.hidden_bias is not None:
            hidden = jnp.concatenate([hidden, self.hidden_bias[:, None]], axis=1)
        return _norms(hidden), _norms(self.output.reshape(self.width, -1))

    def balanced(self) -> Self:
        """The same function with ||(w_j, b_j)|| = ||a_j||: of least penalty among all its scalings."""
        inner, outer = self.sizes()
        alive = (inner != 0) & (outer != 0)  # NaN stays
        ratio = jnp.where(alive, outer, 1) / jnp.where(alive, inner, 1)
        return self._scaled(jnp.where(alive, jnp.sqrt(ratio), 0), jnp.where(alive, ratio**-0.5, 0))

    def _scaled(self, inner: Array, outer: Array) -> Self:
        """With (w_j, b_j) times the one factor and a_j times the other."""
        return dataclasses.replace(
            self,
            hidden=self.hidden * inner[None, :],
            hidden_bias=None if self.hidden_bias is None else self.hidden_bias * inner,
            output=self.output * (outer if self.output.ndim == 1 else outer[:, None]),
        )

    def active(self, tol: float = 0.0) -> np.ndarray:
        """Indices of the neurons with ||(w_j, b_j)|| ||a_j|| above `tol` times the largest. Not for jit."""
        size = np.multiply(*map(np.asarray, self.sizes()))
        return np.flatnonzero(~(size <= tol * np.max(size, initial=0)))  # NaN stays

    def take(self, indices: Any) -> Self:
        """The network of these neurons alone."""
        per_neuron = {
            field.name: getattr(self, field.name)[..., indices]
            for field in dataclasses.fields(self)
            if field.name not in ("output", "output_bias") and getattr(self, field.name) is not None
        }
        return dataclasses.replace(self, output=self.output[indices], **per_neuron)

    def compact(self, tol: float = 0.0) -> Self:
        """Without the neurons that `active(tol)` leaves out. Not for jit."""
        return self.take(self.active(tol))


@value_object
class Network(TwoLayer):
    r"""f(x) = aᵀ(Wᵀx + b)₊ + c.

    Args:
      hidden: W, shape (d, m), a Flax kernel.
      output: a, shape (m,) for one output or (m, C).
      hidden_bias: b, shape (m,), or None.
      output_bias: c, shape () or (C,), or None.

    Raises:
      ValueError: for shapes that do not fit together, and dtypes that are no real floating-point ones.
    """

    def neurons(self, X: Any) -> Array:
        """(X W + b)₊, shape (..., n, m)."""
        return jnp.maximum(self._linear(X, self.hidden, self.hidden_bias), 0)


@value_object
class GatedNetwork(TwoLayer):
    r"""f(x) = aᵀ(1[Gᵀx + h ≥ 0] ∘ (Wᵀx + b)) + c.

    Args:
      hidden: W, shape (d, m).
      output: a, shape (m,) for one output or (m, C).
      hidden_bias: b, shape (m,), or None.
      output_bias: c, shape () or (C,), or None.
      gates: G, shape (d, m).
      gate_bias: h, shape (m,), or None.

    Raises:
      ValueError: for shapes that do not fit together, and dtypes that are no real floating-point ones.
    """

    _: dataclasses.KW_ONLY
    gates: Array
    gate_bias: Array | None = None

    def __post_init__(self):
        _checks.floating(f"gates of {type(self).__name__}", self.gates)
        super().__post_init__()
        self._check_shape("gates", self.hidden.shape)
        self._check_shape("gate_bias", self.hidden.shape[1:])

    def neurons(self, X: Any) -> Array:
        """1[X G + h ≥ 0] ∘ (X W + b), shape (..., n, m)."""
        level = self._linear(X, self.gates, self.gate_bias)
        return through_gates(level, self._linear(X, self.hidden, self.hidden_bias))


def through_gates(level: Array, value: Array) -> Array:
    """1[g ≥ 0] ∘ value for levels g; NaN where g is."""
    return jnp.where(level >= 0, value, jnp.where(jnp.isnan(level), level, 0))


def relu_network(U: Array) -> Network:
    r"""The network of a value of the cone program, balanced.

        v_i: neuron v_i/√||v_i|| with output √||v_i||;     w_i: neuron w_i/√||w_i|| with output −√||w_i||

    Zeros stay neurons of weight zero, so that shapes do not depend on values: `Network.compact` drops them.

    Args:
      U: shape (*batch, 2, P, d), v first; a batch axis is one of outputs, each with its own neurons.
    """
    num = U.shape[-2]
    signs = jnp.repeat(jnp.asarray([1, -1], U.dtype), num)
    return Network(*_balanced_neurons(U.reshape(*U.shape[:-3], 2 * num, U.shape[-1]), signs))


def gated_network(gates: Array, V: Array, *, joint: bool = False) -> GatedNetwork:
    r"""The network of a value of the gated program, balanced.

        v_i: neuron v_i/√||v_i|| with gate g_i and output √||v_i||

    For joint outputs V_i = Σ_k σ_k p_k q_kᵀ (singular values): neurons √σ_k q_k with outputs √σ_k p_k, whose
    penalty is the nuclear norm of V_i. It is the least of any network with these gates and this function.

    Args:
      gates: shape (d, P).
      V: shape (P, d) or (C, P, d).
      joint: whether the outputs share their neurons.
    """
    if joint:
        left, values, right = _linalg.svd(jnp.moveaxis(V, 0, 1))
        root = jnp.sqrt(values)
        hidden = (right * root[..., None]).reshape(-1, V.shape[-1]).T
        output = jnp.swapaxes(left * root[:, None, :], 1, 2).reshape(-1, V.shape[0])
        return GatedNetwork(hidden, output, gates=jnp.repeat(gates, values.shape[-1], axis=1))
    hidden, output = _balanced_neurons(V, jnp.ones(V.shape[-2], V.dtype))
    copies = hidden.shape[1] // gates.shape[1]
    return GatedNetwork(hidden, output, gates=jnp.tile(gates, (1, copies)))


def _balanced_neurons(V: Array, signs: Array) -> tuple[Array, Array]:
    """Hidden and output weights of the vectors V, shape (m, d) or (C, m, d), with the signs of m outputs."""
    root = jnp.sqrt(_norms(V))
    hidden = V / jnp.where(root > 0, root, 1)[..., None]
    output = root * jnp.expand_dims(signs, range(root.ndim - 1))
    if V.ndim == 2:
        return hidden.T, output
    num, width = output.shape
    spread = jnp.eye(num, dtype=V.dtype)[:, None, :] * output[..., None]
    return hidden.reshape(num * width, -1).T, spread.reshape(num * width, num)


def _norms(vectors: Array) -> Array:
    """Euclidean norms along the last axis, in units of the largest entry: no square over- or underflows."""
    unit = jnp.max(jnp.abs(lax.stop_gradient(vectors)), axis=-1, initial=0.0)
    unit = jnp.where(unit > 0, unit, 1.0)
    return unit * jnp.sqrt(jnp.sum((vectors / unit[..., None]) ** 2, axis=-1))
