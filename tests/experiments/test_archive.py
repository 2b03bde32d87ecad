"""The archive reader: where values land, what is refused, what is left behind."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
from archives import files_under, python2_pickle, tiny_records100, write_archive

from experiments.data import archive

NOWHERE = dataclasses.replace(archive.CIFAR10, url="file:///nonexistent/cifar-10-python.tar.gz")


def modern_pickle(record):
    return pickle.dumps(record, protocol=2)


@pytest.mark.parametrize("dump", [python2_pickle, modern_pickle, pickle.dumps])
def test_values_land_in_their_place(tmp_path, records, dump):
    contents = archive.read(write_archive(tmp_path, records, dump=dump), archive.CIFAR10)

    images, labels = contents.splits["train"]
    assert images.shape == (100, 32, 32, 3)
    assert images.dtype == np.uint8
    assert len(contents.splits["test"][1]) == 30
    assert contents.classes[3] == "class 3"
    # image 7 of the third batch: its row is 1024 red, 1024 green, 1024 blue values, row by row
    row = records["data_batch_3"][b"data"][7]
    for channel, first in enumerate((0, 1024, 2048)):
        assert images[47, 5, 9, channel] == row[first + 5 * 32 + 9]
    expected = np.concatenate([records[f"data_batch_{k}"][b"labels"] for k in range(1, 6)])
    np.testing.assert_array_equal(labels, expected)


def test_missing_archive_says_where_it_looked(tmp_path):
    folder = tmp_path / "absent"
    with pytest.raises(archive.DataError) as caught:
        archive.locate(NOWHERE, folder)
    message = str(caught.value)
    for part in (str(folder / "cifar-10-python.tar.gz"), NOWHERE.url, NOWHERE.sha256, "--data-dir"):
        assert part in message
    assert not folder.exists()


def test_download_is_verified(tmp_path, records):
    source = write_archive(tmp_path / "server", records)
    official = dataclasses.replace(
        archive.CIFAR10, url=source.as_uri(), sha256=archive.digest(source)
    )
    path = archive.locate(official, tmp_path / "good")
    assert path.read_bytes() == source.read_bytes()
    assert files_under(tmp_path / "good") == {"cifar-10-python.tar.gz"}

    other = dataclasses.replace(official, sha256="0" * 64)
    with pytest.raises(archive.DataError, match="not the official archive"):
        archive.locate(other, tmp_path / "bad")
    assert files_under(tmp_path / "bad") == set()


def test_truncated_archive(tmp_path, records):
    path = write_archive(tmp_path, records)
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(archive.DataError, match="cannot be unpacked"):
        archive.read(path, archive.CIFAR10)


def test_not_an_archive(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(archive.DataError, match="cannot be unpacked"):
        archive.read(path, archive.CIFAR10)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damaged(records, name, **changes):
    changes = {key.encode(): value for key, value in changes.items()}
    return records | {name: records[name] | changes}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda r: {k: v for k, v in r.items() if k != "data_batch_4"},
            "lacks data_batch_4",
        ),
        (
            lambda r: damaged(r, "data_batch_2", data=np.zeros((20, 3071), np.uint8)),
            "data_batch_2 has rows of 3071 values, expected 3072",
        ),
        (
            lambda r: damaged(r, "test_batch", data=np.zeros((30, 3072), np.float32)),
            "test_batch has no two-dimensional array of bytes",
        ),
        (lambda r: damaged(r, "data_batch_1", labels=[0] * 19), "one label for each of its 20"),
        (lambda r: damaged(r, "data_batch_1", labels=[0] * 19 + [10]), "labels in 0..10"),
        (lambda r: damaged(r, "data_batch_1", labels=[-1] * 20), "labels in -1..-1"),
        (lambda r: damaged(r, "data_batch_1", labels=[b"0"] * 20), "not integers"),
        (
            lambda r: damaged(r, "batches.meta", label_names=[b"one"]),
            "names 1 classes, expected 10",
        ),
        (lambda r: r | {"data_batch_5": b"\x80\x02}q"}, "data_batch_5 cannot be unpickled"),
        (lambda r: r | {"data_batch_5": pickle.dumps([1, 2])}, "holds a list"),
        (
            lambda r: r | {"data_batch_5": pickle.dumps({b"data": Malicious()})},
            "mkdir is not allowed",
        ),
    ],
)
def test_corrupt_contents(tmp_path, monkeypatch, records, damage, message):
    monkeypatch.chdir(tmp_path)
    path = write_archive(tmp_path, damage(records))
    with pytest.raises(archive.DataError, match=message):
        archive.read(path, archive.CIFAR10)
    assert files_under(tmp_path) == {"cifar-10-python.tar.gz"}


def test_cifar100_takes_the_fine_labels(tmp_path, rng):
    records = tiny_records100(rng)
    path = write_archive(tmp_path, records, layout=archive.CIFAR100)
    contents = archive.read(path, archive.CIFAR100)
    for split in ("train", "test"):
        images, labels = contents.splits[split]
        np.testing.assert_array_equal(labels, records[split][b"fine_labels"])
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        np.testing.assert_array_equal(rows, records[split][b"data"])
    assert contents.classes == tuple(f"fine {k}" for k in range(100))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: {k: v for k, v in r.items() if k != "meta"}, "cifar-100-python lacks meta"),
        (lambda r: damaged(r, "train", fine_labels=[100] * 60), "expected 0..99"),
        (
            lambda r: r | {"test": {b"coarse_labels": [0] * 30, b"data": r["test"][b"data"]}},
            "test does not have one label for each",
        ),
        (lambda r: damaged(r, "meta", fine_label_names=[b"one"]), "names 1 classes, expected 100"),
    ],
)
def test_corrupt_cifar100(tmp_path, rng, damage, message):
    path = write_archive(tmp_path, damage(tiny_records100(rng)), layout=archive.CIFAR100)
    with pytest.raises(archive.DataError, match=message):
        archive.read(path, archive.CIFAR100)


def test_missing_cifar100_names_its_own_archive(tmp_path):
    layout = dataclasses.replace(archive.CIFAR100, url="file:///nonexistent/cifar-100")
    with pytest.raises(archive.DataError, match=r"^CIFAR-100: no archive at .*cifar-100-python"):
        archive.locate(layout, tmp_path)
    assert files_under(tmp_path) == set()
