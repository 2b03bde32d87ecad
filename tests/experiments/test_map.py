"""The map: what is trained, what is chosen, and one run from end to end."""

import contextlib
import io
import re

import numpy as np
import pytest

from experiments import map as command
from experiments import report
from experiments.data import Dataset, Split
from experiments.networks import BlockConfig
from experiments.output import maps, runs, summary
from experiments.training import loop

METHODS = {"none": "no dropout", "dropout": "dropout", "prox-sg": "Prox-SG", "ms2gd": "mS2GD"}


def dataset():
    images = Split(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int32))
    return Dataset("toy", images, images, images, ("a", "b"), np.zeros(3), np.ones(3))


def test_what_is_trained():
    config = command.Config(dataset="cifar10", widths=(1.0, 2.0)).filled()
    assert config.schedules == (15, 60)
    lenets = list(config.lenets(dataset()))
    assert [lenet.width for lenet in lenets] == [1.0] * 10 + [2.0] * 10
    blocks = [(lenet.block.method, lenet.block.rate) for lenet in lenets[:10]]
    assert blocks == [
        ("none", 0.0),
        *(("dropout", rate) for rate in (0.1, 0.2, 0.3, 0.5)),
        *((method, rate) for method in ("prox-sg", "ms2gd") for rate in (0.5, 0.1)),
        ("prox-gd-no-dropout", 0.0),
    ]
    networks = [command.network(config, lenet, 60) for lenet in lenets]
    assert len({(n.name, *n.tags.values()) for n in networks}) == len(networks)
    assert networks[6].name == "LeNet ×1, 60 epochs Prox-SG τ = 0.9 n"
    assert networks[6].tags == {"study": "width1-epochs60", "arm": "prox-sg-0.9"}
    assert (networks[6].final["tau"], networks[1].final["dropout_rate"]) == (0.9, 0.1)
    assert networks[6].optimiser(3).epochs == 60
    assert BlockConfig("prox-sg", rate=0.1).solver().tau == 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "0"], "widths: expected positive factors"),
        (["--schedules", "0"], "schedules: expected at least 1 epoch"),
        (["--rates", "1"], "rates: expected dropout rates"),
        (["--taus", "0"], "taus: expected fractions"),
        (["--methods"], "methods: expected at least one"),
        (["--epochs", "3"], "epochs"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        command.main(options)
    assert message in capsys.readouterr().err


def rows_of(method, parameter, validation, test, *, seconds=1.0, full=None, epochs=15):
    """Rows of one network of width 1 from as many seeds as there are accuracies."""
    tau = parameter if method not in ("none", "dropout") else None
    rate = parameter if method == "dropout" else None
    text = f" p = {rate}" if rate else f" τ = {tau} n" if tau else ""
    rows = []
    for seed, accuracy in enumerate(test):
        tags = {"dataset": "toy", "name": f"LeNet ×1, {epochs} epochs {METHODS[method]}{text}"}
        tags |= {"study": f"width1-epochs{epochs}", "arm": f"{method}-{parameter}", "seed": seed}
        tags["arm"] = tags["arm"].removesuffix("-None")
        for epoch, elapsed in enumerate((9.0, 9.0 + seconds, 9.0 + 2 * seconds), start=1):
            about = {"epoch": epoch, "validation_accuracy": validation[seed], "seconds": elapsed}
            rows.append({"kind": "epoch", **tags, **about})
        final = {"method": method, "width": 1.0, "epochs": epochs, "dropout_rate": rate, "tau": tau}
        final |= {"accuracy": accuracy, "validation_accuracy": validation[seed]}
        if full is not None:
            final |= {"validation_full_gradient_accuracy": full[0], "std": 0.1}
            final |= {"full_gradient_accuracy": full[1][seed]}
        rows.append({"kind": "final", **tags, **final})
    return rows


def a_cell(epochs=15, shift=0.0):
    full = (66.0, (65.0 + shift, 66.0 + shift))
    return [
        *rows_of("none", None, (60.0, 62.0), (61.0, 63.0), epochs=epochs),
        *rows_of("dropout", 0.1, (61.0, 63.0), (62.0, 62.5), seconds=1.1, epochs=epochs),
        *rows_of("dropout", 0.5, (50.0, 50.0), (99.0, 99.0), epochs=epochs),
        *rows_of("prox-sg", 0.5, (60.0, 60.0), (90.0, 91.0), seconds=2, full=full, epochs=epochs),
        *rows_of("prox-sg", 0.9, (64.0, 64.0), (64.0, 64.5), epochs=epochs),
        *rows_of("ms2gd", 0.5, (65.0, 65.0), (62.0, 62.0), seconds=4.0, epochs=epochs),
    ]


def test_the_validation_images_choose():
    (cell,) = maps.cells(a_cell())
    assert {method: network.parameter for method, network in cell.chosen.items()} == {
        **{"none": "", "dropout": "p = 0.1"},
        **{"prox-sg": "τ = 0.5 n", "ms2gd": "τ = 0.5 n"},
    }
    assert cell.solver is cell.chosen["prox-sg"]
    assert cell.solver.label == "Prox-SG τ = 0.5 n, full gradient"
    assert (cell.solver.test, cell.time(cell.solver)) == ({0: 65.0, 1: 66.0}, 2.0)
    none, dropout = cell.controls
    np.testing.assert_allclose(cell.solver.gains(none), [4.0, 3.0])
    np.testing.assert_allclose(cell.solver.gains(dropout), [3.0, 3.5])
    # none and dropout are 62 and 62.25 in the mean
    np.testing.assert_allclose(cell.gains(cell.solver), [3.0, 3.5])
    np.testing.assert_allclose(cell.gains(dropout), [0.0, 0.0])
    np.testing.assert_allclose(cell.gains(none), [-1.0, 0.5])
    assert cell.pays(cell.solver)
    assert not cell.pays(cell.chosen["ms2gd"])
    assert not cell.pays(dropout)


def test_the_page_says_where_a_solver_pays(tmp_path, capsys):
    rows = [*a_cell(), *a_cell(epochs=60, shift=-3.5)]
    runs.write_jsonl(tmp_path / runs.ROWS, rows)
    report.main([str(tmp_path)])
    assert "In 1 of 2 cells of the map, the solver" in capsys.readouterr().out
    page = (tmp_path / "README.md").read_text()
    assert "In 1 of 2 cells of the map, the solver" in page
    lines = [re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if "| ×" in line]
    first, second = lines
    assert first == [
        *("LeNet ×1, 15 epochs", "Prox-SG τ = 0.5 n, full gradient", "65.50"),
        *("+3.50 (+3.00 to +4.00)", "+3.25 (+3.00 to +3.50)", "0.1", "× 2.00", "yes"),
    ]
    assert second[-1] == "no"
    for name in ("map.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    by_name = {row["name"]: row for row in summary.summarise(rows).to_dict("records")}
    chosen = by_name["LeNet ×1, 15 epochs Prox-SG τ = 0.9 n"]
    assert (chosen["gain_over_none"], chosen["gain"], chosen["epoch_seconds"]) == (2.25, 2.0, 1.0)
    nowhere = maps.cells(a_cell(shift=-3.5))
    assert maps.sentence(nowhere).startswith("In no cell of the map")


def test_what_diverged_or_is_missing_is_not_chosen(tmp_path):
    rows = a_cell()
    for row in rows:
        if row["kind"] == "final" and row["arm"] == "prox-sg-0.5" and row["seed"] == 1:
            row["accuracy"] = None
    (cell,) = maps.cells(rows)
    assert cell.chosen["prox-sg"].parameter == "τ = 0.9 n"
    assert cell.solver is cell.chosen["ms2gd"]
    without = [row for row in rows if row["arm"] != "none"]
    assert maps.sentence(maps.cells(without)) == (
        "No cell of the map has both controls and a solver."
    )
    summary.write(tmp_path, without)
    assert "No cell of the map" in (tmp_path / "README.md").read_text()
    assert maps.cells([{"kind": "final", "dataset": "toy", "name": "a", "seed": 0}]) == []


def test_a_run_from_end_to_end(tiny_cifar, tmp_path, monkeypatch):
    options = "--dataset cifar10 --batch-size 30 --trials 2 --widths 0.25 --schedules 1 --rates 0.1"
    arguments = [*options.split(), "--data-dir", str(tiny_cifar), "--out", str(tmp_path / "out")]

    def run(*more):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            command.main([*arguments, *more])
        return printed.getvalue(), runs.read_rows(tmp_path / "out" / runs.ROWS)

    full = "prox-gd-no-dropout"
    printed, rows = run("--num-iters", "2", "--methods", "none", "dropout", full)
    assert "of the map, the solver that the validation images choose is ahead" in printed
    assert (tmp_path / "out" / "map.png").read_bytes().startswith(b"\x89PNG")
    (cell,) = maps.cells(rows)
    assert [network.method for network in cell.networks] == ["none", "dropout", full]
    assert cell.solver.seconds > 0
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
    # methods and τ can be added to the folder, and what is there is kept
    assert run("--num-iters", "2", "--taus", "0.9", "--methods", "none")[1] == rows
