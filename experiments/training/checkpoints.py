"""Checkpoints of a training run: written atomically, verified when read, kept from other runs.

A folder belongs to one run. A checkpoint is renamed to its final name when it is complete, and the
last two are kept: if the process is killed while it saves, the checkpoint before is still there.
"""

import contextlib
import dataclasses
import hashlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.data.datasets import digest
from experiments.output import terminal
from experiments.output.runs import differing
from experiments.training import parallel

KEPT = 2
TERMINATION = (signal.SIGTERM, signal.SIGINT)


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, could not be read, or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Attributes:
      step: number of completed steps.
      metrics: loss and accuracy of the steps of the current, incomplete epoch, for each seed.
      history: for each seed, one record for each completed epoch.
      seconds: seconds of training so far.
    """

    step: int = 0
    metrics: tuple[Sequence[Any], ...] = ()
    history: tuple[Sequence[dict[str, float]], ...] = ()
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one run, numbered by step.

    Args:
      folder: made if absent.
      identity: configuration, data and network of the run; other checkpoints are refused.

    Raises:
      CheckpointError: the folder holds something other than checkpoints, or see `check_path`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        check_path(folder)
        self.folder = folder.absolute()
        self.identity = dict(identity)
        _check_holds_checkpoints_alone(self.folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: Any, progress: Progress) -> None:
        """Save the arrays of `state` and the progress.

        Raises:
          CheckpointError: the files could not be written; earlier checkpoints are still good.
        """
        if self._manager.latest_step() == progress.step:
            return
        arrays = host_arrays(state)
        record = {
            "identity": self.identity,
            "progress": dataclasses.asdict(progress),
            "sha256": digest(arrays.values()),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
        )
        try:
            self._manager.save(progress.step, args=items)
        except Exception as error:  # the storage libraries document no common exception
            raise CheckpointError(
                f"{self.folder}: step {progress.step} could not be saved ({_reason(error)}). "
                "The checkpoints before it are still good: the same command goes on from there."
            ) from error

    def restore(self, template: Any) -> tuple[Any, Progress] | None:
        """The state of the latest checkpoint, in the structure of the template, and the progress.

        Returns:
          None if there is no checkpoint.

        Raises:
          CheckpointError: the checkpoint is corrupt, or of another run; it is left as it is.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        folder, expected = self.folder / str(step), host_arrays(template)
        try:
            items = ocp.args.Composite(record=ocp.args.JsonRestore())
            record = self._manager.restore(step, args=items)["record"]
        except Exception as error:
            raise _unreadable(folder, _reason(error)) from error
        try:
            identity, progress = record["identity"], record["progress"]
            lists = {key: tuple(progress[key]) for key in ("metrics", "history")}
            progress = Progress(**progress | lists)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: the checkpoint has another layout than this revision writes "
                f"({_reason(error)}). It is left as it is; train into another folder."
            ) from error
        differences = differing(identity, self.identity)
        if differences:
            raise CheckpointError(f"{folder}: belongs to another run: {differences}")
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(expected))
            arrays = self._manager.restore(step, args=items)["state"]
        except Exception as error:
            raise _unreadable(folder, _reason(error)) from error
        if digest(arrays.values()) != record["sha256"]:
            raise _unreadable(folder, "its arrays do not match their checksum")
        return _with_arrays(template, arrays), progress

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()


def check_path(folder: Path) -> None:
    """Raise a `CheckpointError` for a path that is not text: TensorStore takes paths in UTF-8 alone."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{folder}: expected a path in the encoding of the locale, {sys.getfilesystemencoding()}, "
            "got other bytes. Choose another --out, or a locale in UTF-8."
        ) from None


def structure(graph: Any, state: Any) -> str:
    """SHA-256 of a network's modules, their settings, and the shapes of its state."""
    shapes = [(array.shape, str(array.dtype)) for array in host_arrays(state).values()]
    text = re.sub(r" at 0x[0-9a-f]+", "", f"{graph!r} {shapes}")
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def termination_handled_by(receive: Callable[[int, Any], None]) -> Iterator[None]:
    """Give SIGTERM and SIGINT to a function while the block runs, if this is the main thread."""
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in TERMINATION}
    try:
        for number in TERMINATION:
            signal.signal(number, receive)
    except ValueError:  # only the main thread handles signals
        previous = {}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred_termination() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list while the block runs, instead of ending the program.

    A second Ctrl-C ends it at once.
    """
    received: list[int] = []
    interrupt = signal.getsignal(signal.SIGINT)

    def receive(number: int, _: Any) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, interrupt)

    with termination_handled_by(receive):
        yield received


def host_arrays(state: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree on the host, by position; random keys as integers, empty arrays left out."""
    leaves = (
        np.asarray(jax.random.key_data(leaf) if parallel.is_key(leaf) else leaf)
        for leaf in jax.tree.leaves(state)
    )
    return {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if leaf.size}


def _with_arrays(template: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    leaves, tree = jax.tree.flatten(template)
    for name, array in arrays.items():
        leaf = leaves[int(name)]
        if parallel.is_key(leaf):
            array = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        leaves[int(name)] = array
    return jax.tree.unflatten(tree, leaves)


def _check_holds_checkpoints_alone(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder of checkpoints, found a file")
    for entry in sorted(folder.iterdir()):
        unfinished = "orbax-checkpoint-tmp" in entry.name
        if not entry.is_dir() or not (entry.name.isdecimal() or unfinished):
            raise CheckpointError(f"{folder}: expected nothing but checkpoints, found {entry.name}")


def _unreadable(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the checkpoint is corrupt ({reason}). It is left as it is; "
        "without it, the same command goes on from the checkpoint before."
    )


def _reason(error: BaseException) -> str:
    # TensorStore adds its settings after the cause: [name='…'] [name='…']
    line, *_ = re.split(r" \[[\w ]+='", terminal.first_line(error))
    return f"{type(error).__name__}: {terminal.shortened(line)}".rstrip(": ")
