"""Strict test settings: float64 on, NaN-free randomness, one hypothesis profile."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# batched LAPACK calls of jaxlib 0.10 that run side by side can wait for each other's threads for ever
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_enable_x64", True)

settings.register_profile(
    "project",
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded numpy generator: tests draw no unseeded numbers."""
    return np.random.default_rng(20190506)
