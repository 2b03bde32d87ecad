"""Tables and pictures from stored results."""

import csv
import re

import numpy as np
import pytest

from experiments import report
from experiments.output import panels, runs, summary
from experiments.output.rows import ordered

VERSIONS = {"versions": {"jax": "1.2"}, "hardware": {"device": "NVIDIA H200"}}


def rows_of(seed, accuracy, validation, *, name="D-D Prox-SG", std=0.25):
    tags = {"dataset": "cifar10", "name": name, "seed": seed}
    epochs = [
        {"kind": "epoch", **tags, "epoch": k + 1, "validation_accuracy": value}
        for k, value in enumerate(validation)
    ]
    curve = {"layer": "last", "deterministic": False, "low": [1, 0.1]}
    curve |= {"middle": [2, 0.2], "high": [3, 0.3]}
    final = {"accuracy": accuracy, "std": std, "trials": 20, "epochs": 2, "batch_size": 128}
    final |= {"full_gradient_accuracy": None if std is None else accuracy + 1}
    final |= {"validation_accuracy": validation[-1], "paper_accuracy": 72.86, "paper_std": 0.177}
    final |= {"config": {"training": {"learning_rates": [0.01, 0.001], "augment": True}}}
    final |= VERSIONS
    rows = [*epochs, {"kind": "residuals", **tags, **curve}, {"kind": "final", **tags, **final}]
    return rows if std is not None else [row for row in rows if row["kind"] != "residuals"]


def summaries(rows):
    return summary.summarise(rows).to_dict("records")


@pytest.fixture
def folders(tmp_path):
    """Two runs of other seeds."""
    for seed, accuracy in ((0, 70.0), (1, 73.0)):
        rows = rows_of(seed, accuracy, [50.0 + seed, 60.0 + seed])
        rows += rows_of(seed, 60.0, [40.0, 55.0], name="D-D dropout", std=None)
        for row in rows:
            row["variant"], row["method"] = "D-D", row["name"].split()[1].lower()
        runs.write_jsonl(tmp_path / str(seed) / "results.jsonl", rows)
    return [tmp_path / "0", tmp_path / "1"]


def test_spread_over_seeds_and_over_trials_are_apart(folders):
    solver, dropout = summaries(report.load(folders))
    assert solver["accuracy"] == 71.5
    np.testing.assert_allclose(solver["seed_std"], np.sqrt(4.5))
    assert solver["trial_std"] == 0.25
    assert solver["seeds"] == "0 1"
    assert solver["full_gradient_accuracy"] == 72.5
    np.testing.assert_allclose(solver["difference"], -1.36)
    np.testing.assert_allclose([solver["gain"], solver["gain_seed_std"]], [11.5, np.sqrt(4.5)])
    assert dropout["gain"] is None
    assert (dropout["seed_std"], dropout["trial_std"]) == (0.0, None)
    assert dropout["full_gradient_accuracy"] == 60.0
    # of one seed there is no spread
    assert summaries(report.load(folders[:1]))[0]["seed_std"] is None


def test_several_folders_make_one_page(folders, tmp_path, capsys):
    report.main([*map(str, folders), "--out", str(tmp_path / "all")])
    printed = capsys.readouterr().out
    assert "71.50 ± 2.121" in printed
    page = (tmp_path / "all" / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| D-D Prox-SG"))
    cells = [cell.strip() for cell in row.split("|")]
    for cell in ("72.86 ± 0.177", "71.50 ± 2.121", "0.250", "-1.36", "0 1", "NVIDIA H200"):
        assert cell in cells
    assert "2 epochs; batches of 128; 0.01, 0.001; crop and flip" in row
    with (tmp_path / "all" / "summary.csv").open() as file:
        assert [line["name"] for line in csv.DictReader(file)] == ["D-D Prox-SG", "D-D dropout"]
    for name in ("accuracy.png", "residual.png"):
        assert (tmp_path / "all" / name).read_bytes().startswith(b"\x89PNG")


def test_notes_are_kept_and_a_page_by_hand_is_too(folders):
    folder = folders[0]
    (folder / "NOTES.md").write_text("The archive was recompressed.\n")
    report.main([str(folder)])
    assert (folder / "README.md").read_text().endswith("The archive was recompressed.\n")
    (folder / "README.md").write_text("By hand.\n")
    report.main([str(folder)])
    assert (folder / "README.md").read_text() == "By hand.\n"


def test_curves_are_means_over_seeds(folders):
    drawn = panels.accuracy(report.load(folders))
    assert list(drawn) == ["D-D"]
    solver, dropout = drawn["D-D"]
    assert (solver.label, dropout.label) == ("Prox-SG", "dropout")
    np.testing.assert_array_equal(solver.y, [50.5, 60.5])
    np.testing.assert_array_equal(solver.band, [[50, 60], [51, 61]])
    assert (solver.dashed, dropout.dashed) == (False, True)


def test_earlier_rows_without_names(tmp_path):
    rows = rows_of(0, 70.0, [50.0, 60.0])
    for row in rows:
        del row["name"]
        row |= {"variant": "D-ND", "method": "prox-sg", "dataset": "digits"}
    (row,) = summaries(rows)
    assert row["name"] == "D-ND Prox-SG"
    # the paper's number is of another data set
    assert (row["paper_accuracy"], row["difference"]) == (None, None)


def test_folders_that_do_not_fit(folders, tmp_path):
    with pytest.raises(SystemExit, match=r"both hold D-D Prox-SG on cifar10 with seed 0"):
        report.main([*map(str, [folders[0], folders[0]]), "--out", str(tmp_path / "all")])
    with pytest.raises(SystemExit, match=r"nothing: has no results.jsonl"):
        report.main([str(tmp_path / "nothing")])


def test_gain_of_a_swapped_network_is_over_its_control():
    row = {"kind": "final", "dataset": "digits", "epochs": 1, "batch_size": 1, "parameters": 1}
    accuracies = {"baseline": (50.0, 40.0), "control": (52.0, 44.0), "prox-sg": (55.0, 49.0)}
    rows = [
        {**row, "name": arm, "arm": arm, "study": study, "seed": seed, "accuracy": accuracy + shift}
        for arm, pair in accuracies.items()
        for seed, accuracy in enumerate(pair)
        for study, shift in (("p0", 0.0), ("p0.5", -20.0))
    ]
    gains = {row["name"]: row["gain"] for row in summaries(rows)}
    assert gains == {"baseline": None, "control": None, "prox-sg": 4.0}


def test_gain_over_no_dropout_where_it_was_trained(folders, tmp_path):
    dropped = report.load(folders)
    assert "over no dropout" not in summary.page(dropped)
    rows = list(dropped)
    for seed, accuracy in ((0, 66.0), (1, 70.0)):
        plain = rows_of(seed, accuracy, [50.0, 60.0], name="D-D no dropout", std=None)
        rows += [{**row, "variant": "D-D", "method": "none"} for row in plain]
    found = {row["name"]: row for row in summaries(rows)}
    gains = {name: (row["gain"], row["gain_over_none"]) for name, row in found.items()}
    assert gains == {
        "D-D Prox-SG": (11.5, 3.5),
        "D-D dropout": (None, -8.0),
        "D-D no dropout": (8.0, None),
    }
    np.testing.assert_allclose(found["D-D dropout"]["gain_over_none_std"], np.sqrt(8))
    summary.write(tmp_path, rows)
    page = (tmp_path / "README.md").read_text()
    assert re.search(r"\| D-D Prox-SG .*\| 11.50 ± 2.121 +\| 3.50 ± 0.707 +\|", page)
    assert "Over no dropout" in page
    with (tmp_path / "summary.csv").open() as file:
        assert [row["gain_over_none"] for row in csv.DictReader(file)] == ["3.5", "-8.0", ""]


def test_a_seed_that_diverged_leaves_no_mean(folders):
    rows = report.load(folders)
    for row in rows:
        if row["kind"] == "final" and row["seed"] == 1 and row["method"] == "prox-sg":
            row |= dict.fromkeys(("accuracy", "full_gradient_accuracy", "std"))
            del row["validation_accuracy"]
    solver, dropout = summaries(rows)
    for key in ("accuracy", "seed_std", "validation_accuracy", "difference", "gain"):
        assert solver[key] is None
    assert solver["diverged"] == "diverged 1 of 2"
    assert dropout["accuracy"] == 60.0
    words = summary.table(rows).splitlines()[2].split()
    assert " ".join(words) == "D-D Prox-SG diverged 1 of 2 72.86 ± 0.177"
    assert panels.accuracy(rows)["D-D"][0].label == "Prox-SG, diverged 1 of 2"


def test_a_gain_over_a_baseline_that_diverged_is_none(folders):
    rows = report.load(folders)
    for row in rows:
        if row["kind"] == "final" and row["seed"] == 1 and row["method"] == "dropout":
            row["accuracy"] = None
    assert [row["gain"] for row in summaries(rows)] == [None, None]


def test_every_folder_below_is_redrawn(folders, tmp_path, capsys, monkeypatch):
    rows = [row for row in runs.read_rows(folders[1] / runs.ROWS) if row["kind"] == "final"]
    runs.write_jsonl(folders[1] / runs.ROWS, rows)
    for name in ("table2.csv", "residual.png"):
        (folders[1] / name).write_text("of an earlier revision")
    monkeypatch.setattr(report, "STORED", tmp_path)
    report.main([])
    printed = capsys.readouterr().out
    assert printed.count("written to") == 2
    for folder in folders:
        assert (folder / "README.md").read_text().startswith(summary.MARK)
        assert (folder / "summary.csv").exists()
    assert (folders[0] / "residual.png").read_bytes().startswith(b"\x89PNG")
    # what cannot be drawn any more is kept, and said
    assert (folders[1] / "residual.png").read_text() == "of an earlier revision"
    assert f"{folders[1] / 'residual.png'}: kept" in printed
    assert not (folders[1] / "table2.csv").exists()


def rates_of(seed, rate, accuracy, arm="prox-sg"):
    name = f"LeNet p = {rate:g} {arm}"
    row = {"dataset": "toy", "study": f"p{rate:g}", "arm": arm, "name": name, "seed": seed}
    epoch = {"kind": "epoch", **row, "epoch": 1, "validation_accuracy": accuracy}
    return [epoch, {"kind": "final", **row, "accuracy": accuracy, "config": {"rate": rate}}]


def test_rates_ascend_with_a_band_over_seeds(tmp_path):
    rows = []
    for seed in (0, 1):
        for rate in (0.95, 0.0, 0.5):
            rows += rates_of(seed, rate, 50.0 + 10 * rate + 4 * seed, "baseline")
            rows += rates_of(seed, rate, 60.0 + 10 * rate + 2 * seed)
    rows[-1]["accuracy"] = None  # p = 0.5 of the second seed
    rows = ordered(rows)
    assert list(panels.accuracy(rows)) == ["LeNet p = 0", "LeNet p = 0.5", "LeNet p = 0.95"]
    plain, solver = panels.rates(rows)
    np.testing.assert_array_equal(plain.x, [0, 0.5, 0.95])
    np.testing.assert_allclose(plain.y, [52, 57, 61.5])
    np.testing.assert_allclose(plain.band, [[50, 55, 59.5], [54, 59, 63.5]])
    np.testing.assert_allclose(solver.y, [61, np.nan, 70.5])
    assert (plain.label, plain.dashed, solver.label) == ("baseline", True, "prox-sg")
    runs.write_jsonl(tmp_path / runs.ROWS, rows)
    report.main([str(tmp_path)])
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert "\n# LeNet on toy\n" in (tmp_path / "README.md").read_text()


def test_a_label_has_one_colour_in_all_pictures(folders):
    rows = report.load(folders)
    rows = [*rows[4:], *rows[:4]]  # dropout before the solver
    colors = {
        curve.label.split(",")[0]: curve.color
        for drawn in (panels.accuracy(rows), panels.residuals(rows))
        for curves in drawn.values()
        for curve in curves
    }
    assert colors == {"dropout": 0, "Prox-SG": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1}', "line 1: expected a kind among epoch, residuals, final, got None"),
        ('{"kind": "final", "dataset": "toy"}', "line 1 lacks seed, accuracy, name"),
        ("[1]", "line 1 is not a JSON object"),
        ("", "has no finished network"),
    ],
)
def test_damaged_rows_are_one_clear_line(tmp_path, line, message):
    (tmp_path / runs.ROWS).write_text(line)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        report.main([str(tmp_path)])


def test_progress_of_comparisons_with_backpropagation(tmp_path):
    rows = []
    for seed in (0, 1):
        for method, accuracy in (("backpropagation", 30.0), ("exact", 40.0)):
            each = rows_of(seed, accuracy + seed, [20.0, accuracy], name=f"MLP {method}", std=None)
            for row in each:
                row |= {"method": method, "paper_accuracy": None, "paper_std": None}
                if row["kind"] == "epoch":
                    row |= {"train_loss": 2.0 / row["epoch"], "seconds": 10.0 * row["epoch"] + seed}
            rows += each
    drawn = panels.progress(rows)
    assert list(drawn) == ["training loss", "validation accuracy (%)"]
    plain, exact = drawn["validation accuracy (%)"]["seconds"]
    assert (plain.label, plain.dashed, exact.dashed) == ("backpropagation", True, False)
    np.testing.assert_array_equal(exact.x, [10.5, 20.5])
    np.testing.assert_array_equal(exact.y, [20.0, 40.0])
    summary.write(tmp_path, rows)
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "README.md").read_text()
    assert "share memory" in page
    assert re.search(r"\| 10.00 ± 0.000 +\|", page)  # the gain
    others = [row for row in rows if row["method"] == "exact"]
    assert panels.progress(others) == {}
