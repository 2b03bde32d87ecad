"""The experiments run in float32, as their users run them."""

import jax
import pytest
from archives import tiny_records, write_archive


@pytest.fixture(autouse=True)
def _float32():
    with jax.enable_x64(False):
        yield


@pytest.fixture
def records(rng):
    return tiny_records(rng)


@pytest.fixture
def tiny_cifar(tmp_path, records):
    """A folder with a tiny archive."""
    write_archive(tmp_path / "cifar", records)
    return tmp_path / "cifar"
