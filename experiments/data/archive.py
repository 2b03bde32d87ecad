"""The CIFAR python archives: find or download them; nothing in them is executed when they are read."""

import dataclasses
import gzip
import hashlib
import io
import pickle
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.output import runs

IMAGE_SHAPE = (32, 32, 3)
ROW_LENGTH = 3072


class DataError(RuntimeError):
    """A data set that is missing, corrupt or not what it claims to be."""


@dataclasses.dataclass(frozen=True)
class ArchiveFormat:
    """Layout of an official archive.

    Attributes:
      name: name of the data set.
      filename: file name of the archive.
      folder: the folder inside the archive.
      splits: the batch files of each split, in order.
      label_key: key of the labels in a batch.
      meta: the file of class names.
      class_key: key of the class names in it.
      num_classes: number of classes.
      url: address of the official archive.
      sha256: SHA-256 of the official archive; checked after a download only.
    """

    name: str
    filename: str
    folder: str
    splits: dict[str, tuple[str, ...]]
    label_key: bytes
    meta: str
    class_key: bytes
    num_classes: int
    url: str
    sha256: str


CIFAR10 = ArchiveFormat(
    name="CIFAR-10",
    filename="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    splits={
        "train": tuple(f"data_batch_{k}" for k in range(1, 6)),
        "test": ("test_batch",),
    },
    label_key=b"labels",
    meta="batches.meta",
    class_key=b"label_names",
    num_classes=10,
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)

CIFAR100 = ArchiveFormat(
    name="CIFAR-100",
    filename="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    splits={"train": ("train",), "test": ("test",)},
    label_key=b"fine_labels",
    meta="meta",
    class_key=b"fine_label_names",
    num_classes=100,
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an archive holds: (images, labels) of each split in the archive's order, class names.

    Images are (n, 32, 32, 3) uint8, row, column, then red, green, blue; labels are (n,) int64.
    """

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    classes: tuple[str, ...]


def locate(layout: ArchiveFormat, data_dir: Path, *, timeout: float = 30.0) -> Path:
    """The archive in `data_dir`, downloaded and verified if it is not there.

    Raises:
      DataError: there is none and it cannot be downloaded, or the download is not the official one.
    """
    path = data_dir / layout.filename
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(layout.url, timeout=timeout) as response:
            _download(response, path, layout)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"{layout.name}: no archive at {path}, and {layout.url} cannot be downloaded "
            f"({getattr(error, 'reason', error)}). Fetch {layout.filename} on a machine with a "
            f"network (SHA-256 {layout.sha256}), put it in {data_dir}, or name its folder with "
            "--data-dir."
        ) from error
    return path


def _download(response: Any, path: Path, layout: ArchiveFormat) -> None:
    with runs.whole_file(path) as partial:
        with partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        found = digest(partial)
        if found != layout.sha256:
            raise DataError(
                f"{layout.name}: the download from {layout.url} is not the official archive: "
                f"expected SHA-256 {layout.sha256}, got {found}."
            )


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path, layout: ArchiveFormat) -> Contents:
    """Read and check a whole archive.

    Raises:
      DataError: the archive is truncated, lacks a file, or holds anything but images and labels.
    """
    wanted = {name for names in layout.splits.values() for name in names} | {layout.meta}
    try:
        records = _read_records(path, layout.folder, wanted)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise _corrupt(path, f"it cannot be unpacked ({error})") from error
    missing = sorted(wanted - records.keys())
    if missing:
        raise _corrupt(path, f"{layout.folder} lacks {', '.join(missing)}")
    splits = {}
    for split, names in layout.splits.items():
        batches = [_batch(path, name, records[name], layout) for name in names]
        images, labels = zip(*batches, strict=True)
        splits[split] = (np.concatenate(images), np.concatenate(labels))
        if not len(splits[split][0]):
            raise _corrupt(path, f"its {split} batches hold no images")
    return Contents(splits, _class_names(path, records[layout.meta], layout))


def _read_records(path: Path, folder: str, wanted: set[str]) -> dict[str, dict[bytes, Any]]:
    records = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            parent, _, name = member.name.removeprefix("./").rpartition("/")
            if parent != folder or name not in wanted:
                continue
            file = tar.extractfile(member)
            if file is None:
                raise _corrupt(path, f"{name} is not a file")
            records[name] = _unpickle(path, name, file.read())
    return records


def _batch(
    path: Path, name: str, record: dict[bytes, Any], layout: ArchiveFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one batch; a row is 1024 red, 1024 green and 1024 blue values."""
    rows, labels = record.get(b"data"), record.get(layout.label_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2:
        raise _corrupt(path, f"{name} has no two-dimensional array of bytes under 'data'")
    if rows.shape[1] != ROW_LENGTH:
        raise _corrupt(path, f"{name} has rows of {rows.shape[1]} values, expected {ROW_LENGTH}")
    if not isinstance(labels, list | np.ndarray) or len(labels) != len(rows):
        raise _corrupt(path, f"{name} does not have one label for each of its {len(rows)} rows")
    if not all(isinstance(label, int | np.integer) for label in labels):
        raise _corrupt(path, f"{name} has labels that are not integers")
    labels = np.asarray(labels, np.int64).reshape(-1)
    if len(labels) and (labels.min() < 0 or labels.max() >= layout.num_classes):
        raise _corrupt(
            path,
            f"{name} has labels in {labels.min()}..{labels.max()}, "
            f"expected 0..{layout.num_classes - 1}",
        )
    height, width, channels = IMAGE_SHAPE
    return rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1), labels


def _class_names(path: Path, record: dict[bytes, Any], layout: ArchiveFormat) -> tuple[str, ...]:
    names = record.get(layout.class_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise _corrupt(path, f"{layout.meta} has no list of class names")
    if len(names) != layout.num_classes:
        raise _corrupt(
            path, f"{layout.meta} names {len(names)} classes, expected {layout.num_classes}"
        )
    return tuple(name.decode("utf-8", "replace") for name in names)


def _corrupt(path: Path, what: str) -> DataError:
    return DataError(f"{path} is not a valid archive: {what}. Delete it and fetch it again.")


def _unpickle(path: Path, name: str, payload: bytes) -> dict[bytes, Any]:
    try:
        record = _Unpickler(io.BytesIO(payload), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise _corrupt(path, f"{name} cannot be unpickled ({error})") from error
    if not isinstance(record, dict):
        raise _corrupt(path, f"{name} holds a {type(record).__name__}, expected a dictionary")
    return record


class _Unpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings and their containers; refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None


def _encode(text: str, encoding: str) -> bytes:
    # how Python 3 writes bytes under protocol 2
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding} is not allowed")
    return text.encode(encoding)


def _dtype(name: str | bytes, align: Any = False, copy: Any = False) -> np.dtype:
    # the official pickles give the flags as 0 and 1, which NumPy deprecates
    name = name.decode("ascii") if isinstance(name, bytes) else name
    return np.dtype(name, align=bool(align), copy=bool(copy))


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("numpy._core.multiarray", "scalar"): np.int64(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): bytes,
    ("builtins", "bytes"): bytes,
}
