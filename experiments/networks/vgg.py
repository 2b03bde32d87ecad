"""The VGG16 of tables 4 and 5, adapted to small images."""

import dataclasses

import jax
from flax import nnx

from experiments.networks import patches
from experiments.networks.blocks import BlockConfig, ConvReLU, Variant
from experiments.networks.network import TwoHidden, check_size, scaled

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
HIDDEN = 512
MIN_PIXELS = 8


@dataclasses.dataclass(frozen=True)
class VGG16Config:
    """The VGG16 of tables 4 and 5.

    Attributes:
      image_shape: height, width, channels.
      num_classes: number of outputs.
      width: factor on the numbers of channels and hidden units, rounded; 1 is the paper's network.
      batch_norm: batch normalisation after every convolution. The paper does not say; without it the
        13 convolutions hardly train from scratch.
      variant: which of the two hidden layers is marked D: "D-ND" the penultimate, "ND-D" the last.
      block: dropout or the solver of a layer marked D.
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    width: float = 1.0
    batch_norm: bool = True
    variant: Variant = "D-D"
    block: BlockConfig = dataclasses.field(default_factory=lambda: BlockConfig("dropout"))


class VGG16Features(nnx.Module):
    """13 convolutions of 3×3 in five stages, each with a pool after it; flattened.

    On an odd grid, the last row and column form pools of their own, so that images of fewer than
    32×32 pixels are accepted.
    """

    def __init__(self, config: VGG16Config, *, rngs: nnx.Rngs):
        height, width, n1 = config.image_shape
        check_size(config.image_shape, MIN_PIXELS)
        stages = []
        for counts in STAGES:
            stage = []
            for count in counts:
                n2 = scaled(count, config.width)
                stage.append(ConvReLU(n1, n2, (3, 3), batch_norm=config.batch_norm, rngs=rngs))
                n1 = n2
            height, width = -(-height // 2), -(-width // 2)
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.size = n1 * height * width

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features (batch, size) of normalised images (batch, height, width, channels)."""
        x = images
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
            x = patches.max_pool(x)
        return x.reshape(len(x), -1)


class VGG16(TwoHidden):
    """The features, then linear layers of 512, 512 (times the width) and `num_classes` units."""

    def __init__(self, config: VGG16Config, *, rngs: nnx.Rngs):
        units = scaled(HIDDEN, config.width)
        super().__init__(VGG16Features(config, rngs=rngs), (units, units), config, rngs=rngs)
