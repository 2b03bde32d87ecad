"""A layer and the normalisation behind it as one map and one bias, their parameters unchanged."""

import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.problems import LayerProblem


def affine(
    mean: Array, variance: Array, scale: Array | None, bias: Array | None, epsilon: float
) -> tuple[Array, Array]:
    r"""(s, t) of a BatchNorm in evaluation, y ↦ s y + t: s = γ/√(v + ε), t = β − s m.

    Args:
      mean: m, shape (..., features).
      variance: v.
      scale: γ; None is 1.
      bias: β; None is 0.
      epsilon: ε.
    """
    s = 1 / jnp.sqrt(variance + epsilon)
    if scale is not None:
        s = s * scale
    t = -s * mean
    return s, t if bias is None else t + bias


def identity(output: Array) -> tuple[Array, Array]:
    """(1, 0), of no normalisation behind a layer with this output."""
    features = output.shape[-1:]
    return jnp.ones(features, output.dtype), jnp.zeros(features, output.dtype)


def folded(
    kernel: Array, bias: Array | None, fold: tuple[Array, Array] | None, *, axis: int = -1
) -> tuple[Array, Array | None]:
    r"""The kernel and bias of x ↦ s (A x + b) + t; as they are without a fold.

    Args:
      kernel: of A.
      bias: b, or None.
      fold: (s, t), each of shape (features,).
      axis: the kernel's axis of the features of the output, −1 or −2.
    """
    if fold is None:
        return kernel, bias
    s, t = (one.astype(kernel.dtype) for one in fold)
    others = [i for i in range(kernel.ndim) if i != kernel.ndim + axis]
    kernel = kernel * jnp.expand_dims(s, others)
    if bias is None:
        return kernel, t
    before = range(bias.ndim - 1)
    return kernel, bias * jnp.expand_dims(s, before) + jnp.expand_dims(t, before)


def unfolded(
    output: Array, plain: Array, problem: LayerProblem, fold: tuple[Array, Array]
) -> Array:
    r"""The u with s u + t = w, for w that a solver returned: u = y + (w − w₁)/s.

    y = A x + b is the plain layer's output and w₁ = s y + t the first iterate, as the solver computes it: if
    w is w₁, then u is y to the last bit. u = y where s = 0.

    Args:
      output: w.
      plain: y.
      problem: before it is normalised.
      fold: (s, t).
    """
    first = jnp.asarray(-problem.gradient_at_zero(), output.dtype)
    s = fold[0].astype(output.dtype)
    s = jnp.expand_dims(s, range(output.ndim - 1))
    change = (output - first) / jnp.where(s == 0, 1, s)
    return plain + jnp.where(s == 0, 0, change).astype(plain.dtype)
