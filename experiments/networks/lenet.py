"""The LeNet of table 2."""

import dataclasses

import jax
from flax import nnx

from experiments.networks import patches
from experiments.networks.blocks import (
    BlockConfig,
    HiddenLayer,
    Variant,
    has_stochastic_solver,
    hidden_layer,
)


@dataclasses.dataclass(frozen=True)
class LeNetConfig:
    """The LeNet of table 2.

    Attributes:
      image_shape: height, width, channels.
      num_classes: number of outputs.
      variant: which of the two hidden layers is marked D: "D-ND" the penultimate, "ND-D" the last.
      block: dropout or the solver of a layer marked D.
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    variant: Variant = "D-D"
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)


class LeNetFeatures(nnx.Module):
    """conv 6@5×5, pool, conv 16@5×5, pool, with ReLU after each; flattened."""

    def __init__(self, image_shape: tuple[int, int, int], *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        if min(_pooled(height), _pooled(width)) < 1:
            raise ValueError(f"image_shape: expected at least 16×16 pixels, got {image_shape}")
        self.size = 16 * _pooled(height) * _pooled(width)
        self.conv1 = nnx.Conv(channels, 6, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features (batch, size) of normalised images (batch, height, width, channels)."""
        x = nnx.relu(patches.pooled(self.conv1, images, block=(4, 2)))
        x = nnx.relu(patches.pooled(self.conv2, x, block=(2, 2)))
        return x.reshape(len(x), -1)


class LeNet(nnx.Module):
    """The features, then linear layers of 120, 84 and `num_classes` units; ReLU after all but the last.

    `features` is the deterministic part, `head` the part that may sample.
    """

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        mark_penultimate, mark_last = (mark == "D" for mark in config.variant.split("-"))
        self.features = LeNetFeatures(config.image_shape, rngs=rngs)
        self.penultimate: HiddenLayer = hidden_layer(
            self.features.size, 120, marked=mark_penultimate, block=config.block, rngs=rngs
        )
        self.last: HiddenLayer = hidden_layer(
            120, 84, marked=mark_last, block=config.block, rngs=rngs
        )
        self.classifier = nnx.Linear(84, config.num_classes, rngs=rngs)

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
