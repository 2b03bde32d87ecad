"""Images as rows of a data matrix, for convex programs."""

import dataclasses

import numpy as np

from experiments.data.archive import DataError
from experiments.data.datasets import Dataset, Source, Split

PATCH = 4  # a digit's pixels are repeated in squares of this side
Rows = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The splits of a data set as matrices X (n, d), centred and scaled, and labels (n,).

    Attributes:
      name: of the data set.
      train: X in float32 and labels in int32 of the training images.
      validation: likewise, held out of the training images.
      test: likewise; to be used once.
      classes: names of the classes.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    classes: tuple[str, ...]

    @property
    def num_features(self) -> int:
        """d, the constant feature included."""
        return self.train[0].shape[1]


def of_classes(source: Source, classes: tuple[int, ...]) -> Source:
    """The images of these classes alone, relabelled 0, 1, … in this order.

    Args:
      source: a data set before its validation split is drawn.
      classes: numbers of at least two classes.

    Raises:
      DataError: there is no such class.
    """
    count = len(source.classes)
    if len(set(classes)) < max(2, len(classes)) or not set(classes) <= set(range(count)):
        wanted = f"at least two different numbers in 0..{count - 1} for {source.name}"
        raise DataError(f"classes: expected {wanted}, got {classes}")
    number = np.full(count, -1, np.int32)
    number[list(classes)] = np.arange(len(classes))

    def part(split: Split) -> Split:
        kept = number[split.labels] >= 0
        return Split(split.images[kept], number[split.labels[kept]])

    names = tuple(source.classes[k] for k in classes)
    name = f"{source.name} {'/'.join(names)}"
    return Source(name, part(source.train), part(source.test), names)


def vectors(dataset: Dataset, components: int | None = None) -> Vectors:
    """The images flattened, minus the mean image, over the largest standard deviation of a pixel.

    A constant feature 1 is added, which is the bias of every neuron. Pixels that never vary are left out;
    mean, scale and components are those of the training images. The digits of scikit-learn are taken in
    their own 8×8 pixels.

    Args:
      dataset: images.
      components: so many leading principal components in the place of the pixels, in the same units.

    Raises:
      DataError: there are fewer components.
    """
    splits = (dataset.train, dataset.validation, dataset.test)
    flat = [_flattened(split.images, dataset.name) for split in splits]
    pixels = flat[0]
    mean, spread = pixels.mean(axis=0, dtype=np.float64), pixels.std(axis=0, dtype=np.float64)
    varies = spread > 0
    scale = np.max(spread, initial=0) or 1.0
    scaled = [((images - mean) / scale)[:, varies] for images in flat]
    if components is not None:
        most = min(scaled[0].shape)
        if not 1 <= components <= most:
            raise DataError(f"components: expected 1 to {most}, got {components}")
        _, axes = np.linalg.eigh(scaled[0].T @ scaled[0])
        scaled = [images @ axes[:, : -components - 1 : -1] for images in scaled]

    def rows(images: np.ndarray, split: Split) -> Rows:
        constant = np.ones((len(images), 1))
        return np.concatenate([images, constant], axis=1).astype(np.float32), split.labels

    train, validation, test = (rows(*pair) for pair in zip(scaled, splits, strict=True))
    return Vectors(dataset.name, train, validation, test, dataset.classes)


def _flattened(images: np.ndarray, name: str) -> np.ndarray:
    """Shape (n, pixels), in float32."""
    if name.split()[0] == "digits":
        images = images[:, ::PATCH, ::PATCH]
    return images.reshape(len(images), -1).astype(np.float32)


def targets(labels: np.ndarray, classes: int) -> np.ndarray:
    """y in float32, data on the last axis: ±1 of shape (n,) for two classes, else 0 and 1, (classes, n)."""
    if classes == 2:
        return (2 * labels - 1).astype(np.float32)
    return np.eye(classes, dtype=np.float32)[labels].T


def predicted(scores: np.ndarray) -> np.ndarray:
    """The class of each datum from scores (n,), whose sign decides, or (classes, n)."""
    return (scores > 0).astype(np.int32) if scores.ndim == 1 else np.argmax(scores, axis=0)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """In percent."""
    return 100.0 * float(np.mean(predicted(scores) == labels))
