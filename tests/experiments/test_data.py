"""Data sets: the prepared copy, the splits, the statistics."""

import numpy as np
import pytest
from archives import files_under, tiny_records, write_archive

from experiments import archive, cifar, data


def assert_same(first: archive.Contents, second: archive.Contents):
    assert first.classes == second.classes
    assert first.splits.keys() == second.splits.keys()
    for split, arrays in first.splits.items():
        for mine, theirs in zip(arrays, second.splits[split], strict=True):
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype


def test_prepared_copy_is_the_archive(tiny_cifar):
    path = tiny_cifar / "cifar-10-python.tar.gz"
    direct = archive.read(path, archive.CIFAR10)

    assert_same(cifar.load(archive.CIFAR10, tiny_cifar), direct)
    written = files_under(tiny_cifar)
    assert any(name.endswith(".array_record-00000-of-00001") for name in written)
    assert not any(word in name for name in written for word in ("incomplete", "tmp", "parquet"))

    times = {name: (tiny_cifar / name).stat().st_mtime_ns for name in written}
    assert_same(cifar.load(archive.CIFAR10, tiny_cifar), direct)
    path.unlink()
    assert_same(cifar.load(archive.CIFAR10, tiny_cifar), direct)
    for name in written - {path.name, "prepared"}:
        assert (tiny_cifar / name).stat().st_mtime_ns == times[name]


def test_another_archive_replaces_the_prepared_copy(tiny_cifar, rng):
    cifar.load(archive.CIFAR10, tiny_cifar)
    path = write_archive(tiny_cifar, tiny_records(rng, train=11, test=3))
    contents = cifar.load(archive.CIFAR10, tiny_cifar)
    assert len(contents.splits["train"][1]) == 55
    assert_same(contents, archive.read(path, archive.CIFAR10))


def test_corrupt_archive_leaves_nothing(tiny_cifar):
    path = tiny_cifar / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(archive.DataError, match="not a valid archive"):
        cifar.load(archive.CIFAR10, tiny_cifar)
    assert files_under(tiny_cifar) == {path.name}


def test_interrupted_preparation_leaves_nothing(tiny_cifar, monkeypatch):
    def interrupted(self, images, labels):
        yield 0, {"image": images[0], "label": labels[0]}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cifar.CifarArchive, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cifar.load(archive.CIFAR10, tiny_cifar)
    assert files_under(tiny_cifar) == {"cifar-10-python.tar.gz"}
    assert len(cifar.load(archive.CIFAR10, tiny_cifar).splits["train"][1]) == 100


def test_leftovers_of_a_kill_are_cleared(tiny_cifar):
    leftover = tiny_cifar / "prepared/cifar-10-batches-py/cifar_archive/incomplete.ABC_1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"written")
    cifar.load(archive.CIFAR10, tiny_cifar)
    assert not leftover.exists()


def test_prepared_copy_of_another_length_is_refused(tiny_cifar):
    cifar.load(archive.CIFAR10, tiny_cifar)
    (metadata,) = tiny_cifar.glob("prepared/*/*/*/metadata.json")
    metadata.write_text(metadata.read_text().replace("100", "101"))
    with pytest.raises(archive.DataError, match=r"'train': 100.*'train': 101"):
        cifar.load(archive.CIFAR10, tiny_cifar)


def test_hold_out_is_a_reproducible_partition():
    labels = np.arange(57, dtype=np.int32)
    split = data.Split(np.zeros((57, 2, 2, 1), np.uint8) + labels[:, None, None, None], labels)
    kept, held = data.hold_out(split, 0.1, seed=3)
    assert (len(kept), len(held)) == (51, 6)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept.labels, held.labels])), labels)
    np.testing.assert_array_equal(held.images[:, 0, 0, 0], held.labels)
    np.testing.assert_array_equal(data.hold_out(split, 0.1, seed=3)[1].labels, held.labels)
    assert set(data.hold_out(split, 0.1, seed=4)[1].labels) != set(held.labels)


def test_pixel_statistics(rng):
    images = rng.integers(0, 256, (9, 5, 4, 3), dtype=np.uint8)
    images[..., 2] = 7  # a constant channel is left unscaled
    mean, std = data.pixel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std[:2], images.std(axis=(0, 1, 2))[:2], rtol=1e-6)
    assert std[2] == 1


def test_digits(tmp_path):
    digits = data.load("digits", tmp_path, seed=0)
    assert digits.image_shape == (32, 32, 1)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1294, 144, 359)
    assert len(np.unique(digits.test.labels)) == len(digits.classes) == 10
    blocks = digits.train.images.reshape(-1, 8, 4, 8, 4)
    assert np.all(blocks == blocks[:, :, :1, :, :1])
    assert not list(tmp_path.iterdir())
