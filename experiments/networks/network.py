"""What the networks share: features, a part that may sample, sizes."""

from typing import Any

import jax
from flax import nnx

from experiments.networks.blocks import HiddenLayer, has_stochastic_solver, hidden_layer


class Network(nnx.Module):
    """`features`, the deterministic part, then `head`, the part that may sample; by default a linear map.

    A network has `features`, a module that maps normalised images to features, and, unless it has another
    `head`, the linear map `classifier`.
    """

    features: Any
    classifier: nnx.Linear

    def head(self, features: jax.Array, /) -> jax.Array:
        """Logits (batch, classes) of the features."""
        return self.classifier(features)

    def __call__(self, images: jax.Array, /) -> jax.Array:
        """Logits (batch, classes) of normalised images (batch, height, width, channels)."""
        return self.head(self.features(images))

    @property
    def is_stochastic(self) -> bool:
        """Whether the network samples at test time."""
        return has_stochastic_solver(self)


class TwoHidden(Network):
    """Features, two hidden layers, linear with a ReLU each, and a classifier.

    Args:
      features: has the number of its outputs, `size`.
      units: of the two hidden layers.
      config: has `num_classes`, `variant` (which hidden layer is marked D: "D-ND" the penultimate, "ND-D"
        the last) and `block` (dropout or the solver of such a layer).
      rngs: random streams.
    """

    penultimate: HiddenLayer
    last: HiddenLayer

    def __init__(self, features: Any, units: tuple[int, int], config: Any, *, rngs: nnx.Rngs):
        penultimate, last = (mark == "D" for mark in config.variant.split("-"))
        options, (n1, n2) = {"block": config.block, "rngs": rngs}, units
        self.features = features
        self.penultimate = hidden_layer(features.size, n1, marked=penultimate, **options)
        self.last = hidden_layer(n1, n2, marked=last, **options)
        self.classifier = nnx.Linear(n2, config.num_classes, rngs=rngs)

    def head(self, features: jax.Array, /) -> jax.Array:
        """Logits (batch, classes) of the features."""
        return self.classifier(self.last(self.penultimate(features)))


def scaled(count: int, width: float) -> int:
    """A number of channels or units times the width, rounded, at least 1."""
    if not width > 0:
        raise ValueError(f"width: expected a positive factor, got {width}")
    return max(1, round(width * count))


def check_size(image_shape: tuple[int, int, int], smallest: int) -> None:
    """Raise a ValueError for images of fewer pixels than a network takes."""
    if min(image_shape[:2]) < smallest:
        raise ValueError(
            f"image_shape: expected at least {smallest}×{smallest} pixels, got {image_shape}"
        )
