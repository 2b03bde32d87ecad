r"""||A|| followed through a training, by a few Krylov steps on the layer as it is.

v and w are orthogonal unit vectors on the side of the inputs or of the outputs, whichever is smaller. A step
takes the two top Ritz vectors of A*A in the span of w, v, A*A v, …, (A*A)^k v: v is the one at which ||A v||
is largest, and w the direction most likely to overtake it. The kernel moves little from one step to the
next, so that ||A v|| stays at the norm, from below.
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
from stochsolvers.lipschitz._types import compute_dtype, of_map, of_map_and_state
from stochsolvers.lipschitz.machinery import spectra
from stochsolvers.lipschitz.machinery.blocks import scale_of
from stochsolvers.lipschitz.machinery.written import base_of, checked, sizes

_STEPS, _COLD_STEPS = 4, 48
_NUDGE = 2.0**-12


@value_object
class NormState:
    """What is kept of a layer's norm from one training step to the next.

    Attributes:
      vectors: v and w, (2, entries of the smaller side); zeros before the first step.
      norm: the norm, or a bound on it, as it was last computed in full.
      checksum: of the kernel that it was computed from; zeros are that of nothing.
    """

    vectors: Array
    norm: Array
    checksum: Array


@of_map
def norm_state(linear_map: LinearMap) -> NormState:
    """The state that knows nothing: the first `norm_step` takes 48 steps from a fixed start."""
    dtype = compute_dtype(linear_map)
    vectors = jnp.zeros((2, min(sizes(linear_map))), dtype)
    return NormState(vectors, jnp.zeros((), dtype), jnp.zeros(2, jnp.uint32))


@of_map_and_state(NormState, "norm_state")
@replicated
@functools.partial(jax.jit, static_argnames="num_steps")
def norm_step(
    linear_map: LinearMap, state: NormState, *, num_steps: int = 4
) -> tuple[Array, NormState]:
    r"""(||A v||, the state with v) for the v that maximises ||A v|| in the span of w, v, …, (A*A)^k v.

    A lower bound on ||A|| that reaches it as the steps add up; its derivative is <u, dA v>, u ∝ A v.

    Args:
      linear_map: A.
      state: of the last step, or `norm_state(A)`.
      num_steps: k ≥ 1; each costs a product with A and one with A*.

    Raises:
      ValueError: at trace time, if the state is that of a map of another size.
    """
    num_steps = _checks.count("num_steps", num_steps)
    shape = (2, min(sizes(linear_map)))
    if state.vectors.shape != shape:
        _checks.fail("vectors of the state of norm_step", f"shape {shape}", state.vectors.shape)
    linear_map = checked(base_of(linear_map))
    vectors = _tracking(linear_map, state.vectors, num_steps)
    value = image_norm(linear_map, vectors[0])
    return value, NormState(_known(vectors, state), state.norm, state.checksum)


@of_map_and_state(NormState, "norm_state")
@replicated
@functools.partial(jax.jit, static_argnames="certified")
def norm_refresh(linear_map: LinearMap, state: NormState, *, certified: bool = False) -> NormState:
    """The state with `spectral_norm(A)`, or the upper end of its bracket if `certified`, for `kept_norm`."""
    linear_map = jax.tree.map(lax.stop_gradient, linear_map)
    vectors = _known(_tracking(checked(base_of(linear_map)), state.vectors, _STEPS), state)
    return NormState(vectors, full_norm(linear_map, certified), checksum(linear_map))


@of_map_and_state(NormState, "norm_state")
@replicated
@functools.partial(jax.jit, static_argnames="certified")
def kept_norm(linear_map: LinearMap, state: NormState, *, certified: bool = False) -> Array:
    """The norm that `norm_refresh` computed if that was of this very kernel, else computed afresh.

    Its derivative is <u, dA v> ||A|| / ||A v|| at the kept v.
    """
    is_current = jnp.all(state.checksum == checksum(linear_map))
    return lax.cond(
        is_current,
        lambda A: varying(_with_derivative(state.norm, A, state.vectors[0]), A),
        lambda A: varying(full_norm(A, certified), A),
        linear_map,
    )


@of_map
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
    _checks.floating("norm", norm)
    _checks.non_negative("bound", bound)
    _checks.rank("bound", bound, 0)
    norm = jnp.asarray(norm)
    if not differentiate:
        norm = lax.stop_gradient(norm)
    _checks.held_by("bound", bound, norm.dtype)
    bound = jnp.asarray(bound, norm.dtype)
    least = max(float(epsilon), float(jnp.finfo(norm.dtype).tiny))
    norm = jnp.where(norm < least, least, norm)  # NaN stays
    if not shrink_only:
        return bound / norm
    above = ~(norm <= bound)
    return jnp.where(above, bound / jnp.where(above, norm, 1.0), 1.0)


def _tracking(linear_map: LinearMap, vectors: Array, num_steps: int) -> Array:
    """v and w after `num_steps` Krylov steps; after several times as many from a fixed start if v is zero."""
    linear_map = jax.tree.map(lax.stop_gradient, linear_map)
    vectors = lax.stop_gradient(vectors)
    is_warm = jnp.any(vectors[0] != 0)
    fixed = spectra.fixed_start(vectors.shape[1], vectors.dtype)
    warm = vectors.at[0].add(_NUDGE * fixed)  # leaves invariant spaces of A*A
    start = jnp.where(is_warm, warm, jnp.stack([fixed, fixed[::-1]]))
    rounds = jnp.where(is_warm, 1, -(-_COLD_STEPS // num_steps))
    return lax.fori_loop(
        0,
        rounds,
        lambda _, pair: varying(_improved(linear_map, pair, num_steps), linear_map),
        varying(start, linear_map),
    )


def _known(vectors: Array, state: NormState) -> Array:
    """The vectors, or the state's where a kernel was not finite."""
    return jnp.where(jnp.all(jnp.isfinite(vectors)), vectors, state.vectors)


def _improved(linear_map: LinearMap, vectors: Array, num_steps: int) -> Array:
    """The two top Ritz vectors of the span of w, v, A*A v, …, by products with A and A* alone."""
    forward, backward, shape = smaller_side(linear_map)
    image_shape = _image_shape(linear_map)

    def image(vector):
        return forward(vector.reshape(shape)).ravel()

    def orthogonal(vector, basis):
        """The unit vector of what is orthogonal to the basis, or zero where that is round-off."""
        before = jnp.sqrt(jnp.sum(vector**2))
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        norm = jnp.sqrt(jnp.sum(vector**2))
        keep = norm > 16 * jnp.finfo(norm.dtype).eps * before
        return jnp.where(keep, vector / jnp.where(keep, norm, 1.0), 0.0)

    with jax.default_matmul_precision("highest"):
        norm = jnp.sqrt(jnp.sum(vectors[0] ** 2))
        basis = vectors[:1] / jnp.where(norm > 0, norm, 1.0)  # zero after a zero map
        first = image(basis[0])
        scale = scale_of(first)
        images = [first / scale]
        following = orthogonal(vectors[1], basis)
        last = images[0]
        for step in range(num_steps + 1):
            if step:
                product = backward(last.reshape(image_shape)).ravel() / scale
                following = orthogonal(product, basis)
            basis = jnp.concatenate([basis, following[None]])
            images.append(image(following) / scale)
            last = images[-1] if step else images[0]
        stacked = jnp.stack(images)
        weights = jnp.linalg.eigh(stacked @ stacked.T)[1]
        return weights[:, :-3:-1].T @ basis


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
