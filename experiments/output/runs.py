"""The folder of a run: rows, settings, checkpoints, event files; every file is written atomically."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from experiments.output import boards, terminal

PACKAGES = ("stochsolvers", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
ROWS, SETTINGS = "results.jsonl", "config.json"
CHECKPOINTS, BOARDS = "checkpoints", "tensorboard"
KEYS = {
    "epoch": ("dataset", "epoch", "validation_accuracy"),
    "residuals": ("layer", "deterministic", "low", "middle", "high"),
    "final": ("dataset", "seed", "accuracy"),
}
"""Kinds of rows, and the keys that each kind must have."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path, renamed to `path` if the block succeeds, removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A file in UTF-8, whatever the locale says."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """What a file in UTF-8 holds.

    Raises:
      FolderError: it is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FolderError(f"{path}: not in UTF-8 ({error})") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run.

    Raises:
      FolderError: a line is not a JSON object, or lacks a key of its kind.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FolderError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise FolderError(f"{path}: line {number} is not a JSON object")
        if row.get("kind") not in KEYS:
            expected = ", ".join(KEYS)
            raise FolderError(
                f"{path}: line {number}: expected a kind among {expected}, got {row.get('kind')}"
            )
        named = "name" in row or {"variant", "method"} <= row.keys()
        lacking = [key for key in KEYS[row["kind"]] if key not in row] + ["name"] * (not named)
        if lacking:
            raise FolderError(f"{path}: line {number} lacks {', '.join(lacking)}")
        rows.append(row)
    return rows


class FolderError(RuntimeError):
    """A folder of results is damaged, or belongs to another run."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, made if absent, for one command; the lock ends with the process.

    Raises:
      FolderError: another command has locked it.
    """
    if not terminal.is_first():  # the first process locks it for all of them
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"{folder}: another command is writing there") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


class Run:
    """The folder of one run: rows of the finished networks, checkpoints of the others.

    Several processes may share the folder; the first one writes.

    Args:
      folder: made when there is something to write.
      settings: settings that all rows share, as JSON; a folder with other settings is refused.
      files: names of other files that the run writes there; `overwrite` removes them too.
      overwrite: first remove the rows, checkpoints and event files in the folder.
      tensorboard: write event files for TensorBoard.

    Raises:
      FolderError: the folder belongs to another run, or is damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        files: Iterable[str] = (),
        overwrite: bool = False,
        tensorboard: bool = False,
    ):
        self.folder = folder
        self._tensorboard = tensorboard and terminal.is_first()
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if overwrite:
            self._clear(files)
        elif (folder / ROWS).exists():
            self._check_settings()
            self.rows = read_rows(folder / ROWS)

    def final(self, **tags: Any) -> dict[str, Any] | None:
        """The final row with these entries, or None if that network is not finished."""
        wanted = {"kind": "final", **tags}.items()
        return next((row for row in self.rows if wanted <= _scalars(row)), None)

    @property
    def finals(self) -> list[dict[str, Any]]:
        """The final rows."""
        return [row for row in self.rows if row["kind"] == "final"]

    def checkpoint(self, *names: Any) -> Path:
        """The folder for the checkpoints of one network."""
        return self.folder / CHECKPOINTS / _joined(names)

    def board(self, *names: Any, after: int = 0) -> boards.Board:
        """The event file of one network, after so many earlier epochs; written only with `tensorboard`."""
        return boards.Board(
            self.folder / BOARDS / _joined(names) if self._tensorboard else None, after
        )

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of a finished network, and write all rows."""
        self.rows += (dict(row) for row in rows)
        if terminal.is_first():
            write_text(self.folder / SETTINGS, json.dumps(self.settings, indent=2) + "\n")
            write_jsonl(self.folder / ROWS, self.rows)

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS
        try:
            found = json.loads(read_text(path))
        except FileNotFoundError:
            raise FolderError(
                f"{self.folder}: holds {ROWS} without {SETTINGS}. "
                "Choose another --out, or start anew with --overwrite."
            ) from None
        except ValueError as error:
            raise FolderError(f"{path}: not JSON ({error})") from None
        differences = differing(found, self.settings)
        if differences:
            raise FolderError(
                f"{self.folder}: holds the results of another run: {differences}. "
                "Choose another --out, or start anew with --overwrite."
            )

    def _clear(self, files: Iterable[str]) -> None:
        if terminal.is_first():
            for name in (ROWS, SETTINGS, *files):
                (self.folder / name).unlink(missing_ok=True)
            for name in (CHECKPOINTS, BOARDS):
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
        multihost_utils.sync_global_devices("cleared")


def _joined(names: Iterable[Any]) -> str:
    return "_".join(map(str, names)).replace("/", "_")


def _scalars(row: Mapping[str, Any]) -> Any:
    return {key: value for key, value in row.items() if not isinstance(value, list | dict)}.items()


def differing(found: Any, expected: Any, name: str = "") -> str:
    """The entries in which two nested dictionaries differ, as text; empty if they are equal."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        parts = (
            differing(found.get(key), expected.get(key), f"{name}.{key}" if name else str(key))
            for key in dict.fromkeys([*expected, *found])
        )
        return "; ".join(filter(None, parts))
    if isinstance(expected, tuple):  # JSON has lists only
        expected = list(expected)
    return "" if found == expected else f"{name} is {_short(found)} there, {_short(expected)} here"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def environment() -> dict[str, Any]:
    """Versions and hardware, without host names and paths."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": _cores(),
            "device": jax.devices()[0].device_kind,
        },
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _cores() -> int:
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available else os.cpu_count() or 1
