"""Mini-batch semi-stochastic gradient descent; S2GD and SVRG are its settings."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.estimators import FeatureEstimator, VarianceReduced
from stochsolvers.estimators.forms import Form, gradient_form
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers import _loop
from stochsolvers.solvers._loop import Diagnostics, Solution, Step
from stochsolvers.solvers.derivatives import DerivativeLike, Unrolling, scan, unrolling
from stochsolvers.solvers.prox_sg import as_sampling
from stochsolvers.solvers.step_sizes import StepSizeLike, as_schedule, as_steps


def ms2gd(
    key: Array,
    problem: LayerProblem,
    *,
    tau: int | float | Array | None = None,
    step_size: StepSizeLike = None,
    num_outer: int,
    num_inner: int,
    init: Array | None = None,
    random_inner: bool = False,
    sampling: FeatureEstimator | None = None,
    form: Form = "auto",
    derivative: DerivativeLike = None,
    trace_objective: bool = False,
    certify: bool = False,
) -> Solution:
    r"""mS2GD: y ← z, μ ← ∇F(y), then M inner steps z ← prox_{ηg}(z − η[μ + ∇Ψ_S(z) − ∇Ψ_S(y)]).

    From y = 0 with η = 1 an inner step is prox_g(A x + b + (I − (n1/τ) Σ_{i∈S} A_i A_i*) z): the plain layer
    plus additive dropout (proposition 2). The first inner step starts at z = y = 0 and carries no
    noise; the second is the first that does. τ = 1 is S2GD; with a fixed inner length it is SVRG.

    Args:
      key: random key; inner step j of the whole run uses `fold_in(key, j)`.
      problem: the layer's problem.
      tau: τ of a τ-nice sampling: a count (int, may be traced) or a fraction of n1 (float).
      step_size: a number, j -> η_j over all inner steps, a rule, or None for 1/L.
      num_outer: number of full gradients, static, ≥ 1.
      num_inner: M, inner steps for each, static, ≥ 1; the largest of them for `random_inner`.
      init: z_0, zero by default.
      random_inner: draw the inner length t in 1..M with P(t) ∝ (1 − λη)^{M − t} (Konečný et al. 2016,
        algorithm 1; uniform without a ridge), once for each outer iteration and the whole batch.
      sampling: any feature estimator in place of `tau`.
      form: which of the equal forms of the full gradient to use, see `stochsolvers.forms`.
      derivative: "unrolled" (the default), "remat" or `Truncated(n)`, all counted in outer iterations;
        see `solvers.derivatives`.
      trace_objective: also return P for every inner step.
      certify: also return a bound on P(z) − min P at the last iterate.

    Returns:
      `Solution` with K = num_outer · num_inner inner steps; steps beyond a random inner length are
      idle and have residual 0.

    Raises:
      ValueError: as `prox_sg`.

    References:
      Konečný, Liu, Richtárik and Takáč 2016; Johnson and Zhang 2013; Bibi et al. 2019, eq. 28–31.
    """
    num_outer = _checks.count("num_outer", num_outer)
    num_inner = _checks.count("num_inner", num_inner)
    base = as_sampling(tau, sampling, problem)
    if not isinstance(base, FeatureEstimator):
        _checks.fail("sampling", "an estimator that samples input features", type(base).__name__)
    solution = _ms2gd(
        key,
        problem,
        base,
        as_steps(step_size),
        _loop.starting_point(problem, init),
        unrolling(derivative, "ms2gd"),
        num_outer=num_outer,
        num_inner=num_inner,
        random_inner=random_inner,
        form=form,
        trace_objective=trace_objective,
    )
    return _loop.certified(problem, solution) if certify else solution


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_outer",
        "num_inner",
        "random_inner",
        "form",
        "trace_objective",
    ),
)
def _ms2gd(
    key: Array,
    problem: LayerProblem,
    base: FeatureEstimator,
    steps: Any,
    z0: Array,
    derivative: Unrolling,
    *,
    num_outer: int,
    num_inner: int,
    random_inner: bool,
    form: Form,
    trace_objective: bool,
) -> Solution:
    schedule = as_schedule(steps, problem, base)
    gradient = gradient_form(problem, form, num_calls=num_outer)

    def outer(operands, z, epoch):
        problem, gradient, base, schedule = operands
        estimator = VarianceReduced(base, z, gradient(z))
        first = epoch * num_inner
        length_key = jax.random.fold_in(jax.random.fold_in(key, first), 0)
        length = num_inner
        if random_inner:
            length = _random_length(length_key, problem.ridge * schedule(first), num_inner)

        def inner(operands, j, z, memory):
            problem, estimator, schedule = operands
            step = schedule(j)
            point = z - step * estimator(jax.random.fold_in(key, j), problem, z)
            value = problem.prior.prox(point, step)
            if random_inner:
                active = j - first < length
                value, point = jnp.where(active, value, z), jnp.where(active, point, z)
            return Step(value, memory, point)

        return _loop.iterate(
            problem,
            inner,
            (problem, estimator, schedule),
            z,
            num_inner,
            first=first,
            trace_objective=trace_objective,
        )

    operands = problem, gradient, base.prepare(problem), schedule
    z, diagnostics = scan(outer, operands, z0, jnp.arange(num_outer), derivative)
    flat = jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), diagnostics
    )
    return _loop.solution(z, Diagnostics(*flat))


def _random_length(key: Array, contraction: Array, num_inner: int) -> Array:
    """t in 1..M with P(t) ∝ (1 − λη)^{M − t}."""
    lengths = jnp.arange(1, num_inner + 1)
    shrink = jnp.log1p(-jnp.minimum(jnp.asarray(contraction), 0.999))
    return 1 + jax.random.categorical(key, (num_inner - lengths) * shrink)
