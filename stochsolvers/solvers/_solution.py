"""What a solver returns."""

import enum

from stochsolvers._typing import Array, value_object


class Status(enum.IntEnum):
    """How a solver with a tolerance ended, for each example.

    UNBOUNDED: at the cap the iterates still grew at a constant rate, so that a relative test proves nothing:
    the problem is unbounded below, or its minimiser far beyond the iterations. A ridge λ > 0 bounds it.
    """

    CONVERGED = 0
    MAX_ITERS = 1
    DIVERGED = 2
    UNBOUNDED = 3


@value_object
class Solution:
    r"""What a solver returns.

    Attributes:
      value: the last iterate z_K, shape (*batch, …) as the layer's output. It and `pre_activation` are
        differentiable; the others are diagnostics, constant under differentiation.
      residuals: ||z_{k+1} − z_k||₂ for each iteration and example, shape (K, *batch), in units of z.
        It goes to zero for a solver that converges; with a decaying step it does so in any case.
        With a tolerance K is the cap, and an example that has stopped has residual 0.
      objectives: P(z_{k+1}), shape (K, *batch), where asked for, else None. It stays at its last value
        for an example that has stopped.
      finite: whether every iterate of an example was finite, shape (*batch,).
      status: a `Status` for each example, shape (*batch,), where a tolerance was given, else None.
      iterations: iterations that each example took, shape (*batch,), where a tolerance was given.
      pre_activation: w_K with prox_g(w_K) = z_K, where asked for (`pre_activation=True`), shaped as
        the value and differentiable; see `Prior.pre_activation`.
      certificate: a bound on P(z_K) − min P for each example, shape (*batch,), where asked for
        (`certify=True`) or a `gap_tol` given; see `LayerProblem.certificate`.
    """

    value: Array
    residuals: Array
    objectives: Array | None
    finite: Array
    status: Array | None = None
    iterations: Array | None = None
    certificate: Array | None = None
    pre_activation: Array | None = None
