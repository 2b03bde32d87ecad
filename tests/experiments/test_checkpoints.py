"""Checkpoints: a run that is stopped in any way ends as one that was not."""

import dataclasses
import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toys

from experiments.training import checkpoints, loop, training_step

# the other reads of a damaged checkpoint end after the one that failed
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run from beginning to end: what it gives, its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with jax.enable_x64(False):
        return toys.train(folder), folder


@pytest.fixture
def folder(uninterrupted, tmp_path):
    """A copy of the finished run's folder."""
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    return tmp_path / "run"


def without_seconds(trained):
    return [{**record, "seconds": 0} for record in trained.history]


def assert_same(trained, uninterrupted):
    assert toys.digest(trained) == toys.digest(uninterrupted[0])
    assert without_seconds(trained) == without_seconds(uninterrupted[0])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(folder, **options):
    program = [sys.executable, toys.__file__, json.dumps({"folder": str(folder), **options})]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def steps_in(folder):
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())


def test_a_finished_run_is_read_back(uninterrupted, folder, monkeypatch):
    assert steps_in(folder) == [2 * toys.STEPS, 3 * toys.STEPS]
    monkeypatch.setattr(training_step, "compiled_step", lambda *_, **__: None)
    again = toys.train(folder)
    assert_same(again, uninterrupted)
    assert again.seconds == uninterrupted[0].seconds
    # the folder is no part of the result
    monkeypatch.undo()
    assert_same(toys.train(), uninterrupted)


def test_kill_9_at_a_random_step(uninterrupted, tmp_path):
    # another step in every run of the tests; a failure shows which
    step = toys.STEPS + 1 + secrets.randbelow(2 * toys.STEPS - 1)
    print(f"killed at step {step}")
    killed(tmp_path / "run", kill_at=step)
    saved = (step - 1) // toys.STEPS * toys.STEPS  # at the end of an epoch it dies before the save
    assert steps_in(tmp_path / "run")[-1] == saved
    assert_same(toys.train(tmp_path / "run"), uninterrupted)


def test_kill_9_in_the_middle_of_a_save(uninterrupted, tmp_path):
    killed(tmp_path / "run", kill_in_save=2 * toys.STEPS)
    assert steps_in(tmp_path / "run") == [toys.STEPS]
    assert len(list((tmp_path / "run").iterdir())) == 2
    assert_same(toys.train(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (1, signal.SIGTERM),
        (toys.STEPS + 2, signal.SIGTERM),
        (toys.STEPS + 2, signal.SIGINT),
        (2 * toys.STEPS, signal.SIGTERM),
    ],
)
def test_a_signal_saves_and_stops(uninterrupted, tmp_path, monkeypatch, capsys, step, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(loop, "tqdm", toys.interrupted_bar(step, number))
    with pytest.raises(SystemExit) as caught:
        toys.train(tmp_path / "run")
    assert caught.value.code == 128 + number
    assert (
        f"stopped at step {step}; the same command goes on from there\n" in capsys.readouterr().err
    )
    assert signal.getsignal(number) is before
    assert steps_in(tmp_path / "run")[-1] == step
    monkeypatch.undo()
    assert_same(toys.train(tmp_path / "run"), uninterrupted)


def test_a_full_disk_keeps_the_checkpoint_before(uninterrupted, tmp_path, monkeypatch):
    save = checkpoints.ocp.CheckpointManager.save

    def full(self, step, **options):
        if step > toys.STEPS:
            (tmp_path / "run" / f"{step}.orbax-checkpoint-tmp").mkdir()
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, step, **options)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", full)
    with pytest.raises(checkpoints.CheckpointError, match=r"step 8 could not .* No space left"):
        toys.train(tmp_path / "run")
    monkeypatch.undo()
    assert_same(toys.train(tmp_path / "run"), uninterrupted)


def test_the_cause_of_an_error_is_kept_however_long_its_paths():
    details = """[os_error_code='27'] [tensorstore_spec='{"driver":"zarr"}']"""
    long = ValueError(f'Error opening "{"long/" * 80}": File too large {details}')
    assert checkpoints._reason(long).endswith(": File too large")
    assert checkpoints._reason(OSError("[Errno 28] No space left")) == (
        "OSError: [Errno 28] No space left"
    )


@pytest.mark.parametrize("size", [0, 100, 1000])
def test_writes_that_fail_halfway_keep_the_checkpoint_before(
    size, uninterrupted, tmp_path, monkeypatch
):
    """The operating system itself cuts the files of the second save, as a full disk does."""
    resource = pytest.importorskip("resource")
    save = checkpoints.ocp.CheckpointManager.save

    def cut(self, step, **options):
        if step == toys.STEPS:
            return save(self, step, **options)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            return save(self, step, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "save", cut)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"step 8 could not be saved .*[Ff]ile too"
    ):
        toys.train(tmp_path / "run")
    monkeypatch.undo()
    assert_same(toys.train(tmp_path / "run"), uninterrupted)


def damage_arrays(step: Path):
    for path in step.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def damage_record(step: Path):
    (record,) = (p for p in (step / "record").iterdir() if "success" not in p.name)
    record.write_text("{")


@pytest.mark.parametrize(
    "damage",
    [
        damage_arrays,
        damage_record,
        lambda step: shutil.rmtree(step / "state"),
        lambda step: [path.write_bytes(b"") for path in step.rglob("*") if path.is_file()],
    ],
    ids=["arrays", "record", "no state", "empty files"],
)
def test_corrupt_checkpoints_are_refused_and_left(uninterrupted, folder, damage):
    last = folder / str(3 * toys.STEPS)
    damage(last)
    before = contents(folder)
    with pytest.raises(checkpoints.CheckpointError, match=r"run/12: the checkpoint is corrupt \("):
        toys.train(folder)
    assert contents(folder) == before
    # as the message says, the one before is still good
    shutil.rmtree(last)
    assert_same(toys.train(folder), uninterrupted)


def test_a_checkpoint_of_another_layout_is_refused_and_left(folder):
    (record,) = (
        path
        for path in (folder / str(3 * toys.STEPS) / "record").iterdir()
        if "success" not in path.name
    )
    record.write_text(record.read_text().replace('"metrics"', '"losses"'))
    before = contents(folder)
    with pytest.raises(checkpoints.CheckpointError, match="another layout than this revision"):
        toys.train(folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("changes", "tau", "message"),
    [
        ({"epochs": 4}, 0.5, "training.epochs is 3 there, 4 here"),
        ({"learning_rates": (0.1,)}, 0.5, r"learning_rates is \[0.1, 0.01\] there, \[0.1\] here"),
        ({}, 0.75, "belongs to another run: network.sha256"),
    ],
)
def test_foreign_checkpoints_are_refused_and_left(folder, changes, tau, message):
    before = contents(folder)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        toys.train(folder, config=dataclasses.replace(toys.CONFIG, **changes), tau=tau)
    assert contents(folder) == before


def test_other_data_are_refused(folder, monkeypatch):
    other = toys.dataset(1)
    monkeypatch.setattr(toys, "dataset", lambda: other)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"another run: data.sha256 is \w+… there"
    ):
        toys.train(folder)


@pytest.mark.parametrize("what", ["a file", "a stranger"])
def test_what_is_no_folder_of_checkpoints_is_refused(tmp_path, what):
    path = tmp_path / "run" if what == "a file" else tmp_path / "run" / "thesis.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(
        checkpoints.CheckpointError, match=r"run: expected .* found (a file|thesis)"
    ):
        toys.train(tmp_path / "run")
    assert path.read_text() == "mine"


def test_divergence_keeps_the_last_good_checkpoint(folder, monkeypatch):
    shutil.rmtree(folder / str(3 * toys.STEPS))
    before = contents(folder)
    compiled_step = training_step.compiled_step

    def diverging(*args, **options):
        step = compiled_step(*args, **options)

        def run(state, source, batch, number, rates):
            state, metrics = step(state, source, batch, number, rates)
            return state, metrics * (np.nan if number >= 2 * toys.STEPS + 1 else 1)

        return run

    monkeypatch.setattr(training_step, "compiled_step", diverging)
    with pytest.raises(loop.DivergenceError, match="the loss is nan at step 10"):
        toys.train(folder)
    assert contents(folder) == before
