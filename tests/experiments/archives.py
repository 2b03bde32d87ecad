"""Tiny archives in the official layout, as Python 2 and NumPy 1 pickled them."""

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np

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


def write_archive(data_dir: Path, records: dict, *, dump=python2_pickle) -> Path:
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, record in records.items():
            payload = record if isinstance(record, bytes) else dump(record)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def files_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
