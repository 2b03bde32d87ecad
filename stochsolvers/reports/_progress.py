"""How far a long report is, on the terminal."""

import sys
import time

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
