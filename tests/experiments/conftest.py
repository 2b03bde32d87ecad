"""The experiments run in float32, as their users run them."""

import os

import jax
import pytest
from archives import tiny_records, write_archive


@pytest.fixture(autouse=True)
def _float32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Runs of the same network, here and in subprocesses, share their compiled steps."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
        del os.environ[name.upper()]


@pytest.fixture
def records(rng):
    return tiny_records(rng)


@pytest.fixture
def tiny_cifar(tmp_path, records):
    """A folder with a tiny archive."""
    write_archive(tmp_path / "cifar", records)
    return tmp_path / "cifar"
