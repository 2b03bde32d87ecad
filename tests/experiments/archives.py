"""Tiny archives in the official layout, as Python 2 and NumPy 1 pickled them."""

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.data import archive

CLASSES = [f"class {k}".encode() for k in range(10)]


class Python2Pickler(pickle._Pickler):
    """Writes what the official archives hold: Python 2 strings and NumPy 1 globals."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, obj):
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)
        self.memoize(obj)

    dispatch[bytes] = save_bytes

    def reducer_override(self, obj):
        if isinstance(obj, np.dtype):
            _, arguments, state = obj.__reduce__()
            return np.dtype, (arguments[0].encode(), 0, 1), state
        return NotImplemented


def python2_pickle(record) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(record)
    return file.getvalue().replace(b"numpy._core.", b"numpy.core.")


def tiny_records(rng: np.random.Generator, *, train: int = 20, test: int = 30) -> dict:
    """Batches of the official layout with `train` images in each of five and `test` to test."""
    records = {}
    for name, rows in [(f"data_batch_{k}", train) for k in range(1, 6)] + [("test_batch", test)]:
        records[name] = {
            b"batch_label": name.encode(),
            b"labels": rng.integers(0, 10, rows).tolist(),
            b"data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8),
            b"filenames": [f"{name}_{k}.png".encode() for k in range(rows)],
        }
    records["batches.meta"] = {b"label_names": CLASSES, b"num_vis": 3072}
    return records


def tiny_records100(rng: np.random.Generator, *, train: int = 60, test: int = 30) -> dict:
    """The files of a CIFAR-100 archive: train, test, meta."""
    records: dict = {}
    for name, rows in (("train", train), ("test", test)):
        fine = rng.integers(0, 100, rows)
        records[name] = {
            b"filenames": [f"{name}_{k}.png".encode() for k in range(rows)],
            b"batch_label": f"{name}ing batch 1 of 1".encode(),
            b"fine_labels": fine.tolist(),
            b"coarse_labels": (fine // 5).tolist(),
            b"data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8),
        }
    records["meta"] = {
        b"fine_label_names": [f"fine {k}".encode() for k in range(100)],
        b"coarse_label_names": [f"coarse {k}".encode() for k in range(20)],
    }
    return records


def write_archive(
    data_dir: Path, records: dict, *, dump=python2_pickle, layout=archive.CIFAR10
) -> Path:
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / layout.filename
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, record in records.items():
            payload = record if isinstance(record, bytes) else dump(record)
            info = tarfile.TarInfo(f"{layout.folder}/{name}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
