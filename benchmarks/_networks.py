"""Plain Flax networks, as anybody writes them, for the reports: ResNet-18 and a U-Net, NNX and Linen."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

WIDTHS = (64, 128, 256, 512)


class Block(nnx.Module):
    """Two 3×3 convolutions with normalisation, and a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(
            inputs, outputs, (3, 3), strides=stride, padding=1, use_bias=False, rngs=rngs
        )
        self.norm1 = nnx.BatchNorm(outputs, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(outputs, rngs=rngs)
        same = stride == 1 and inputs == outputs
        project = nnx.Conv(inputs, outputs, (1, 1), strides=stride, use_bias=False, rngs=rngs)
        self.project: Any = nnx.data(None if same else project)
        self.norm: Any = nnx.data(None if same else nnx.BatchNorm(outputs, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.norm is None else self.norm(self.project(x))))


class ResNet(nnx.Module):
    """ResNet-18: two blocks for each of four widths, for images of CIFAR's size."""

    def __init__(self, rngs: nnx.Rngs, widths: Sequence[int] = WIDTHS, depth: int = 2):
        first = widths[0]
        self.stem = nnx.Conv(3, first, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(first, rngs=rngs)
        blocks, inputs = [], first
        for stage, width in enumerate(widths):
            for i in range(depth):
                blocks.append(Block(inputs, width, 2 if stage and not i else 1, rngs))
                inputs = width
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


class UNet(nnx.Module):
    """Down by max pooling, up by nearest and by linear interpolation, joined by concatenation."""

    def __init__(self, rngs: nnx.Rngs, widths: Sequence[int] = (16, 32, 64)):
        self.down = nnx.List(
            [nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in zip((3, *widths), widths, strict=False)]
        )
        pairs = list(itertools.pairwise(widths))[::-1]
        self.up = nnx.List([nnx.Conv(a + b, a, (3, 3), rngs=rngs) for a, b in pairs])
        self.head = nnx.Conv(widths[0], 1, (1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        kept = []
        for conv in self.down:
            x = nnx.relu(conv(x))
            kept.append(x)
            x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        x = kept.pop()
        for i, conv in enumerate(self.up):
            skip = kept.pop()
            x = upsample(x, skip.shape, "nearest" if i % 2 == 0 else "linear")
            x = nnx.relu(conv(jnp.concatenate([x, skip], axis=-1)))
        return self.head(x)


def upsample(x: jax.Array, like: Sequence[int], method: str) -> jax.Array:
    """Resize the pixels."""
    return jax.image.resize(x, (*like[:-1], x.shape[-1]), method)


class LinenBlock(nn.Module):
    """As `Block`."""

    outputs: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=True)(x)

        conv: Callable[..., nn.Conv] = nn.Conv
        stride = self.stride
        y = conv(self.outputs, (3, 3), strides=stride, padding=1, use_bias=False)(x)
        y = nn.relu(norm(y))
        y = norm(conv(self.outputs, (3, 3), padding=1, use_bias=False)(y))
        if stride != 1 or x.shape[-1] != self.outputs:
            x = norm(conv(self.outputs, (1, 1), strides=stride, use_bias=False)(x))
        return nn.relu(y + x)


class LinenResNet(nn.Module):
    """As `ResNet`."""

    widths: Sequence[int] = WIDTHS
    depth: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.widths[0], (3, 3), padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        for stage, width in enumerate(self.widths):
            for i in range(self.depth):
                x = LinenBlock(width, 2 if stage and not i else 1)(x)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


class LinenUNet(nn.Module):
    """As `UNet`."""

    widths: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kept = []
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            kept.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = kept.pop()
        for i, width in enumerate(self.widths[-2::-1]):
            skip = kept.pop()
            x = upsample(x, skip.shape, "nearest" if i % 2 == 0 else "linear")
            x = nn.relu(nn.Conv(width, (3, 3))(jnp.concatenate([x, skip], axis=-1)))
        return nn.Conv(1, (1, 1))(x)
