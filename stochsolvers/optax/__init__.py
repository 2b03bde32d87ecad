"""Constraints and priors on weights as transformations of `optax`: the last ones of a chain.

    optax.chain(optax.sgd(0.1), ss.optax.project_spectral_norm(1.0))     every kernel in {||A|| ≤ 1}
    optax.chain(optax.sgd(0.1), ss.optax.prox(ss.prox.L1(1e-3), 0.1))    proximal gradient descent

They need the parameters: `optimizer.update(gradients, state, params)`, as `nnx.Optimizer` calls it.
"""

from stochsolvers.optax._project import ProjectState as ProjectState
from stochsolvers.optax._project import dense_kernels as dense_kernels
from stochsolvers.optax._project import project_spectral_norm as project_spectral_norm
from stochsolvers.optax._prox import ProxState as ProxState
from stochsolvers.optax._prox import prox as prox
