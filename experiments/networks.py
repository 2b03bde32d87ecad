"""The networks of the tables, with dropout or a solver in the layers under study."""

import dataclasses
from typing import Literal

import jax
from flax import nnx

import stochsolvers as ss

Variant = Literal["D-D", "D-ND", "ND-D"]
Method = Literal["dropout", "prox-sg"]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What stands in a fully-connected ReLU layer that is marked D.

    Attributes:
      method: "dropout" drops inputs before the layer; "prox-sg" solves the layer's problem.
      rate: dropout rate p; the solver samples τ = (1 − p) n1 inputs.
      num_iters: iterations of the solver.
      decay: factor of the solver's step size, 1/L at first, from one iteration to the next.
      ridge: λ of the solver's problem.
    """

    method: Method = "prox-sg"
    rate: float = 0.5
    num_iters: int = 10
    decay: float = 0.9
    ridge: float = 1e-3


@dataclasses.dataclass(frozen=True)
class LeNetConfig:
    """The LeNet of table 2.

    Attributes:
      image_shape: height, width, channels.
      num_classes: outputs.
      variant: which of the two hidden layers is marked D: "D-ND" the penultimate, "ND-D" the last.
      block: what D means.
    """

    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    variant: Variant = "D-D"
    block: BlockConfig = dataclasses.field(default_factory=BlockConfig)


class DropoutReLU(nnx.Module):
    """Dropout of the inputs, linear map, ReLU: one iteration of Prox-SG, as a plain layer."""

    def __init__(self, in_features: int, out_features: int, *, rate: float, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.linear = nnx.Linear(in_features, out_features, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """ReLU(W dropout(x) + b)."""
        return nnx.relu(self.linear(self.dropout(inputs)))


HiddenLayer = DropoutReLU | ss.nnx.SolverLinear


def hidden_layer(
    in_features: int, out_features: int, *, marked: bool, block: BlockConfig, rngs: nnx.Rngs
) -> HiddenLayer:
    """A fully-connected ReLU layer, with dropout or a solver where it is marked D."""
    if marked and block.method == "prox-sg":
        return ss.nnx.SolverLinear(
            in_features,
            out_features,
            prior=ss.prox.NonNegative(),
            solver=ss.ProxSG(tau=1.0 - block.rate, num_iters=block.num_iters, decay=block.decay),
            ridge=block.ridge,
            rngs=rngs,
        )
    return DropoutReLU(in_features, out_features, rate=block.rate if marked else 0.0, rngs=rngs)


class LeNet(nnx.Module):
    """conv 6@5×5, pool, conv 16@5×5, pool, 120, 84, classes, with ReLU after each but the last.

    `features` is the deterministic part, `head` the part that may be stochastic.
    """

    def __init__(self, config: LeNetConfig, *, rngs: nnx.Rngs):
        height, width, channels = config.image_shape
        area = _pooled(height) * _pooled(width)
        if min(_pooled(height), _pooled(width)) < 1:
            raise ValueError(
                f"image_shape: expected at least 16×16 pixels, got {config.image_shape}"
            )
        mark_penultimate, mark_last = (mark == "D" for mark in config.variant.split("-"))
        self.conv1 = nnx.Conv(channels, 6, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.penultimate = hidden_layer(
            16 * area, 120, marked=mark_penultimate, block=config.block, rngs=rngs
        )
        self.last = hidden_layer(120, 84, marked=mark_last, block=config.block, rngs=rngs)
        self.classifier = nnx.Linear(84, config.num_classes, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """The convolutional part, flattened: (batch, n1)."""
        x = nnx.relu(nnx.max_pool(self.conv1(images), (2, 2), (2, 2)))
        x = nnx.relu(nnx.max_pool(self.conv2(x), (2, 2), (2, 2)))
        return x.reshape(len(x), -1)

    def head(self, features: jax.Array) -> jax.Array:
        """The fully-connected part: logits (batch, classes)."""
        return self.classifier(self.last(self.penultimate(features)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits (batch, classes) of normalised images (batch, height, width, channels)."""
        return self.head(self.features(images))

    @property
    def is_stochastic(self) -> bool:
        """Whether the network is stochastic at test time."""
        return any(
            isinstance(layer, ss.nnx.SolverLinear) for layer in (self.penultimate, self.last)
        )


def set_mode(model: nnx.Module, mode: Literal["train", "test", "deterministic"]) -> None:
    """Switch a model's random layers, in place.

    "train": all random. "test": dropout off, solvers random, as the paper tests. "deterministic":
    dropout off, solvers follow the full gradient.
    """
    if mode == "train":
        model.train()
        return
    model.eval()
    if mode == "test":
        for _, module in nnx.iter_modules(model):
            if isinstance(module, ss.nnx.SolverLinear):
                module.deterministic = False


def _pooled(size: int) -> int:
    """Pixels along an axis after two rounds of a 5×5 convolution and a 2×2 pool."""
    return ((size - 4) // 2 - 4) // 2
