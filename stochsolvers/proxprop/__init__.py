r"""Proximal backpropagation: the parameters of a linear layer take an implicit step.

For a layer A(x) = x W + b at the inputs x of a batch, with rows A = [x 1], parameters Θ = [W; b] and the
cotangent G of its output, backpropagation hands AᵀG to the optimiser. Proximal backpropagation hands over

    d = Θ − Θ⁺,   Θ⁺ = argmin_Θ' ½||A Θ' − (A Θ − G)||² + (1/2τ)||Θ' − Θ||²,   d = (AᵀA + I/τ)⁻¹ Aᵀ G,

the same least-squares problem as a solver layer's, with the parameters as the variable and the inputs as the
map. The cotangent of the inputs is the ordinary one. d is a descent direction; d/τ → AᵀG as τ → 0, so that
lr · τ is the rate of backpropagation. Any optimiser takes d in the place of the gradient.

- The system is that of the whole batch: of the global batch on a mesh, Auto or Explicit. AᵀA is a sum over
  the batch, while G of a mean loss falls with its size: a batch k times as large needs τ/k and k · lr. Steps
  of parts of a batch do not add up to that of the batch, so gradients are not to be accumulated.
- `vmap` over models works. Over examples it is refused, every example having a system of its own: inputs need
  an axis of a batch that is not mapped over.
- Forward mode, `jax.jvp` and `jax.jacfwd`, is refused by JAX, with a TypeError that names `custom_vjp`: d is
  no derivative of a function.
- A layer that is used twice in a model gets the sum of two steps.
- On CPU the Cholesky factor is LAPACK's. The threads that OpenBLAS starts for it fight with those of XLA: set
  OPENBLAS_NUM_THREADS=1 in the environment of the process, or `threadpoolctl.threadpool_limits(1, "blas")`.

References:
  Frerix, Möllenhoff, Moeller and Cremers, Proximal Backpropagation, ICLR 2018.
"""

from stochsolvers.proxprop._implicit import apply as apply
from stochsolvers.proxprop._implicit import implicit_gradient as implicit_gradient
from stochsolvers.proxprop._steps import ConjugateGradients as ConjugateGradients
from stochsolvers.proxprop._steps import Exact as Exact
from stochsolvers.proxprop._steps import Form as Form
from stochsolvers.proxprop._steps import ImplicitStep as ImplicitStep
from stochsolvers.proxprop._steps import checked_step as checked_step
from stochsolvers.proxprop._through import through as through
