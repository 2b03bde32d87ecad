"""One step of training, compiled: for one network, or for several seeds of a network at once.

Whatever differs between seeds, or between training and finetuning, is an argument of the program, so
that networks of the same structure share one compiled step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import stochsolvers as ss
from experiments.training.evaluation import normalise

Precision = Literal["float32", "bf16"]
Optimizer = Literal["sgd", "nesterov", "adam", "adamw"]
CROP_PADDING = 4
COMPILED = 8
"""Number of network structures whose compiled programs are kept."""
ADDED = ("optimizer", "second_decay")
"""Fields of the configuration that stored runs and checkpoints name only where they are not the defaults."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimiser; by default that of "Deep Layers as Stochastic Solvers", SGD with momentum.

    Attributes:
      epochs: number of epochs; each learning rate is used for an equal part of the steps.
      batch_size: examples in a step.
      learning_rates: in order of use.
      momentum: momentum of SGD; of Adam, the decay β₁ of its first moment.
      weight_decay: λ of (λ/2)||w||², weights and biases; its gradient enters the momentum. Of "adamw" the
        decoupled one, w ← w − rate · λ w.
      seed: seed of the initialisation, the order of the examples and the sampling.
      augment: crop and flip the training images at random; the paper does not mention it.
      precision: "bf16" computes plain layers in bfloat16; parameters, solvers and loss stay float32.
      optimizer: "sgd", "nesterov" (SGD with Nesterov's momentum), "adam" or "adamw".
      second_decay: β₂ of Adam's second moment.
    """

    epochs: int = 300
    batch_size: int = 128
    learning_rates: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    augment: bool = False
    precision: Precision = "float32"
    optimizer: Optimizer = "sgd"
    second_decay: float = 0.999

    def settings(self) -> dict[str, Any]:
        """As JSON, without those of `ADDED` that have their defaults: earlier runs know none of them."""
        defaults, values = dataclasses.asdict(TrainConfig()), dataclasses.asdict(self)
        unnamed = {name for name in ADDED if values[name] == defaults[name]}
        return {name: value for name, value in values.items() if name not in unnamed}


class State(NamedTuple):
    """The state of training: parameters, other state of the model, state of the optimiser."""

    params: Any
    rest: Any
    optimiser: Any


class Examples(NamedTuple):
    """The training data: images as stored, labels, mean and deviation of the pixels, a random key."""

    images: Any
    labels: Any
    mean: Any
    std: Any
    key: Any


class Rates(NamedTuple):
    """The parameters of the optimiser."""

    learning_rate: Any
    momentum: Any
    weight_decay: Any
    second_decay: Any = 0.999


def staged(rates: Sequence[float], step: int, total: int) -> float:
    """The learning rate of a step: each of the rates in turn, for equal parts of the steps."""
    return rates[min(len(rates) * step // total, len(rates) - 1)]


def optimizer(rates: Rates, kind: Optimizer = "sgd") -> optax.GradientTransformation:
    """SGD or Adam on the loss plus (λ/2)||w||², AdamW on the loss; the rates may be traced."""
    if kind in ("sgd", "nesterov"):
        descent = optax.sgd(
            rates.learning_rate, momentum=rates.momentum, nesterov=kind == "nesterov"
        )
        return optax.chain(optax.add_decayed_weights(rates.weight_decay), descent)
    moments = optax.scale_by_adam(b1=rates.momentum, b2=rates.second_decay)
    decay = optax.add_decayed_weights(rates.weight_decay)
    parts = (decay, moments) if kind == "adam" else (moments, decay)
    return optax.chain(*parts, optax.scale_by_learning_rate(rates.learning_rate))


def augmented(key: jax.Array, images: jax.Array, *, padding: int = CROP_PADDING) -> jax.Array:
    """Each image padded with zeros, cropped at random to its size, and flipped with probability ½."""
    border = ((padding, padding), (padding, padding), (0, 0))

    def one(key, image):
        key_crop, key_flip = jax.random.split(key)
        row, column = jax.random.randint(key_crop, (2,), 0, 2 * padding + 1)
        crop = jax.lax.dynamic_slice(jnp.pad(image, border), (row, column, 0), image.shape)
        return jnp.where(jax.random.bernoulli(key_flip), crop[:, ::-1], crop)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def set_precision(model: Any, precision: Precision) -> None:
    """With "bf16", plain layers compute in bfloat16; solver layers keep float32 inside."""
    if precision == "float32":
        return
    for _, module in nnx.iter_modules(model):
        plain = isinstance(module, nnx.Linear | nnx.Conv | nnx.BatchNorm)
        if plain and not isinstance(module, ss.nnx.SolverLinear | ss.nnx.SolverConv):
            module.dtype = jnp.bfloat16


def stack(trees: Sequence[Any]) -> Any:
    """The trees of several seeds, stacked along a new first axis; a single tree is returned unchanged."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any, count: int) -> list[Any]:
    """The trees that `stack` was given."""
    if count == 1:
        return [tree]
    return [jax.tree.map(lambda leaf, k=k: leaf[k], tree) for k in range(count)]


@functools.lru_cache(COMPILED)
def compiled_step(
    graph: Any, *, augment: bool, together: bool, optimizer_kind: Optimizer = "sgd"
) -> Callable[..., Any]:
    """(state, examples, batch, number, rates) -> the next state, (loss, accuracy in percent).

    The batch holds indices into the examples; its number is the step's. With `together`, state, examples
    and batch are stacked over seeds, and so are the results. The state is donated.
    """

    def loss_of(params, rest, images, labels):
        model = nnx.merge(graph, params, rest, copy=True)
        logits = model(images).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = 100.0 * jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), accuracy)

    def step(state, examples, batch, number, rates):
        images, labels = examples.images[batch], examples.labels[batch]
        if augment:
            images = augmented(jax.random.fold_in(examples.key, number), images)
        images = normalise(images, examples.mean, examples.std)
        (loss, (rest, accuracy)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.rest, images, labels
        )
        descent = optimizer(rates, optimizer_kind)
        updates, optimiser = descent.update(gradients, state.optimiser, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, rest, optimiser), jnp.stack([loss, accuracy])

    each = jax.vmap(step, in_axes=(0, 0, 0, None, None)) if together else step
    return jax.jit(each, donate_argnums=0)


@functools.lru_cache(COMPILED)
def compiled_refresh(graph: Any, *, together: bool) -> Callable[..., Any]:
    """(parameters, other state) -> other state with every Lipschitz constant recomputed."""

    def refresh(params, rest):
        model = nnx.merge(graph, params, rest, copy=True)
        ss.nnx.refresh_lipschitz(model)
        return nnx.state(model, nnx.Not(nnx.Param))

    return jax.jit(jax.vmap(refresh) if together else refresh)
