"""CIFAR through tensorflow-datasets, without TensorFlow: array_record files, random access.

The builders that come with tensorflow-datasets read the binary archives, whose checksums they demand, store
PNGs, and shuffle. Here the python archives are read, recompressed ones too, pixels are stored as they are,
and examples stay in the archive's order, on which the validation splits of all seeds depend.

Importing this module imports tensorflow-datasets; `experiments.data.datasets` does so when it is needed.
"""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.data import archive

CHUNK = 5000


class CifarArchive(tfds.core.GeneratorBasedBuilder):
    """Prepares a CIFAR python archive, examples in the archive's order.

    Args:
      contents: contents of the archive; None to read a copy that is prepared already.
      sha256: SHA-256 of the archive.
      **options: those of `tfds.core.GeneratorBasedBuilder`.
    """

    name = "cifar_archive"
    VERSION = tfds.core.Version("1.0.0")
    # no metadata beside this file: everything is in the archive
    pkg_dir_path = None

    def __init__(
        self, *, contents: archive.Contents | None = None, sha256: str = "", **options: Any
    ):
        self._contents, self._sha256 = contents, sha256
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=archive.IMAGE_SHAPE, dtype=np.uint8),
                "label": tfds.features.Scalar(dtype=np.int64),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # the archive has been read
        if self._contents is None:
            raise ValueError("contents: expected those of an archive, got None")
        metadata: Any = self.info.metadata
        metadata.update(
            sha256=self._sha256,
            lengths={name: len(labels) for name, (_, labels) in self._contents.splits.items()},
            classes=list(self._contents.classes),
        )
        return {
            name: self._generate_examples(images, labels)
            for name, (images, labels) in self._contents.splits.items()
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[Any]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image, "label": label}


def load(layout: archive.ArchiveFormat, data_dir: Path) -> archive.Contents:
    """The data set's arrays, prepared under `data_dir` the first time and reread from there.

    The archive is read from `data_dir`, or downloaded into it if it is not there. A copy that was
    prepared from another archive is replaced. A copy gets its final name when it is complete.

    Raises:
      archive.DataError: the archive is missing or corrupt, or the prepared copy is damaged.
    """
    prepared = data_dir / "prepared" / layout.folder
    builder = CifarArchive(data_dir=prepared)
    if not _is_prepared(builder) or (data_dir / layout.filename).is_file():
        path = archive.locate(layout, data_dir)
        with _exclusive(path):
            builder = _prepare(layout, path, prepared)
    return _read(builder, layout, prepared)


def _is_prepared(builder: CifarArchive) -> bool:
    return Path(builder.data_dir).is_dir()


def _prepare(layout: archive.ArchiveFormat, path: Path, prepared: Path) -> CifarArchive:
    sha256 = archive.digest(path)
    builder = CifarArchive(data_dir=prepared)
    if _is_prepared(builder) and _metadata(builder)["sha256"] == sha256:
        return builder
    contents = archive.read(path, layout)
    # left by a preparation that was killed; no other is under way, since the archive is locked
    for leftover in prepared.glob("*/incomplete.*"):
        shutil.rmtree(leftover)
    if _is_prepared(builder):
        replaced = Path(builder.data_dir).with_name("incomplete.replaced")
        shutil.rmtree(Path(builder.data_dir).rename(replaced))
    builder = CifarArchive(contents=contents, sha256=sha256, data_dir=prepared)
    downloads = prepared / "downloads"  # stays empty
    try:
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(num_shards=1),
        )
    except BaseException:
        shutil.rmtree(prepared, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: other data sets are prepared there
            prepared.parent.rmdir()
        raise
    finally:
        shutil.rmtree(downloads, ignore_errors=True)
    return builder


def _metadata(builder: CifarArchive) -> Any:
    return builder.info.metadata


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a lock on a file; the system releases it if the process dies."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(builder: CifarArchive, layout: archive.ArchiveFormat, prepared: Path) -> archive.Contents:
    lengths = _metadata(builder)["lengths"]
    source: Any = builder.as_data_source()
    found = {split: len(source[split]) for split in layout.splits}
    if found != lengths:
        raise archive.DataError(
            f"{layout.name}: the prepared copy holds {found} examples where its archive holds "
            f"{lengths}. Delete {prepared} and run again."
        )
    splits = {split: _gather(source[split]) for split in layout.splits}
    return archive.Contents(splits, tuple(_metadata(builder)["classes"]))


def _gather(source: Any) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(source), *archive.IMAGE_SHAPE), np.uint8)
    labels = np.empty(len(source), np.int64)
    for start in range(0, len(source), CHUNK):
        rows = range(start, min(start + CHUNK, len(source)))
        for row, example in zip(rows, source.__getitems__(rows), strict=True):
            images[row], labels[row] = example["image"], example["label"]
    return images, labels
