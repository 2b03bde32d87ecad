"""A small convolutional network whose tiers are equilibria, the same weights unrolled, or plain layers."""

import dataclasses
import itertools
from typing import Any, Literal, TypeAlias, get_args

import jax
from flax import nnx

import stochsolvers as ss
from experiments.networks.network import Network, check_size

EquilibriumMethod: TypeAlias = Literal["equilibrium", "unrolled", "plain"]

EQUILIBRIUM_NAMES: dict[EquilibriumMethod, str] = {
    "equilibrium": "equilibrium",
    "unrolled": "4 iterations",
    "plain": "plain",
}
"""The methods as tables and pictures name them."""
UNROLLED = 4
_INIT = nnx.initializers.he_normal()


@dataclasses.dataclass(frozen=True)
class EquilibriumNetConfig:
    """The network of `experiments.opteq`; all methods have the same parameters.

    Attributes:
      image_shape: height, width, channels.
      num_classes: number of outputs.
      method: "equilibrium" solves z = Wᵀ ReLU(W z + c) in each tier; "unrolled" takes 4 iterations of it from
        zero; "plain" is ReLU, W, ReLU.
      width: channels of the first tier; the second has twice as many.
      depth: layers in each equilibrium, one after the other.
      bound: the most that ||W|| may be.
      tol: of the forward solve.
      max_iters: the cap of its iterations.
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    method: EquilibriumMethod = "equilibrium"
    width: int = 32
    depth: int = 1
    bound: float = 0.95
    tol: float = 1e-2
    max_iters: int = 40

    def __post_init__(self):
        if self.method not in get_args(EquilibriumMethod):
            names = ", ".join(get_args(EquilibriumMethod))
            raise ValueError(f"method: expected one of {names}, got {self.method}")
        if min(self.width, self.depth, self.max_iters) < 1:
            raise ValueError("width, depth, max_iters: expected at least 1")
        if not 0 < self.bound < 1 or not self.tol > 0:
            raise ValueError("bound, tol: expected a bound in (0, 1) and a positive tolerance")
        check_size(self.image_shape, 8)

    def solver(self) -> ss.Solver:
        """How the equilibria are solved."""
        if self.method == "unrolled":
            return ss.FixedPoint(UNROLLED, derivative="unrolled")
        derivative = ss.Implicit(tol=max(0.1 * self.tol, 1e-6), max_iters=50)
        return ss.Anderson(self.max_iters, tol=self.tol, derivative=derivative)


class EquilibriumTier(nnx.Module):
    """conv 3×3 with stride 2, normalisation, the equilibrium or its plain twin, normalisation."""

    def __init__(
        self,
        config: EquilibriumNetConfig,
        channels: tuple[int, int],
        shape: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        before, width = channels
        options: dict[str, Any] = {"use_bias": False, "kernel_init": _INIT, "rngs": rngs}
        self.conv = nnx.Conv(before, width, (3, 3), strides=2, **options)
        self.norm = nnx.BatchNorm(width, momentum=0.95, rngs=rngs)
        self.is_plain = config.method == "plain"
        if self.is_plain:
            plain = [nnx.Conv(width, width, (3, 3), **options) for _ in range(config.depth)]
            norms = [nnx.BatchNorm(width, momentum=0.95, rngs=rngs) for _ in plain]
            self.plain, self.norms = nnx.List(plain), nnx.List(norms)
            return
        layers = [
            ss.nnx.EquilibriumConv(
                None, width, (3, 3), spatial_shape=shape, bound=config.bound, **options
            )
            for _ in range(config.depth)
        ]
        self.inner = ss.nnx.DeepEquilibrium(layers, solver=config.solver())
        self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.95, rngs=rngs)])

    def drive(self, images: jax.Array) -> jax.Array:
        """What the equilibrium is driven by."""
        return self.norm(self.conv(images))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features (batch, height / 2, width / 2, channels)."""
        x = self.drive(images)
        if not self.is_plain:
            return self.norms[0](self.inner(x))
        for layer, norm in zip(self.plain, self.norms, strict=True):
            x = norm(layer(nnx.relu(x)))
        return nnx.relu(x)


class EquilibriumFeatures(nnx.Module):
    """Two tiers, an average over windows of 2×2 pixels, flattened."""

    def __init__(self, config: EquilibriumNetConfig, *, rngs: nnx.Rngs):
        height, width, channels = config.image_shape
        shapes = [(-(-height // s), -(-width // s)) for s in (2, 4)]
        widths = (channels, config.width, 2 * config.width)
        self.tiers = nnx.List(
            [
                EquilibriumTier(config, pair, shape, rngs=rngs)
                for pair, shape in zip(itertools.pairwise(widths), shapes, strict=True)
            ]
        )
        self.size = (shapes[1][0] // 2) * (shapes[1][1] // 2) * widths[-1]

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features (batch, size) of normalised images (batch, height, width, channels)."""
        x = images
        for tier in self.tiers:
            x = tier(x)
        return nnx.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)


class EquilibriumNet(Network):
    """The features and a linear classifier."""

    def __init__(self, config: EquilibriumNetConfig, *, rngs: nnx.Rngs):
        self.features = EquilibriumFeatures(config, rngs=rngs)
        self.classifier = nnx.Linear(self.features.size, config.num_classes, rngs=rngs)
