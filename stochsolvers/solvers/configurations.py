"""The algorithms as frozen configurations, for layers: what to run, without the problem.

Every configuration has `solve(key, problem, step_constant=None, deterministic=False)`. `deterministic`
replaces the sampling by the full gradient, as evaluation does for dropout. A configuration made of
numbers is hashable, and so can be a module's static attribute.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Protocol

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.estimators import Estimator, FeatureEstimator, Full, OutputCoordinates
from stochsolvers.estimators.forms import FORMS, Form
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers._loop import Solution
from stochsolvers.solvers.derivatives import DerivativeLike, canonical, unrolling
from stochsolvers.solvers.ms2gd import ms2gd
from stochsolvers.solvers.nsync import nsync
from stochsolvers.solvers.prox_gd import prox_gd
from stochsolvers.solvers.prox_sg import as_sampling, prox_sg
from stochsolvers.solvers.step_sizes import InverseLipschitz, StepSizeLike, StepSizeRule, as_steps


class Solver(Protocol):
    """What a layer needs of a configuration."""

    stochastic: ClassVar[bool]
    """Whether `solve` needs a key unless it is deterministic."""

    def step_constant(self, problem: LayerProblem) -> Array | None:
        """What the step size is read off, L for 1/L; None where it is read off nothing."""
        ...

    def solve(
        self,
        key: Array | None,
        problem: LayerProblem,
        *,
        step_constant: Array | None = None,
        deterministic: bool = False,
    ) -> Solution:
        """Run the algorithm; `step_constant` is what the method of that name returned."""
        ...


class _Configuration(abc.ABC):
    """One way to `solve`; subclasses say what to sample and which algorithm to run."""

    stochastic: ClassVar[bool] = True
    per_output: ClassVar[bool] = False
    step_size: StepSizeLike

    def step_constant(self, problem: LayerProblem) -> Array | None:
        """What the step size is read off, L for 1/L; None where it is read off nothing."""
        rule = as_steps(self._step_size())
        if not isinstance(rule, StepSizeRule):
            return None
        return rule.constant(problem, self._estimator(False))

    def solve(
        self,
        key: Array | None,
        problem: LayerProblem,
        *,
        step_constant: Array | None = None,
        deterministic: bool = False,
    ) -> Solution:
        """Run the algorithm; deterministic, as many steps of the same sizes along the full gradient.

        Args:
          key: random key; None where nothing is sampled.
          problem: the layer's problem.
          step_constant: the constant of the step size's rule, where the caller keeps it.
          deterministic: sample nothing.
        """
        estimator = self._estimator(deterministic)
        steps = as_steps(self._step_size(), per_output=self.per_output)
        if isinstance(steps, StepSizeRule):
            if step_constant is None or self._moves(deterministic):
                step_constant = steps.constant(problem, estimator)
            steps = steps.schedule(step_constant, problem)
        if self.stochastic and not deterministic:
            if key is None:
                _checks.fail("key", "a random key for a stochastic solver", None)
            return self._run(key, problem, estimator, steps)
        return self._run_full(problem, steps)

    def _run_full(self, problem: LayerProblem, steps: Any) -> Solution:
        """The algorithm when nothing is sampled."""
        return prox_gd(problem, step_size=steps, num_iters=self._iterations())

    def _step_size(self) -> StepSizeLike:
        return self.step_size

    def _moves(self, deterministic: bool) -> bool:
        """Whether the constant is another one when nothing is sampled."""
        return False

    @abc.abstractmethod
    def _iterations(self) -> int: ...

    @abc.abstractmethod
    def _estimator(self, deterministic: bool) -> Estimator: ...

    @abc.abstractmethod
    def _run(self, key: Array, problem: LayerProblem, estimator: Any, steps: Any) -> Solution: ...


@value_object
class ProxGD(_Configuration):
    """`prox_gd` with `num_iters` iterations.

    Args:
      num_iters: K ≥ 1, the cap where `tol` is given.
      step_size: a number, a schedule, a rule, or None for 1/L.
      momentum: FISTA.
      form: which of the equal forms of ∇F to iterate, see `stochsolvers.forms`.
      tol: where to stop, see `prox_gd`.
      derivative: "unrolled", "remat", `Truncated(n)`, "implicit" or `Implicit(...)`; None is unrolled,
        implicit where `tol` is given.
    """

    num_iters: int = static_field()
    step_size: StepSizeLike = None
    momentum: bool = static_field(default=False)
    form: Form = static_field(default="auto", kw_only=True)
    tol: Scalar | None = dataclasses.field(default=None, kw_only=True)
    derivative: DerivativeLike = static_field(default=None, kw_only=True)
    stochastic: ClassVar[bool] = False

    def __post_init__(self):
        _checks.count("num_iters", self.num_iters)
        _checks.member("form", self.form, FORMS)
        canonical(self.derivative, stops=self.tol is not None)
        if self.tol is not None:
            _checks.non_negative("tol", self.tol)

    def _iterations(self):
        return self.num_iters

    def _estimator(self, deterministic):
        return Full()

    def _run(self, key, problem, estimator, steps):
        return self._run_full(problem, steps)

    def _run_full(self, problem, steps):
        return prox_gd(
            problem,
            step_size=steps,
            num_iters=self.num_iters,
            momentum=self.momentum,
            form=self.form,
            tol=self.tol,
            derivative=self.derivative,
        )


@value_object
class ProxSG(_Configuration):
    """`prox_sg` with `num_iters` iterations.

    Args:
      tau: τ: a count (int) or a fraction of n1 (float); None where `sampling` is given.
      num_iters: K ≥ 1.
      step_size: a number, a schedule, a rule, or None for decay^k / L.
      decay: the factor of each iteration where `step_size` is None. The paper decays exponentially
        and does not state the rate; its experiments here use 0.9.
      sampling: an estimator in place of `tau`.
      derivative: "unrolled", "remat" or `Truncated(n)`.
    """

    tau: int | float | None = static_field()
    num_iters: int = static_field()
    step_size: StepSizeLike = None
    decay: Scalar = 1.0
    sampling: Estimator | None = None
    derivative: DerivativeLike = static_field(default=None, kw_only=True)

    def __post_init__(self):
        _checks.count("num_iters", self.num_iters)
        unrolling(self.derivative, "ProxSG")
        _checks.positive("decay", self.decay)
        if self.step_size is not None and self.decay != 1.0:
            _checks.fail("decay", "1.0 where step_size is given", self.decay)
        as_sampling(self.tau, self.sampling)

    def _step_size(self):
        return InverseLipschitz(decay=self.decay) if self.step_size is None else self.step_size

    def _iterations(self):
        return self.num_iters

    def _estimator(self, deterministic):
        return as_sampling(self.tau, self.sampling)

    def _run(self, key, problem, estimator, steps):
        return prox_sg(
            key,
            problem,
            step_size=steps,
            num_iters=self.num_iters,
            sampling=estimator,
            derivative=self.derivative,
        )


@value_object
class MS2GD(_Configuration):
    """`ms2gd` with `num_outer` full gradients and `num_inner` inner steps for each.

    Args:
      tau: τ: a count (int) or a fraction of n1 (float); None where `sampling` is given.
      num_outer: full gradients, ≥ 1.
      num_inner: inner steps for each, ≥ 1.
      step_size: a number, a schedule, a rule, or None for 1/L.
      random_inner: random inner lengths.
      sampling: a feature estimator in place of `tau`.
      form: which of the equal forms of the full gradient to use, see `stochsolvers.forms`.
      derivative: "unrolled", "remat" or `Truncated(n)`, counted in outer iterations.
    """

    tau: int | float | None = static_field()
    num_outer: int = static_field()
    num_inner: int = static_field()
    step_size: StepSizeLike = None
    random_inner: bool = static_field(default=False)
    sampling: FeatureEstimator | None = None
    form: Form = static_field(default="auto", kw_only=True)
    derivative: DerivativeLike = static_field(default=None, kw_only=True)

    def __post_init__(self):
        _checks.member("form", self.form, FORMS)
        unrolling(self.derivative, "MS2GD")
        _checks.count("num_outer", self.num_outer)
        _checks.count("num_inner", self.num_inner)
        as_sampling(self.tau, self.sampling)

    def _iterations(self):
        return self.num_outer * self.num_inner

    def _estimator(self, deterministic):
        return as_sampling(self.tau, self.sampling)

    def _run(self, key, problem, estimator, steps):
        return ms2gd(
            key,
            problem,
            step_size=steps,
            num_outer=self.num_outer,
            num_inner=self.num_inner,
            random_inner=self.random_inner,
            sampling=estimator,
            form=self.form,
            derivative=self.derivative,
        )


@value_object
class NSync(_Configuration):
    """`nsync` with `num_iters` iterations.

    Args:
      tau: τ of n2: a count (int) or a fraction (float).
      num_iters: K ≥ 1.
      step_size: a number, (n2,) of them, a schedule or a rule; None for 1/L. The default is the unit
        step of proposition 6; for more iterations take `InverseSeparable()`.
      derivative: "unrolled", "remat" or `Truncated(n)`.
    """

    tau: int | float = static_field()
    num_iters: int = static_field()
    step_size: StepSizeLike = 1.0
    derivative: DerivativeLike = static_field(default=None, kw_only=True)
    per_output: ClassVar[bool] = True

    def __post_init__(self):
        unrolling(self.derivative, "NSync")
        _checks.count("num_iters", self.num_iters)

    def _iterations(self):
        return self.num_iters

    def _moves(self, deterministic):
        return deterministic  # all coordinates at once allow shorter steps only

    def _estimator(self, deterministic):
        return OutputCoordinates(1.0 if deterministic else self.tau)

    def _run(self, key, problem, estimator, steps):
        return nsync(
            key,
            problem,
            tau=estimator.tau,
            num_iters=self.num_iters,
            step_size=steps,
            derivative=self.derivative,
        )
