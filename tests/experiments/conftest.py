"""The experiments run in float32, as their users run them."""

import os

import jax
import pytest
from archives import tiny_records, write_archive
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def _float32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder of compiled programs, one for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _compile_once(compiled):
    """Runs of the same network, here and in subprocesses, share their compiled steps.

    Other tests do not: to write all their small programs would take longer than it saves.
    """
    settings = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def records(rng):
    return tiny_records(rng)


@pytest.fixture
def tiny_cifar(tmp_path, records):
    """A folder with a tiny archive."""
    write_archive(tmp_path / "cifar", records)
    return tmp_path / "cifar"
