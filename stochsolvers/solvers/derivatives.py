r"""How derivatives pass through a solver: four ways, one argument.

| `derivative` | reverse mode stores | and computes |
|---|---|---|
| "unrolled" | K iterates | every iteration's transpose |
| "remat" | about 2 √K iterates | the same, and every iteration once more |
| `Truncated(n)` | n iterates | the transpose of the last n iterations, the rest taken as constant |
| the same, at a tolerance | n iterates | the transpose of n steps z ← T(z) more (phantom gradients) |
| "implicit", `Implicit(...)` | one iterate | one linear solve at the fixed point, see `solvers.implicit` |

The first two are exact for any K; the last two are exact in the limit of convergence.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._shards import varying
from stochsolvers._typing import Array, Scalar, static_field, value_object


@value_object
class Unrolled:
    """Derivatives through every iteration, "unrolled"."""


@value_object
class Remat:
    """Derivatives through every iteration, each of which is computed once more in reverse, "remat"."""


@value_object
class Truncated:
    """Derivatives through the last `num_iters` iterations; what comes before is a constant.

    With a tolerance the solver runs until it stops, and its value is then that of n steps z ← T(z) more, T as
    in `FixedPoint`, through which derivatives pass.

    Args:
      num_iters: n ≥ 1; n ≥ K is unrolled.

    References:
      Shaban, Cheng, Hatch and Boots 2019, Truncated back-propagation for bilevel optimization; Geng et al.
      2021, On training implicit models (phantom gradients).
    """

    num_iters: int = static_field()

    def __post_init__(self):
        _checks.count("num_iters of Truncated", self.num_iters)


@value_object
class Implicit:
    """Derivatives of the fixed point by one linear solve, see `solvers.implicit.fixed_point`.

    Args:
      tol: relative residual at which an example's linear system counts as solved; may be traced.
      max_iters: the most conjugate-gradient iterations, static.
      guess: warm start in reverse mode, shaped as the solution: the gradient of the same loss with
        respect to a bias of each example (`LayerProblem.bias`, given in the solution's shape) at a
        nearby point; of a problem z = h(z), with respect to what is added to h. A constant to derivatives.
      unsolved: what becomes of an example whose system is not solved to the tolerance after `max_iters`
        iterations, or has no solution: "nan", so that its derivatives, and those of all that it shares with
        others, are NaN; or "keep", the last iterate. Residuals of the size of round-off count as
        solved. None is "nan" for problems z = h(z) and "keep" for layers, see `solvers.implicit`.
    """

    tol: Scalar = 1e-5
    max_iters: int = static_field(default=200)
    guess: Array | None = None
    unsolved: Literal["nan", "keep"] | None = static_field(default=None)

    def __post_init__(self):
        _checks.positive("tol of Implicit", self.tol)
        _checks.rank("tol of Implicit", self.tol, 0)
        _checks.count("max_iters of Implicit", self.max_iters)
        _checks.member("unsolved of Implicit", self.unsolved, ("nan", "keep", None))


Unrolling: TypeAlias = Unrolled | Remat | Truncated
DerivativeLike: TypeAlias = Literal["unrolled", "remat", "implicit"] | Unrolling | Implicit | None
_NAMES = {"unrolled": Unrolled, "remat": Remat, "implicit": Implicit}


def canonical(derivative: DerivativeLike, *, stops: bool = False) -> Unrolling | Implicit:
    """`derivative` with its default and its names resolved; `stops` is whether a tolerance is set.

    Raises:
      ValueError: for anything else, and for what has no reverse mode through a stopping test.
    """
    if derivative is None:
        derivative = "implicit" if stops else "unrolled"
    if isinstance(derivative, Unrolled | Remat | Truncated | Implicit):
        resolved = derivative
    else:
        _checks.member("derivative", derivative, _NAMES)
        resolved = _NAMES[derivative]()
    if stops and not isinstance(resolved, Implicit | Truncated):
        wanted = "'implicit', Implicit(...) or Truncated(n)"
        _checks.fail("derivative where a tolerance is given", wanted, derivative)
    return resolved


Body: TypeAlias = Callable[[Any, Any, Array], tuple[Any, Any]]
"""(operands, carry, k) -> (carry, output); everything it differentiates is in the operands."""


def scan(
    body: Body,
    operands: Any,
    carry: Any,
    ks: Array,
    derivative: Unrolling,
    *,
    opening: Body | None = None,
) -> tuple[Any, Any]:
    """`lax.scan` of `body` over `ks`, differentiated as asked; `opening` does the first iteration."""
    carry = varying(carry, operands)
    if isinstance(derivative, Truncated):
        constant = ks.shape[0] - derivative.num_iters
        if constant <= 0:
            return scan(body, operands, carry, ks, Unrolled(), opening=opening)
        frozen = lax.stop_gradient((operands, carry))
        carry, before = scan(body, *frozen, ks[:constant], Unrolled(), opening=opening)
        carry, after = scan(body, operands, lax.stop_gradient(carry), ks[constant:], Unrolled())
        return carry, _concatenate(before, after)
    if opening is not None:
        carry, output = opening(operands, carry, ks[0])
        output = jax.tree.map(lambda leaf: leaf[None], output)
        if ks.shape[0] == 1:
            return carry, output
        carry, outputs = scan(body, operands, carry, ks[1:], derivative)
        return carry, _concatenate(output, outputs)

    def run(operands, carry, ks):
        return lax.scan(lambda carry, k: body(operands, carry, k), carry, ks)

    if isinstance(derivative, Remat):
        return _in_chunks(run, operands, carry, ks)
    return run(operands, carry, ks)


def _in_chunks(run: Callable[..., Any], operands: Any, carry: Any, ks: Array) -> tuple[Any, Any]:
    """`run` in about √K chunks, of which only the ends are kept for the reverse pass."""
    size = math.isqrt(ks.shape[0])
    whole = ks.shape[0] // size * size
    chunk = jax.checkpoint(run, prevent_cse=False)
    carry, outputs = lax.scan(
        lambda carry, ks: chunk(operands, carry, ks), carry, ks[:whole].reshape(-1, size)
    )
    outputs = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), outputs)
    if whole == ks.shape[0]:
        return carry, outputs
    carry, rest = jax.checkpoint(run)(operands, carry, ks[whole:])
    return carry, _concatenate(outputs, rest)


def _concatenate(*parts: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
