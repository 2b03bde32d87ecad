"""Small networks of today for `experiments.swap`: a CNN and a ResNet with batch normalisation, a transformer.

They are written as anyone would write them in Flax NNX, without any layer of this library.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.networks.network import Network, check_size, scaled

ModernName = Literal["cnn", "resnet", "transformer"]
MODERN_NAMES: dict[ModernName, str] = {"cnn": "CNN", "resnet": "ResNet", "transformer": "ViT"}


@dataclasses.dataclass(frozen=True)
class ModernConfig:
    """Which network, and its size.

    Attributes:
      name: "cnn", "resnet" or "transformer".
      image_shape: height, width, channels.
      num_classes: number of outputs.
      width: factor on the 16 channels of the first layers, and on the 64 of the transformer's tokens.
      dropout: rate of the CNN's dropout, before its hidden layer.
    """

    name: ModernName = "cnn"
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    width: float = 1.0
    dropout: float = 0.5

    def __post_init__(self):
        if self.name not in get_args(ModernName):
            raise ValueError(f"name: expected one of {', '.join(MODERN_NAMES)}, got {self.name}")
        scaled(1, self.width)  # a positive factor
        check_size(self.image_shape, 8)

    @property
    def channels(self) -> int:
        """Of the first layers."""
        return scaled(16, self.width)

    def build(self, rngs: nnx.Rngs) -> "Modern":
        """The network."""
        return {"cnn": CNN, "resnet": ResNet, "transformer": Transformer}[self.name](self, rngs)


class Features(nnx.Module):
    """The images as they are: any layer behind may sample."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """x."""
        return images


class Modern(Network):
    """A network whose every layer may become a solver."""

    def __init__(self):
        self.features = Features()

    def head(self, images: jax.Array, /) -> jax.Array:
        """Logits (batch, classes) of normalised images (batch, height, width, channels)."""
        return self(images)


class ConvNorm(nnx.Module):
    """Convolution 3×3 and batch normalisation."""

    def __init__(self, before: int, after: int, *, strides: int = 1, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            before, after, (3, 3), strides=strides, padding="SAME", use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(after, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """norm(A x)."""
        return self.norm(self.conv(x))


class CNN(Modern):
    """Twice two convolutions and a pool, dropout, a hidden layer."""

    def __init__(self, config: ModernConfig, rngs: nnx.Rngs):
        super().__init__()
        (height, width, channels), few = config.image_shape, config.channels
        many = 2 * few
        sizes = ((channels, few), (few, few), (few, many), (many, many))
        self.convs = nnx.List([ConvNorm(*size, rngs=rngs) for size in sizes])
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.hidden = nnx.Linear((height // 4) * (width // 4) * many, 4 * many, rngs=rngs)
        self.classifier = nnx.Linear(4 * many, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = images
        for k, layer in enumerate(self.convs):
            x = nnx.relu(layer(x))
            if k % 2:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        x = self.dropout(x.reshape(len(x), -1))
        return self.classifier(nnx.relu(self.hidden(x)))


class Block(nnx.Module):
    """ReLU(norm(A₂ ReLU(norm(A₁ x))) + x), with a 1×1 convolution on the shortcut where sizes differ."""

    def __init__(self, before: int, after: int, strides: int, *, rngs: nnx.Rngs):
        self.first = ConvNorm(before, after, strides=strides, rngs=rngs)
        self.second = ConvNorm(after, after, rngs=rngs)
        same = strides == 1 and before == after
        options: dict[str, Any] = {"strides": strides, "use_bias": False, "rngs": rngs}
        self.shortcut = nnx.data(None if same else nnx.Conv(before, after, (1, 1), **options))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block of x."""
        kept = x if self.shortcut is None else self.shortcut(x)
        return nnx.relu(self.second(nnx.relu(self.first(x))) + kept)


class ResNet(Modern):
    """A convolution, three blocks of w, 2w and 4w channels, the mean over pixels."""

    def __init__(self, config: ModernConfig, rngs: nnx.Rngs):
        super().__init__()
        width = config.channels
        self.stem = ConvNorm(config.image_shape[-1], width, rngs=rngs)
        sizes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        self.blocks = nnx.List([Block(*size, rngs=rngs) for size in sizes])
        self.classifier = nnx.Linear(4 * width, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = nnx.relu(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return self.classifier(jnp.mean(x, axis=(1, 2)))


class Encoder(nnx.Module):
    """x + attention(norm(x)), then x + A₂ ReLU(A₁ norm(x))."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.before_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.before_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 4 * width, rngs=rngs)
        self.contract = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens (batch, count, width)."""
        x = x + self.attention(self.before_attention(x))
        return x + self.contract(nnx.relu(self.expand(self.before_mlp(x))))


class Transformer(Modern):
    """A vision transformer of two layers with ReLU: 8 × 8 tokens, learned positions, their mean."""

    def __init__(self, config: ModernConfig, rngs: nnx.Rngs):
        super().__init__()
        (height, width, channels), size = config.image_shape, 4 * config.channels
        patch = height // 8, width // 8
        self.embed = nnx.Conv(channels, size, patch, strides=patch, padding="VALID", rngs=rngs)
        count = (height // patch[0]) * (width // patch[1])
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, count, size)))
        self.encoders = nnx.List([Encoder(size, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(size, rngs=rngs)
        self.classifier = nnx.Linear(size, config.num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits."""
        x = self.embed(images)
        x = x.reshape(len(x), -1, x.shape[-1]) + self.positions[...]
        for encoder in self.encoders:
            x = encoder(x)
        return self.classifier(jnp.mean(self.norm(x), axis=1))
