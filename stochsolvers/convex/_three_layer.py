"""The convex program of a parallel three-layer network, on small data."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._cone_program import ConeProgram, SignedMap
from stochsolvers.convex._cones import ConeGroupL2, PolyhedralCones
from stochsolvers.convex._patterns import Patterns
from stochsolvers.linear_maps import Contraction, LinearMap
from stochsolvers.losses import Loss, Squares

_LIMIT = 2**24  # entries of the cones


@value_object
class ThreeLayerProblem(ConeProgram):
    r"""The convex program of parallel three-layer ReLU networks with `width` first-layer neurons each.

        min Σ_j ℓ((Σ_m ((X W_m)₊ a_m)₊ c_m)_j, y_j) + (β/2) Σ_m (||a_m||² + c_m²)

    over W_m with columns of norm at most 1. It has a block b = (i_1, …, i_width; s; l) for all first-layer
    patterns, signs s_k = ±1 of a and second-layer patterns:

        minimise  Σ_j ℓ((Σ_b D_l Σ_k s_k D_{i_k} X (v_bk − w_bk))_j, y_j) + β Σ_b (||v_b|| + ||w_b||)
        subject to (2 D_{i_k} − I) X v_bk ≥ 0,   (2 D_l − I) Σ_k s_k D_{i_k} X v_bk ≥ 0,   and so for w.

    ||v_b|| is the norm of all of block b. Over all patterns X has in the first layer, and all subsets of the
    data in the second, its optimum is the network's. U has shape (2, B, width d); B grows as
    P^width 2^(width + n), so this is for small data.

    Args:
      X: data, shape (n, d).
      y: targets, shape (n,); (C, n) for C programs.
      patterns: of the first layer.
      beta: β > 0, traced.
      width: of the first layer of each network.
      second: second-layer patterns, booleans (n, L); all 2ⁿ − 1 that have active data by default.
      loss: ℓ, of `stochsolvers.losses`.

    Raises:
      ValueError: as of `ReLUProblem`, and for programs with more than 2²⁴ coefficients.

    References:
      Ergen and Pilanci, Global optimality beyond two layers: training deep ReLU networks via convex programs,
      2021, theorem 2.
    """

    _: dataclasses.KW_ONLY
    signs: Array = dataclasses.field(init=False)  # s of each block, shape (B, width)

    def __init__(
        self,
        X: ArrayLike,
        y: ArrayLike,
        patterns: Patterns,
        beta: Scalar,
        *,
        width: int = 1,
        second: ArrayLike | None = None,
        loss: Loss = Squares(),  # noqa: B008 - immutable
    ):
        _inputs.loss("loss of ThreeLayerProblem", loss)
        if getattr(loss, "axis", -1) != -1:
            _checks.fail("loss of ThreeLayerProblem", "one that couples no outputs", repr(loss))
        X = _inputs.data("X of ThreeLayerProblem", X)
        _checks.rank("X of ThreeLayerProblem", X, 2)
        y = _inputs.targets("y of ThreeLayerProblem", y, X, loss, joint=False)
        _checks.instance("patterns of ThreeLayerProblem", patterns, Patterns, "Patterns")
        width = _checks.count("width", width)
        if second is None:
            if len(X) > 16:
                wanted = "at most 16 data, or the second-layer patterns to use"
                _checks.fail("second of ThreeLayerProblem", wanted, f"{len(X)} data")
            second = np.array(list(itertools.product([False, True], repeat=len(X)))).T[:, 1:]
        _checks.rank("second of ThreeLayerProblem", second, 2)
        _checks.trailing("second of ThreeLayerProblem", second, (len(X), jnp.shape(second)[1]))
        if patterns.mask.shape[:-1] != X.shape[:1]:
            _checks.fail("mask of the patterns", f"({len(X)}, P)", patterns.mask.shape)
        if len(patterns.gates) != X.shape[1]:
            _checks.fail("gates of the patterns", f"({X.shape[1]}, P)", patterns.gates.shape)
        features, cones, signs = _blocks(X, patterns.mask, jnp.asarray(second, bool), width)
        linear_map = SignedMap(Contraction("n,bnd->bd", features, (len(X),)))
        prior = ConeGroupL2(PolyhedralCones.of(cones), 1.0)
        self._fill(linear_map, y, loss, beta, prior=prior, signs=signs)

    def predict(self, U: Array, X: ArrayLike) -> Array:
        r"""The network's function of new data, Σ_b (Σ_k s_k (x·v_bk)₊)₊ − that of w, shape (n',) or (C, n').

        Args:
          U: shaped as the variable.
          X: shape (n', d).
        """
        X = _inputs.data("data of predict", X).astype(self.dtype)
        width = self.signs.shape[-1]
        U = self._variable(U)
        U = U.reshape(*U.shape[:-1], width, U.shape[-1] // width)
        _checks.trailing("data of predict", X, (X.shape[0], U.shape[-1]))
        first = jax.nn.relu(jnp.einsum("nd,...bkd->...bkn", X, U))
        second = jax.nn.relu(jnp.einsum("bk,...bkn->...bn", self.signs, first))
        values = jnp.sum(second, axis=-2)
        return values[..., 0, :] - values[..., 1, :]

    def _magnitudes(self) -> LinearMap:
        return SignedMap(self.base_map.absolute(), sign=1)  # pyright: ignore[reportArgumentType]


def _blocks(X: Array, mask: Array, second: Array, width: int) -> tuple[Array, Array, Array]:
    """A_b of shape (B, n, width d), G_b of shape (B, (width + 1) n, width d), and s of shape (B, width)."""
    n, d = X.shape
    tuples = np.array(list(itertools.combinations_with_replacement(range(mask.shape[1]), width)))
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=width)))
    sizes = len(tuples), len(signs), second.shape[1]
    count = sizes[0] * sizes[1] * sizes[2]
    if count * (width + 1) * n * width * d > _LIMIT:
        wanted = f"at most {_LIMIT:,} coefficients"
        _checks.fail("size of ThreeLayerProblem", wanted, f"{count:,} blocks")
    first = mask.T[tuples].astype(X.dtype)  # (tuples, width, n)
    active = first[..., None] * jnp.expand_dims(X, (0, 1))
    joined = jnp.einsum("sk,tknd->tsnkd", jnp.asarray(signs, X.dtype), active)
    above = second.T.astype(X.dtype)
    features = jnp.einsum("ln,tsnkd->tslnkd", above, joined)
    outer = jnp.einsum("ln,tsnkd->tslnkd", 2 * above - 1, joined)
    own = (2 * first - 1)[..., None] * jnp.expand_dims(X, (0, 1))
    inner = jnp.einsum("tknd,kj->tknjd", own, jnp.eye(width, dtype=X.dtype))
    inner = jnp.expand_dims(inner.reshape(len(tuples), width * n, width * d), (1, 2))
    inner = jnp.broadcast_to(inner, (*sizes, width * n, width * d))
    outer = outer.reshape(*sizes, n, width * d)
    cones = jnp.concatenate([inner, outer], axis=-2)
    each = jnp.broadcast_to(jnp.asarray(signs, X.dtype)[None, :, None], (*sizes, width))
    return (
        features.reshape(count, n, width * d),
        cones.reshape(count, (width + 1) * n, width * d),
        each.reshape(count, width),
    )
