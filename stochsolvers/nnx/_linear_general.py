"""The solver layer of `nnx.LinearGeneral`."""

from typing import Any

import jax
from flax import nnx

from stochsolvers import _checks, _layers
from stochsolvers._typing import Array, Scalar
from stochsolvers.linear_maps import Contraction, dense_general
from stochsolvers.losses import Loss, Squares
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.prox import NonNegative, Prior
from stochsolvers.solvers import Solver


class SolverLinearGeneral(SolverLayer, nnx.LinearGeneral):
    r"""`nnx.LinearGeneral` and its activation, as a solver; see `SolverLinear`.

        A(x)[n] = Σ_c x[c] kernel[c, n],   c over the last axes of the input, n over those of `out_features`.

    Args:
      in_features: the sizes of the contracted axes, which are the last ones of the input.
      out_features: n2, or the sizes of several axes.
      axis: (−k, …, −1) for k contracted axes.
      solver, prior, ridge, loss, normalize, output: as in `SolverLinear`.
      deterministic, rng_collection, rngs: likewise.
      **options: those of `nnx.LinearGeneral`; `batch_axis` is refused.
    """

    plain_class = nnx.LinearGeneral

    def __init__(
        self,
        in_features: Any,
        out_features: Any,
        *,
        axis: Any = -1,
        solver: Solver,
        prior: Prior = NonNegative(),  # noqa: B008 - a frozen value
        ridge: Scalar = 0.0,
        loss: Loss = Squares(),  # noqa: B008
        normalize: bool = False,
        output: _layers.Output = "activation",
        deterministic: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        dot_general = options.get("dot_general")
        _layers.refuse(
            "SolverLinearGeneral",
            dot_general=None if dot_general is jax.lax.dot_general else dot_general,
            dot_general_cls=options.get("dot_general_cls"),
            preferred_element_type=options.get("preferred_element_type"),
            batch_axis=options.get("batch_axis") or None,
        )
        nnx.LinearGeneral.__init__(self, in_features, out_features, axis=axis, rngs=rngs, **options)
        expected = tuple(range(-len(self.axis), 0))
        if tuple(self.axis) != expected:
            _checks.fail("axis of SolverLinearGeneral", expected, self.axis)
        self.init_stochastic(deterministic, rng_collection, rngs)
        self._init_solver(_layers.Settings(solver, prior, ridge, loss, normalize, output))

    def _kept_map(self) -> Contraction:
        return self._map_of(self._folded_kernel())

    def _kernel_ndim(self) -> int:
        return len(self.in_features) + len(self.out_features)

    def _linear_map(self, kernel: Array, inputs: Array) -> Contraction:
        rank = len(self.in_features)
        if tuple(inputs.shape[-rank:]) != tuple(self.in_features):
            expected = f"(..., {', '.join(map(str, self.in_features))})"
            _checks.fail("shape of SolverLinearGeneral's inputs", expected, inputs.shape)
        return self._map_of(kernel)

    def _map_of(self, kernel: Array) -> Contraction:
        return dense_general(kernel, tuple(self.in_features), axis=tuple(self.axis))

    def _plain_call(self, inputs: Array) -> Array:
        return nnx.LinearGeneral.__call__(self, inputs)
