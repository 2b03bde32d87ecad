"""Proximal gradient descent, with Nesterov momentum as an option."""

from typing import Any

import jax.numpy as jnp

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, static_field, value_object
from stochsolvers.estimators.forms import FORMS, Form
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers._base import Solver
from stochsolvers.solvers._loop import Step
from stochsolvers.solvers._run import Run
from stochsolvers.solvers._solution import Solution
from stochsolvers.solvers.derivatives import DerivativeLike
from stochsolvers.step_sizes import StepSizeLike


@value_object
class ProxGD(Solver):
    r"""Proximal gradient descent, z ← prox_{ηg}(z − η ∇F(z)), `num_iters` times.

    With momentum (FISTA) the gradient is taken at y_k = z_k + ((t_{k−1} − 1)/t_k)(z_k − z_{k−1}),
    t_k = (1 + sqrt(1 + 4 t_{k−1}²))/2. See `prox_gd` for what is proved of it.

    Args:
      num_iters: K ≥ 1, the cap where `tol` is given.
      step_size: a number, a schedule, a rule, or None for 1/L.
      momentum: FISTA.
      restart: with momentum, begin again with t = 1 for an example at each iteration that turns back,
        <y_k − z_{k+1}, z_{k+1} − z_k> > 0.
      form: which of the equal forms of ∇F to iterate, see `estimators.forms`.
      tol, gap_tol: where to stop, see `prox_gd`.
      derivative: "unrolled", "remat", `Truncated(n)`, "implicit" or `Implicit(...)`; None is unrolled,
        implicit where a tolerance is given.

    References:
      Bibi et al. 2019, eq. 3; Beck and Teboulle 2009; O'Donoghue and Candès 2015, section 3.2 (restart).
    """

    num_iters: int = static_field()
    step_size: StepSizeLike = None
    momentum: bool = static_field(default=False)
    restart: bool = static_field(default=False, kw_only=True)
    form: Form = static_field(default="auto", kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        _checks.member("form", self.form, FORMS)
        if self.restart and not self.momentum:
            _checks.fail("restart", "False without momentum", self.restart)

    def init(self, run: Run, z: Array) -> Any:
        """(y_0, t_0) with momentum; one t for each example where they restart by themselves."""
        examples = run.problem.batch_shape if self.restart else ()
        return (z, jnp.ones(examples, z.dtype)) if self.momentum else None

    def step(self, run: Run, k: Array, z: Array, memory: Any) -> Step:
        """One proximal gradient step, from z or the extrapolated point."""
        y, t = (z, None) if memory is None else memory
        point = run.gradient_step(y, k)
        value = run.prox(point, k)
        if t is not None:
            if self.restart:
                turned = run.problem.sum((y - value) * (value - z)) > 0
                t = jnp.where(turned, 1.0, t)
            t_next = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t**2))
            weight = (t - 1.0) / t_next
            if self.restart:
                weight = jnp.expand_dims(weight, range(weight.ndim, y.ndim))
            memory = value + weight * (value - z), t_next
        return Step(value, memory, point, origin=y)

    def takes_gradient_steps(self) -> bool:
        """True without momentum."""
        return not self.momentum

    def _num_gradients(self, from_zero: bool) -> int:
        return self.num_iters - from_zero

    def _opening(self, run: Run) -> Run | None:
        return run.at_zero()


def prox_gd(
    problem: LayerProblem,
    *,
    step_size: StepSizeLike = None,
    num_iters: int,
    init: Array | None = None,
    momentum: bool = False,
    restart: bool = False,
    form: Form = "auto",
    tol: Scalar | None = None,
    gap_tol: Scalar | None = None,
    derivative: DerivativeLike = None,
    trace_objective: bool = False,
    certify: bool = False,
) -> Solution:
    r"""Proximal gradient descent, z ← prox_{ηg}(z − η ∇F(z)).

    From z = 0 with η = 1, one iteration is the plain layer prox_g(A x + b). With η ≤ 1/L it satisfies
    P(z_k) − P* ≤ ||z_0 − z*||²/(2ηk), and contracts by 1 − ηλ with a ridge. With momentum the gradient
    is taken at y_k = z_k + ((t_{k−1} − 1)/t_k)(z_k − z_{k−1}), t_k = (1 + sqrt(1 + 4 t_{k−1}²))/2, and
    the bound is 2||z_0 − z*||²/(η(k + 1)²).

    Args:
      problem: the layer's problem.
      step_size: η: a number, k -> η_k, a rule, or None for 1/L (`InverseLipschitz`), through which
        derivatives then pass as well. A function of your own is compiled once for each function
        object: define it once, or use `exponential_decay`.
      num_iters: number of iterations, static, ≥ 1.
      init: z_0, zero by default.
      momentum: FISTA.
      restart: with momentum, of each example by itself, see `ProxGD`.
      form: which of the equal forms of ∇F to iterate, see `estimators.forms`; "auto" is the one with
        the least work for the shapes at hand.
      tol: stop an example where ||T(y_k) − y_k|| ≤ tol max(1, ||z_{k+1}||), T the step's map and y_k
        where it was taken; `num_iters` is then the cap. Traced. See `Status`.
      gap_tol: stop an example where its certified gap is at most this, P(z_k) − min P ≤ gap_tol, in units of
        the objective, as `LayerProblem.certificate` shows it; `Solution.certificate` is then filled in. It is
        looked at every ten iterations or more, once the steps are short enough for it. A gap below the
        round-off of a certificate is never met. With `tol` too, an example stops at the first of them.
      derivative: "unrolled", "remat", `Truncated(n)`, "implicit" or `Implicit(...)`; see
        `solvers.derivatives`. Unrolled by default, implicit where a tolerance is given.
      trace_objective: also return P(z_k) for every iteration, which reads the input each time.
      certify: also return a bound on P(z_K) − min P.

    Returns:
      `Solution`; a path of steps, weights, inputs or tolerances compiles once.

    Raises:
      ValueError: at trace time, for an iteration count below 1, a non-positive number as step size,
        an init of another shape, a form that the map does not have, or a derivative that a
        tolerance does not allow.

    Example:
      >>> A, x = ss.Dense(jnp.array([[1.0, -1.0], [0.0, 1.0]])), jnp.array([1.0, 2.0])
      >>> problem = ss.LayerProblem(A, x, bias=jnp.array([0.0, -2.0]), prior=ss.prox.NonNegative())
      >>> ss.prox_gd(problem, step_size=1.0, num_iters=1).value.tolist()  # max(x W + b, 0)
      [1.0, 0.0]

    References:
      Bibi et al. 2019, eq. 3; Beck and Teboulle 2009.
    """
    solver = ProxGD(
        num_iters,
        step_size,
        momentum,
        restart=restart,
        form=form,
        tol=tol,
        gap_tol=gap_tol,
        derivative=derivative,
    )
    return solver.solve(None, problem, init=init, trace_objective=trace_objective, certify=certify)
