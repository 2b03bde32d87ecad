"""Proximal gradient descent, with Nesterov momentum as an option."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar
from stochsolvers.estimators import Full
from stochsolvers.estimators.forms import Form, gradient_form
from stochsolvers.problems import LayerProblem
from stochsolvers.solvers import _loop
from stochsolvers.solvers._loop import Solution, Step
from stochsolvers.solvers.derivatives import DerivativeLike, Implicit, Unrolling, canonical
from stochsolvers.solvers.implicit import ProxGradientMap, fixed_point
from stochsolvers.solvers.step_sizes import StepSizeLike, as_schedule, as_steps
from stochsolvers.solvers.stopping import iterate_until


def prox_gd(
    problem: LayerProblem,
    *,
    step_size: StepSizeLike = None,
    num_iters: int,
    init: Array | None = None,
    momentum: bool = False,
    form: Form = "auto",
    tol: Scalar | None = None,
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
      form: which of the equal forms of ∇F to iterate, see `stochsolvers.forms`; "auto" is the one with
        the least work for the shapes at hand.
      tol: stop an example where ||T(y_k) − y_k|| ≤ tol max(1, ||z_{k+1}||), T the step's map and y_k
        where it was taken; `num_iters` is then the cap. Traced. See `solvers.stopping`.
      derivative: "unrolled", "remat", `Truncated(n)`, "implicit" or `Implicit(...)`; see
        `solvers.derivatives`. Unrolled by default, implicit where `tol` is given.
      trace_objective: also return P(z_k) for every iteration, which reads the input each time.
      certify: also return a bound on P(z_K) − min P.

    Returns:
      `Solution`; a path of steps, weights, inputs or tolerances compiles once.

    Raises:
      ValueError: at trace time, for an iteration count below 1, a non-positive number as step size,
        an init of another shape, a form that the map does not have, or a derivative that a
        tolerance does not allow.

    References:
      Bibi et al. 2019, eq. 3; Beck and Teboulle 2009.
    """
    num_iters = _checks.count("num_iters", num_iters)
    resolved = canonical(derivative, stops=tol is not None)
    if tol is not None:
        _checks.non_negative("tol", tol)
        tol = jnp.asarray(tol, problem.dtype)
    solution = _prox_gd(
        problem,
        as_steps(step_size),
        _loop.starting_point(problem, init),
        tol,
        resolved,
        num_iters=num_iters,
        momentum=momentum,
        from_zero=init is None,
        form=form,
        trace_objective=trace_objective,
    )
    return _loop.certified(problem, solution) if certify else solution


@functools.partial(
    jax.jit,
    static_argnames=("num_iters", "momentum", "from_zero", "form", "trace_objective"),
)
def _prox_gd(
    problem: LayerProblem,
    steps: Any,
    z0: Array,
    tol: Array | None,
    derivative: Unrolling | Implicit,
    *,
    num_iters: int,
    momentum: bool,
    from_zero: bool,
    form: Form,
    trace_objective: bool,
) -> Solution:
    schedule = as_schedule(steps, problem, Full())
    gradient = gradient_form(problem, form, num_calls=num_iters - from_zero)
    operands = gradient, problem.prior, schedule

    def step_from(gradient_at, operands, k, z, memory):
        _, prior, schedule = operands
        y, t = (z, None) if memory is None else memory
        step = schedule(k)
        point = y - step * gradient_at(y)
        value = prior.prox(point, step)
        if t is not None:
            t_next = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t**2))
            memory = value + (t - 1.0) / t_next * (value - z), t_next
        return Step(value, memory, point)

    def update(operands, k, z, memory):
        return step_from(operands[0], operands, k, z, memory)

    def opening(operands, k, z, memory):
        return step_from(lambda _: operands[0].at_zero(), operands, k, z, memory)

    memory = (z0, jnp.ones((), problem.dtype)) if momentum else None
    options: Any = {
        "memory": memory,
        "opening": opening if from_zero else None,
        "trace_objective": trace_objective,
    }
    if not isinstance(derivative, Implicit):
        z, diagnostics = _loop.iterate(
            problem, update, operands, z0, num_iters, derivative=derivative, **options
        )
        return _loop.solution(z, diagnostics)
    frozen = lax.stop_gradient((operands, z0))
    ends = {}
    if tol is None:
        z, diagnostics = _loop.iterate(problem, update, *frozen, num_iters, **options)
    else:
        z, diagnostics, ends["status"], ends["iterations"] = iterate_until(
            problem, update, *frozen, num_iters, tol, origin=_origin, **options
        )
    step = 0.5 * jnp.minimum(schedule(0), schedule(num_iters - 1))
    step_map = ProxGradientMap(gradient, problem.prior, lax.stop_gradient(step))
    z = fixed_point(step_map, z, derivative, len(problem.batch_shape))
    return _loop.solution(z, diagnostics, **ends)


def _origin(z: Array, memory: Any) -> Array:
    return z if memory is None else memory[0]
