"""The networks of proximal backpropagation: an MLP and a ConvNet whose hidden layers take implicit steps."""

import dataclasses
import itertools
from typing import Any, Literal, get_args

import jax
from flax import nnx

import stochsolvers as ss
from experiments.networks.network import Network, check_size, scaled

Kind = Literal["mlp", "convnet"]
Init = Literal["uniform", "lecun"]
INITIALISERS: dict[str, Any] = {
    "uniform": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "lecun": nnx.initializers.lecun_normal(),
}
LABELS: dict[str, str] = {"mlp": "MLP", "convnet": "ConvNet"}
UNITS = (4000, 1000, 4000)
CHANNELS = (16, 20, 20)
BATCH_SIZE = 500
DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"optimizer": "nesterov", "momentum": 0.95, "rate": 1.0, "plain": 0.05, "tau": 0.05},
    "convnet": {"optimizer": "adam", "momentum": 0.9, "rate": 1e-3, "plain": 1e-3, "tau": 1.0},
}
"""Of the paper, at its batch size: optimiser, rates of implicit steps and of backpropagation, τ."""


@dataclasses.dataclass(frozen=True)
class ProxPropConfig:
    """A network of Frerix et al. 2018, section 4.

    Attributes:
      kind: "mlp" has hidden layers of 4000, 1000 and 4000 units; "convnet" has 5×5 convolutions of 16, 20 and
        20 channels, padded by 2, with pools of 2×2 after the first two. ReLU after all of them.
      image_shape: height, width, channels.
      num_classes: outputs of the last layer, a dense one that is trained by ordinary gradients.
      step: of the hidden layers; None for ordinary gradients.
      width: factor on the numbers of units and channels.
      init: of the kernels, "uniform" in ±1/√inputs, as in the paper's code, or "lecun", Flax's normal one of
        1.7 times its deviation; biases are zero.
    """

    kind: Kind = "mlp"
    image_shape: tuple[int, int, int] = (32, 32, 3)
    num_classes: int = 10
    step: ss.proxprop.ImplicitStep | None = None
    width: float = 1.0
    init: Init = "uniform"

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"network: expected one of {', '.join(get_args(Kind))}, got {self.kind}"
            )
        if self.kind == "convnet":
            check_size(self.image_shape, 4)

    def sizes(self, numbers: tuple[int, ...]) -> list[int]:
        """The numbers times the width."""
        return [scaled(number, self.width) for number in numbers]


class _Dense(nnx.Module):
    def __init__(self, config: ProxPropConfig, *, rngs: nnx.Rngs):
        height, width, channels = config.image_shape
        sizes = [height * width * channels, *config.sizes(UNITS)]
        options: dict[str, Any] = {"kernel_init": INITIALISERS[config.init], "rngs": rngs}
        self.layers = nnx.List(
            [
                _implicit(nnx.Linear(*pair, **options), config.step)
                for pair in itertools.pairwise(sizes)
            ]
        )
        self.size = sizes[-1]

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


class _Convolutional(nnx.Module):
    def __init__(self, config: ProxPropConfig, *, rngs: nnx.Rngs):
        height, width, channels = config.image_shape
        sizes = [channels, *config.sizes(CHANNELS)]
        options: dict[str, Any] = {"padding": ((2, 2), (2, 2)), "rngs": rngs}
        options["kernel_init"] = INITIALISERS[config.init]
        self.layers = nnx.List(
            [
                _implicit(nnx.Conv(*pair, (5, 5), **options), config.step)
                for pair in itertools.pairwise(sizes)
            ]
        )
        self.size = (height // 4) * (width // 4) * sizes[-1]

    def __call__(self, images: jax.Array) -> jax.Array:
        first, second, third = self.layers
        x = nnx.max_pool(nnx.relu(first(images)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(second(x)), (2, 2), (2, 2))
        x = nnx.relu(third(x))
        return x.reshape(len(x), -1)


def _implicit(layer: Any, step: ss.proxprop.ImplicitStep | None) -> Any:
    if step is None:
        return layer
    kind: Any = ss.nnx.ProxPropLinear if isinstance(layer, nnx.Linear) else ss.nnx.ProxPropConv
    return kind.from_layer(layer, step=step)


class ProxPropNet(Network):
    """The hidden layers, `features`, and the last layer, `classifier`. Nothing samples."""

    def __init__(self, config: ProxPropConfig, *, rngs: nnx.Rngs):
        kind = _Dense if config.kind == "mlp" else _Convolutional
        self.features = kind(config, rngs=rngs)
        init = INITIALISERS[config.init]
        self.classifier = nnx.Linear(
            self.features.size, config.num_classes, kernel_init=init, rngs=rngs
        )
