"""Mini-batch semi-stochastic gradient descent; S2GD and SVRG are its settings."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, count_field, static_field, value_object
from stochsolvers.estimators import FeatureEstimator, VarianceReduced
from stochsolvers.estimators.forms import FORMS, Form
from stochsolvers.problems import LayerProblem
from stochsolvers.sampling import canonical_tau
from stochsolvers.solvers import _loop
from stochsolvers.solvers._base import Solver
from stochsolvers.solvers._loop import Diagnostics, Step
from stochsolvers.solvers._run import Run
from stochsolvers.solvers._solution import Solution
from stochsolvers.solvers.derivatives import DerivativeLike, scan
from stochsolvers.solvers.gradient_descent import ProxGD
from stochsolvers.solvers.stochastic_gradient import as_sampling
from stochsolvers.step_sizes import StepSizeLike


@value_object
class MS2GD(Solver):
    r"""mS2GD: y ← z, μ ← ∇F(y), then inner steps z ← prox_{ηg}(z − η[μ + ∇Ψ_S(z) − ∇Ψ_S(y)]); see `ms2gd`.

    Args:
      tau: τ: a count (int, an array may be traced) or a fraction of n1 (float); None where `sampling` is
        given.
      num_outer: full gradients, ≥ 1.
      num_inner: inner steps for each, ≥ 1.
      step_size: a number, a schedule, a rule, or None for 1/L.
      random_inner: random inner lengths.
      sampling: a feature estimator in place of `tau`.
      form: which of the equal forms of the full gradient to use, see `estimators.forms`.
      derivative: "unrolled", "remat" or `Truncated(n)`, counted in outer iterations.

    References:
      Konečný et al. 2016; Bibi et al. 2019, proposition 2.
    """

    tau: int | float | Array | None = count_field()
    num_outer: int = static_field()
    num_inner: int = static_field()
    step_size: StepSizeLike = None
    random_inner: bool = static_field(default=False)
    sampling: FeatureEstimator | None = None
    form: Form = static_field(default="auto", kw_only=True)
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "tau", canonical_tau(self.tau))
        _checks.member("form", self.form, FORMS)
        self.estimator()

    @property
    def num_iters(self) -> int:
        """All inner steps."""
        return self.num_outer * self.num_inner

    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """Inner step k of the whole run; `memory` is the estimator of its outer iteration."""
        draw_key = run.fold_key(k)
        point = z - run.step_size(k) * memory(draw_key, run.problem, z)
        return Step(run.prox(point, k), memory, point)

    def estimator(self) -> FeatureEstimator:
        """τ-nice, or the sampling given, before its variance is reduced."""
        base = as_sampling(self.tau, self.sampling)
        if not isinstance(base, FeatureEstimator):
            _checks.fail(
                "sampling", "an estimator that samples input features", type(base).__name__
            )
        return base

    def deterministic(self) -> ProxGD:
        """As many steps of `ProxGD`."""
        return ProxGD(self.num_iters, form=self.form, derivative=self.derivative)

    def _num_gradients(self, from_zero: bool) -> int:
        return self.num_outer

    def _iterate(self, run, z, *, derivative, trace_objective):
        def outer(run, carry, epoch):
            z, last = carry
            first = epoch * self.num_inner
            residual = None if run.problem.is_quadratic else run.problem.residual(z)
            reduced = VarianceReduced(run.estimator, z, run.gradient(z), residual)
            length = self._length(run, first)

            def inner(operands, j, z, last):
                run, reduced = operands
                step = self.step(run, j, z, reduced)
                if self.random_inner:
                    active = j - first < length
                    step = step._replace(
                        value=jnp.where(active, step.value, z),
                        point=None if step.point is None else jnp.where(active, step.point, z),
                        moved=active,
                    )
                return step._replace(memory=run.last_point(step, j, last))

            z, last, diagnostics = _loop.iterate(
                run.problem,
                inner,
                (run, reduced),
                z,
                self.num_inner,
                memory=last,
                first=first,
                trace_objective=trace_objective,
            )
            return (z, last), diagnostics

        carry = z, run.first_point(z, per_entry=False)
        (z, last), diagnostics = scan(outer, run, carry, jnp.arange(self.num_outer), derivative)
        flat = jax.tree.map(
            lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), diagnostics
        )
        return z, last, Diagnostics(*flat), {}

    def _length(self, run: Run, first: Array) -> Array | int:
        """The number of inner steps of the outer iteration that begins with inner step `first`."""
        if not self.random_inner:
            return self.num_inner
        key = jax.random.fold_in(run.fold_key(first), 0)
        contraction = run.problem.ridge * run.step_size(first)
        return _random_length(key, contraction, self.num_inner)


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
      form: which of the equal forms of the full gradient to use, see `estimators.forms`.
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
    solver = MS2GD(
        tau, num_outer, num_inner, step_size, random_inner, sampling,
        form=form, derivative=derivative,
    )  # fmt: skip
    return solver.solve(key, problem, init=init, trace_objective=trace_objective, certify=certify)


def _random_length(key: Array, contraction: Array, num_inner: int) -> Array:
    """t in 1..M with P(t) ∝ (1 − λη)^{M − t}."""
    lengths = jnp.arange(1, num_inner + 1)
    shrink = jnp.log1p(-jnp.minimum(jnp.asarray(contraction), 0.999))
    return 1 + jax.random.categorical(key, (num_inner - lengths).astype(shrink.dtype) * shrink)
