"""The linear map of a gated network: weights to predictions, and back."""

import abc
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import automatic, batch_spec, is_explicit, replicated
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._patterns import Patterns
from stochsolvers.linear_maps import LinearMap

_SMALL = 1024  # data with a kernel matrix that may be squared a few times
_SQUARINGS = 6
_ENTRIES = 2**24  # products of rows and patterns that are held at a time


@value_object
class GatedMap(LinearMap):
    r"""A(r)_i = Xᵀ D_i r and A*(V) = Σ_i D_i X v_i, the predictions of a gated network with weights v_i.

    With data of patches X_k, one gate and one v_i for all of them, A*(V) = Σ_i Σ_k D_ik X_k v_i. With
    several outputs each has its own row of r and its own weights, with the same patterns.

    The cost is one product of the n × P matrix D of the patterns for each output, and the n × P × d array
    of all D_i X is not formed:

        A(r)ᵀ = (r ∘ X)ᵀ D,      A*(V) = (X ∘ D V) 1,

    or where P < d, of X: A(r) = (Dᵀ ∘ r) X and A*(V) = (Dᵀ ∘ V Xᵀ)ᵀ 1.

    Args:
      X: data, shape (n, d), or (n, K, d) for K patches each.
      patterns: D_1, …, D_P of these data.
      outputs: C for in_shape (C, n) and out_shape (C, P, d); None for (n,) and (P, d).

    Raises:
      ValueError: at trace time, for shapes and dtypes that do not fit, and data that are known not to be
        finite.
    """

    X: Array
    patterns: Patterns
    outputs: int | None = static_field(default=None, kw_only=True)

    def __post_init__(self):
        X = _inputs.data("X of GatedMap", self.X)
        wanted = "Patterns, such as sample_patterns(key, X, 100)"
        _checks.instance("patterns of GatedMap", self.patterns, Patterns, wanted)
        gates, mask = self.patterns.gates, self.patterns.mask
        if mask.shape[:-1] != X.shape[:-1] or gates.shape[0] != X.shape[-1]:
            wanted = f"gates ({X.shape[-1]}, P) and a mask {(*X.shape[:-1], 'P')}"
            _checks.fail("shapes of the patterns of GatedMap", wanted, (gates.shape, mask.shape))
        if self.outputs is not None:
            object.__setattr__(self, "outputs", _checks.count("outputs", self.outputs))
        object.__setattr__(self, "X", X)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape (n,) or (C, n) of predictions, without batch axes."""
        return (*self._outputs, self.X.shape[0])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape (P, d) or (C, P, d) of weights, without batch axes."""
        return (*self._outputs, self.patterns.num, self.X.shape[-1])

    @property
    def _outputs(self) -> tuple[int, ...]:
        return () if self.outputs is None else (self.outputs,)

    def __call__(self, x: Array) -> Array:
        """A(r), shape (..., n) to (..., P, d)."""
        _checks.trailing("argument of GatedMap", x, self.in_shape)
        spec = batch_spec(x, x.ndim - len(self.in_shape)) if is_explicit() else None
        return automatic(lambda A, x: A._each(A._weights, x), spec, self, x)

    def _weights(self, x: Array) -> Array:
        X, mask = self._rows()
        if self.X.ndim == 3:
            x = jnp.repeat(x, self.X.shape[1], axis=-1)
        if self._few_features:
            rows = x[..., None] * _lifted(X, x.ndim + 1)
            return jnp.matmul(mask.astype(X.dtype).T, rows)
        gated = jnp.where(_lifted(mask.T, x.ndim + 1), x[..., None, :], jnp.zeros((), x.dtype))
        return gated @ X

    def adjoint(self, z: Array) -> Array:
        """A*(V), shape (..., P, d) to (..., n)."""
        _checks.trailing("argument of GatedMap.adjoint", z, self.out_shape)
        spec = batch_spec(z, z.ndim - len(self.out_shape)) if is_explicit() else None
        return automatic(lambda A, z: A._each(A._predictions, z), spec, self, z)

    def _predictions(self, z: Array) -> Array:
        X, mask = self._rows()
        if self._few_features:
            values = _lifted(X, z.ndim) * jnp.matmul(mask.astype(X.dtype), z)
            values = jnp.sum(values, axis=-1)
        else:
            products = z @ X.T
            kept = jnp.where(_lifted(mask.T, z.ndim), products, jnp.zeros((), products.dtype))
            values = jnp.sum(kept, axis=-2)
        if self.X.ndim == 3:
            values = jnp.sum(values.reshape(*values.shape[:-1], *self.X.shape[:2]), axis=-1)
        return values

    def _each(self, product: Callable[[Array], Array], argument: Array) -> Array:
        """The product of all examples, or of some at a time where those of all would not fit."""
        events = 1 if product == self._weights else 2
        lead = argument.shape[: argument.ndim - events]
        count, own = math.prod(lead), self.patterns.mask.size
        known = all(isinstance(n, int) for n in lead)  # none of them symbolic
        if not known or count * own <= max(_ENTRIES, own):
            return product(argument)
        flat = argument.reshape(count, *argument.shape[len(lead) :])
        result = lax.map(product, flat, batch_size=max(1, _ENTRIES // own))
        return result.reshape(*lead, *result.shape[1:])

    @property
    def _few_features(self) -> bool:
        """Whether an n × d array, for each example, is the smaller one to form."""
        return self.X.shape[-1] <= self.patterns.num

    def _rows(self) -> tuple[Array, Array]:
        """X and the mask with one row for each patch of each datum."""
        mask = self.patterns.mask
        return self.X.reshape(-1, self.X.shape[-1]), mask.reshape(-1, mask.shape[-1])

    def restrict(self, indices: Array) -> "GatedMap":
        """A on a subset of the data: the rows of X and of the mask are gathered.

        Args:
          indices: integer array (τ,), may be traced.
        """
        patterns = self.patterns
        mask = patterns.mask[indices]
        return self._with(self.X[indices], patterns.replaced(patterns.gates, mask))

    def restrict_outputs(self, indices: Array) -> "GatedMap":
        """A followed by the choice of a subset of the features of X, the last axis of weights.

        Args:
          indices: integer array (τ,), may be traced.
        """
        patterns = self.patterns
        gates = patterns.gates[indices]
        return self._with(self.X[..., indices], patterns.replaced(gates, patterns.mask))

    def scaled(self, factor: Scalar) -> "GatedMap":
        """The map with the data c X."""
        return self._with(jnp.asarray(factor, self.X.dtype) * self.X, self.patterns)

    def absolute(self) -> "GatedMap | None":
        """The map with the data |X|; not known for patches, of which an entry of A is a sum."""
        return None if self.X.ndim == 3 else self.magnitudes()

    def magnitudes(self) -> "GatedMap":
        """The map with the data |X|, whose matrix has entries of at least the sizes of those of A."""
        return self._with(jnp.abs(self.X), self.patterns)

    def _with(self, X: Array, patterns: Patterns) -> "GatedMap":
        """The map of other arrays that are known to fit."""
        structure = jax.tree.structure(self)
        return jax.tree.unflatten(structure, (X, *jax.tree.leaves(patterns)))

    @replicated
    def kernel_matrix(self) -> Array:
        """A* A, the n × n matrix K = (X Xᵀ) ∘ (D Dᵀ) of one output; summed over pairs of patches."""
        X, mask = self._rows()
        with jax.default_matmul_precision("highest"):
            D = mask.astype(X.dtype)
            K = (X @ X.T) * (D @ D.T)
        if self.X.ndim == 3:
            n, patches = self.X.shape[:2]
            K = jnp.sum(K.reshape(n, patches, n, patches), axis=(1, 3))
        return K

    @replicated
    def squared_norm_bound(self) -> Array:
        r"""An upper bound on ‖A‖² = λ_max(K), K = (X Xᵀ) ∘ (D Dᵀ).

        For up to 1024 data it is (tr K^128)^(1/128) ≤ n^(1/128) λ_max(K). For more, with s_j the number of
        patterns active at x_j, K is a sum of two positive semi-definite matrices,

            K = S X Xᵀ S / P + (X Xᵀ) ∘ E,   S = diag(s),   E = D Dᵀ − s sᵀ/P,

        and λ_max(M ∘ E) ≤ min(max M_jj λ_max(E), max E_jj λ_max(M)) (Schur); d × d and P × P matrices.
        The norm for K patches is at most √K times that of all of them. Round-off is added.
        """
        X, mask = self._rows()
        if self.X.shape[0] <= _SMALL and len(X) <= 4 * _SMALL:
            kernel, eps = self.kernel_matrix(), float(jnp.finfo(X.dtype).eps)
            rounding = 4 * (len(X) + mask.shape[1] + X.shape[1]) * eps
            return _power_bound(kernel) + rounding * jnp.trace(kernel)
        return (len(X) // self.X.shape[0]) * _schur_bound(X, mask)


class OfGatedData(abc.ABC):
    """A program of gated data, by its map."""

    @property
    @abc.abstractmethod
    def gated_map(self) -> GatedMap:
        """A, without signs and cones."""

    @property
    def X(self) -> Array:  # noqa: N802 - as in the formula
        """The data, shape (n, d) or (n, K, d)."""
        return self.gated_map.X

    @property
    def patterns(self) -> Patterns:
        """The patterns of the data and their gates."""
        return self.gated_map.patterns

    @property
    def joint(self) -> bool:
        """Whether all outputs are of one program."""
        return self.gated_map.outputs is not None


def _power_bound(matrix: Array) -> Array:
    """(tr M^p)^(1/p) ≥ λ_max(M) for a positive semi-definite M, p = 128, by squaring."""
    n_eps = len(matrix) * float(jnp.finfo(matrix.dtype).eps)
    scales = []
    for k in range(_SQUARINGS + 1):
        largest = jnp.max(jnp.abs(matrix))
        unit = matrix / jnp.where(largest > 0, largest, 1)
        norm = jnp.sqrt(jnp.sum(unit * unit))
        scales.append(largest * norm)
        if k < _SQUARINGS:
            unit = unit / jnp.where(norm > 0, norm, 1)
            matrix = jnp.matmul(unit, unit, precision="highest")
    # λ(M)² ≤ λ(the computed square) + n eps for a matrix of Frobenius norm 1
    bound = jnp.ones((), matrix.dtype)
    for scale in scales[:0:-1]:
        bound = jnp.sqrt(scale * bound + n_eps)
    return scales[0] * bound * (1 + 8 * n_eps)


def _lifted(matrix: Array, ndim: int) -> Array:
    return jnp.expand_dims(matrix, range(ndim - matrix.ndim))


def _schur_bound(X: Array, mask: Array) -> Array:
    num, eps = mask.shape[-1], float(jnp.finfo(X.dtype).eps)
    with jax.default_matmul_precision("highest"):
        D = mask.astype(X.dtype)
        count = jnp.sum(D, axis=-1)
        weighted = count[:, None] * X
        linear = jnp.linalg.eigvalsh(weighted.T @ weighted)[-1] / num
        centred = D - (count / num)[:, None]
        rows = jnp.sum(X * X, axis=-1)
        of_data = jnp.linalg.eigvalsh(X.T @ X)[-1]
        of_masks = jnp.linalg.eigvalsh(centred.T @ centred)[-1]
    spread = jnp.max(count - count * count / num)
    rest = jnp.minimum(jnp.max(rows) * of_masks, spread * of_data)
    return (linear + rest) * (1 + 8 * (len(X) + num) * eps)
