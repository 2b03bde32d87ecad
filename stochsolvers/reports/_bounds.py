"""Bounds on one layer: its squared spectral norm, its step sizes, how far its solver can amplify."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from stochsolvers._layers import Settings
from stochsolvers._typing import Array
from stochsolvers.equilibrium import EquilibriumProblem, Regularized
from stochsolvers.linear_maps import Dense, LinearMap
from stochsolvers.lipschitz import (
    Bracket,
    is_exact,
    lipschitz_bracket,
    operator_bracket,
    strong_convexity,
)
from stochsolvers.losses import Loss, Squares
from stochsolvers.problems import LayerProblem, NormalizedProblem
from stochsolvers.reports._norms import least_eigenvalue, squared_norm
from stochsolvers.solvers import Solver

_HOST = 1024  # order of a Gram matrix that is decomposed within a program's run


def squared_norm_bracket(linear_map: LinearMap) -> Bracket:
    """lower ≤ ||A||² ≤ upper: up to round-off where it is exact, else of the layer as it is."""
    exact = is_exact(linear_map)
    return lipschitz_bracket(linear_map) if exact else operator_bracket(linear_map)


def norms_of(linear_map: LinearMap) -> tuple[Array, Array, Array]:
    """lower ≤ ||A||² ≤ upper and a lower bound on λ_min(A A*), within a program.

    Of a dense layer on one device they are computed on the host: a program that finds them takes seconds to
    compile.
    """
    if (
        not isinstance(linear_map, Dense)
        or jax.device_count() > 1
        or min(linear_map.kernel.shape) > _HOST
    ):
        bracket = squared_norm_bracket(linear_map)
        return bracket.lower, bracket.upper, strong_convexity(linear_map, upper=bracket.upper)
    dtype = jnp.result_type(linear_map.dtype, jnp.float32)

    def norms(kernel: Any) -> np.ndarray:
        layer = jax.tree.unflatten(jax.tree.structure(linear_map), [np.asarray(kernel)])
        ends = squared_norm(layer)
        least = least_eigenvalue(layer)
        assert ends is not None
        assert least is not None
        rounding = 2 * np.finfo(dtype).eps
        factors = (1 - rounding, 1 + rounding, 1 - rounding)
        return np.asarray((*ends, least) * np.asarray(factors), dtype)

    result = jax.ShapeDtypeStruct((3,), dtype)
    (kernel,) = jax.tree.leaves(linear_map)
    lower, upper, least = jax.pure_callback(norms, result, kernel, vmap_method="sequential")
    return lower, upper, least


def first_step(
    solver: Solver, problem: LayerProblem, step_constant: Array | None, deterministic: bool
) -> Array:
    """η_0, a scalar or one for each output."""
    steps = solver.schedule(problem, step_constant, deterministic=deterministic)
    return steps(jnp.zeros((), int))


def solver_bound(
    settings: Settings,
    linear_map: LinearMap,
    upper: Array,
    constant: Array | None,
    least: Array | None = None,
) -> Array:
    r"""A Lipschitz constant of x ↦ z_K, or w_K, for K steps along the full gradient from zero.

    A proximal operator brings no two points further apart, so that

        ℓ_{k+1} = max(|1 − η_k μ|, |1 − η_k (λ + upper)|) ℓ_k + η_k sqrt(upper),   ℓ_0 = 0,

    μ = λ + λ_min(A A*), for squares. One step of size 1 gives sqrt(upper), the plain layer's. Normalised, μ
    and λ + upper are divided by L. The map from the point before the prox to w_K has the constant
    max(1, 1/η).

    Args:
      settings: of a layer with a solver for which `has_bound` holds.
      linear_map: A.
      upper: an upper bound on ||A||².
      constant: the current one of the layer, or None.
      least: a lower bound on λ_min(A A*), where it is known.
    """
    solver, inputs = settings.solver, jnp.zeros(linear_map.in_shape, linear_map.dtype)
    plain = settings.problem(linear_map, inputs, None, None)
    problem, constant = settings.prepared(plain, constant)
    steps = solver.schedule(problem, constant, deterministic=True)
    least = strong_convexity(linear_map, upper=upper) if least is None else least
    convexity, smoothness = plain.ridge + least, plain.ridge + upper
    if isinstance(problem, NormalizedProblem):
        convexity, smoothness = convexity / problem.scale, smoothness / problem.scale

    def step(k, bound):
        size = steps(k)
        return _expansion(size, convexity, smoothness) * bound + size * jnp.sqrt(upper)

    count = solver.deterministic().num_iters  # pyright: ignore[reportAttributeAccessIssue]
    bound = lax.fori_loop(0, count, step, jnp.zeros((), problem.dtype))
    if settings.output == "activation":
        return bound
    return bound * jnp.maximum(1.0, 1.0 / steps(count - 1))


def guarantee(
    solver: Solver,
    problem: LayerProblem,
    upper: Array,
    step_constant: Array | None,
    deterministic: bool,
    least: Array | None = None,
) -> Array:
    r"""max(|1 − η μ|, |1 − η (λ + upper)|) if every step is that of one η along the full gradient, else +∞.

    Then z_{k+1} − z_k = T z_k − T z_{k−1} for one map T, which brings two points closer by that factor.
    """
    none = jnp.asarray(jnp.inf, problem.dtype)
    if solver.stochastic and not deterministic:
        return none
    running = solver.deterministic() if deterministic else solver
    if not running.takes_gradient_steps():
        return none
    steps = solver.schedule(problem, step_constant, deterministic=deterministic)
    sizes = lax.map(steps, jnp.arange(running.num_iters))  # pyright: ignore[reportAttributeAccessIssue]
    if sizes.ndim > 1:  # one for each output
        return none
    convexity, modulus = jnp.asarray(problem.ridge), problem.loss.strong_convexity
    if not isinstance(modulus, int | float) or modulus > 0:
        known = strong_convexity(problem.linear_map, upper=upper) if least is None else least
        convexity = convexity + modulus * known
    factor = _expansion(sizes[0], convexity, problem.smoothness(upper))
    return jnp.where(jnp.all(sizes == sizes[0]), factor, none)


class EquilibriumNumbers(NamedTuple):
    """Of a problem z = h(z): its squared norm between two numbers, and what residuals are multiplied by.

    Attributes:
      lower, upper: of ||W||², of a composition of the product of its ||W_i||²; 0 and +∞ where not known.
      contraction: the guaranteed factor of the residuals; +∞ where there is none.
    """

    lower: Array
    upper: Array
    contraction: Array


def equilibrium_numbers(solver: Solver, problem: Any) -> EquilibriumNumbers:
    """The norms of a problem's layers, and κ for solvers whose every step is z ← h(z)."""
    none = jnp.asarray(jnp.inf, problem.dtype)
    layers = getattr(problem, "equilibria", (problem,))
    if not all(isinstance(layer, EquilibriumProblem) for layer in layers):
        return EquilibriumNumbers(jnp.zeros_like(none), none, none)
    brackets = [operator_bracket(layer.linear_map) for layer in layers]
    lower, upper = (
        functools.reduce(jnp.multiply, [bracket[end] for bracket in brackets]) for end in (0, 1)
    )
    contraction = contraction_of(problem, tuple(bracket.upper for bracket in brackets))
    unit_steps = solver.takes_gradient_steps() and getattr(solver, "step_size", None) is None
    return EquilibriumNumbers(lower, upper, contraction if unit_steps else none)


def contraction_of(problem: Any, squared_norms: Sequence[Array]) -> Array:
    """κ with ||T(z) − T(y)|| ≤ κ ||z − y||: ω², or Π ((1 − α) + α ω_i²) times the regulariser's."""
    if isinstance(problem, EquilibriumProblem):
        return squared_norms[0]
    alpha, factors = problem.alpha, list(squared_norms)
    if problem.is_averaged:
        factors = [1 - alpha + alpha * upper for upper in factors]
    for layer in problem.layers:
        if isinstance(layer, Regularized):
            factors.append(layer.lipschitz_constant(problem.dtype))
    return functools.reduce(jnp.multiply, factors)


def equilibrium_bound(
    problem: Any, squared_norms: Sequence[Array], input_norms: Sequence[Array]
) -> Array:
    r"""A Lipschitz constant of x ↦ z*, the drives c_i = U_i x + b_i.

    Of one layer ||U|| ω / (1 − ω²), for dz = (I − WᵀD W)⁻¹ WᵀD dc, D = σ′ with 0 ⪯ D ⪯ I. A composition
    moves by

        e ← ((1 − α) + α ω_i²) e + α ω_i ||U_i||

    from layer to layer, from e = 0 to e_n for a fixed z, and by e_n / (1 − κ) at the equilibrium.

    Args:
      problem: an `EquilibriumProblem` or a `DeepProblem`.
      squared_norms: upper bounds on ω_i² for each equilibrium layer.
      input_norms: upper bounds on ||U_i||.
    """
    alpha, moved = getattr(problem, "alpha", 1.0), jnp.zeros((), problem.dtype)
    pairs = iter(zip(squared_norms, input_norms, strict=True))
    for layer in getattr(problem, "layers", (problem,)):
        if isinstance(layer, Regularized):
            moved = moved * layer.lipschitz_constant(problem.dtype)
            continue
        squared, norm = next(pairs)
        moved = (1 - alpha + alpha * squared) * moved + alpha * jnp.sqrt(squared) * norm
    slack = 1 - contraction_of(problem, squared_norms)
    return jnp.where(slack > 0, moved / jnp.where(slack > 0, slack, 1), jnp.inf)


def _expansion(step: Array, convexity: Array, lipschitz: Array) -> Array:
    """max(|1 − η μ|, |1 − η L|), the most by which z ↦ z − η ∇F(z) moves two points apart."""
    return jnp.maximum(jnp.abs(1.0 - step * convexity), jnp.abs(1.0 - step * lipschitz))


def has_bound(solver: Any, loss: Loss) -> bool:
    """Whether `solver_bound` holds: squares, one step size for all outputs, no momentum, no stopping rule.

    A step size that is a user's function cannot be a part of the compiled report.
    """
    if not isinstance(solver, Solver) or solver.per_output or solver.stops:
        return False
    if type(loss) is not Squares or any(map(callable, jax.tree.leaves(solver))):
        return False
    return solver.deterministic().takes_gradient_steps()
