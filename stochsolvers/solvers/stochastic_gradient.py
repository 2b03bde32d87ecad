"""Proximal stochastic gradient descent with any sampling of the input features."""

from typing import Any, ClassVar, cast

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, count_field, static_field, value_object
from stochsolvers.estimators import Estimator, TauNice
from stochsolvers.problems import LayerProblem
from stochsolvers.sampling import canonical_tau
from stochsolvers.solvers._base import Solver
from stochsolvers.solvers._loop import Step
from stochsolvers.solvers._run import Run
from stochsolvers.solvers._solution import Solution
from stochsolvers.solvers.derivatives import DerivativeLike
from stochsolvers.solvers.gradient_descent import ProxGD
from stochsolvers.step_sizes import InverseLipschitz, StepSizeLike


@value_object
class ProxSG(Solver):
    r"""Proximal stochastic gradient, z ← prox_{η_k g}(z − η_k ∇Ψ_{S_k}(z)), `num_iters` times; see `prox_sg`.

    Args:
      tau: τ: a count (int, an array may be traced) or a fraction of n1 (float); None where `sampling` is
        given.
      num_iters: K ≥ 1.
      step_size: a number, a schedule, a rule, or None for decay^k / L.
      decay: the factor of each iteration where `step_size` is None. The paper decays exponentially
        and does not state the rate; its experiments here use 0.9.
      sampling: an estimator in place of `tau`.
      derivative: "unrolled", "remat" or `Truncated(n)`.

    References:
      Bibi et al. 2019, proposition 1; Xiao and Zhang 2014.
    """

    tau: int | float | Array | None = count_field()
    num_iters: int = static_field()
    step_size: StepSizeLike = None
    decay: Scalar = 1.0
    sampling: Estimator | None = None
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "tau", canonical_tau(self.tau))
        _checks.positive("decay", self.decay)
        _checks.rank("decay", self.decay, 0)
        if self.step_size is not None and self.decay != 1.0:
            _checks.fail("decay", "1.0 where step_size is given", self.decay)
        as_sampling(self.tau, self.sampling)

    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """One step along an estimate of the gradient."""
        point = z - run.step_size(k) * run.estimate(k, z)
        return Step(run.prox(point, k), memory, point)

    def estimator(self) -> Estimator:
        """τ-nice, or the sampling given."""
        return as_sampling(self.tau, self.sampling)

    def default_step_size(self) -> InverseLipschitz:
        """decay^k / L."""
        return InverseLipschitz(decay=self.decay)

    def deterministic(self) -> ProxGD:
        """As many steps of `ProxGD`."""
        return ProxGD(self.num_iters, derivative=self.derivative)


def prox_sg(
    key: Array,
    problem: LayerProblem,
    *,
    tau: int | float | Array | None = None,
    step_size: StepSizeLike = None,
    num_iters: int,
    init: Array | None = None,
    sampling: Estimator | None = None,
    derivative: DerivativeLike = None,
    trace_objective: bool = False,
    certify: bool = False,
) -> Solution:
    r"""Proximal stochastic gradient, z ← prox_{η_k g}(z − η_k ∇Ψ_{S_k}(z)).

    With τ-nice sampling, ∇Ψ_S(z) = (n1/τ) Σ_{i∈S} A_i (A_i* z − x_i) − b + λ z. From z = 0 with η = 1, one
    iteration is prox_g((n1/τ) A (m ⊙ x) + b): dropout of exactly n1 − τ input features (whole feature
    maps for a convolution), then the plain layer (proposition 1).

    Args:
      key: random key; iteration k uses `fold_in(key, k)`.
      problem: the layer's problem.
      tau: τ of a τ-nice sampling: a count (int, may be traced) or a fraction of n1 (float).
      step_size: a number, k -> η_k (`exponential_decay`), a rule, or None for 1/L. A function of your
        own is compiled once for each function object: define it once.
      num_iters: number of iterations, static, ≥ 1.
      init: z_0, zero by default.
      sampling: any member of `stochsolvers.estimators` in place of `tau`.
      derivative: "unrolled" (the default), "remat" or `Truncated(n)`; see `solvers.derivatives`.
      trace_objective: also return P(z_k) for every iteration.
      certify: also return a bound on P(z_K) − min P.

    Returns:
      `Solution`; `finite` is False for an example whose iterates overflowed.

    Raises:
      ValueError: at trace time, for τ outside 1..n1, both or neither of `tau` and `sampling`, and
        as in `prox_gd`.

    References:
      Bibi et al. 2019, proposition 1; Xiao and Zhang 2014.
    """
    solver = ProxSG(tau, num_iters, step_size, sampling=sampling, derivative=derivative)
    return solver.solve(key, problem, init=init, trace_objective=trace_objective, certify=certify)


def as_sampling(tau: int | float | Array | None, sampling: Estimator | None) -> Estimator:
    """The estimator that `tau` or `sampling` names; exactly one of them is given."""
    if (tau is None) == (sampling is None):
        _checks.fail("tau, sampling", "exactly one of the two", f"{tau!r}, {sampling!r}")
    if tau is None:
        if not isinstance(sampling, Estimator):
            _checks.fail("sampling", "an Estimator", repr(sampling))
        return cast(Estimator, sampling)
    _checks.positive("tau", tau)
    return TauNice(tau)
