"""Tables 3 to 5 from end to end on a handful of images, and what they share."""

import contextlib
import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path

import events
import jax
import numpy as np
import pytest
import tyro
from archives import files_under
from flax import nnx

from experiments import data, networks, table2, table3, table4, table5
from experiments.data import datasets
from experiments.networks import BlockConfig, LeNet, LeNetConfig
from experiments.output import boards, runs, summary
from experiments.training import evaluation, finetune, loop

HANDFUL = [
    "--epochs",
    "1",
    "--finetune-epochs",
    "1",
    "--batch-size",
    "8",
    "--trials",
    "2",
    "--width",
    "0.03",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A file of 16×16 images of two classes."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("npz") / "halves.npz"
    labels = np.arange(40) % 2
    pixels = rng.integers(0, 60, (40, 16, 16), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[8 * label : 8 * label + 8] += 150
    np.savez(path, images=pixels, labels=labels)
    return path


def run(module, images, out, *options):
    """The rows that a table wrote, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        module.main(["--dataset", str(images), "--out", str(out), *HANDFUL, *options])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return rows, printed.getvalue()


def finals(rows):
    return [row for row in rows if row["kind"] == "final"]


@pytest.fixture(scope="module")
def lenet_rows(images, tmp_path_factory):
    """One run of table 5 with the LeNet."""
    out = tmp_path_factory.mktemp("table5") / "out"
    with jax.enable_x64(False):
        rows, printed = run(
            table5, images, out, "--network", "lenet", "--rates", "0.5", "--num-iters", "2"
        )
    return out, rows, printed


def test_test_images_are_read_once_after_the_training(images, tmp_path, monkeypatch):
    happened, train, evaluate = [], loop.train, evaluation.evaluate

    def recorded_train(*args, **options):
        trained = train(*args, **options)
        happened.append("trained")
        return trained

    def recorded_evaluate(model, split, data, *, deterministic=False, **options):
        if split is data.test:
            happened.append("full gradient" if deterministic else "tested")
        return evaluate(model, split, data, deterministic=deterministic, **options)

    monkeypatch.setattr(loop, "train", recorded_train)
    monkeypatch.setattr(evaluation, "evaluate", recorded_evaluate)
    options = ("--network", "lenet", "--rates", "0.5", "--num-iters", "2")
    run(table5, images, tmp_path / "out", *options)
    plain = ["trained", "tested"]
    assert happened == [*plain, *plain, *plain, "full gradient"]
    # what is finished is not tested again
    run(table5, images, tmp_path / "out", *options)
    assert happened[7:] == []


def test_table5_rows_files_and_print(lenet_rows, images):
    out, rows, printed = lenet_rows
    assert [row["arm"] for row in finals(rows)] == ["baseline", "control", "prox-sg"]
    # the finetuning epochs follow those of the baseline
    epochs = [(row["arm"], row["epoch"]) for row in rows if row["kind"] == "epoch"]
    assert epochs == [("baseline", 1), ("control", 2), ("prox-sg", 2)]
    for row in finals(rows):
        sampled = row["arm"] == "prox-sg"
        assert (row["trials"], row["std"] is not None) == ((2, True) if sampled else (1, False))
        assert (row["validation_std"] is not None) == sampled
        rates = row["config"]["training"]["learning_rates"]
        assert rates == ([1e-2, 1e-3, 1e-4] if row["arm"] == "baseline" else [1e-3, 1e-4])
        assert row["config"]["rate"] == 0.5
        assert row["paper_accuracy"] is None
        assert row["versions"]["jax"]
        assert 0 <= row["accuracy"] <= 100
    assert len({row["parameters"] for row in finals(rows)}) == 1
    for name in ("accuracy.png", "rates.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    with (out / summary.CSV).open() as file:
        assert [line["name"] for line in csv.DictReader(file)] == [
            "LeNet p = 0.5 baseline",
            "LeNet p = 0.5 baseline, finetuned",
            "LeNet p = 0.5 Prox-SG",
        ]
    for path in (out / "results.jsonl", out / "config.json", out / summary.PAGE):
        assert str(images.parent) not in path.read_text()
    assert "LeNet p = 0.5 Prox-SG" in printed
    assert "The paper has no numbers for this network on halves." in printed


def test_a_stopped_run_goes_on(lenet_rows, images, tmp_path, monkeypatch):
    out, rows, _ = lenet_rows
    before = (out / "results.jsonl").read_text()
    options = ("--network", "lenet", "--rates", "0.5", "--num-iters", "2")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", None)  # nothing is trained again
        run(table5, images, out, *options)
    assert (out / "results.jsonl").read_text() == before

    # without the last network's rows and checkpoint, only that network is trained, to the same end
    kept = [line for line in before.splitlines() if '"prox-sg"' not in line]
    (tmp_path / "results.jsonl").write_text("\n".join(kept) + "\n")
    (tmp_path / "config.json").write_text((out / "config.json").read_text())
    again, printed = run(table5, images, tmp_path, *options)
    assert "baseline, seed 0:" not in printed

    def score(rows):
        return [row["accuracy"] for row in finals(rows)]

    assert score(again) == score(rows)

    with pytest.raises(SystemExit, match=r"^error: .*another run.*decay"):
        run(table5, images, out, *options, "--decay", "0.5")


def test_table3_from_end_to_end(images, tmp_path):
    rows, _ = run(table3, images, tmp_path / "3", "--num-iters", "2")
    assert [row["name"] for row in finals(rows)] == [
        "AlexNet baseline",
        "AlexNet baseline, finetuned",
        "AlexNet Prox-GD",
    ]
    assert len({row["parameters"] for row in finals(rows)}) == 1
    assert all(row["std"] is None for row in finals(rows))


def test_table4_from_end_to_end(images, tmp_path):
    out = tmp_path / "4"
    options = ("--num-iters", "2", "--methods", "prox-sg", "--no-batch-norm", "--tensorboard")
    rows, printed = run(table4, images, out, *options)
    arms = ["baseline", "control", "prox-sg-ND-D", "prox-sg-D-D"]
    names = ["baseline", "baseline, finetuned", "Prox-SG ND-D", "Prox-SG D-D"]
    names = [f"VGG16 {name}" for name in names]
    assert [row["arm"] for row in finals(rows)] == arms
    assert [row["name"] for row in finals(rows)] == names
    marks = [row["config"].get("marks") for row in finals(rows)]
    assert marks == [None, None, "ND-D", "D-D"]
    assert len({row["parameters"] for row in finals(rows)}) == 1
    for row in finals(rows):
        sampled = row["arm"] not in ("baseline", "control")
        assert (row["trials"], row["std"] is not None) == ((2, True) if sampled else (1, False))
        assert (row["full_gradient_accuracy"] is not None) == sampled
        assert 0 <= row["accuracy"] <= 100
        assert row["config"]["network"]["width"] == 0.03
        assert row["paper_accuracy"] is None
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [(row["arm"], row["epoch"]) for row in epochs] == list(
        zip(arms, (1, 2, 2, 2), strict=True)
    )

    page = (out / summary.PAGE).read_text()
    lines = [line.strip("| ") for line in page.splitlines() if line.startswith("| VGG16")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert [line[0] for line in cells] == names
    for line, row in zip(cells, finals(rows), strict=True):
        assert line[2] == f"{row['accuracy']:.2f}"
        gain = row["accuracy"] - finals(rows)[1]["accuracy"]
        assert line[7] == ("" if row["std"] is None else f"{gain:.2f}")
        schedule = "1 epochs" if row["arm"] == "baseline" else "1 + 1 epochs"
        assert line[8].startswith(f"{schedule}; batches of 8; ")
    assert all(name in printed for name in names)

    # the curves say what the rows say
    for row, epoch in zip(finals(rows), epochs, strict=True):
        folder = out / runs.BOARDS / f"vgg16-{row['arm']}-seed0"
        points = {tag: (epoch["epoch"], epoch[key]) for key, tag in boards.TAGS.items()}
        points[boards.TEST] = (epoch["epoch"], row["accuracy"])
        found = {tag: (step, value) for tag, step, value in events.read(folder)}
        assert found.keys() == points.keys()
        for tag, point in points.items():
            np.testing.assert_allclose(found[tag], point, rtol=1e-6)


def test_table4_swaps_what_it_says(images):
    methods = ("prox-sg", "prox-gd", "none", "prox-gd-no-dropout")
    config = table4.Config(dataset="halves.npz", width=0.03, num_iters=2, methods=methods)
    dataset = datasets.load(str(images), images.parent, seed=0)
    (study,) = table4.studies(config, dataset)

    def swapped(arm):
        model = study.build(nnx.Rngs(0))
        arm.swap(model, nnx.Rngs(1))
        return model

    names, rates = {}, {}
    for arm in study.arms:
        model = nnx.eval_shape(lambda arm=arm: swapped(arm))
        layers = (model.penultimate, model.last)
        names[arm.name] = tuple(type(layer).__name__ for layer in layers)
        for layer in layers:
            if hasattr(layer, "dropout"):
                rates.setdefault(arm.name, []).append(layer.dropout.rate)
            solver = networks.solver_of(layer)
            if solver is not None and solver.solver.stochastic:
                assert solver.solver.tau == 0.5
    assert names == {
        "prox-sg-ND-D": ("DropoutReLU", "SolverLinear"),
        "prox-sg-D-D": ("SolverLinear", "SolverLinear"),
        "prox-gd-D-D": ("DropoutSolver", "DropoutSolver"),
        "none-ND-D": ("DropoutReLU", "DropoutReLU"),
        "none-D-D": ("DropoutReLU", "DropoutReLU"),
        "prox-gd-no-dropout-D-D": ("DropoutSolver", "DropoutSolver"),
    }
    assert rates == {
        "prox-sg-ND-D": [0.5],
        "prox-gd-D-D": [0.5, 0.5],
        "none-ND-D": [0.5, 0.0],
        "none-D-D": [0.0, 0.0],
        "prox-gd-no-dropout-D-D": [0.0, 0.0],
    }


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        *(("vgg16", "last"), ("alexnet", "last"), ("lenet", "last")),
        *(("vgg16", "penultimate"), ("lenet", "penultimate")),
    ],
)
def test_table5_marks_the_layer(network, layer, images):
    dataset = datasets.load(str(images), images.parent, seed=0)
    config = table5.Config(network=network, layer=layer, rates=(0.9,), width=0.05)
    (study,) = table5.studies(config, dataset)
    model = nnx.eval_shape(lambda: study.build(nnx.Rngs(0)))
    assert getattr(model, layer).dropout.rate == 0.9
    if network != "alexnet":
        other = {"last": model.penultimate, "penultimate": model.last}[layer]
        assert other.dropout.rate == (0.5 if network == "vgg16" else 0.0)
    (arm,) = study.arms
    swapped = nnx.eval_shape(lambda: finetune.swapped(study.build(nnx.Rngs(0)), arm)(nnx.Rngs(1)))
    assert networks.solver_of(getattr(swapped, layer)).solver.tau == pytest.approx(0.1)


def test_the_papers_numbers_stand_where_they_are_comparable():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    split = data.Split(images, np.zeros(4, np.int32))
    statistics = (np.zeros(3, np.float32), np.ones(3, np.float32))
    names = tuple(map(str, range(100)))

    def papers(module, config, dataset="cifar100"):
        these = data.Dataset(Path(dataset).stem, split, split, split, names, *statistics)
        return [
            paper
            for study in module.studies(dataclasses.replace(config, dataset=dataset), these)
            for paper in (study.paper, *(arm.paper for arm in study.arms))
        ]

    assert papers(table3, table3.Config(width=1.0)) == [(44.20, None), (45.53, None)]
    assert papers(table3, table3.Config(width=0.5)) == [None, None]
    assert papers(table3, table3.Config(width=1.0), "own/cifar100.npz") == [None, None]
    expected = [(70.27, None), (70.95, 0.042), (70.44, 0.077), (71.10, None)]
    assert papers(table4, table4.Config(width=1.0)) == expected
    assert papers(table4, table4.Config(width=1.0), "digits") == [None] * 4
    assert papers(table5, table5.Config(width=1.0))[-2:] == [(30.61, None), (67.42, 0.0774)]
    assert papers(table5, table5.Config(width=1.0, network="lenet")) == [None] * 10
    assert papers(table5, table5.Config(width=1.0, layer="penultimate")) == [None] * 10
    assert papers(table5, table5.Config(width=1.0), "cifar10") == [None] * 10


def test_finetuning_leaves_the_baseline_alone(images):
    dataset = datasets.load(str(images), images.parent, seed=0)
    config = LeNetConfig(dataset.image_shape, 2, "ND-D", BlockConfig("dropout"))
    baseline = nnx.jit(lambda: LeNet(config, rngs=nnx.Rngs(0)))()
    before = parameters(baseline)

    def swap(model, rngs):
        model.last = networks.swap_hidden(model.last, BlockConfig(num_iters=2), rngs=rngs)

    optimiser = loop.TrainConfig(epochs=1, batch_size=8, learning_rates=(0.1,))
    build = finetune.swapped(baseline, finetune.Arm("swap", "swap", swap))
    for mine, theirs in zip(before, parameters(build(nnx.Rngs(0))), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    trained = loop.train(build, dataset, optimiser, label="test").model
    for mine, theirs in zip(before, parameters(trained), strict=True):
        assert np.any(mine != theirs)
    for mine, theirs in zip(before, parameters(baseline), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def parameters(model):
    """In an order that a swap keeps."""
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def test_a_diverging_swap_is_a_row(images, tmp_path, monkeypatch):
    train = loop.train

    def diverging(build, dataset, config, *, label, **options):
        if "Prox-SG" in label:
            raise loop.DivergenceError(f"{label}: the loss is nan at step 3.", 0)
        return train(build, dataset, config, label=label, **options)

    monkeypatch.setattr(loop, "train", diverging)
    options = ("--network", "lenet", "--rates", "0.5", "--num-iters", "2")
    with pytest.raises(SystemExit, match=r"^error: diverged: LeNet p = 0.5 Prox-SG, seed 0$"):
        run(table5, images, tmp_path, *options)
    rows = runs.read_rows(tmp_path / runs.ROWS)
    assert finals(rows)[-1]["accuracy"] is None
    assert "nan at step 3" in finals(rows)[-1]["error"]


def test_nothing_goes_on_from_a_baseline_that_diverged(images, tmp_path, monkeypatch):
    labels = []

    def diverging(build, dataset, config, *, label, **options):
        labels.append(label)
        raise loop.DivergenceError(f"{label}: the loss is nan at step 3.", 0)

    monkeypatch.setattr(loop, "train", diverging)
    options = ("--network", "lenet", "--rates", "0.9", "0.5")
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"p = 0.9 baseline, seed 0; LeNet p"):
            run(table5, images, tmp_path, *options)
    assert labels == ["LeNet p = 0.9 baseline", "LeNet p = 0.5 baseline"]


def test_a_folder_belongs_to_one_data_set(lenet_rows, images, tmp_path):
    """By what the file holds; where it lies is of no matter."""
    out, rows, _ = lenet_rows
    options = ("--network", "lenet", "--rates", "0.5", "--num-iters", "2")
    elsewhere = tmp_path / "halves.npz"
    shutil.copy(images, elsewhere)
    assert run(table5, elsewhere, out, *options)[0] == rows
    with np.load(images) as file:
        arrays = dict(file)
    arrays["images"][0, 0, 0] ^= 1
    np.savez(elsewhere, **arrays)
    with pytest.raises(SystemExit, match=r"^error: .*another run: data_sha256 is \w+… there"):
        run(table5, elsewhere, out, *options)


def test_a_folder_is_written_by_one_command(images, tmp_path):
    message = f"^error: {tmp_path}: another command is writing there$"
    with runs.locked(tmp_path), pytest.raises(SystemExit, match=message):
        run(table3, images, tmp_path)
    with runs.locked(tmp_path):  # it is released
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [table2, table3, table5])
def test_images_too_small_are_one_clear_line(module, tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, images=np.zeros((40, 7, 7), np.uint8), labels=np.arange(40) % 2)
    options = ["--dataset", str(path), "--out", str(tmp_path / "out"), "--batch-size", "8"]
    message = r"^error: tiny: image_shape: expected at least (8×8|16×16) pixels, got \(7, 7, 1\)$"
    with pytest.raises(SystemExit, match=message):
        module.main(options)
    assert not (tmp_path / "out").exists()


def test_the_table_separates_seeds_from_trials():
    rows = [
        {
            **{"kind": "final", "dataset": "toy", "study": "s", "arm": arm, "name": arm},
            **{"seed": seed, "accuracy": accuracy, "std": std, "full_gradient_accuracy": None},
            **{"validation_accuracy": 1.0, "paper_accuracy": None, "paper_std": None},
            **{"epochs": 1, "finetune_epochs": 1},
        }
        for seed in (0, 1)
        for arm, accuracy, std in (
            ("control", 50.0 + seed, None),
            ("prox-sg", 53.0 + 2 * seed, 0.25),
        )
    ]
    lines = summary.table(rows).splitlines()
    control = "control 50.50 ± 0.707 50.50 ± 0.707 1.00 ± 0.000"
    assert lines[2].split() == control.split()
    solver = "prox-sg 54.00 ± 1.414 0.250 54.00 ± 1.414 1.00 ± 0.000 3.50 ± 0.707"
    assert lines[3].split() == solver.split()
    assert "± beside a number is over seeds" in "\n".join(lines)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (table3, ["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (table3, ["--num-iters", "0"], "num_iters: expected at least 1"),
        (table3, ["--methods", "prox-sg"], "prox-sg"),
        (table4, ["--methods", "dropout"], "expected at least one solver and no dropout"),
        (table4, ["--decay", "1.5"], "decay: expected a factor"),
        (table4, ["--variants"], "variants: expected at least one"),
        (table4, ["--width", "-1"], "width: expected a positive factor"),
        (table5, ["--rates", "1.0"], "rates: expected dropout rates"),
        (table5, ["--network", "alexnet", "--layer", "penultimate"], "layer: expected last for"),
        (table5, ["--finetune-learning-rate", "0"], "finetune_learning_rate: expected a positive"),
        (table5, ["--seeds", "1", "1"], "seeds: expected at least one, not negative, each once"),
    ],
)
def test_bad_options(module, options, message, capsys):
    with pytest.raises(SystemExit):
        module.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, (1e-3, 1e-4)),
        ({"learning_rate": 0.03}, (3e-3, 3e-4)),
        ({"finetune_learning_rate": 5e-3}, (5e-3, 5e-4)),
    ],
)
def test_learning_rates_of_finetuning(options, rates):
    filled = table5.Config(dataset="cifar10", **options).filled()
    assert filled.finetune_config(4) == loop.TrainConfig(epochs=200, learning_rates=rates, seed=4)


@pytest.mark.parametrize("module", [table3, table4, table5])
def test_unknown_data_is_one_clear_line(module, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: dataset: expected digits, .*, got mnist$"):
        module.main(["--dataset", "mnist", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^error: absent\.npz: no such file$"):
        module.main(["--dataset", "absent.npz", "--out", str(tmp_path / "out")])
    assert files_under(tmp_path) == set()


def test_a_smoke_run_is_small():
    options = table5.Config(smoke=True).filled()
    assert (options.epochs, options.width, options.rates) == (2, 0.125, table5.SMOKE_RATES)
    given = table5.Config(smoke=True, epochs=5, rates=(0.1,)).filled()
    assert (given.epochs, given.rates) == (5, (0.1,))
    assert table4.Config(smoke=True).filled().variants == table4.SMOKE_VARIANTS
    assert table4.Config(smoke=True).filled().methods == table4.SMOKE_METHODS
    assert table4.Config(smoke=True, variants=("ND-D",)).filled().variants == ("ND-D",)
    both = tyro.cli(table4.Config, args=["--smoke", "--methods", "prox-sg", "prox-gd"]).filled()
    assert (both.methods, both.variants) == (("prox-sg", "prox-gd"), table4.SMOKE_VARIANTS)
    full = table4.Config(dataset="cifar100").filled()
    assert full.variants == ("ND-D", "D-D")
    assert (full.epochs, full.finetune_epochs, full.batch_size, full.width) == (300, 200, 128, 1.0)
