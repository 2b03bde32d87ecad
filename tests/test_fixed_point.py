"""Problems z = h(z): solvers, safeguards, stopping and derivatives, against numpy and long unrolling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stochsolvers as ss
from stochsolvers.solvers import Status

pytestmark = pytest.mark.optimized

KEY = jax.random.key(0)


@ss.value_object
class Shallow(ss.FixedPointProblem):
    """z = Wᵀ relu(W z + c), the minimiser of ½||z||² − ½||relu(W z + c)||²."""

    weights: jax.Array
    drive: jax.Array
    symmetric = True

    batch_shape = property(lambda self: self.drive.shape[:-1])
    shape = property(lambda self: (*self.batch_shape, self.weights.shape[1]))
    dtype = property(lambda self: self.drive.dtype)

    def hidden(self, z):
        return jax.nn.relu(z @ self.weights.T + self.drive)

    def layer(self, z):
        return self.hidden(z) @ self.weights

    def objective(self, z):
        return 0.5 * self.sum(z**2) - 0.5 * self.sum(self.hidden(z) ** 2)

    def certificate(self, z):
        omega = jnp.linalg.norm(self.weights, 2)
        moved = self.norm(z - self.layer(z))
        return jnp.where(omega < 1, 0.5 * moved**2 / jnp.abs(1 - omega**2), jnp.inf)


def shallow(rng, n=20, batch=4, omega=0.95, dtype=np.float64):
    W = rng.normal(size=(n, n))
    W *= omega / np.linalg.norm(W, 2)
    c = rng.normal(size=(batch, n)) * 10.0 ** np.arange(-2, batch - 2)[:, None]
    return Shallow(jnp.asarray(W, dtype), jnp.asarray(c, dtype))


def equilibrium(problem):
    W, c = np.asarray(problem.weights), np.asarray(problem.drive)
    z = np.zeros(problem.shape)
    for _ in range(4000):
        z = np.maximum(z @ W.T + c, 0) @ W
    return z


def test_gradient_descent_solves_a_fixed_point_problem(rng):
    problem, want = (p := shallow(rng)), equilibrium(p)
    for momentum in (False, True):
        solver = ss.ProxGD(1500, momentum=momentum, tol=1e-11)
        solution = solver.solve(None, problem, trace_objective=True, certify=True)
        np.testing.assert_array_equal(solution.status, Status.CONVERGED)
        np.testing.assert_allclose(solution.value, want, rtol=1e-7, atol=1e-9)
        gap = solution.objectives[-1] - problem.objective(jnp.asarray(want))
        assert np.all(solution.certificate >= gap - 1e-12)
    one = ss.ProxGD(1).solve(None, problem, init=jnp.asarray(want) + 1.0).value
    np.testing.assert_array_equal(one, problem.layer(jnp.asarray(want) + 1.0))


def test_certified_gaps_stop_a_fixed_point_iteration(rng):
    problem = shallow(rng)
    solution = ss.ProxGD(3000, gap_tol=1e-6).solve(None, problem)
    np.testing.assert_array_equal(solution.status, Status.CONVERGED)
    gap = problem.objective(solution.value) - problem.objective(jnp.asarray(equilibrium(problem)))
    assert np.all(gap <= 1e-6)
    assert np.all(solution.certificate <= 1e-6)
    assert len(set(solution.iterations.tolist())) == 4
    np.testing.assert_allclose(solution.certificate, problem.certificate(solution.value), rtol=1e-6)


def test_solvers_of_layers_refuse_fixed_point_problems(rng):
    problem = shallow(rng)
    for solver in (ss.ProxSG(0.5, 2), ss.MS2GD(0.5, 2, 2), ss.NSync(0.5, 2)):
        for deterministic in (True, False):
            with pytest.raises(ValueError, match="expected a LayerProblem, got Shallow"):
                solver.solve(KEY, problem, deterministic=deterministic)
    calls = [
        (lambda: ss.ProxGD(2).solve(None, problem.drive), "a LayerProblem or a FixedPointProblem"),
        (lambda: ss.ProxGD(2, form="gram").solve(None, problem), "problem of form 'gram'"),
        (
            lambda: ss.ProxGD(2, ss.InverseExpectedSmoothness()).solve(None, problem),
            "problem of InverseExpectedSmoothness",
        ),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
