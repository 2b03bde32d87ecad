"""A batch normalisation behind a solver layer, folded into it at every call without touching a parameter."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from stochsolvers import _checks
from stochsolvers._typing import Array

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FollowingNorm:
    r"""An `nn.BatchNorm` behind a layer: BN(A x + b) = s ⊙ (A x) + s ⊙ (b − m) + β, s = γ / sqrt(v + ε).

    m and v are the running mean and variance, whatever the normalisation is asked to do: they are constants.

    Attributes:
      up: how many modules above the layer is one that contains both.
      path: from that one to the normalisation.
      epsilon: ε.
      use_scale: whether there is a γ.
      use_bias: whether there is a β.
    """

    up: int
    path: Path
    epsilon: float
    use_scale: bool
    use_bias: bool

    @classmethod
    def of(cls, norm: nn.BatchNorm, path: Path, layer: Path) -> "FollowingNorm":
        """That of a normalisation at a path behind a layer at another."""
        common = 0
        while common < min(len(path), len(layer)) and path[common] == layer[common]:
            common += 1
        up = len(layer) - common
        return cls(up, path[common:], norm.epsilon, norm.use_scale, norm.use_bias)

    def absolute(self, layer: Path) -> Path:
        """The path of the normalisation, given that of the layer."""
        return layer[: len(layer) - self.up] + self.path

    def arrays(self, scope: Any) -> dict[str, Array]:
        """γ, β, m and v, as "scale", "bias", "mean" and "var", from the scope of the layer.

        Raises:
          ValueError: where the normalisation is outside of a lifted transform that the layer is in.
        """
        for _ in range(self.up):
            scope = scope.parent
            if scope is None:
                where = f"the normalisation {'/'.join(self.path)!r} of a layer"
                _checks.fail(where, "within the same nn.scan, nn.vmap or nn.remat", "one outside")
        parameters, statistics = (
            _nested(scope, collection, self.path) for collection in ("params", "batch_stats")
        )
        names = ["scale"] * self.use_scale + ["bias"] * self.use_bias
        found = {name: parameters.get(name) for name in names}
        found |= {name: statistics.get(name) for name in ("mean", "var")}
        for name, value in found.items():
            if value is None:
                where = f"variables of {'/'.join(self.path)!r}"
                _checks.fail(where, f"{name!r}, which the layer before it reads", "none")
        return nn.unbox(found)

    def fold(
        self, arrays: Mapping[str, Array], kernel: Array, bias: Array | None
    ) -> tuple[Array, Array]:
        """The kernel and the bias of the layer and its normalisation, whose features are the last axis."""
        scale = jax.lax.rsqrt(arrays["var"] + self.epsilon)
        if self.use_scale:
            scale = scale * arrays["scale"]
        shift = (0.0 if bias is None else bias) - arrays["mean"]
        shift = scale * shift
        if self.use_bias:
            shift = shift + arrays["bias"]
        return kernel * scale.reshape((1,) * (kernel.ndim - 1) + scale.shape), shift


def _nested(scope: Any, collection: str, path: Path) -> Mapping[str, Any]:
    value = scope.get_variable(collection, path[0], {})
    for name in path[1:]:
        value = value.get(name, {})
    return value


_folded: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar(
    "_folded", default=frozenset()
)


@contextlib.contextmanager
def folded_norms(paths: frozenset[Path]) -> Iterator[None]:
    """Within it, the normalisations at these paths pass their inputs through."""
    token = _folded.set(_folded.get() | paths)
    try:
        yield
    finally:
        _folded.reset(token)


def is_folded(module: nn.Module) -> bool:
    """Whether a module is a normalisation that is folded into the layer before it."""
    return isinstance(module, nn.BatchNorm) and module.path in _folded.get()
