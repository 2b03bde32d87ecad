"""Strict test settings: float64 on, ranks not promoted, seeded randomness, light compilation.

Most of the time of these tests is XLA's. Programs are therefore compiled without most optimisations, but
in tests marked `optimized`: those of round-off, of equality to the last bit, of memory and operations.
README's examples run with the settings of a user, but for that.
"""

import gc
import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        # batched LAPACK calls of jaxlib 0.10 that run side by side can wait for each other's threads for ever
        "--xla_cpu_multi_thread_eigen=false",
        # quicker to compile, the second by far; later versions do not have it
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10."),
        # half of the time of optimised programs; they still contract and reassociate, not to the same bits
        "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling,"
        "xla_cpu_disable_slp_vectorizer,xla_cpu_optimize_for_size",
    ]
)

import compilation
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)

MANY_PROGRAMS = 2000  # Linux gives a process 65,530 memory maps, and each program takes 8 to 16

compilation.quicken()

# cycles of objects that will stay, such as modules and cached programs, are looked for less often
gc.freeze()
gc.set_threshold(50_000, 20, 50)

settings.register_profile(
    "project",
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


def is_light(item: pytest.Item) -> bool:
    return item.get_closest_marker("optimized") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All light tests, then the others: a change of the setting empties JAX's caches."""
    items.sort(key=is_light, reverse=True)


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile a test's programs as its mark says."""
    light = is_light(item)
    changes = light != jax.config.read("jax_disable_most_optimizations")
    if changes or compilation.compiled() > MANY_PROGRAMS:
        jax.clear_caches()  # the setting is no part of their keys
        compilation.forget()
    if changes:
        jax.config.update("jax_disable_most_optimizations", light)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(light))  # of subprocesses
    # commands run as users run them; everything else names the axes that it broadcasts
    commands = "experiments" in item.path.parts or item.path.name == "test_benchmarks.py"
    jax.config.update("jax_numpy_rank_promotion", "allow" if commands else "raise")


@pytest.fixture(scope="session")
def users_environment() -> dict[str, str]:
    """The environment of a user's own process."""
    changed = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in changed}


@pytest.fixture(scope="session")
def quick_environment(users_environment) -> dict[str, str]:
    """The same, with XLA's threads, but for programs that are compiled quickly."""
    flags = os.environ["XLA_FLAGS"].replace("--xla_cpu_multi_thread_eigen=false", "")
    return {**users_environment, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded numpy generator: tests draw no unseeded numbers, but for the step of a kill -9."""
    return np.random.default_rng(20190506)
