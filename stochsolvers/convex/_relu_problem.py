"""The convex program of a ReLU network: a gated one with the weights of each pattern in its cone."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._cone_program import ConeProgram, SignedMap
from stochsolvers.convex._cones import ConeGroupL2, PatternCones
from stochsolvers.convex._gated_map import GatedMap, OfGatedData
from stochsolvers.convex._patterns import Patterns
from stochsolvers.losses import Loss, Squares


@value_object
class ReLUProblem(ConeProgram, OfGatedData):
    r"""The convex program of a two-layer ReLU network over patterns D_1, …, D_P.

        minimise_{V, W}  Σ_j ℓ((Σ_i D_i X (v_i − w_i))_j, y_j) + β Σ_i (||v_i||₂ + ||w_i||₂)
        subject to       (2 D_i − I) X v_i ≥ 0,  (2 D_i − I) X w_i ≥ 0

    Over all patterns of X its optimum is that of the network with weight decay,

        min Σ_j ℓ(((X W₁)₊ w₂)_j, y_j) + (β/2) (||W₁||² + ||w₂||²),

    and a solution is a network: neurons v_i/√||v_i|| with output √||v_i||, and w_i/√||w_i|| with
    −√||w_i||. Over fewer patterns it is an upper bound. The variable U = (V, W) has shape (2, P, d); it is a
    `LayerProblem` whose prior is the norm on the cones. For data of K patches the constraints hold for each.
    Of joint outputs it has shape (2, C, P, d): every output has neurons of its own, and a loss that couples
    them, `CrossEntropy`.

    Args:
      X: data, shape (n, d); (n, K, d) for the sum over K patches.
      y: targets, shape (n,); (C, n) for C programs, one for each output (one-vs-rest).
      patterns: `Patterns` of X.
      beta: β > 0, traced.
      loss: ℓ, of `stochsolvers.losses`.
      joint: one program for all C outputs, as losses that couple classes need.

    Raises:
      ValueError: as of `GatedProblem`.

    References:
      Pilanci and Ergen, Neural networks are convex regularizers, 2020, theorem 1; Ergen and Pilanci, Implicit
      convex regularizers of CNN architectures, 2021 (patches).
    """

    def __init__(
        self,
        X: ArrayLike,
        y: ArrayLike,
        patterns: Patterns,
        beta: Scalar,
        *,
        loss: Loss = Squares(),  # noqa: B008 - immutable
        joint: bool = False,
    ):
        _inputs.loss("loss of ReLUProblem", loss)
        if getattr(loss, "axis", -1) != -1 and not joint:
            _checks.fail("joint", "True for a loss that couples outputs", joint)
        X = _inputs.data("X of ReLUProblem", X)
        y = _inputs.targets("y of ReLUProblem", y, X, loss, joint=joint)
        linear_map = SignedMap(GatedMap(X, patterns, outputs=len(y) if joint else None))
        prior = ConeGroupL2(PatternCones.of(X, patterns.mask), 1.0)
        self._fill(linear_map, y, loss, beta, prior=prior)

    @property
    def gated_map(self) -> GatedMap:
        """A, of the program without signs and cones."""
        assert isinstance(self.base_map, GatedMap)
        return self.base_map

    def predict(self, U: Array, X: ArrayLike | None = None) -> Array:
        r"""The network's function of new data, Σ_i (x·v_i)₊ − Σ_i (x·w_i)₊, shape (n',) or (C, n').

        Args:
          U: shaped as the variable.
          X: shape (n', d) or (n', K, d), summed over patches; None for the data of the problem.
        """
        X = self.X if X is None else X
        X = _inputs.data_like("data of predict", X, self.X).astype(self.dtype)
        U = self._variable(U)
        products = jnp.sum(jax.nn.relu(U @ X.reshape(-1, X.shape[-1]).T), axis=-2)
        positive, negative = jnp.moveaxis(products, -1 - len(self.gated_map.in_shape), 0)
        values = positive - negative
        if X.ndim == 3:
            values = jnp.sum(values.reshape(*values.shape[:-1], *X.shape[:2]), axis=-1)
        return values

    def _magnitudes(self):
        return SignedMap(self.gated_map.magnitudes(), sign=1)
