r"""The dropout layers that one iteration of a stochastic solver is, as pure functions.

| function | solver iteration from 0 | place |
|---|---|---|
| `tau_nice_dropout` | Prox-SG, τ-nice (proposition 1) | before the linear map, exactly n1 − τ dropped |
| `importance_dropout` | Prox-SG, importance sampling (section 5) | before the linear map |
| `additive_dropout` | mS2GD (proposition 2) | added after the linear map |
| `output_dropout` | NSync (proposition 6) | after the linear map, no rescaling |

τ is a count (int) or a fraction (float), so that a dropout rate p is τ = 1.0 − p. Leading axes are batch
axes with a mask each; `spatial_ndim=2` drops whole feature maps.

References:
  Bibi et al. 2019.
"""

import jax.numpy as jnp

from stochsolvers import _checks, sampling
from stochsolvers._typing import Array
from stochsolvers.estimators import Importance, ImportanceScore, TauNice, feature_axis
from stochsolvers.linear_maps import LinearMap
from stochsolvers.linear_maps._base import check_map
from stochsolvers.problems import LayerProblem


def tau_nice_dropout(
    key: Array, x: Array, tau: int | float | Array, *, spatial_ndim: int = 0
) -> Array:
    r"""(n/τ) m ⊙ x with exactly τ features kept: inverted dropout that counts.

    What is dropped is zero, whatever it was: infinite or NaN too.

    Args:
      key: random key.
      x: shape (*batch, *spatial, n).
      tau: features to keep.
      spatial_ndim: number of spatial axes, which share a feature's fate.

    Example:
      >>> sorted(ss.dropout.tau_nice_dropout(jax.random.key(0), jnp.ones(4), 2).tolist())
      [0.0, 0.0, 2.0, 2.0]
    """
    x = _activations("x of tau_nice_dropout", x)
    n = x.shape[-1]
    tau = sampling.num_sampled(tau, n)
    return _keep(key, x, tau, spatial_ndim) * jnp.asarray(n / tau, x.dtype)


def output_dropout(
    key: Array, u: Array, tau: int | float | Array, *, spatial_ndim: int = 0
) -> Array:
    r"""m ⊙ u with exactly τ of n2 outputs kept, not rescaled: goes after the linear map.

    What is dropped is zero, whatever it was: infinite or NaN too.

    Args:
      key: random key.
      u: shape (*batch, *spatial, n2).
      tau: outputs to keep.
      spatial_ndim: number of spatial axes, which share a feature's fate.
    """
    u = _activations("u of output_dropout", u)
    return _keep(key, u, sampling.num_sampled(tau, u.shape[-1]), spatial_ndim)


def additive_dropout(key: Array, A: LinearMap, z: Array, tau: int | float | Array) -> Array:
    r"""(I − (n1/τ) Σ_{i∈S} A_i A_i*) z, to be added to A x + b.

    Its mean is (I − A A*) z: unlike a mask it is not centred on the plain layer unless z = 0.

    Args:
      key: random key.
      A: the layer's linear map.
      z: activations, shape (*batch, *A.out_shape).
      tau: input features in the sum.
    """
    check_map("A of additive_dropout", A)
    z = _activations("z of additive_dropout", z)
    _checks.trailing("z of additive_dropout", z, A.out_shape)
    batch_shape = z.shape[: z.ndim - len(A.out_shape)]
    problem = LayerProblem(A, jnp.zeros((*batch_shape, *A.in_shape), z.dtype))
    estimator = TauNice(tau)
    return z - estimator.curvature(problem, z, estimator.draw(key, problem, z))


def importance_dropout(
    key: Array,
    A: LinearMap,
    x: Array,
    tau: int | float | Array,
    *,
    by: ImportanceScore = "gradient",
) -> Array:
    r"""m_i x_i / p_i with exactly τ features kept, P(i is kept) = p_i ∝ the size of ∇f_i(0), capped at 1.

    Args:
      key: random key.
      A: the layer's linear map.
      x: inputs, shape (*batch, *A.in_shape).
      tau: features to keep.
      by: "gradient" for ||A_i|| ||x_i||, "lipschitz" for L_i, which does not look at x.
    """
    check_map("A of importance_dropout", A)
    x = _activations("x of importance_dropout", x)
    problem = LayerProblem(A, x)
    zero = jnp.zeros(problem.shape, problem.dtype)
    weights = Importance(tau, by=by).draw(key, problem, zero)
    return (feature_axis(weights, problem) * x).astype(x.dtype)


def _activations(what: str, x: Array) -> Array:
    """Real floating-point numbers, the features on the last axis."""
    _checks.floating(what, x)
    if jnp.ndim(x) < 1:
        _checks.fail(f"shape of {what}", "at least the axis of the features", jnp.shape(x))
    return jnp.asarray(x)


def _keep(key: Array, x: Array, tau: int | Array, spatial_ndim: int) -> Array:
    spatial_ndim = _checks.count("spatial_ndim", spatial_ndim, minimum=0, maximum=x.ndim - 1)
    batch_shape = x.shape[: x.ndim - 1 - spatial_ndim]
    mask = sampling.tau_nice_mask(key, tau, x.shape[-1], batch_shape)
    spatial = tuple(range(len(batch_shape), x.ndim - 1))
    return jnp.where(jnp.expand_dims(mask, spatial), x, jnp.zeros((), x.dtype))
