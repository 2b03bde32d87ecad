"""Images as rows of a data matrix, for convex programs."""

import dataclasses

import numpy as np

from experiments.data import Dataset, Split

PATCH = 4  # a digit's pixels are repeated in squares of this side
Rows = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Vectors:
    """The splits of a data set as matrices X (n, d), centred and scaled, and labels (n,).

    Attributes:
      name: of the data set.
      train: X and labels of the training images.
      validation: likewise, held out of the training images.
      test: likewise; to be used once.
      classes: names of the classes.
      varies: which pixels, flattened, are features.
      image_shape: height, width and channels of the pixels.
    """

    name: str
    train: Rows
    validation: Rows
    test: Rows
    classes: tuple[str, ...]
    varies: np.ndarray
    image_shape: tuple[int, ...]

    @property
    def num_features(self) -> int:
        """d, the constant feature included."""
        return self.train[0].shape[1]

    def picture(self, features: np.ndarray) -> np.ndarray:
        """Features without the constant as an image, zero where pixels never vary."""
        pixels = np.zeros(self.varies.shape, np.float32)
        pixels[self.varies] = features
        return pixels.reshape(self.image_shape)


def vectors(dataset: Dataset, classes: tuple[int, ...] | None = None) -> Vectors:
    """The images flattened, minus the mean image, over the largest standard deviation of a pixel.

    A constant feature 1 is added, which is the bias of every neuron. Digits are taken in their own 8×8
    pixels; pixels that never vary are left out.

    Args:
      dataset: images.
      classes: only these classes, by number, in this order; by default all.
    """

    shapes: list[tuple[int, ...]] = []

    def flat(split: Split) -> Rows:
        images, labels = split.images, split.labels
        if classes is not None:
            kept = np.isin(labels, classes)
            images, labels = images[kept], labels[kept]
            labels = np.argsort(classes)[np.searchsorted(np.sort(classes), labels)]
        if dataset.name == "digits":
            images = images[:, ::PATCH, ::PATCH]
        shapes.append(images.shape[1:])
        return images.reshape(len(images), -1).astype(np.float32), labels.astype(np.int32)

    splits = [flat(split) for split in (dataset.train, dataset.validation, dataset.test)]
    pixels = splits[0][0]
    mean, spread = pixels.mean(axis=0, dtype=np.float64), pixels.std(axis=0, dtype=np.float64)
    varies = spread > 0

    def rows(images: np.ndarray) -> np.ndarray:
        scaled = ((images - mean) / spread.max())[:, varies]
        return np.concatenate([scaled, np.ones((len(images), 1))], axis=1).astype(np.float32)

    train, validation, test = ((rows(images), labels) for images, labels in splits)
    names = dataset.classes
    chosen = names if classes is None else tuple(names[k] for k in classes)
    return Vectors(dataset.name, train, validation, test, chosen, varies, shapes[0])


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Targets (classes, n) in float32, data on the last axis as in `stochsolvers.LayerProblem`."""
    return np.eye(classes, dtype=np.float32)[labels].T
