"""Commands where the terminal cannot show every character, and files that do not depend on it."""

import ast
import io
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments import table2
from experiments.data import datasets
from experiments.output import runs, summary, terminal
from experiments.training import checkpoints

ROOT = pathlib.Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
UTF_8 = {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}


def run(module, *options, locale):
    """A command in an environment of its own, from the folder of the project."""
    environment = {**os.environ, **locale, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *map(str, options)],
        env=environment,
        capture_output=True,
        cwd=ROOT,
        timeout=240,
    )


@pytest.fixture
def finished(tmp_path, rng):
    """Table 2 of one network and two seeds, finished: the command's options, its folder."""
    images = rng.integers(0, 256, (60, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "größe.npz", images=images, labels=np.arange(60) % 3)
    options = {"dataset": str(tmp_path / "größe.npz"), "out": tmp_path / "out", "epochs": 1}
    options |= {"batch_size": 32}
    config = table2.Config(**options, variants=("ND-D",), methods=("prox-sg",), seeds=(0, 1))
    source = datasets.read(config.dataset, tmp_path)
    stored = runs.Run(
        config.out, {**config.filled().settings("table2"), "data_sha256": source.sha256()}
    )
    for seed, accuracy in enumerate((70.0, 73.0)):
        tags = {"dataset": "größe", "name": "ND-D Prox-SG", "variant": "ND-D"}
        tags |= {"method": "prox-sg", "seed": seed}
        scores = {"accuracy": accuracy, "std": 0.25, "trials": 20, "full_gradient_accuracy": 74.0}
        epoch = {"kind": "epoch", **tags, "epoch": 1, "validation_accuracy": accuracy}
        stored.add([epoch, {"kind": "final", **tags, **scores}])
    (config.out / summary.NOTES).write_text("Größe: 60 ± 0 Bilder.\n", encoding="utf-8")
    arguments = f"--dataset {config.dataset} --out {config.out} --epochs 1 --batch-size 32"
    arguments += " --variants ND-D --methods prox-sg --seeds 0 1"
    return arguments.split(), config.out


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_table_in_an_ascii_terminal(finished):
    options, out = finished
    done = run("table2", *options, locale=ASCII)
    assert done.returncode == 0, done.stderr.decode()
    header, rule, row = done.stdout.decode("ascii").splitlines()[1:4]
    assert "71.50 +/- 2.121" in row
    assert "+/- trials" in header
    ends = [match.end() for match in re.finditer(r"-+", rule)]
    assert all(row[end : end + 2].isspace() or end >= len(row) for end in ends)
    written = files(out)
    page = written[summary.PAGE].decode("utf-8")
    assert "71.50 ± 2.121" in page
    assert "LeNet on größe" in page
    assert "Größe: 60 ± 0 Bilder." in page

    # the same folder, redrawn in either locale, holds the same bytes
    for locale, spread in ((UTF_8, "71.50 ± 2.121"), (ASCII, "71.50 +/- 2.121")):
        done = run("report", out, locale=locale)
        assert done.returncode == 0, done.stderr.decode()
        assert spread in done.stdout.decode("utf-8")
        assert files(out) == written


def test_a_path_that_is_not_text_is_refused_before_training(tmp_path):
    done = run("table2", "--out", tmp_path / "größe", locale=ASCII)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: ")
    assert b"expected a path in the encoding of the locale, ascii" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert not list(tmp_path.iterdir())
    checkpoints.check_path(tmp_path / "größe")


@pytest.mark.parametrize("module", ["table2", "table3", "table4", "table5", "figure2", "report"])
def test_every_command_prepares_the_terminal(module, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    command = __import__(f"experiments.{module}", fromlist=["main"])
    with pytest.raises(SystemExit):
        command.main(["--help"])
    print("70 ± 1 × τ ≤ 3, é")
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue()
    assert printed.endswith(b"70 +/- 1 x tau <= 3, ?\n")
    assert f"python -m experiments.{module}".encode() in printed


def test_undecodable_bytes_of_a_file_name_are_printed_as_they_are():
    name = b"\xff\xe4".decode("utf-8", "surrogateescape")
    for encoding in ("ascii", "utf-8"):
        assert name.encode(encoding, terminal.ERRORS) == b"\xff\xe4"
    assert terminal.as_unicode(name) == "��"
    assert datasets.name_of("größe.npz") == "größe"
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("ascii", terminal.ERRORS)


@pytest.mark.parametrize("name", [runs.ROWS, runs.SETTINGS, summary.NOTES])
def test_a_file_in_another_encoding_is_one_clear_line(finished, name):
    options, out = finished
    (out / name).write_bytes(b"Gr\xf6\xdfe")
    with pytest.raises(SystemExit, match=f"^error: .*{name}: not in UTF-8"):
        table2.main(options)


@pytest.mark.parametrize(
    "path",
    [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_text_files_have_an_explicit_encoding(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        called = ast.unparse(node) if isinstance(node, ast.Call) else ""
        own = called.startswith(("runs.", "read_text(", "write_text("))  # explicit inside
        if not own and called.partition("(")[0].endswith((".read_text", ".write_text")):
            assert "utf-8" in called, f"line {node.lineno}: {called}"
