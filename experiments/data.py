"""Data sets in memory: a training, a validation and a test split, with the pixels' statistics."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import archive

DatasetName = Literal["digits", "cifar10"]
VALIDATION_FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (n, height, width, channels), as stored, and labels (n,) int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a data set.

    Attributes:
      name: of the data set.
      train: to fit.
      validation: to watch and to choose.
      test: read once, at the end.
      classes: names of the classes.
      mean: of the training pixels, for each channel.
      std: likewise, the standard deviation.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def load(name: DatasetName, data_dir: Path, *, seed: int) -> Dataset:
    """Load a data set and hold out a tenth of its training images for validation.

    Args:
      name: "digits" is embedded in scikit-learn; "cifar10" is read from `data_dir`.
      data_dir: folder of archives and of what is prepared from them.
      seed: of the permutation that chooses the validation images.

    Raises:
      archive.DataError: an archive is missing or corrupt.
    """
    if name == "digits":
        train, test, classes = digits()
    else:
        from experiments import cifar  # imports tensorflow-datasets

        contents = cifar.load(archive.CIFAR10, data_dir)
        train, test = (
            Split(images, labels.astype(np.int32))
            for images, labels in (contents.splits["train"], contents.splits["test"])
        )
        classes = contents.classes
    train, validation = hold_out(train, VALIDATION_FRACTION, seed=seed)
    mean, std = pixel_statistics(train.images)
    return Dataset(name, train, validation, test, classes, mean, std)


def digits() -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's 1,797 digits as 32×32 grey images; every fifth one is for the test.

    The 8×8 images are enlarged by repeating each pixel in a 4×4 square, so that the LeNet of the
    CIFAR experiments fits as it is.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.asarray(bunch["images"], np.uint8)  # whole numbers 0..16
    images = images.repeat(4, axis=1).repeat(4, axis=2)[..., None]
    labels = np.asarray(bunch["target"], np.int32)
    test = np.arange(len(labels)) % 5 == 4
    classes = tuple(str(digit) for digit in range(10))
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), classes


def hold_out(split: Split, fraction: float, *, seed: int) -> tuple[Split, Split]:
    """Partition a split by a seeded permutation; the second part has `fraction` of it, at least 1."""
    count = max(1, round(fraction * len(split)))
    order = np.random.default_rng([seed, 0]).permutation(len(split))
    kept, held = np.sort(order[count:]), np.sort(order[:count])
    return (
        Split(split.images[kept], split.labels[kept]),
        Split(split.images[held], split.labels[held]),
    )


def pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, from exact sums of the integer pixels."""
    axes = (0, 1, 2)
    count = images[..., 0].size
    total = images.sum(axis=axes, dtype=np.int64)
    squares = np.sum([np.sum(np.square(image, dtype=np.int64), axis=(0, 1)) for image in images], 0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)
