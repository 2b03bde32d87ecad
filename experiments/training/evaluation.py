"""Accuracy of a network on a split; residuals over images as rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from experiments.data import Dataset, Split
from experiments.networks import set_mode
from experiments.training import parallel


def normalise(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Stored pixels as float32 of zero mean and unit variance."""
    return (jnp.asarray(images, jnp.float32) - mean) / std


def first_images(data: Dataset, count: int) -> jax.Array:
    """The first validation images, normalised."""
    return normalise(data.validation.images[:count], data.mean, data.std)


def quantiles(values: ArrayLike) -> dict[str, list[float]]:
    """The median over the images and the quantiles 0.1 and 0.9, of values (iterations, images)."""
    limits = np.quantile(np.asarray(values), (0.1, 0.5, 0.9), axis=1)
    low, middle, high = ([float(f"{x:.6g}") for x in line] for line in limits)
    return {"low": low, "middle": middle, "high": high}


def evaluate(
    model: Any,
    split: Split,
    data: Dataset,
    *,
    trials: int = 1,
    deterministic: bool = False,
    batch_size: int = 200,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Accuracy in percent, shape (trials,).

    The features are computed once; each trial repeats the part that samples, with the model's own
    random streams.

    Args:
      model: the network; its random streams are not advanced, its mode is set.
      split: the images to classify.
      data: the data set whose mean and standard deviation normalise the pixels.
      trials: number of independent repetitions.
      deterministic: use full gradients in the solvers instead of sampling.
      batch_size: images in a batch; the last one is padded, so that a single program is compiled.
      mesh: devices that share each batch; by default one.
    """
    set_mode(model, "deterministic" if deterministic else "test")
    mesh = mesh or parallel.local_mesh()
    graph, state = nnx.split(model)
    model = nnx.merge(graph, parallel.replicate(state, mesh))
    features_graph, features_state = nnx.split(model.features)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    correct = np.zeros(trials, np.int64)
    size = batch_size + -batch_size % mesh.size
    for start in range(0, len(split), size):
        images = split.images[start : start + size]
        labels = split.labels[start : start + size]
        # the last batch is padded with images whose label, −1, is never predicted
        missing = size - len(labels)
        images = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)))
        labels = np.pad(labels, (0, missing), constant_values=-1)
        images, labels = parallel.shard(images, mesh), parallel.shard(labels, mesh)
        features = _features(features_graph, features_state, images, data.mean, data.std)
        hits = []
        for _ in range(trials):
            found, rest = _count_correct(graph, params, rest, features, labels)
            hits.append(found)
        correct += np.asarray(jax.device_get(hits))
    return 100.0 * correct / len(split)


@functools.partial(jax.jit, static_argnums=0)
def _features(graph, state, images, mean, std):
    # compiled separately from the head, which differs between the networks of a table
    return nnx.merge(graph, state, copy=True)(normalise(images, mean, std))


@functools.partial(jax.jit, static_argnums=0)
def _count_correct(graph, params, rest, features, labels):
    model = nnx.merge(graph, params, rest, copy=True)
    predicted = jnp.argmax(model.head(features), axis=-1)
    return jnp.sum(predicted == labels), nnx.state(model, nnx.Not(nnx.Param))
