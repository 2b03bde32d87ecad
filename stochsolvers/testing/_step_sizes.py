"""The contract of a step size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stochsolvers import step_sizes
from stochsolvers._typing import Array
from stochsolvers.estimators import Estimator, Full, OutputCoordinates
from stochsolvers.problems import LayerProblem
from stochsolvers.sampling import num_sampled
from stochsolvers.step_sizes import StepSizeLike, StepSizeRule
from stochsolvers.testing import _common as common


class StepSizeReport(NamedTuple):
    """How a first step compares with the one that theory supports.

    Attributes:
      first: η_0, the largest of them if there is one for each output.
      safe: 2/L_F for the full gradient and samplings of outputs, 1/(2𝓛) for other estimators; None if 𝓛 is
        not known.
    """

    first: float
    safe: float | None


def check_step_size(
    rule: StepSizeLike, problem: LayerProblem, estimator: Estimator | None = None
) -> StepSizeReport:
    r"""Hold a step size to its contract, on a small problem.

    - η_k is positive and finite at k = 0, 1, 10 and 100, in the problem's dtype;
    - along the full gradient η_0 ≤ 2/L_F, L_F = L_ℓ ‖A‖² + λ by numpy; with τ-nice sampling of the outputs,
      λ_max(E) ≤ 2 for E = √η [β H + (1 − β) diag(H)] √η, H = L_ℓ A A* + λ I, β = (τ − 1)/(n2 − 1);
    - a step along ∇F then does not raise the objective, from random points;
    - a rule's constant is the same for other inputs and another bias, and a path of problems and of the
      rule's numbers compiles once;
    - a kernel of NaN raises nothing, and a rule's step is then NaN.

    With estimators that sample features, longer steps than theory supports are allowed (the paper's are), and
    only reported.

    Args:
      rule: a number, a schedule or a rule.
      problem: a problem of a few features.
      estimator: of its gradient; the full gradient by default.

    Returns:
      `StepSizeReport`.

    Raises:
      AssertionError: in words, with the numbers.
    """
    name = type(rule).__name__
    estimator = Full() if estimator is None else estimator
    if isinstance(rule, StepSizeRule):
        common.passes_as_a_value(name, rule)
    with common.float64():
        problem = common.cast(problem, jnp.float64)
        steps = _steps(name, rule, problem, estimator)
        if isinstance(rule, StepSizeRule):
            _check_constant(name, rule, problem, estimator)
        _check_bad_values(name, rule, problem, estimator)
        first = np.asarray(steps[0])
        largest = float(np.max(first))
        if isinstance(estimator, Full | OutputCoordinates):
            safe = largest * _check_bound(name, first, problem, estimator)
            _check_descent(name, steps[0], problem, estimator)
        else:
            safe = _theory(estimator, problem)
    return StepSizeReport(largest, safe)


def _steps(
    name: str, rule: StepSizeLike, problem: LayerProblem, estimator: Estimator
) -> list[Array]:
    def steps(rule, problem):
        schedule = step_sizes.schedule_of(rule, problem, estimator)
        return [schedule(k) for k in (0, 1, 10, 100)]

    if rule is None or _is_function(rule):
        path = [(common.scaled(problem, f),) for f in (1.0, 1.5, 0.5)]
        got = common.traced_once(name, lambda problem: steps(rule, problem), path)
    else:
        path = [(common.scaled(rule, f), common.scaled(problem, f)) for f in (1.0, 0.9)]
        got = common.traced_once(name, steps, path)
    for k, step in zip((0, 1, 10, 100), got[0], strict=True):
        fine = jnp.isfinite(step) & (step > 0)
        common.require(fine, f"{name}: step of iteration {k}", "a number > 0", step)
        common.same_dtype(f"{name}: step of iteration {k}", step, problem.dtype)
    eager = steps(rule, problem)[0]
    common.close(f"{name} without jit", eager, got[0][0], words="that of jit")
    return got[0]


def _is_function(rule: Any) -> bool:
    """Whether a step size is a function and no pytree, so that it cannot be an argument of `jit`."""
    if not callable(rule) or isinstance(rule, StepSizeRule):
        return False
    leaves = jax.tree.leaves(rule)
    return not leaves or leaves[0] is rule


def _check_constant(
    name: str, rule: StepSizeRule, problem: LayerProblem, estimator: Estimator
) -> None:
    bias = None if problem.bias is None else 2.0 * problem.bias
    other = LayerProblem(
        problem.linear_map, 3.0 * problem.inputs + 1.0,
        loss=problem.loss, bias=bias, prior=problem.prior, ridge=problem.ridge,
    )  # fmt: skip
    here, there = (jax.jit(rule.constant)(p, estimator) for p in (problem, other))
    what = f"{name}.constant at other inputs and another bias"
    common.close(what, there, here, words="the same, for layers keep it")


def _check_bad_values(
    name: str, rule: StepSizeLike, problem: LayerProblem, estimator: Estimator
) -> None:
    bad = common.scaled(problem, jnp.nan)

    @jax.jit
    def first(problem):
        return step_sizes.schedule_of(rule, problem, estimator)(0)

    step = common.attempt(f"{name} of a kernel of NaN", first, bad)
    if isinstance(rule, StepSizeRule):  # as a layer does that keeps the constant
        what = f"{name}.constant of a kernel of NaN without jit"
        common.attempt(what, rule.constant, bad, estimator)
        words = "NaN, for an iterate that does not move would pass for a solution"
        common.require(jnp.isnan(step), f"{name} of a kernel of NaN", words, step)


def _hessian(problem: LayerProblem) -> np.ndarray:
    """L_ℓ A A* + λ I."""
    A: Any = problem.linear_map
    size = int(np.prod(A.out_shape))
    units = jnp.eye(size).reshape(size, *A.out_shape)
    rows = np.asarray(jax.jit(lambda A: jax.vmap(A.adjoint)(units))(A)).reshape(size, -1)
    return float(problem.loss.smoothness) * rows @ rows.T + float(problem.ridge) * np.eye(size)


def _check_bound(
    name: str, first: np.ndarray, problem: LayerProblem, estimator: Estimator
) -> float:
    """2 / λ_max(E), by which the steps could be longer."""
    H, n2 = _hessian(problem), problem.linear_map.out_features
    beta = 1.0
    if isinstance(estimator, OutputCoordinates):
        beta = (int(num_sampled(estimator.tau, n2)) - 1) / max(n2 - 1, 1)
    feature = np.arange(len(H)) % n2
    blocks = feature[:, None] == feature[None]
    roots = np.sqrt(np.broadcast_to(first, (n2,)))[feature]
    E = roots[:, None] * (beta * H + (1 - beta) * H * blocks) * roots
    worst = float(np.linalg.eigvalsh(E)[-1])
    what = f"first step of {name}"
    if first.ndim == 0 and beta == 1:
        safe = 2 / np.linalg.eigvalsh(H)[-1]
        words = f"at most 2/L_F = {safe:.8g}"
        common.require(worst <= 2 + 1e-9, what, words, f"{float(first):.8g}")
    words = "at most the step of the sampling's separable overapproximation, λ_max <= 2"
    common.require(worst <= 2 + 1e-9, what, words, f"λ_max = {worst:.6g}")
    return 2 / worst


def _check_descent(name: str, step: Array, problem: LayerProblem, estimator: Estimator) -> None:
    if isinstance(estimator, OutputCoordinates):
        return

    @jax.jit
    def objectives(z):
        z = problem.prior.prox(z, 1.0)
        new = problem.prior.prox(z - step * problem.gradient(z), step)
        return problem.objective(z), problem.objective(new)

    for seed in (1, 2, 3):
        before, after = objectives(common.normal(seed, problem.shape))
        words = f"at most {np.max(before):.8g}, that of before"
        what = f"objective after a step of {name} along ∇F"
        common.require(after <= before + 1e-9 * (1 + np.abs(before)), what, words, np.max(after))


def _theory(estimator: Estimator, problem: LayerProblem) -> float | None:
    try:
        return 0.5 / float(estimator.expected_smoothness(problem))
    except ValueError:
        return None
