r"""||A|| followed through a training, by a few Krylov steps on the layer as it is.

v is a unit vector on the side of the inputs or of the outputs, whichever is smaller. A step looks for the
largest ||A w|| / ||w|| in the span of v, A*A v, …, (A*A)^k v, and keeps the w. The kernel moves little from
one step to the next, so that ||A v|| stays at the norm, from below.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import replicated, varying
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.linear_maps import LinearMap
from stochsolvers.lipschitz._matrix_free import image_norm, smaller_side
from stochsolvers.lipschitz._norm import spectral_norm, spectral_norm_bracket
from stochsolvers.lipschitz._types import compute_dtype
from stochsolvers.lipschitz.machinery import spectra
from stochsolvers.lipschitz.machinery.blocks import scale_of
from stochsolvers.lipschitz.machinery.written import base_of, checked, sizes

_STEPS, _COLD_STEPS = 4, 48
_NUDGE = 2.0**-8


@value_object
class NormState:
    """What is kept of a layer's norm from one training step to the next.

    Attributes:
      vector: v, unit, of the smaller side; zeros before the first step.
      norm: the norm, or a bound on it, as it was last computed in full.
      checksum: of the kernel that it was computed from; zeros are that of nothing.
    """

    vector: Array
    norm: Array
    checksum: Array


def norm_state(linear_map: LinearMap) -> NormState:
    """The state that knows nothing: the first `norm_step` takes 48 steps from a fixed start."""
    dtype = compute_dtype(linear_map)
    vector = jnp.zeros(min(sizes(linear_map)), dtype)
    return NormState(vector, jnp.zeros((), dtype), jnp.zeros(2, jnp.uint32))


@replicated
@functools.partial(jax.jit, static_argnames="num_steps")
def norm_step(
    linear_map: LinearMap, state: NormState, *, num_steps: int = 4
) -> tuple[Array, NormState]:
    r"""(||A v||, the state with v) for the v that maximises ||A v|| in the span of v, A*A v, …, (A*A)^k v.

    A lower bound on ||A|| that reaches it as the steps add up; its derivative is <u, dA v>, u ∝ A v.

    Args:
      linear_map: A.
      state: of the last step, or `norm_state(A)`.
      num_steps: k ≥ 1; each costs a product with A and one with A*.

    Raises:
      ValueError: at trace time, if the state is that of a map of another size.
    """
    num_steps = _checks.count("num_steps", num_steps)
    size = min(sizes(linear_map))
    if state.vector.shape != (size,):
        _checks.fail("vector of the state of norm_step", f"shape {(size,)}", state.vector.shape)
    linear_map = checked(base_of(linear_map))
    vector = _tracking(linear_map, state.vector, num_steps)
    value = image_norm(linear_map, vector)
    return value, NormState(_known(vector, state), state.norm, state.checksum)


@replicated
@functools.partial(jax.jit, static_argnames="certified")
def norm_refresh(linear_map: LinearMap, state: NormState, *, certified: bool = False) -> NormState:
    """The state with `spectral_norm(A)`, or the upper end of its bracket if `certified`, for `kept_norm`."""
    linear_map = jax.tree.map(lax.stop_gradient, linear_map)
    vector = _known(_tracking(checked(base_of(linear_map)), state.vector, _STEPS), state)
    return NormState(vector, full_norm(linear_map, certified), checksum(linear_map))


@replicated
@functools.partial(jax.jit, static_argnames="certified")
def kept_norm(linear_map: LinearMap, state: NormState, *, certified: bool = False) -> Array:
    """The norm that `norm_refresh` computed if that was of this very kernel, else computed afresh.

    Its derivative is <u, dA v> ||A|| / ||A v|| at the kept v.
    """
    is_current = jnp.all(state.checksum == checksum(linear_map))
    return lax.cond(
        is_current,
        lambda A: varying(_with_derivative(state.norm, A, state.vector), A),
        lambda A: varying(full_norm(A, certified), A),
        linear_map,
    )


def full_norm(linear_map: LinearMap, certified: bool) -> Array:
    """`spectral_norm(A)`, or the upper end of its bracket, with the derivative of the norm."""
    norm = spectral_norm(linear_map)
    if not certified:
        return norm
    upper = spectral_norm_bracket(jax.tree.map(lax.stop_gradient, linear_map)).upper
    return _scaled_to(upper, norm)


def normalising_factor(
    norm: Array,
    bound: Scalar,
    *,
    shrink_only: bool = False,
    differentiate: bool = True,
    epsilon: float = 0.0,
) -> Array:
    """c / σ, or min(1, c / σ) if `shrink_only`; σ at least ε, and a constant unless `differentiate`."""
    if not differentiate:
        norm = lax.stop_gradient(norm)
    bound = jnp.asarray(bound, norm.dtype)
    least = max(float(epsilon), float(jnp.finfo(norm.dtype).tiny))
    norm = jnp.where(norm < least, least, norm)  # NaN stays
    if not shrink_only:
        return bound / norm
    above = ~(norm <= bound)
    return jnp.where(above, bound / jnp.where(above, norm, 1.0), 1.0)


def _tracking(linear_map: LinearMap, vector: Array, num_steps: int) -> Array:
    """v after `num_steps` Krylov steps; after several times as many from a fixed start if it is zero."""
    linear_map = jax.tree.map(lax.stop_gradient, linear_map)
    vector = lax.stop_gradient(vector)
    is_warm = jnp.any(vector != 0)
    fixed = spectra.fixed_start(vector.size, vector.dtype)
    start = jnp.where(is_warm, vector + _NUDGE * fixed, fixed)  # leaves invariant spaces of A*A
    start = start / jnp.sqrt(jnp.sum(start**2))
    rounds = jnp.where(is_warm, 1, -(-_COLD_STEPS // num_steps))
    return lax.fori_loop(
        0,
        rounds,
        lambda _, v: varying(_improved(linear_map, v, num_steps), linear_map),
        varying(start, linear_map),
    )


def _known(vector: Array, state: NormState) -> Array:
    """The vector, or the state's where a kernel was not finite."""
    return jnp.where(jnp.all(jnp.isfinite(vector)), vector, state.vector)


def _improved(linear_map: LinearMap, vector: Array, num_steps: int) -> Array:
    """The Ritz vector of the Krylov space of A*A from v, by products with A and A* alone."""
    forward, backward, shape = smaller_side(linear_map)
    with jax.default_matmul_precision("highest"):
        image = forward(vector.reshape(shape)).ravel()
        scale = scale_of(image)
        basis, images = vector[None], image[None] / scale
        for _ in range(num_steps):
            residual = backward(images[-1].reshape(_image_shape(linear_map))).ravel() / scale
            for _ in range(2):
                residual = residual - (basis @ residual) @ basis
            norm = jnp.sqrt(jnp.sum(residual**2))
            # what is left of an invariant space is round-off
            keep = norm > 16 * jnp.finfo(norm.dtype).eps * jnp.sum(images[-1] ** 2)
            following = jnp.where(keep, residual / jnp.where(keep, norm, 1.0), 0.0)
            basis = jnp.concatenate([basis, following[None]])
            image = forward(following.reshape(shape)).ravel() / scale
            images = jnp.concatenate([images, image[None]])
        weights = jnp.linalg.eigh(images @ images.T)[1][:, -1]
        found = weights @ basis
    norm = jnp.sqrt(jnp.sum(found**2))
    # all images of A = 0 are zero, and the weights may be those of a vector that was not kept
    return jnp.where(norm == 0, vector, found / jnp.where(norm == 0, 1.0, norm))


def _image_shape(linear_map: LinearMap) -> tuple[int, ...]:
    inputs, outputs = sizes(linear_map)
    return linear_map.in_shape if outputs < inputs else linear_map.out_shape


def _with_derivative(norm: Array, linear_map: LinearMap, vector: Array) -> Array:
    value = image_norm(checked(base_of(linear_map)), vector)
    return _scaled_to(norm, value)


def _scaled_to(norm: Array, value: Array) -> Array:
    """A constant, with the relative derivative of a positive value near it."""
    norm, here = lax.stop_gradient((norm, value))
    ratio = jnp.where(here > 0, norm / jnp.where(here > 0, here, 1.0), 0.0)
    return norm + ratio * (value - here)


def checksum(tree: Any) -> Array:
    """Two 32-bit numbers that depend on every bit of the tree's arrays, and not on the order of a sum.

    They depend on its structure too: the same kernel has another norm on images of another shape.
    """
    structure = np.uint32(zlib.crc32(str(jax.tree.structure(tree)).encode()))
    lanes = jnp.full(2, structure, jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        words = _words(lax.stop_gradient(leaf))
        place = lax.iota(jnp.uint32, words.size) * np.uint32(0x9E3779B9) + np.uint32(number + 1)
        mixed = [_mixed(words ^ _mixed(place + np.uint32(seed))) for seed in (0, 0x7F4A7C15)]
        lanes = lanes + jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in mixed])
    return jnp.where(jnp.any(lanes != 0), lanes, jnp.ones_like(lanes))


def _words(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf).ravel()
    bits = 8 * leaf.dtype.itemsize
    if bits < 32:
        return lax.bitcast_convert_type(leaf, f"uint{bits}").astype(jnp.uint32)
    return lax.bitcast_convert_type(leaf, jnp.uint32).ravel()


def _mixed(words: Array) -> Array:
    """A bijection of 32-bit words in which every bit of the argument matters (MurmurHash3's last step)."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))
