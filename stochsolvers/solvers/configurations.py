"""The algorithms as frozen configurations, for layers: what to run, without the problem.

Every configuration solves a problem with `configuration.solve(key, problem, lipschitz=None,
deterministic=False)`. `deterministic` replaces the sampling by the full gradient, as evaluation does
for dropout. A configuration of numbers is hashable, and so can be a module's static attribute.
"""

from typing import Protocol

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.estimators import Estimator, FeatureEstimator, Full, OutputCoordinates
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers._loop import Solution
from stochsolvers.solvers.ms2gd import ms2gd
from stochsolvers.solvers.nsync import nsync
from stochsolvers.solvers.prox_gd import prox_gd
from stochsolvers.solvers.prox_sg import as_sampling, prox_sg
from stochsolvers.solvers.step_sizes import InverseLipschitz, StepSizeLike, StepSizeRule, as_steps


class Solver(Protocol):
    """What a layer needs of a configuration."""

    @property
    def stochastic(self) -> bool:
        """Whether `solve` needs a key unless it is deterministic."""
        ...

    @property
    def uses_lipschitz(self) -> bool:
        """Whether the step size is read off the Lipschitz constant that `solve` is given."""
        ...

    def solve(
        self,
        key: Array | None,
        problem: LayerProblem,
        *,
        lipschitz: Array | None = None,
        deterministic: bool = False,
    ) -> Solution:
        """Run the algorithm; `lipschitz` is λ_max(A A*) where the caller keeps it."""
        ...


class _LipschitzStep:
    step_size: StepSizeLike

    @property
    def uses_lipschitz(self) -> bool:
        """Whether the step size is read off the Lipschitz constant."""
        return self.step_size is None or isinstance(self.step_size, InverseLipschitz)


@value_object
class ProxGD(_LipschitzStep):
    """`prox_gd` with `num_iters` iterations.

    Args:
      num_iters: K ≥ 1.
      step_size: a number, a schedule, a rule, or None for 1/L.
      momentum: FISTA.
    """

    num_iters: int = static_field()
    step_size: StepSizeLike = None
    momentum: bool = static_field(default=False)

    def __post_init__(self):
        _checks.count("num_iters", self.num_iters)

    @property
    def stochastic(self) -> bool:
        """No key is needed."""
        return False

    def solve(
        self,
        key: Array | None,
        problem: LayerProblem,
        *,
        lipschitz: Array | None = None,
        deterministic: bool = False,
    ) -> Solution:
        """Run `prox_gd`."""
        step_size = _known(self.step_size, problem, Full(), lipschitz)
        return prox_gd(
            problem, step_size=step_size, num_iters=self.num_iters, momentum=self.momentum
        )


@value_object
class ProxSG(_LipschitzStep):
    """`prox_sg` with `num_iters` iterations.

    Args:
      tau: τ: a count (int) or a fraction of n1 (float); None where `sampling` is given.
      num_iters: K ≥ 1.
      step_size: a number, a schedule, a rule, or None for decay^k / L.
      decay: the factor of each iteration where `step_size` is None. The paper decays exponentially
        and does not state the rate.
      sampling: an estimator in place of `tau`.
    """

    tau: int | float | None = static_field()
    num_iters: int = static_field()
    step_size: StepSizeLike = None
    decay: Scalar = 0.9
    sampling: Estimator | None = None

    def __post_init__(self):
        _checks.count("num_iters", self.num_iters)
        _checks.positive("decay", self.decay)
        as_sampling(self.tau, self.sampling)

    @property
    def stochastic(self) -> bool:
        """A key is needed."""
        return True

    def solve(
        self,
        key: Array | None,
        problem: LayerProblem,
        *,
        lipschitz: Array | None = None,
        deterministic: bool = False,
    ) -> Solution:
        """Run `prox_sg`; deterministic, with the same steps along the full gradient."""
        sampling = as_sampling(self.tau, self.sampling)
        step_size = InverseLipschitz(decay=self.decay) if self.step_size is None else self.step_size
        step_size = _known(step_size, problem, sampling, lipschitz)
        if deterministic:
            return prox_gd(problem, step_size=step_size, num_iters=self.num_iters)
        return prox_sg(
            _required(key),
            problem,
            step_size=step_size,
            num_iters=self.num_iters,
            sampling=sampling,
        )


@value_object
class MS2GD(_LipschitzStep):
    """`ms2gd` with `num_outer` full gradients and `num_inner` inner steps for each.

    Args:
      tau: τ: a count (int) or a fraction of n1 (float); None where `sampling` is given.
      num_outer: full gradients, ≥ 1.
      num_inner: inner steps for each, ≥ 1.
      step_size: a number, a schedule, a rule, or None for 1/L.
      random_inner: random inner lengths.
      sampling: a feature estimator in place of `tau`.
    """

    tau: int | float | None = static_field()
    num_outer: int = static_field()
    num_inner: int = static_field()
    step_size: StepSizeLike = None
    random_inner: bool = static_field(default=False)
    sampling: FeatureEstimator | None = None

    def __post_init__(self):
        _checks.count("num_outer", self.num_outer)
        _checks.count("num_inner", self.num_inner)
        as_sampling(self.tau, self.sampling)

    @property
    def stochastic(self) -> bool:
        """A key is needed."""
        return True

    def solve(
        self,
        key: Array | None,
        problem: LayerProblem,
        *,
        lipschitz: Array | None = None,
        deterministic: bool = False,
    ) -> Solution:
        """Run `ms2gd`; deterministic, as many full-gradient steps of the same length."""
        sampling = as_sampling(self.tau, self.sampling)
        step_size = _known(self.step_size, problem, sampling, lipschitz)
        if deterministic:
            return prox_gd(problem, step_size=step_size, num_iters=self.num_outer * self.num_inner)
        return ms2gd(
            _required(key),
            problem,
            step_size=step_size,
            num_outer=self.num_outer,
            num_inner=self.num_inner,
            random_inner=self.random_inner,
            sampling=sampling if isinstance(sampling, FeatureEstimator) else Full(),
        )


@value_object
class NSync(_LipschitzStep):
    """`nsync` with `num_iters` iterations.

    Args:
      tau: τ of n2: a count (int) or a fraction (float).
      num_iters: K ≥ 1.
      step_size: a number, (n2,) of them, a schedule or a rule; None for 1/L.
    """

    tau: int | float = static_field()
    num_iters: int = static_field()
    step_size: StepSizeLike = 1.0

    def __post_init__(self):
        _checks.count("num_iters", self.num_iters)

    @property
    def stochastic(self) -> bool:
        """A key is needed."""
        return True

    def solve(
        self,
        key: Array | None,
        problem: LayerProblem,
        *,
        lipschitz: Array | None = None,
        deterministic: bool = False,
    ) -> Solution:
        """Run `nsync`; deterministic, with all coordinates in every iteration."""
        estimator = OutputCoordinates(1.0 if deterministic else self.tau)
        step_size = _known(self.step_size, problem, estimator, lipschitz)
        if deterministic:
            return prox_gd(problem, step_size=step_size, num_iters=self.num_iters)
        return nsync(
            _required(key), problem, tau=self.tau, num_iters=self.num_iters, step_size=step_size
        )


def _known(
    step_size: StepSizeLike, problem: LayerProblem, estimator: Estimator, lipschitz: Array | None
) -> StepSizeLike:
    """The step size, with its rule already read off the problem and the configuration's sampling."""
    steps = as_steps(step_size)
    return (
        steps.schedule(problem, estimator, lipschitz) if isinstance(steps, StepSizeRule) else steps
    )


def _required(key: Array | None) -> Array:
    if key is None:
        _checks.fail("key", "a random key for a stochastic solver", None)
    return key
