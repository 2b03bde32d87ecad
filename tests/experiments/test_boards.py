"""Curves for TensorBoard, read back from the event files."""

import importlib.util

import events
import pytest
import toys

from experiments import table2, table3
from experiments.output import boards, runs


def expected(history, after=0):
    return [
        (tag, after + k, pytest.approx(record[key], rel=1e-6))
        for k, record in enumerate(history, start=1)
        for key, tag in boards.TAGS.items()
    ]


def test_a_stopped_run_goes_on_without_gaps_or_duplicates(tmp_path):
    class StoppedError(Exception):
        pass

    def board():
        return boards.Board(tmp_path / "curves", after=5)

    first, seen = board(), []

    def stopping(records):
        first.show(records)
        seen.append(len(records))
        if len(records) == 1:  # drawn, and killed
            raise StoppedError

    with pytest.raises(StoppedError):
        toys.train(tmp_path / "run", watch=stopping)
    assert seen == [0, 1]
    first._writer.close()  # writes in a thread of its own
    assert {step for _, step, _ in events.read(tmp_path / "curves")} == {6}

    again = board()
    history = toys.train(tmp_path / "run", watch=again.show).history
    again.finish(75.0)
    points = events.read(tmp_path / "curves")
    assert points == [*expected(history, after=5), (boards.TEST, 5 + len(history), 75.0)]
    rates = [value for tag, _, value in points if tag == "learning_rate"]
    assert rates == pytest.approx([0.1, 0.01, 0.01])  # of the last step


def test_off_by_default_and_overwritten(tmp_path):
    runs.Run(tmp_path, {}).board("a").show([{"train_loss": 1.0}])
    assert not list(tmp_path.iterdir())
    records = [dict.fromkeys(boards.TAGS, 1.0)]
    board = runs.Run(tmp_path, {}, tensorboard=True).board("a", 1)
    board.show(records)
    board.finish(1.0)
    assert len(events.read(tmp_path / runs.BOARDS / "a_1")) == len(boards.TAGS) + 1
    runs.Run(tmp_path, {}, overwrite=True)
    assert not (tmp_path / runs.BOARDS).exists()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.output.terminal.is_first", lambda: False)
    runs.Run(tmp_path, {}, tensorboard=True).board("a").finish(1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("table", [table2, table3])
def test_without_the_package_the_extra_is_named(table, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: tensorboard: .*stochsolvers\[tensorboard\]"):
        table.main(["--tensorboard", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
