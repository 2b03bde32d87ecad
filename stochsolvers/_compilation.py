"""Programs for which compiling takes longer than running."""

import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax

LIGHT: dict[str, Any] = {
    "xla_backend_optimization_level": 1,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of XLA with which a CPU's programs compile in two thirds of the time and run as fast."""
if version("jaxlib").startswith("0.10."):  # later ones do not have it
    LIGHT["xla_cpu_use_fusion_emitters"] = False
ONCE = {**LIGHT, "xla_backend_optimization_level": 0}
"""Those that compile in an eighth of the time: for programs that run once."""


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` for a program that runs once, of a report say; not within other transformations.

    On CPUs it is compiled without optimisations; products of matrices and convolutions are library calls.

    Args:
      function: any.
      **options: of `jax.jit`.
    """
    optimised = jax.jit(function, **options)
    light = jax.jit(function, compiler_options=ONCE, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        jitted = light if jax.default_backend() == "cpu" else optimised
        return jitted(*args, **kwargs)

    return call
