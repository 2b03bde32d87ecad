"""What makes many small programs quick to compile: for tests, and for examples in their own process."""

import re
import threading
import time
from typing import Any

import jax
from jax._src import compiler
from jax._src.interpreters import mlir

PROGRAMS_PER_CONTEXT = 100  # what it interns stays in memory as long as it does
_contexts = threading.local()
WORTH_KEEPING = 0.03  # seconds of compilation; most programs take less, and each takes memory
_NAMES = re.compile(
    r'^module @\S+| ?\{jax\.result_info = "[^"]*"\}'
)  # of the function and its results
_executables: dict[tuple[str, bytes], Any] = {}
_compiled = [0]


def quicken() -> None:
    """Share contexts and executables, and write no places in the source into programs."""
    jax.config.update("jax_traceback_in_locations_limit", 0)
    _share_contexts()
    _share_executables()


def _share_contexts() -> None:
    """Lower a hundred programs in one MLIR context: a new one takes a fifth of a small program's time."""
    make = getattr(mlir, "make_ir_context", None)

    def shared():
        count, context = getattr(_contexts, "last", (PROGRAMS_PER_CONTEXT, None))
        if count >= PROGRAMS_PER_CONTEXT:
            count, context = 0, make()
        _contexts.last = count + 1, context
        return context

    if make is not None:  # later versions may do without
        mlir.make_ir_context = shared


def _share_executables() -> None:
    """Compile equal programs once: functions that are traced anew often lower to the text of an earlier one.

    Their names are no part of the text, so that layers of NNX and of Linen share a program. Programs that
    call back into Python hold their callbacks, and are compiled each by itself.
    """
    compile_one = getattr(compiler, "compile_or_get_cached", None)

    def shared(backend, computation, devices, options, callbacks, *rest, **more):
        text = _NAMES.sub("", str(computation))  # without the places in the source
        key = text, options.SerializeAsString()
        if key not in _executables:
            start = time.perf_counter()
            made = compile_one(backend, computation, devices, options, callbacks, *rest, **more)
            _compiled[0] += 1
            if callbacks or "callback" in text or time.perf_counter() - start < WORTH_KEEPING:
                return made
            _executables[key] = made
        return _executables[key]

    if compile_one is not None:  # later versions may do without
        compiler.compile_or_get_cached = shared


def compiled() -> int:
    """Programs that were compiled since the last call of `forget`."""
    return _compiled[0]


def forget() -> None:
    """Keep no executables."""
    _executables.clear()
    _compiled[0] = 0
