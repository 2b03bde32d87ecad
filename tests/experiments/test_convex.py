"""The command of the convex programs: data matrices, descent, one run from end to end, its pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convex, data
from experiments.data import archive, vectors
from experiments.output import panels, runs, summary
from experiments.training import descent, nonconvex, programs


def blobs(count, rng):
    """Images (n, 6, 6, 1) of three classes, bright in the rows 2k and 2k + 1; the corner is constant."""
    labels = np.arange(count) % 3
    images = rng.integers(0, 90, (count, 6, 6, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 60
    images[:, 0, 0] = 7
    return data.Split(images, labels.astype(np.int32))


@pytest.fixture
def source(rng):
    return data.Source("blobs", blobs(150, rng), blobs(60, rng), ("up", "middle", "down"))


def test_rows_are_centred_scaled_and_have_a_constant(source):
    dataset = source.dataset(0)
    found = vectors.vectors(dataset)
    X, labels = found.train
    assert X.dtype == np.float32
    assert found.num_features == X.shape[1] == 36  # 35 pixels that vary, and the constant
    np.testing.assert_array_equal(X[:, -1], 1)
    np.testing.assert_allclose(X[:, :-1].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(X[:, :-1].std(axis=0).max(), 1, rtol=1e-6)
    np.testing.assert_array_equal(labels, dataset.train.labels)
    # the other splits in the units of the training images: differences of pixels over one number
    pixels = dataset.test.images.reshape(60, -1)[:, 1:].astype(float)
    ratio = np.diff(found.test[0][:, :-1], axis=0)[np.diff(pixels, axis=0) == 60]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_principal_components(source):
    dataset = source.dataset(0)
    X, Z = (vectors.vectors(dataset, c).train[0] for c in (None, 5))
    values = np.linalg.svd(X[:, :-1], compute_uv=False)[:5]
    np.testing.assert_allclose(np.linalg.norm(Z[:, :-1], axis=0), values, rtol=1e-4)
    np.testing.assert_allclose(Z[:, :-1].T @ Z[:, :-1], np.diag(values**2), atol=1e-2)
    with pytest.raises(archive.DataError, match=r"components: expected 1 to 35, got 36"):
        vectors.vectors(dataset, 36)


def test_classes_are_chosen_and_renumbered(source):
    pair = vectors.of_classes(source, (2, 0))
    assert pair.name == "blobs down/up"
    assert pair.classes == ("down", "up")
    for found, whole in ((pair.train, source.train), (pair.test, source.test)):
        kept = whole.labels != 1
        np.testing.assert_array_equal(found.images, whole.images[kept])
        np.testing.assert_array_equal(found.labels, whole.labels[kept] == 0)
    for classes in ((0,), (0, 3), (1, 1)):
        with pytest.raises(archive.DataError, match=r"two different numbers in 0\.\.2"):
            vectors.of_classes(source, classes)


def test_targets_and_predictions():
    labels = np.array([0, 1, 1])
    np.testing.assert_array_equal(vectors.targets(labels, 2), [-1, 1, 1])
    np.testing.assert_array_equal(vectors.targets(labels, 3), [[1, 0, 0], [0, 1, 1], [0, 0, 0]])
    assert vectors.accuracy(np.array([-0.1, 0.2, -3.0]), labels) == pytest.approx(200 / 3)
    scores = np.array([[0.5, 0.1, 0.9], [0.4, 0.2, 0.1]])
    assert vectors.accuracy(scores, labels) == pytest.approx(200 / 3)


def weights_and_data(rng, *, outputs=2, width=3, features=4, count=7):
    W, a = rng.normal(size=(outputs, width, features)), rng.normal(size=(outputs, width))
    X, y = rng.normal(size=(count, features)), rng.normal(size=(outputs, count))
    mask = rng.random((count, width)) < 0.5
    return W, a, X, y, mask


def test_objective_of_both_networks(rng):
    W, a, X, y, mask = weights_and_data(rng)
    weights = descent.Weights(*(jnp.asarray(w, jnp.float32) for w in (W, a)))
    beta = 0.3
    products = np.einsum("nd,cpd->cnp", X, W)
    for gates, neurons in ((None, np.maximum(products, 0)), (mask, products * mask)):
        f = np.einsum("cnp,cp->cn", neurons, a)
        expected = 0.5 * np.sum((f - y) ** 2) + beta / 2 * (np.sum(W**2) + np.sum(a**2))
        open_ = None if gates is None else jnp.asarray(gates)
        arrays = descent.Data(jnp.asarray(X, jnp.float32), jnp.asarray(y, jnp.float32), open_)
        np.testing.assert_allclose(descent.objective(weights, arrays, beta), expected, rtol=1e-5)


def test_a_step_of_sgd_is_one_on_the_mean(rng):
    """One batch of all data: momentum 0.9 with Nesterov's step is 1.9 times the gradient at first."""
    *_, X, y, mask = weights_and_data(rng)
    X, y = (jnp.asarray(value, jnp.float32) for value in (X, y))
    arrays = descent.Data(X, y, jnp.asarray(mask))
    trainer = descent.Trainer(arrays, 0.3, width=3, optimizer="sgd", batch_size=7)
    first_key, _ = jax.random.split(jax.random.key(5))
    before = descent.initial(first_key, arrays, 3)
    np.testing.assert_allclose(
        np.linalg.norm(before.hidden, axis=-1), np.abs(before.output), rtol=1e-5
    )
    (record,) = trainer(jax.random.key(5), 0.01, 1)
    gradient = jax.grad(lambda w: descent.objective(w, arrays, 0.3))(before)
    for new, old, slope in zip(record.weights, before, gradient, strict=True):
        np.testing.assert_allclose(new, old - 0.01 * 1.9 * slope / 7, atol=1e-5)
    assert record.seconds > trainer.compilation > 0


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A command with three classes, its folder and rows."""
    folder = tmp_path_factory.mktemp("convex")
    rng = np.random.default_rng(3)
    train, test = blobs(150, rng), blobs(60, rng)
    np.savez(
        folder / "blobs.npz",
        images=train.images,
        labels=train.labels,
        test_images=test.images,
        test_labels=test.labels,
    )

    def run(*options):
        common = f"--dataset {folder / 'blobs.npz'} --epochs 8 --batch-size 15 --width 8".split()
        rates = ["--adam-rates", "0.03", "--sgd-rates", "0.5", "1e9"]
        grids = ["--fractions", "0.1", "0.01", *rates, "--methods", "gated-adam", "sgd"]
        arguments = [*common, *grids, "--out", str(folder / "out"), *options]
        with jax.enable_x64(False):
            convex.main(arguments)
        return runs.read_rows(folder / "out" / runs.ROWS)

    return run, folder / "out", run()


def test_the_gated_program_bounds_gated_networks(command):
    *_, rows = command
    finals = {row["method"]: row for row in rows if row["kind"] == "final"}
    assert list(finals) == ["gated", "gated-adam", "sgd"]
    gated, adam, sgd = finals.values()
    assert 0 <= gated["objective"] - gated["lower_bound"] <= 1e-3 * gated["objective"]
    assert adam["objective"] > gated["lower_bound"] == adam["lower_bound"]
    assert 0 <= sgd["lower_bound"] <= sgd["objective"]
    assert gated["accuracy"] >= 80
    assert sgd["diverged_rates"] == pytest.approx([sgd["learning_rate"] * 2e9])
    assert {row["beta"] for row in finals.values()} == {gated["beta"]}
    path = gated["path"]
    assert [row["fraction"] for row in path] == [0.1, 0.01]
    assert gated["fraction"] == max(path, key=lambda row: row["validation_accuracy"])["fraction"]
    # a curve ends below its start, at the objective, and takes time
    for method, final in finals.items():
        curve = [row for row in rows if row["kind"] == "epoch" and row["method"] == method]
        assert curve[-1]["objective"] == final["objective"] < curve[0]["objective"]
        assert curve[-1]["seconds"] == final["train_seconds"] > 0


def test_a_run_is_resumed_and_drawn(command, monkeypatch, capsys):
    run, out, rows = command
    monkeypatch.setattr(programs, "prepared", lambda *_: pytest.fail("prepared again"))
    assert run() == rows
    for picture in ("descent.png", "path.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert not (out / "accuracy.png").exists()
    page = (out / "README.md").read_text()
    assert "TwoLayer8 on blobs" in page
    assert "lower bound" in page
    assert "relative gap" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds the results of another run"):
        run("--width", "9")


def test_rounds_of_a_relu_network_of_a_pair(source):
    pair = vectors.of_classes(source, (0, 2)).dataset(0)
    task = programs.prepared(pair, 0, 8)
    assert task.program.y.shape == (90,)
    beta = 0.03 * float(task.program.beta)
    trained = nonconvex.train_relu(task, beta, 2, 50)
    first, last = trained.history
    assert first["seconds"] < last["seconds"]
    assert last["objective"] <= first["objective"] * (1 + 1e-6)
    assert 0 <= trained.final["lower_bound"] <= last["objective"] == trained.final["objective"]
    assert 0 < trained.final["neurons"] <= 8
    assert programs.accuracy(trained.predict, task.data.test) >= 80


def test_gaps_are_from_the_best_bound_of_a_family():
    def row(method, family, objective, bound, seed=0, kind="final"):
        tags = {"dataset": "toy", "study": "Net", "name": f"Net {method}", "seed": seed}
        numbers = {"objective": objective, "lower_bound": bound, "accuracy": 90.0}
        more = {"seconds": 1.0 + seed, "validation_accuracy": 50.0, "epoch": 1}
        return {"kind": kind, **tags, "family": family, **numbers, **more}

    rows = [
        row("a", "relu", 10.0, 4.0),
        row("b", "relu", 8.0, 6.0),
        row("c", "gated", 5.0, 4.5),
        row("d", "wide", 5.0, None),
    ]
    rows += [{**each, "kind": "epoch"} for each in rows]
    curves = panels.descent(rows)
    gap = {curve.label: curve.y[0] for curve in curves[panels.DESCENT["gap"]]}
    assert gap == pytest.approx({"a": 0.4, "b": 0.25, "c": 0.1})
    assert [curve.label for curve in curves["objective"]] == ["a", "b", "c", "d"]
    assert summary.summarise(rows)["gap"].tolist() == [
        *(pytest.approx(value) for value in (0.4, 0.25, 0.1)),
        None,
    ]
    assert panels.accuracy(rows) == {}
    assert "0.25" in summary.table(rows)
    other = [{k: v for k, v in each.items() if k != "objective"} for each in rows]
    assert panels.descent(other) == {}
    assert summary.summarise(other)["gap"].isna().all()


def test_defaults():
    digits = convex.Config().filled()
    assert (digits.epochs, digits.batch_size, digits.width) == (60, 32, 200)
    assert digits.methods == ("gated", "gated-adam", "adam", "sgd")
    pair = convex.Config(dataset="cifar10", classes=(3, 5)).filled()
    assert (pair.epochs, pair.batch_size, pair.width) == (30, 128, 100)
    assert pair.methods == ("gated", "gated-adam", "relu", "adam", "sgd")
    smoke = dataclasses.replace(convex.Config(smoke=True), width=7).filled()
    assert (smoke.width, smoke.epochs, smoke.fractions) == (7, 3, (0.1, 0.03))
    assert convex.wanted(convex.Config(methods=("sgd", "gated"))) == ["gated", "sgd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods"], "methods: expected at least one"),
        (["--methods", "lbfgs"], "lbfgs"),
        (["--fractions", "1"], "numbers in (0, 1)"),
        (["--adam-rates", "0"], "adam_rates: expected positive numbers"),
        (["--tol", "2"], "tol: expected a number in (0, 1)"),
        (["--width", "0"], "width: expected at least 1"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        convex.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "3", "10"], r"two different numbers in 0\.\.9"),
        (["--components", "65"], "components: expected 1 to"),
        (["--batch-size", "300", "--classes", "0", "1"], "at most 281"),
    ],
)
def test_data_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        convex.main([*options, "--out", str(tmp_path / "out")])
