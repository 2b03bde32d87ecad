"""The command from end to end, on a tiny archive."""

import contextlib
import csv
import io
import json

import jax
import numpy as np
import pytest
from archives import files_under, tiny_records, write_archive

from experiments import results, table2

EPHEMERAL = ("seconds", "train_seconds")


def run(tiny_cifar, out, *options):
    arguments = f"--dataset cifar10 --epochs 1 --batch-size 30 --trials 2 --data-dir {tiny_cifar}"
    table2.main([*arguments.split(), "--out", str(out), *options])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    for row in rows:
        for key in EPHEMERAL:
            row.pop(key, None)
    return rows


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run of all six networks: its archive, its folder, its rows and what it printed."""
    folder = tmp_path_factory.mktemp("table2")
    write_archive(folder / "cifar", tiny_records(np.random.default_rng(0)))
    with jax.enable_x64(False), contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = run(folder / "cifar", folder / "out")
    return folder / "cifar", folder / "out", rows, printed.getvalue()


def test_all_networks_and_files(everything):
    _, out, rows, printed = everything
    assert files_under(out) == set(table2.FILES)

    finals = [row for row in rows if row["kind"] == "final"]
    assert [(row["variant"], row["method"]) for row in finals] == [
        (variant, method)
        for variant in ("D-D", "D-ND", "ND-D")
        for method in ("dropout", "prox-sg")
    ]
    assert len(rows) == 2 * len(finals)
    for row in finals:
        solver = row["method"] == "prox-sg"
        assert (row["trials"], row["std"] is not None) == (2, True) if solver else (1, False)
        assert row["config"]["training"]["epochs"] == 1
        assert row["versions"]["jax"]
        assert row["hardware"]["cores"] >= 1
        assert 0 <= row["accuracy"] <= 100
    assert str(out.parent) not in (out / "results.jsonl").read_text()

    with (out / "table2.csv").open() as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(table2.COLUMNS)
    assert [float(row["accuracy"]) for row in table] == [row["accuracy"] for row in finals]

    for name in ("accuracy.png", "residual.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "72.86 ± 0.177" in printed
    assert "64.39" in printed
    assert "not comparable" not in printed


def test_reproducible_from_the_seed(everything, tmp_path):
    tiny_cifar, _, rows, _ = everything
    # alone or among others, a network comes out the same
    again = run(tiny_cifar, tmp_path, "--variants", "ND-D", "--methods", "prox-sg")
    assert again == [r for r in rows if (r["variant"], r["method"]) == ("ND-D", "prox-sg")]


def test_only_own_files_are_replaced(tiny_cifar, tmp_path):
    (tmp_path / "residual.png").write_text("of an earlier run")
    (tmp_path / "notes.txt").write_text("mine")
    run(tiny_cifar, tmp_path, "--variants", "D-D", "--methods", "dropout")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    # nothing to draw without a solver: the stale picture is gone
    assert not (tmp_path / "residual.png").exists()


def test_missing_archive_is_one_clear_line(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise ConnectionError(f"no network for {url} in {timeout} s")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(SystemExit) as caught:
        table2.main(["--dataset", "cifar10", "--data-dir", str(tmp_path / "nothing")])
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
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        table2.main(options)
    assert message in capsys.readouterr().err


def test_impossible_batch_is_one_clear_line(tiny_cifar, tmp_path):
    with pytest.raises(SystemExit, match=r"error: batch_size: expected 1 to 90, .* got 91"):
        run(tiny_cifar, tmp_path / "out", "--batch-size", "91")
    assert files_under(tmp_path / "out") == set()


def test_digits_are_marked_as_not_comparable():
    config = table2.Config()
    final = {
        "variant": "D-D",
        "method": "dropout",
        "accuracy": 97.0,
        "std": None,
        "full_gradient_accuracy": None,
        "paper_accuracy": 64.39,
        "paper_std": None,
    }
    assert "not comparable with digits" in table2.table(config, [final])


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "results.jsonl"
    results.write_jsonl(path, [{"a": 1}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.write_jsonl(path, [{"a": float("nan")}])
    assert json.loads(path.read_text()) == {"a": 1}
    assert files_under(tmp_path) == {"results.jsonl"}
