"""Data sets: the prepared copy, the splits, the statistics."""

import contextlib
import io
import re
import zipfile

import numpy as np
import pytest
from archives import files_under, tiny_records, tiny_records100, write_archive

from experiments.data import archive, cifar, datasets


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
    # the number alone: the digits of the checksum may hold the same three
    text, count = re.subn(r'("train": )100\b', r"\g<1>101", metadata.read_text())
    assert count == 1
    metadata.write_text(text)
    with pytest.raises(archive.DataError, match=r"'train': 100.*'train': 101"):
        cifar.load(archive.CIFAR10, tiny_cifar)


def test_hold_out_is_a_reproducible_partition():
    labels = np.arange(57, dtype=np.int32)
    split = datasets.Split(np.zeros((57, 2, 2, 1), np.uint8) + labels[:, None, None, None], labels)
    kept, held = datasets.hold_out(split, 0.1, seed=3)
    assert (len(kept), len(held)) == (51, 6)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept.labels, held.labels])), labels)
    np.testing.assert_array_equal(held.images[:, 0, 0, 0], held.labels)
    np.testing.assert_array_equal(datasets.hold_out(split, 0.1, seed=3)[1].labels, held.labels)
    assert set(datasets.hold_out(split, 0.1, seed=4)[1].labels) != set(held.labels)


def test_pixel_statistics(rng):
    images = rng.integers(0, 256, (9, 5, 4, 3), dtype=np.uint8)
    images[..., 2] = 7  # a constant channel is left unscaled
    mean, std = datasets.pixel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std[:2], images.std(axis=(0, 1, 2))[:2], rtol=1e-6)
    assert std[2] == 1


def test_digits(tmp_path):
    digits = datasets.load("digits", tmp_path, seed=0)
    assert digits.image_shape == (32, 32, 1)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1294, 144, 359)
    assert len(np.unique(digits.test.labels)) == len(digits.classes) == 10
    blocks = digits.train.images.reshape(-1, 8, 4, 8, 4)
    assert np.all(blocks == blocks[:, :, :1, :, :1])
    assert not list(tmp_path.iterdir())


def test_cifar100_is_prepared_beside_cifar10(tiny_cifar, rng):
    path = write_archive(tiny_cifar, tiny_records100(rng), layout=archive.CIFAR100)
    ten = datasets.load("cifar10", tiny_cifar, seed=0)
    hundred = datasets.load("cifar100", tiny_cifar, seed=0)
    assert (len(ten.classes), len(hundred.classes)) == (10, 100)
    assert (len(hundred.train), len(hundred.validation), len(hundred.test)) == (54, 6, 30)
    direct = archive.read(path, archive.CIFAR100)
    np.testing.assert_array_equal(hundred.test.labels, direct.splits["test"][1])

    path.write_bytes(b"no archive")
    with pytest.raises(archive.DataError, match="not a valid archive"):
        datasets.load("cifar100", tiny_cifar, seed=0)
    assert len(datasets.load("cifar10", tiny_cifar, seed=0).train) == 90


def npz_arrays(rng, **changes):
    arrays = {
        "images": rng.integers(0, 256, (50, 9, 8), dtype=np.uint8),
        "labels": np.arange(50) % 3,
    } | changes
    return {name: array for name, array in arrays.items() if array is not None}


def test_npz_without_a_test_split(tmp_path, rng):
    arrays = npz_arrays(rng)
    np.savez(tmp_path / "mine.npz", **arrays)
    first, second = (
        datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=seed) for seed in (0, 1)
    )
    assert (first.name, first.classes, first.image_shape) == ("mine", ("0", "1", "2"), (9, 8, 1))
    assert (len(first.train), len(first.validation), len(first.test)) == (36, 4, 10)
    # the seed moves the validation split, not the test split
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert not np.array_equal(first.validation.images, second.validation.images)
    # every image is in one split, with its own label
    label_of = {
        image.tobytes(): label
        for image, label in zip(arrays["images"], arrays["labels"], strict=True)
    }
    splits = (first.train, first.validation, first.test)
    pairs = [pair for s in splits for pair in zip(s.images, s.labels, strict=True)]
    assert len({image.tobytes() for image, _ in pairs}) == 50
    assert all(label_of[image.tobytes()] == label for image, label in pairs)


def test_npz_with_a_test_split_of_floats(tmp_path, rng):
    images = rng.normal(size=(20, 8, 8, 2))
    test = {"test_images": images[:5], "test_labels": np.zeros(5, np.int64)}
    np.savez(tmp_path / "mine.npz", **npz_arrays(rng, images=images, labels=[0, 1] * 10, **test))
    dataset = datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=0)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (18, 2, 5)
    np.testing.assert_array_equal(dataset.test.images, images[:5].astype(np.float32))
    pixels = dataset.train.images.astype(np.float64)
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "lacks labels; it holds images"),
        ({"test_images": np.zeros((5, 9, 8), np.uint8)}, "lacks test_labels"),
        ({"images": np.zeros((50, 8), np.uint8)}, r"images: expected \(n, height, width\)"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, "with n ≥ 3"),
        ({"images": np.zeros((50, 8, 8), np.int64)}, "expected uint8 or floating, got int64"),
        ({"images": np.full((50, 8, 8), np.nan)}, "expected finite values"),
        ({"labels": np.zeros(49, int)}, r"expected shape \(50,\), one an image"),
        ({"labels": np.zeros(50)}, "expected integers, got float64"),
        ({"labels": np.full(50, -1)}, r"expected 0\.\.49.*got -1\.\.-1"),
        ({"labels": np.full(50, 99)}, r"expected 0\.\.49"),
        (
            {"test_images": np.zeros((5, 8, 8), np.uint8), "test_labels": np.zeros(5, int)},
            r"test_images: expected images of shape \(9, 8, 1\)",
        ),
        (
            {"test_images": np.zeros((5, 9, 8), np.uint8), "test_labels": np.full(5, 3)},
            r"test_labels: expected 0\.\.2, as in labels, got 3",
        ),
        ({"images": np.array([{}] * 50, object)}, "cannot be read"),
    ],
)
def test_npz_that_does_not_fit(tmp_path, rng, changes, message):
    np.savez(tmp_path / "mine.npz", **npz_arrays(rng, **changes))
    with pytest.raises(archive.DataError, match=message):
        datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=0)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_of(header: str, version=1) -> bytes:
    """A member with a header of one's own."""
    text = header.encode().ljust(116) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2, "little") + text


def zipped(members: dict[str, bytes], compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive_file:
        for name, content in members.items():
            archive_file.writestr(name, content)
    return file.getvalue()


def members_of(arrays) -> dict[str, bytes]:
    return {f"{name}.npy": npy(array) for name, array in arrays.items()}


UNREADABLE = "cannot be read as an .npz file"
SHAPED = "{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"


@pytest.mark.parametrize("name", [*datasets.TRAIN_ARRAYS, *datasets.TEST_ARRAYS])
@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"", "expected an array in NumPy's format, got another file"),
        (b"plain text", "expected an array in NumPy's format, got another file"),
        (npy(np.uint8(3)), "expected "),  # of no axes
        (npy(np.zeros((50, 9, 8), "datetime64[s]")), "expected "),
        (npy(np.zeros(50, "timedelta64[s]")), "expected "),
        (npy(np.zeros((50, 9, 8), [("a", "u1")])), "expected "),
        (npy(np.full(50, "x")), "expected "),
        (npy(np.zeros(50, bool)), "expected "),
        (npy(np.zeros((50, 0, 8), np.uint8)), "expected "),
        (npy(np.full((50, 9, 8), 1e300)), "expected "),
        (npy(np.zeros((50, 9, 8), np.uint8))[:500], UNREADABLE),
        (npy(np.zeros((50, 9, 8), np.uint8))[:50], UNREADABLE),
        (npy_of("{'descr': '|u1', 'shape': (50, 9"), UNREADABLE),
        (npy_of("("), UNREADABLE),
        (npy_of("{}"), UNREADABLE),
        (npy_of("{'descr': (), 'fortran_order': False, 'shape': (3,), }"), UNREADABLE),
        (npy_of(SHAPED % f"({10**13}, 9, 8)"), UNREADABLE),
        (npy_of(SHAPED % f"({10**30}, 9, 8)"), UNREADABLE),
        (npy_of(SHAPED % "(True,)"), UNREADABLE),
        (npy_of(SHAPED % "(50, 9, 8)", version=9), UNREADABLE),
    ],
)
def test_odd_members_are_one_clear_line(tmp_path, rng, name, member, message):
    test = {"test_images": np.zeros((5, 9, 8), np.uint8), "test_labels": np.zeros(5, int)}
    members = members_of(npz_arrays(rng, **test)) | {f"{name}.npy": member}
    (tmp_path / "mine.npz").write_bytes(zipped(members))
    with pytest.raises(archive.DataError, match=re.escape(message)) as caught:
        datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=0)
    words = str(caught.value)
    assert "\n" not in words
    assert len(words) < 200 + len(str(tmp_path)) + 100
    assert message == UNREADABLE or f"mine.npz, {name}" in words or "labels: expected" in words


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_damaged_files_are_refused_or_read(tmp_path, rng, compression):
    whole = zipped(members_of(npz_arrays(rng)), compression)
    damaged = [whole[:length] for length in (0, 10, len(whole) // 2, len(whole) - 5)]
    for _ in range(150):
        changed = bytearray(whole)
        # the ends hold zip's own records and NumPy's header
        place = rng.choice([*range(200), *range(len(whole) - 200, len(whole))])
        changed[place] = rng.integers(256)
        damaged.append(bytes(changed))
    for content in damaged:
        (tmp_path / "mine.npz").write_bytes(content)
        with contextlib.suppress(archive.DataError):
            assert len(datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=0).train) == 36


def test_members_that_are_not_needed_are_not_read(tmp_path, rng):
    names = np.array(["cat", {}], object)
    np.savez(tmp_path / "mine.npz", **npz_arrays(rng, **{"names": names, "größe": names}))
    assert len(datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=0).train) == 36
    np.savez(tmp_path / "mine.npz", **{f"größe{k}": 1 for k in range(99)})
    with pytest.raises(archive.DataError, match=r"lacks images; it holds größe0, .* … .*größe98$"):
        datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=0)
    np.savez(tmp_path / "mine.npz")
    with pytest.raises(archive.DataError, match="lacks images; it holds nothing"):
        datasets.load(str(tmp_path / "mine.npz"), tmp_path, seed=0)


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(archive.DataError, match="no such file"):
        datasets.load(str(tmp_path / "absent.npz"), tmp_path, seed=0)
    for contents in (b"", b"PK\x03\x04 cut short", b"plain text"):
        (tmp_path / "bad.npz").write_bytes(contents)
        with pytest.raises(archive.DataError, match=r"cannot be read as an \.npz"):
            datasets.load(str(tmp_path / "bad.npz"), tmp_path, seed=0)
    with open(tmp_path / "bad.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(archive.DataError, match=r"cannot be read as an \.npz"):
        datasets.load(str(tmp_path / "bad.npz"), tmp_path, seed=0)
    with pytest.raises(archive.DataError, match="expected digits, cifar10, cifar100 or the path"):
        datasets.load("mnist", tmp_path, seed=0)
