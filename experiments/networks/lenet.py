"""The LeNet of table 2."""

import dataclasses

import jax
from flax import nnx

from experiments.networks import patches
from experiments.networks.alexnet import scaled
from experiments.networks.blocks import (
    BlockConfig,
    HiddenLayer,
    Variant,
    has_stochastic_solver,
    hidden_layer,
)

CHANNELS, UNITS = (6, 16), (120, 84)
"""Of the two convolutions and of the two hidden layers, at width 1."""


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
        if min(_pooled(height), _pooled(width)) < 1:
            raise ValueError(
                f"image_shape: expected at least 16×16 pixels, got {config.image_shape}"
            )
        first, second = (scaled(count, config.width) for count in CHANNELS)
        self.size = second * _pooled(height) * _pooled(width)
        self.conv1 = nnx.Conv(channels, first, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (5, 5), padding="VALID", rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features (batch, size) of normalised images (batch, height, width, channels)."""
        x = nnx.relu(patches.pooled(self.conv1, images, block=(4, 2)))
        x = nnx.relu(patches.pooled(self.conv2, x, block=(2, 2)))
        return x.reshape(len(x), -1)


class LeNet(nnx.Module):
    """The features, then linear layers of 120, 84 (times the width) and `num_classes` units.

    ReLU after all but the last.

    `features` is the deterministic part, `head` the part that may sample.
    """

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        mark_penultimate, mark_last = (mark == "D" for mark in config.variant.split("-"))
        first, second = (scaled(count, config.width) for count in UNITS)
        self.features = LeNetFeatures(config, rngs=rngs)
        self.penultimate: HiddenLayer = hidden_layer(
            self.features.size, first, marked=mark_penultimate, block=config.block, rngs=rngs
        )
        self.last: HiddenLayer = hidden_layer(
            first, second, marked=mark_last, block=config.block, rngs=rngs
        )
        self.classifier = nnx.Linear(second, config.num_classes, rngs=rngs)

    def head(self, features: jax.Array) -> jax.Array:
        """The fully-connected part: logits (batch, classes)."""
        return self.classifier(self.last(self.penultimate(features)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, classes) of normalised images (batch, height, width, channels)."""
        return self.head(self.features(images))

    @property
    def is_stochastic(self) -> bool:
        """Whether the network samples at test time."""
        return has_stochastic_solver(self)


def _pooled(size: int) -> int:
    """Pixels along an axis after two rounds of a 5×5 convolution and a 2×2 pool."""
    return ((size - 4) // 2 - 4) // 2
