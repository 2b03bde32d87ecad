"""What the wrappers for spectral normalisation share: options, and maps whose norm needs no inputs."""

import math
from typing import Any

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.linear_maps import Contraction, LinearMap
from stochsolvers.lipschitz import full_norm, norm_state, norm_step, normalising_factor


@value_object
class SpectralOptions:
    """Attributes as the arguments of `stochsolvers.nnx.SpectralNorm`."""

    bound: Scalar
    shrink_only: bool = static_field()
    differentiate_norm: bool = static_field()
    certified: bool = static_field()
    n_steps: int = static_field()
    epsilon: float = static_field()
    dtype: Any = static_field()

    def __post_init__(self):
        _checks.positive("bound of SpectralNorm", self.bound)
        _checks.rank("bound of SpectralNorm", self.bound, 0)
        _checks.count("n_steps of SpectralNorm", self.n_steps)
        _checks.non_negative("epsilon of SpectralNorm", self.epsilon)
        for name in ("shrink_only", "differentiate_norm", "certified"):
            if not isinstance(getattr(self, name), bool):
                got = repr(getattr(self, name))
                _checks.fail(f"{name} of SpectralNorm", "True or False", got)

    def normalised(self, kernel: Array, norm: Array) -> Array:
        """W c / ||A||, in the kernel's dtype or the one asked for."""
        factor = normalising_factor(
            norm,
            self.bound,
            shrink_only=self.shrink_only,
            differentiate=self.differentiate_norm,
            epsilon=self.epsilon,
        )
        wide = kernel.astype(jnp.promote_types(kernel.dtype, factor.dtype)) * factor
        return wide.astype(kernel.dtype if self.dtype is None else self.dtype)

    def norm_of(self, linear_map: LinearMap, *, training: bool) -> Array:
        """||A|| without a state: after steps from a fixed start, or in full."""
        if not training:
            return full_norm(linear_map, self.certified)
        return norm_step(linear_map, norm_state(linear_map), num_steps=self.n_steps)[0]


def blocks_map(kernel: Array, groups: int, contracted: int) -> LinearMap:
    """The block diagonal map of a kernel (*groups, *contracted, *new): the layer's but for copies of it."""
    shape = kernel.shape
    first, second = math.prod(shape[:groups]), math.prod(shape[groups : groups + contracted])
    blocks = kernel.reshape(first, second, -1)
    return Contraction("gi,gio->go", blocks, (first, second))


def einsum_map(equation: str, kernel: Array) -> LinearMap | None:
    """The map of a Flax einsum layer but for copies of it; None if x has labels that are summed alone."""
    equation = equation.replace(" ", "")
    inputs, _, rest = equation.partition(",")
    labels, _, outputs = rest.partition("->")
    sizes = dict(zip(labels, kernel.shape, strict=True))
    x = inputs.replace("...", "")
    if any(label not in sizes and label not in outputs for label in x):
        return None
    return Contraction(equation, kernel, tuple(sizes.get(label, 1) for label in x))
