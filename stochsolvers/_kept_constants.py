"""The constant that a layer keeps beside its parameters, and how it knows that it is of another kernel."""

import functools
import zlib
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._compilation import jit_once
from stochsolvers._shards import automatic, is_explicit, varying
from stochsolvers._typing import Array, at_least_float32, join_static, split_static
from stochsolvers.linear_maps import LinearMap
from stochsolvers.solvers import Solver

_SAMPLES = 61  # entries of the kernel in a fingerprint
_POWER_STEPS = 2
_MOVED = 0.5  # relative change above which a kernel is another one


def fingerprint(settings: Any, linear_map: LinearMap) -> Array:
    r"""Numbers by which a kept constant is known to be of a map, a solver's step rule and a ridge.

    The rule's structure as a number, the ridge, the shape of the inputs; the Euclidean norm of the map's
    arrays and some of their entries; and ‖A* v‖ for v after two steps of the power method with A A*, from a
    fixed start, which is large where ‖A‖ is.
    """
    linear_map = lax.stop_gradient(linear_map)
    dtype = at_least_float32(linear_map.dtype)
    leaves = [leaf.ravel().astype(dtype) for leaf in jax.tree.leaves(linear_map)]
    entries = jnp.concatenate(leaves)
    places = np.random.default_rng(0).integers(entries.size, size=_SAMPLES)
    start = np.random.default_rng(1).standard_normal(linear_map.out_shape)
    A, v = linear_map.astype(dtype), jnp.asarray(start, dtype)
    for _ in range(_POWER_STEPS):
        v = A(A.adjoint(v / _norm(v)))
    size = _norm(A.adjoint(v / _norm(v)))
    known = [rule_number(settings.solver), *linear_map.in_shape]
    numbers = jnp.stack([jnp.asarray(settings.ridge, dtype), _norm(entries), size])
    return jnp.concatenate([jnp.asarray(known, dtype), numbers, entries[places]])


def _norm(array: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(array**2))
    return jnp.where(norm > 0, norm, 1)


def rule_number(solver: Solver) -> int:
    """A number for the structure of the solver's step rule and estimator, hardly ever that of another one."""
    structure = jax.tree.structure((solver.rule(), solver.estimator()))
    return zlib.crc32(repr(structure).encode()) % 2**20 + 1  # exact in float32; zero is no rule's


def is_current(reference: Array, now: Array, rank: int) -> Array:
    """Whether two fingerprints are of about the same map, and the same rule.

    Training moves a kernel little from one refresh to the next. A kernel whose norm, entries or image of the
    power method have changed by half is another one (loaded from a checkpoint, say), and so is one for
    images of another size.

    Args:
      reference: an earlier fingerprint; zeros are that of nothing.
      now: the fingerprint at hand.
      rank: the number of axes of the map's inputs.
    """
    if now.shape != reference.shape:
        return jnp.zeros((), bool)
    now = now.astype(reference.dtype)
    same = jnp.all(now[: rank + 2] == reference[: rank + 2])
    norm, size, norm_before, size_before = (
        *now[rank + 2 : rank + 4],
        *reference[rank + 2 : rank + 4],
    )
    near = (jnp.abs(norm - norm_before) <= _MOVED * norm_before) & (
        size**2 <= (1 + _MOVED) * size_before**2
    )
    moved, before = now[rank + 4 :] - reference[rank + 4 :], reference[rank + 4 :]
    return same & near & (jnp.sum(moved**2) <= _MOVED**2 * jnp.sum(before**2))


def current_constant(
    settings: Any,
    linear_map: LinearMap,
    kept: Array | None,
    reference: Array | None,
) -> Array | None:
    """The kept constant if it is of about this map and of this rule, else one computed from the map at hand.

    So that a network into which weights have just been loaded does not run on the steps of others.

    Args:
      settings: of a solver layer, `_layers.Settings`.
      linear_map: A.
      kept: what `settings.constant` returned for an earlier kernel, or None.
      reference: the `fingerprint` of the map that it is of, or None.
    """
    traced, static = split_static(lax.stop_gradient((settings, linear_map)))
    constant = functools.partial(_constant, static=static)
    shape = jax.eval_shape(constant, traced)
    if kept is None or reference is None or shape is None or kept.shape != shape.shape:
        return constant(traced)
    operands = traced, kept, reference
    if _is_known(operands):  # no program of both branches
        is_kept = _is_kept(*operands, static=static)
        return kept if is_kept else jnp.asarray(constant(traced), kept.dtype)
    choose = functools.partial(_kept_or_computed, static=static)
    return automatic(choose, jax.sharding.PartitionSpec(), *operands)


def constant_and_fingerprint(settings: Any, linear_map: LinearMap) -> tuple[Array, Array] | None:
    """`settings.constant` of a map and its `fingerprint`, or None for a fixed step.

    Outside of traced functions it is compiled as a program that runs once.
    """
    traced, static = split_static((settings, linear_map))
    compute = _once_both if _is_known(traced) else _both
    return compute(traced, static=static)


def _is_known(operands: Any) -> bool:
    """Whether arrays are at hand, outside of traced functions, on no mesh with explicit axes."""
    leaves = [
        lax.full((), 0),
        *jax.tree.leaves(operands),
    ]  # the first is traced with what is around
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) and not is_explicit()


def _both(traced: Any, *, static: Any) -> tuple[Array, Array] | None:
    settings, linear_map = join_static(traced, static)
    constant = settings.constant(linear_map)
    return None if constant is None else (constant, fingerprint(settings, linear_map))


_once_both = jit_once(_both, static_argnames="static")


def _constant(traced: Any, static: Any) -> Array | None:
    settings, linear_map = join_static(traced, static)
    return settings.constant(linear_map)


@functools.partial(jax.jit, static_argnames="static")
def _is_kept(traced: Any, kept: Array, reference: Array, *, static: Any) -> Array:
    settings, linear_map = join_static(traced, static)
    now = fingerprint(settings, linear_map)
    return is_current(reference, now, len(linear_map.in_shape))


@functools.partial(jax.jit, static_argnames="static")
def _kept_or_computed(traced: Any, kept: Array, reference: Array, *, static: Any) -> Array:
    settings, linear_map = join_static(traced, static)
    kept, traced = varying((kept, traced), (kept, traced))
    now = fingerprint(settings, linear_map)
    return lax.cond(
        is_current(reference, now, len(linear_map.in_shape)),
        lambda _: kept,
        lambda traced: jnp.asarray(_constant(traced, static), kept.dtype),
        traced,
    )
