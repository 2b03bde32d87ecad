"""The LeNet of table 2."""

import dataclasses

import jax
from flax import nnx

from experiments.networks import patches
from experiments.networks.blocks import BlockConfig, Variant
from experiments.networks.network import TwoHidden, check_size, scaled

CHANNELS, UNITS = (6, 16), (120, 84)
"""Of the two convolutions and of the two hidden layers, at width 1."""
MIN_PIXELS = 16


@dataclasses.dataclass(frozen=True)
class LeNetConfig:
    """The LeNet of table 2.

    Attributes:
      image_shape: height, width, channels.
      num_classes: number of outputs.
      variant: which of the two hidden layers is marked D: "D-ND" the penultimate, "ND-D" the last.
      block: dropout or the solver of a layer marked D.
      width: factor on the numbers of channels and hidden units, rounded; 1 is the paper's network.
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    variant: Variant = "D-D"
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)
    width: float = 1.0


class LeNetFeatures(nnx.Module):
    """conv 6@5×5, pool, conv 16@5×5, pool, with ReLU after each, channels times the width; flattened."""

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        height, width, channels = config.image_shape
        check_size(config.image_shape, MIN_PIXELS)
        first, second = (scaled(count, config.width) for count in CHANNELS)
        self.size = second * _pooled(height) * _pooled(width)
        self.conv1 = nnx.Conv(channels, first, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (5, 5), padding="VALID", rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features (batch, size) of normalised images (batch, height, width, channels)."""
        x = nnx.relu(patches.pooled(self.conv1, images, block=(4, 2)))
        x = nnx.relu(patches.pooled(self.conv2, x, block=(2, 2)))
        return x.reshape(len(x), -1)


class LeNet(TwoHidden):
    """The features, then linear layers of 120, 84 (times the width) and `num_classes` units."""

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        first, second = (scaled(count, config.width) for count in UNITS)
        super().__init__(LeNetFeatures(config, rngs=rngs), (first, second), config, rngs=rngs)


def _pooled(size: int) -> int:
    """Pixels along an axis after two rounds of a 5×5 convolution and a 2×2 pool."""
    return ((size - 4) // 2 - 4) // 2
