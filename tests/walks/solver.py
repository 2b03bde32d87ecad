"""Someone from optimisation wants a solver, a certificate, a picture of convergence, an own map and prior.

Needs the extras `plot` and `testing`.
"""

import jax
import jax.numpy as jnp
import matplotlib as mpl

import stochsolvers as ss
from stochsolvers import testing

mpl.use("Agg")


@ss.value_object
class Differences(ss.LinearMap):
    """A(x) = (x_1 − x_0, …, x_{n−1} − x_{n−2})."""

    n: int = ss.static_field()

    @property
    def in_shape(self):
        return (self.n,)

    @property
    def out_shape(self):
        return (self.n - 1,)

    def __call__(self, x):
        return x[..., 1:] - x[..., :-1]


@ss.value_object
class Smoothed(ss.Prior):
    """g(u) = (γ/2) ||u||²: prox_{ηg}(v) = v/(1 + ηγ)."""

    gamma: float = 1.0

    def _value(self, u):
        return 0.5 * self.gamma * jnp.sum(u**2)

    def _prox(self, v, step):
        return v / (1 + step * self.gamma)


@ss.value_object
class Unsummed(Smoothed):
    def _value(self, u):
        return 0.5 * self.gamma * u**2


@ss.value_object
class Stepless(Smoothed):
    def _prox(self, v, step):
        return v / (1 + self.gamma)


def message(call):
    """What an error says."""
    try:
        call()
    except (ValueError, AssertionError) as error:
        return str(error)
    raise RuntimeError("no error")


# a lasso: known data, two solvers, one certificate
key = jax.random.key(0)
W = jax.random.normal(key, (64, 32)) / 8
x = jax.random.normal(jax.random.key(1), (3, 64))
lasso = ss.LayerProblem(ss.Dense(W), x, prior=ss.prox.L1(0.3))
runs = {
    name: ss.prox_gd(lasso, num_iters=60, momentum=momentum, trace_objective=True, certify=True)
    for name, momentum in {"ISTA": False, "FISTA": True}.items()
}
assert runs["FISTA"].certificate.max() <= runs["ISTA"].certificate.max()
assert (runs["FISTA"].certificate < 1e-2 * lasso.objective(runs["FISTA"].value)).all()
solved = ss.prox_gd(lasso, num_iters=500, momentum=True, tol=1e-5)
assert {ss.Status(status) for status in solved.status.tolist()} == {ss.Status.CONVERGED}
for run in runs.values():  # a certificate is an upper bound of the gap
    gap = lasso.objective(run.value) - lasso.objective(solved.value)
    assert (gap <= run.certificate).all()

ax = ss.plot.convergence(runs)
assert [line.get_label() for line in ax.lines] == list(runs)
assert "certified" in ax.get_ylabel()
assert "problem.certificate" in message(
    lambda: ss.plot.convergence(runs["ISTA"], certificate=lasso)
)

# factors of one's own: the adjoint, the norm, the step and the certificate follow
A, prior = Differences(12), Smoothed(0.5)
own = ss.LayerProblem(A, x[:, :12], prior=prior, ridge=0.1)
certificate = ss.prox_gd(own, num_iters=100, momentum=True, certify=True).certificate
assert (certificate < 1e-3).all()
lower, upper = ss.spectral_norm_bracket(A)
assert lower <= 2 * jnp.cos(jnp.pi / 24) <= upper  # its norm, by Fourier
assert "argmin" in message(lambda: testing.check_prior(Stepless(), (3, 4)))

# what cannot be meant is refused in words that help
problem = ss.LayerProblem
assert "Dense(W)" in message(lambda: problem(W, x))
assert "(..., 32)" in message(lambda: problem(ss.Dense(W.T), x))
assert "prox.Activation" in message(lambda: problem(ss.Dense(W), x, prior=jax.nn.relu))
wrong = problem(A, x[:, :12], prior=Unsummed())
assert "a sum over all entries" in message(lambda: wrong.objective(jnp.zeros((3, 11))))
assert "at x = 0" in message(lambda: ss.linear_map(lambda x: x + 1, (8,)))
assert "random key" in message(lambda: ss.prox_sg(0, lasso, tau=0.5, num_iters=3))
print(f"lasso: FISTA is within {runs['FISTA'].certificate.max():.0e} of the minimum")
