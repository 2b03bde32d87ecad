"""The terminal: command lines, characters that its encoding lacks, errors in one line."""

import codecs
import os
import sys
from typing import Any

import jax
import tyro

IN_ASCII = {
    "±": "+/-",
    "×": "x",
    "−": "-",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "τ": "tau",
    "η": "eta",
}
"""How characters are printed where the encoding lacks them; any other is a question mark."""
ERRORS = "experiments.output.terminal"
"""The name of this rule, as Python's codecs know it."""
LONGEST = 200
"""Characters of a message that another library wrote."""


def is_first() -> bool:
    """Whether this process writes the files and talks to the terminal."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print, in the first process only."""
    if is_first():
        print(text, flush=True)


def parse(config: type[Any], module: str, args: list[str] | None, **options: Any) -> Any:
    """The command line of `python -m module`; from here on, any text can be printed.

    Args:
      config: a dataclass with a field for each option.
      module: for the usage line.
      args: by default those of the process.
      **options: of `tyro.cli`.
    """
    accept_any_character()
    return tyro.cli(config, prog=f"python -m {module}", args=args, **options)


def accept_any_character() -> None:
    """Make the standard streams print `IN_ASCII` for what their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a notebook's streams take any character as it is
            reconfigure(errors=ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character, after = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":  # an undecodable byte of a file name, PEP 383
        return bytes([ord(character) - 0xDC00]), after
    return IN_ASCII.get(character, "?"), after


codecs.register_error(ERRORS, _in_ascii)


def shown(text: str) -> str:
    """A text as `print` shows it, so that columns can be aligned."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, ERRORS).decode(encoding, "replace")


def as_unicode(name: str) -> str:
    """A file name for files in UTF-8: decoded from UTF-8, whatever the encoding of the locale."""
    return os.fsencode(name).decode("utf-8", "replace")


def reason(error: BaseException) -> str:
    """Class and first line of an exception that another library raised."""
    return f"{type(error).__name__}: {shortened(first_line(error))}".rstrip(": ")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or nothing."""
    return next(iter(str(error).splitlines()), "")


def shortened(text: str) -> str:
    """Beginning and end of a long text: the cause of an error is at one of them."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}"
