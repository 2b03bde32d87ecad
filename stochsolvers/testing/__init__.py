r"""Checks that users run on objects of their own: the library's whole contract, in words where it breaks.

| function | object | what it is held to |
|---|---|---|
| `assert_equivalent` | a layer and a plain block | equal outputs; equal laws where both sample |
| `check_linear_map` | `LinearMap` | linearity, <A x, z> = <x, A* z>, restriction, norms, batch axes |
| `check_loss` | `Loss` | convexity, derivative, L_ℓ, conjugate, projection, certificates |
| `check_prior` | `Prior` | prox_{ηg} against direct minimisation, conjugate, derivatives, certificates |
| `check_estimator` | `Estimator` | E[∇Ψ] = ∇F, expected smoothness, one draw for each example |
| `check_step_size` | a step size | at most 2/L_F, constant in the inputs, descent |
| `check_solver` | `Solver` | convergence, derivatives, tolerance, bad values, one compilation, layers |
| `check_layer` | a Flax layer with a solver | dtypes, modes, derivatives, state, the problem that it solves |

Each raises AssertionError where the object breaks its contract: what was expected, what was got. The checks
also hold the object to pass through `jit` and `vmap`, and a path of its arrays to compile once. They compute
in float64 except where dtypes are checked, and are meant for objects of a few features. In a test:

    def test_my_map():
        ss.testing.check_linear_map(Blur(jnp.ones(3)))

They need chex: `pip install 'stochsolvers[testing]'`, then `import stochsolvers.testing`.
"""

try:
    import chex as _chex  # noqa: F401
except ImportError as error:
    raise ImportError(
        "stochsolvers.testing needs chex: pip install 'stochsolvers[testing]'"
    ) from error

from stochsolvers.testing._equivalence import assert_equivalent as assert_equivalent
from stochsolvers.testing._estimators import check_estimator as check_estimator
from stochsolvers.testing._layers import check_layer as check_layer
from stochsolvers.testing._linear_maps import check_linear_map as check_linear_map
from stochsolvers.testing._losses import check_loss as check_loss
from stochsolvers.testing._prox import check_prior as check_prior
from stochsolvers.testing._solvers import check_solver as check_solver
from stochsolvers.testing._step_sizes import StepSizeReport as StepSizeReport
from stochsolvers.testing._step_sizes import check_step_size as check_step_size
