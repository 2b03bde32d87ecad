"""The records of a training run as event files for TensorBoard, through tensorboardX."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TAGS = {
    "train_loss": "loss/train",
    "train_accuracy": "accuracy/train",
    "validation_accuracy": "accuracy/validation",
    "learning_rate": "learning_rate",
}
"""Keys of an epoch's record, and their names in TensorBoard."""
TEST = "accuracy/test"


class MissingError(RuntimeError):
    """The package that writes event files is not installed."""


def check_installed() -> None:
    """Raise a `MissingError` if tensorboardX cannot be imported."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise MissingError(
            "tensorboard: needs tensorboardX, which is not installed. It comes with the extra of "
            "that name: pip install 'stochsolvers[tensorboard]'"
        )


class Board:
    """The records of one network, one point for each epoch, in one event file.

    When a run is resumed, the file is written anew from the records of its checkpoint, so that every
    epoch has exactly one point.

    Args:
      folder: folder of the event file; with None, nothing is written.
      after: number of epochs that were trained before these records begin.
    """

    def __init__(self, folder: Path | None, after: int = 0):
        self._folder, self._last = folder, after
        self._after, self._writer = after, None

    def show(self, records: Sequence[Mapping[str, float]]) -> None:
        """Write the records of the epochs that are not in the file yet."""
        if self._folder is None:
            return
        writer = self._open(self._folder)
        for record in records[self._last - self._after :]:
            self._last += 1
            for key, tag in TAGS.items():
                writer.add_scalar(tag, record[key], self._last)

    def finish(self, accuracy: float) -> None:
        """Write the test accuracy after the last epoch, and close the file."""
        if self._folder is not None:
            writer = self._open(self._folder)
            writer.add_scalar(TEST, accuracy, self._last)
            writer.close()

    def _open(self, folder: Path) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter  # of the extra `tensorboard`

            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            self._writer = SummaryWriter(str(folder), flush_secs=1)
        return self._writer
