"""Data sets in memory: a training, a validation and a test split, with the pixels' statistics."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from experiments.data import archive
from experiments.output import terminal

DatasetName: TypeAlias = str
"""One of `NAMES`, or the path of an .npz file."""

NAMES = ("digits", "cifar10", "cifar100")
TRAIN_ARRAYS, TEST_ARRAYS = ("images", "labels"), ("test_images", "test_labels")
"""The arrays of an .npz file."""
VALIDATION_FRACTION = 0.1
TEST_FRACTION = 0.2


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
      name: name of the data set.
      train: the images that networks are trained on.
      validation: held out of the training images; scored after every epoch, and for choices.
      test: scored once, after the last epoch.
      classes: names of the classes.
      mean: mean of the training pixels, shape (channels,).
      std: their standard deviation, likewise; 1 for a constant channel.
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


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set before its validation split is drawn, the same for every seed.

    Attributes:
      name: name of the data set; of a file, without folder and suffix.
      train: the images for training and validation.
      test: scored once, after the last epoch.
      classes: names of the classes.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    def dataset(self, seed: int, examples: int | None = None) -> Dataset:
        """The splits of a seed: a random tenth of the training images is held out for validation.

        Args:
          seed: of both random choices.
          examples: keep this many of the other training images, chosen at random; by default all. The
            mean and the standard deviation are those of all of them.
        """
        train, validation = hold_out(self.train, VALIDATION_FRACTION, seed=seed)
        mean, std = pixel_statistics(train.images)
        if examples is not None and examples < len(train):
            chosen = np.random.default_rng([seed, 2]).permutation(len(train))[:examples]
            chosen.sort()
            train = Split(train.images[chosen], train.labels[chosen])
        return Dataset(self.name, train, validation, self.test, self.classes, mean, std)

    def sha256(self) -> str:
        """SHA-256 of all images and labels."""
        splits = (self.train, self.test)
        return digest(array for s in splits for array in (s.images, s.labels))


def read(name: DatasetName, data_dir: Path) -> Source:
    """Read a data set.

    Args:
      name: "digits" is embedded in scikit-learn; "cifar10" and "cifar100" are read from `data_dir`;
        FILE.npz is read by `npz`.
      data_dir: folder of the CIFAR archives and of the copies prepared from them.

    Raises:
      archive.DataError: the name is unknown; an archive or a file is missing or corrupt.
    """
    if name == "digits":
        return Source(name, *digits())
    if name in NAMES:
        return Source(name, *_cifar(name, data_dir))
    if Path(name).suffix != ".npz":
        raise archive.DataError(
            f"dataset: expected {', '.join(NAMES)} or the path of an .npz file, got {name}"
        )
    return Source(name_of(name), *npz(Path(name)))


def name_of(dataset: DatasetName) -> str:
    """The name of a data set; that of a file is without folder and suffix."""
    return terminal.as_unicode(Path(dataset).stem)


def load(name: DatasetName, data_dir: Path, *, seed: int) -> Dataset:
    """`read` a data set and split it by a seed."""
    return read(name, data_dir).dataset(seed)


def _cifar(name: str, data_dir: Path) -> tuple[Split, Split, tuple[str, ...]]:
    from experiments.data import cifar  # imports tensorflow-datasets

    layout = {"cifar10": archive.CIFAR10, "cifar100": archive.CIFAR100}[name]
    contents = cifar.load(layout, data_dir)
    train, test = (
        Split(images, labels.astype(np.int32))
        for images, labels in (contents.splits["train"], contents.splits["test"])
    )
    return train, test, contents.classes


def npz(path: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """A user's own images: training split, test split, the names "0", "1", … of the classes.

    The file holds `images`, (n, height, width) or (n, height, width, channels), uint8 or floating,
    and `labels`, (n,) integers from 0. It may hold `test_images` and `test_labels` as well; without
    them, a fifth of the images becomes the test split, the same for every seed.

    Raises:
      archive.DataError: the file is missing, is no .npz, lacks an array, or an array does not fit.
    """
    arrays = _npz_arrays(path)
    train = _npz_split(path, arrays, *TRAIN_ARRAYS)
    if arrays.keys() >= set(TEST_ARRAYS):
        test = _npz_split(path, arrays, *TEST_ARRAYS)
        if test.images.shape[1:] != train.images.shape[1:]:
            raise _misfit(
                path, "test_images", f"images of shape {train.images.shape[1:]}", test.images.shape
            )
        classes = 1 + int(train.labels.max())
        if test.labels.max() >= classes:
            raise _misfit(
                path, "test_labels", f"0..{classes - 1}, as in labels", int(test.labels.max())
            )
    else:
        train, test = hold_out(train, TEST_FRACTION, seed=0)
        classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return train, test, tuple(str(k) for k in range(classes))


def _npz_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of both splits, or of the training split alone; other members are not read."""
    if not path.is_file():
        raise archive.DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            found = set(file.files)
            wanted = (*TRAIN_ARRAYS, *(TEST_ARRAYS if found & {*TEST_ARRAYS} else ()))
            arrays = {name: file[name] for name in wanted if name in found}
    except Exception as error:  # a damaged file can raise nearly anything
        raise archive.DataError(
            f"{path} cannot be read as an .npz file ({terminal.reason(error)})"
        ) from error
    for name in wanted:
        if name not in found:
            held = terminal.shortened(", ".join(sorted(found))) or "nothing"
            raise archive.DataError(f"{path} lacks {name}; it holds {held}")
        if not isinstance(arrays[name], np.ndarray):  # NumPy gives the bytes of other files
            raise _misfit(path, name, "an array in NumPy's format", "another file")
    return arrays


def _npz_split(
    path: Path, arrays: dict[str, np.ndarray], images_key: str, labels_key: str
) -> Split:
    images, labels = arrays[images_key], arrays[labels_key]
    if images.ndim not in (3, 4) or 0 in images.shape or len(images) < 3:
        expected = "(n, height, width) or (n, height, width, channels) with n ≥ 3"
        raise _misfit(path, images_key, expected, images.shape)
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise _misfit(path, images_key, "uint8 or floating", images.dtype)
    if images.dtype != np.uint8:
        with np.errstate(over="ignore"):
            images = images.astype(np.float32)
    if not np.all(np.isfinite(images)):
        raise _misfit(path, images_key, "finite values in float32", "NaN or infinity")
    if labels.shape != images.shape[:1]:
        raise _misfit(path, labels_key, f"shape {images.shape[:1]}, one an image", labels.shape)
    if labels.dtype.kind not in "iu":
        raise _misfit(path, labels_key, "integers", labels.dtype)
    if labels.min() < 0 or labels.max() >= len(labels):
        expected = f"0..{len(labels) - 1}, fewer classes than images"
        raise _misfit(path, labels_key, expected, f"{labels.min()}..{labels.max()}")
    images = images[..., None] if images.ndim == 3 else images
    return Split(images, labels.astype(np.int32))


def _misfit(path: Path, what: str, expected: str, got: Any) -> archive.DataError:
    return archive.DataError(f"{path}, {what}: expected {expected}, got {got}")


def digits() -> tuple[Split, Split, tuple[str, ...]]:
    """scikit-learn's 1,797 digits as 32×32 grey images; every fifth is a test image.

    The 8×8 images are enlarged by repeating each pixel in a 4×4 square, so that the LeNet of the
    CIFAR experiments can be used unchanged.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.asarray(bunch["images"], np.uint8)  # whole numbers 0..16
    images = images.repeat(4, axis=1).repeat(4, axis=2)[..., None]
    labels = np.asarray(bunch["target"], np.int32)
    test = np.arange(len(labels)) % 5 == 4
    classes = tuple(str(digit) for digit in range(10))
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), classes


def digest(arrays: Any) -> str:
    """SHA-256 of the values, shapes and types of some arrays."""
    total = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        total.update(f"{array.dtype} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def hold_out(split: Split, fraction: float, *, seed: int) -> tuple[Split, Split]:
    """Two random parts of a split; the second has this fraction of the images, at least one image."""
    count = max(1, round(fraction * len(split)))
    order = np.random.default_rng([seed, 0]).permutation(len(split))
    kept, held = np.sort(order[count:]), np.sort(order[:count])
    return (
        Split(split.images[kept], split.labels[kept]),
        Split(split.images[held], split.labels[held]),
    )


def pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, from exact sums if the pixels are integers."""
    axes, count = (0, 1, 2), images[..., 0].size
    if np.issubdtype(images.dtype, np.integer):
        total = images.sum(axis=axes, dtype=np.int64)
        each = [np.sum(np.square(image, dtype=np.int64), axis=(0, 1)) for image in images]
        mean = total / count
        variance = np.sum(each, axis=0) / count - mean**2
    else:
        mean = images.mean(axis=axes, dtype=np.float64)
        each = [np.sum((image - mean) ** 2, axis=(0, 1)) for image in images]
        variance = np.sum(each, axis=0) / count
    std = np.sqrt(np.maximum(variance, 0))
    return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)
