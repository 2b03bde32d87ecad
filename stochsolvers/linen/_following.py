"""A batch normalisation behind a solver layer: one problem of both, whose parameters stay where they are."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.surgery import _fold

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FollowingNorm:
    r"""An `nn.BatchNorm` in evaluation behind a layer, y ↦ s y + t: s = γ / sqrt(v + ε), t = β − s m.

    m and v are the running mean and variance, also where the normalisation itself uses the batch's.

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

    def variables(self, variables: Mapping[str, Array], layer: Path) -> dict[str, Array]:
        """The same, from the variables of the network by path as text, and the path of the layer."""
        path = "/".join(self.absolute(layer))
        names = {f"params/{path}/": ("scale", "bias"), f"batch_stats/{path}/": ("mean", "var")}
        return {
            name: variables[prefix + name]
            for prefix, own in names.items()
            for name in own
            if prefix + name in variables
        }

    def affine(self, arrays: Mapping[str, Array]) -> tuple[Array, Array]:
        """(s, t) of the normalisation y ↦ s y + t."""
        scale, bias = arrays.get("scale"), arrays.get("bias")
        return _fold.affine(arrays["mean"], arrays["var"], scale, bias, self.epsilon)


def _nested(scope: Any, collection: str, path: Path) -> Mapping[str, Any]:
    value = scope.get_variable(collection, path[0], {})
    for name in path[1:]:
        value = value.get(name, {})
    return value
