"""How far a long report is, on the terminal."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

_PATIENCE = 2.0  # seconds without a word


class Progress:
    """Writes "norms of layers: 3 of 20" to the standard error, on one line.

    Args:
      what: is counted.
      total: how many there are.
      shown: True to write, False not to; None writes after two seconds, and to a terminal alone.
    """

    def __init__(self, what: str, total: int, shown: bool | None):
        self.what, self.total = what, total
        self.shown = sys.stderr.isatty() if shown is None else shown
        self.silent_until = time.monotonic() + (_PATIENCE if shown is None else 0.0)
        self.written = False

    def __call__(self, done: int) -> None:
        """So many are done; all of them end the line."""
        if self.shown and (self.written or time.monotonic() >= self.silent_until):
            end = "\n" if done == self.total else ""
            sys.stderr.write(f"\r{self.what}: {done} of {self.total}{end}")
            sys.stderr.flush()
            self.written = True


@contextlib.contextmanager
def waiting(what: str, shown: bool | None) -> Iterator[None]:
    """Within it, "certificates of the layers: 3 s" is written to the standard error every second.

    Args:
      what: is waited for.
      shown: True to write, False not to; None writes after two seconds, and to a terminal alone.
    """
    if not (sys.stderr.isatty() if shown is None else shown):
        yield
        return
    start, done = time.monotonic(), threading.Event()

    def write() -> None:
        pause = _PATIENCE if shown is None else 0.0
        while not done.wait(pause):
            sys.stderr.write(f"\r{what}: {time.monotonic() - start:.0f} s")
            sys.stderr.flush()
            pause = 1.0
        if pause == 1.0:
            sys.stderr.write("\n")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield
    finally:
        done.set()
        writer.join()
