"""The command from end to end, on a tiny archive."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from archives import files_under, tiny_records, write_archive

from experiments import table2
from experiments.output import runs, summary
from experiments.training import loop

EPHEMERAL = ("seconds", "train_seconds")


def run(tiny_cifar, out, *options):
    arguments = f"--dataset cifar10 --epochs 1 --batch-size 30 --trials 2 --data-dir {tiny_cifar}"
    table2.main([*arguments.split(), "--out", str(out), *options])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in rows:
        for key in EPHEMERAL:
            row.pop(key, None)
    return rows


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run of three networks: its archive, its folder, its rows and what it printed."""
    folder = tmp_path_factory.mktemp("table2")
    write_archive(folder / "cifar", tiny_records(np.random.default_rng(0)))
    options = ["--variants", "ND-D", "--methods", "dropout", "prox-sg", "fista"]
    with jax.enable_x64(False), contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = run(folder / "cifar", folder / "out", *options)
    return folder / "cifar", folder / "out", rows, printed.getvalue()


def test_all_networks_and_files(everything):
    _, out, rows, printed = everything
    names = {name for name in files_under(out) if not name.startswith("checkpoints")}
    assert names == {
        *("config.json", "results.jsonl", "summary.csv", "README.md"),
        *("accuracy.png", "residual.png"),
    }
    finals = [row for row in rows if row["kind"] == "final"]
    assert [row["method"] for row in finals] == ["dropout", "prox-sg", "fista"]
    assert [row["name"] for row in finals] == ["ND-D dropout", "ND-D Prox-SG", "ND-D FISTA"]
    for row in finals:
        samples = row["method"] == "prox-sg"
        assert (row["trials"], row["std"] is not None) == (2, True) if samples else (1, False)
        assert (row["full_gradient_accuracy"] is not None) == samples
        assert (row["paper_accuracy"] is None) == (row["method"] == "fista")
        assert row["config"]["training"]["epochs"] == 1
        assert row["versions"]["jax"]
        assert row["hardware"]["cores"] >= 1
        assert 0 <= row["accuracy"] <= 100
    assert str(out.parent) not in (out / "results.jsonl").read_text()

    curves = [
        (r["method"], r["deterministic"], len(r["middle"]))
        for r in rows
        if r["kind"] == "residuals"
    ]
    assert curves == [("prox-sg", False, 10), ("prox-sg", True, 10), ("fista", True, 10)]

    with (out / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(summary.COLUMNS)
    assert [float(row["accuracy"]) for row in table] == [row["accuracy"] for row in finals]
    assert all(row["full_gradient_accuracy"] and not row["seed_std"] for row in table)

    for name in ("accuracy.png", "residual.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "76.23 ± 0.206" in printed
    assert "68.54" in printed


def test_finished_networks_are_not_trained_again(everything, tmp_path, monkeypatch):
    tiny_cifar, out, rows, _ = everything
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
    options = ["--variants", "ND-D", "--methods"]
    assert run(tiny_cifar, folder, *options, "dropout", "prox-sg") == rows

    # the final row of the last network is lost, its checkpoint is not
    kept = [row for row in runs.read_rows(folder / "results.jsonl") if row["method"] != "fista"]
    runs.write_jsonl(folder / "results.jsonl", kept)
    monkeypatch.undo()
    monkeypatch.setattr(loop, "_epoch_steps", lambda *_: None)
    assert run(tiny_cifar, folder, *options, "fista") == rows


def test_a_folder_belongs_to_one_configuration(everything, tmp_path):
    tiny_cifar, out, _, _ = everything
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    before = contents(folder)
    with pytest.raises(SystemExit, match=r"another run: decay is 0.9 there, 0.8 here"):
        run(tiny_cifar, folder, "--decay", "0.8")
    assert contents(folder) == before
    (folder / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"results.jsonl without config.json"):
        run(tiny_cifar, folder)
    shutil.copy(out / "config.json", folder)

    (folder / "results.jsonl").write_text('{"kind": "final"\n')
    with pytest.raises(SystemExit, match=r"results.jsonl: line 1 is not JSON"):
        run(tiny_cifar, folder)


def test_overwrite_removes_its_own_files_alone(everything, tmp_path):
    tiny_cifar, out, _, _ = everything
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    (folder / "mine.txt").write_text("mine")
    rows = run(
        tiny_cifar,
        folder,
        *("--overwrite", "--variants", "ND-D", "--methods", "dropout", "--seeds", "3"),
    )
    assert {(row["method"], row["seed"]) for row in rows} == {("dropout", 3)}
    assert (folder / "mine.txt").read_text() == "mine"
    # nothing to draw without a solver: the stale picture is gone
    assert not (folder / "residual.png").exists()
    assert len(list((folder / "checkpoints").iterdir())) == 1


def test_missing_archive_is_one_clear_line(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise ConnectionError(f"no network for {url} in {timeout} s")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    options = ["--data-dir", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        table2.main(["--dataset", "cifar10", *options])
    message = str(caught.value)
    assert message.startswith("error: CIFAR-10: no archive at")
    assert "\n" not in message
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--decay", "1.5"], "decay: expected a factor"),
        (["--variants", "ND-ND"], "ND-ND"),
        (["--variants"], "expected at least one"),
        (["--seeds", "-3"], "seeds: expected at least one, not negative, each once"),
        (["--seeds", "0", "0"], "seeds: expected at least one, not negative, each once"),
        (["--learning-rate", "0"], "learning_rate: expected a positive rate"),
        (["--num-iters", "0"], "num_iters: expected at least 1"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        table2.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "typo"], "dataset: expected digits, .*, got typo"),
        (["--dataset", "absent.npz"], "absent.npz: no such file"),
        (["--batch-size", "91"], "batch_size: expected 1 to 90"),
        (["--devices", "99"], "devices: expected 1"),
    ],
)
def test_a_mistaken_command_removes_nothing(everything, tmp_path, options, message):
    tiny_cifar, out, _, _ = everything
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    before = contents(folder)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(tiny_cifar, folder, "--overwrite", *options)
    assert contents(folder) == before


def test_a_diverging_network_does_not_stop_the_others(tmp_path, monkeypatch):
    """With two seeds at once, the one that is left begins again alone."""
    calls = []

    def train(build, datasets, config, *, label, **options):
        calls.append((label, tuple(datasets)))
        if label == "ND-D dropout" and 4 in datasets:
            raise loop.DivergenceError(f"{label}, seed 4: the loss is nan at step 3.", 4)
        raise loop.DivergenceError(f"{label}: the loss is inf at step 1.", min(datasets))

    monkeypatch.setattr(loop, "train_together", train)
    options = ["--seeds", "4", "1", "--seeds-at-once", "--variants", "ND-D", "--out", str(tmp_path)]
    options += ["--methods", "dropout", "prox-sg"]
    with pytest.raises(SystemExit, match=r"^error: diverged: ND-D dropout, seed 4; ND-D dropout"):
        table2.main(options)
    assert calls == [
        *[("ND-D dropout", (4, 1)), ("ND-D dropout", (1,))],
        *[("ND-D Prox-SG", (4, 1)), ("ND-D Prox-SG", (4,))],
    ]
    rows = runs.read_rows(tmp_path / "results.jsonl")
    assert [row["accuracy"] for row in rows] == [None] * 4
    assert "diverged 2 of 2" in (tmp_path / "README.md").read_text()
    calls.clear()
    with pytest.raises(SystemExit, match="diverged"):  # nothing is tried again
        table2.main(options)
    assert not calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_training_ends_with_a_word(number, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(number)
    monkeypatch.setattr(table2.data, "read", lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        table2.main(["--out", str(tmp_path)])
    assert caught.value.code == 128 + number
    assert capsys.readouterr().err == "stopped; the same command goes on from what is saved\n"
    assert signal.getsignal(number) is before


def test_impossible_batch_is_one_clear_line(tiny_cifar, tmp_path):
    with pytest.raises(SystemExit, match=r"error: batch_size: expected 1 to 90, .* got 91"):
        run(tiny_cifar, tmp_path / "out", "--batch-size", "91")
    assert files_under(tmp_path / "out") == set()


def test_more_devices_than_there_are_is_one_clear_line(tiny_cifar, tmp_path):
    with pytest.raises(SystemExit, match=r"error: devices: expected 1 to \d+, got 99"):
        run(tiny_cifar, tmp_path / "out", "--devices", "99")


def test_smoke_and_defaults():
    def optimiser(**options):
        return table2.Config(**options).filled().train_config(4)

    assert optimiser(smoke=True).epochs == 2
    assert optimiser(smoke=True, epochs=5).epochs == 5
    assert table2.Config(smoke=True).filled().variants == table2.SMOKE_VARIANTS
    assert table2.Config(smoke=True, variants=("ND-D",)).filled().variants == ("ND-D",)
    assert optimiser(dataset="cifar10") == loop.TrainConfig(seed=4)
    changed = optimiser(dataset="cifar10", augment=True, precision="bf16", learning_rate=0.003)
    assert changed == loop.TrainConfig(
        learning_rates=(3e-3, 3e-4, 3e-5), seed=4, augment=True, precision="bf16"
    )


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.jsonl"
    runs.write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_jsonl(path, [{"a": float("nan")}])
    assert json.loads(path.read_text()) == {"a": 1}
    assert files_under(tmp_path) == {"results.jsonl"}
