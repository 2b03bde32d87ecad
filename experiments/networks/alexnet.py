"""The AlexNet of table 3, adapted to small images."""

import dataclasses

import jax
from flax import nnx

import stochsolvers as ss
from experiments.networks import patches
from experiments.networks.blocks import BlockConfig, ConvReLU, HiddenLayer, hidden_layer
from experiments.networks.network import Network, check_size, scaled

MIN_PIXELS = 8


@dataclasses.dataclass(frozen=True)
class AlexNetConfig:
    """The AlexNet of table 3.

    Attributes:
      image_shape: height, width, channels.
      num_classes: number of outputs.
      width: factor on the numbers of channels, rounded; 1 is the paper's network.
      hidden: units of a fully-connected ReLU layer before the classifier, times `width`; None for the
        paper's network, whose only fully-connected layer is the classifier.
      block: dropout or the solver of that layer, "last".
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    width: float = 1.0
    hidden: int | None = None
    block: BlockConfig = dataclasses.field(default_factory=lambda: BlockConfig("dropout"))


class AlexNetFeatures(nnx.Module):
    """conv 64@11×11 stride 4 padding 5, pool, 192@5×5, pool, 384@3×3, 256@3×3, 256@3×3, pool; flattened.

    All pools are 2×2; on an odd grid, the last row and column form pools of their own, so that images
    of fewer than 32×32 pixels are accepted. On 32×32 pixels every grid is even.
    """

    def __init__(self, config: AlexNetConfig, *, rngs: nnx.Rngs):
        height, width, channels = config.image_shape
        check_size(config.image_shape, MIN_PIXELS)
        sizes = [scaled(count, config.width) for count in (64, 192, 384, 256, 256)]
        self.image_size = (height, width)
        self.first: ConvReLU | ss.nnx.SolverConv = ConvReLU(
            channels, sizes[0], (11, 11), strides=4, padding=5, rngs=rngs
        )
        kernels = (5, 3, 3, 3)
        self.convolutions = nnx.List(
            ConvReLU(n1, n2, (kernel, kernel), rngs=rngs)
            for n1, n2, kernel in zip(sizes, sizes[1:], kernels, strict=False)
        )
        self.size = sizes[-1] * _pooled(height) * _pooled(width)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features (batch, size) of normalised images (batch, height, width, channels)."""
        x = patches.max_pool(self.first(images))
        for layer, pooled in zip(self.convolutions, (True, False, False, True), strict=True):
            x = patches.max_pool(layer(x)) if pooled else layer(x)
        return x.reshape(len(x), -1)


class AlexNet(Network):
    """The features and the classifier, with an optional ReLU layer between them."""

    def __init__(self, config: AlexNetConfig, *, rngs: nnx.Rngs):
        self.features = AlexNetFeatures(config, rngs=rngs)
        n1 = self.features.size
        self.last: HiddenLayer | None = nnx.data(None)
        if config.hidden is not None:
            n2 = scaled(config.hidden, config.width)
            self.last = hidden_layer(n1, n2, marked=True, block=config.block, rngs=rngs)
            n1 = n2
        self.classifier = nnx.Linear(n1, config.num_classes, rngs=rngs)

    def head(self, features: jax.Array, /) -> jax.Array:
        """Logits (batch, classes) of the features."""
        return self.classifier(features if self.last is None else self.last(features))


def _pooled(size: int) -> int:
    """Pixels along an axis after the first convolution and three pools."""
    size = (size - 1) // 4 + 1
    return -(-size // 8)
