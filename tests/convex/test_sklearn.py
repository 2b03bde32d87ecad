"""The estimators: scikit-learn's conventions, networks in the data's own units, paths."""

import pathlib
import sys

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.exceptions import SkipTestWarning
from sklearn.utils.estimator_checks import check_estimator

import stochsolvers as ss
from stochsolvers import convex

OPTIONS = {"num_gates": 20, "random_state": 0}


def data(rng, n=80, d=3):
    """Features in units of their own, and one that is constant."""
    X = rng.standard_normal((n, d)) * np.array([1e-3, 1.0, 40.0]) + np.array([5.0, -1.0, 300.0])
    X = np.concatenate([X, np.full((n, 1), 7.0)], axis=1)
    z = (X - X.mean(axis=0))[:, :3] / X.std(axis=0)[:3]
    return X, z


def fitted_value(estimator, X):
    """f(X) of the estimator's own weights, as a formula in numpy."""
    network = estimator.network_
    hidden = X @ np.asarray(network.hidden) + np.asarray(network.hidden_bias)
    if isinstance(network, convex.GatedNetwork):
        hidden *= X @ np.asarray(network.gates) + np.asarray(network.gate_bias) >= 0
    else:
        hidden = np.maximum(hidden, 0)
    return hidden @ np.asarray(network.output) + np.asarray(network.output_bias)


@pytest.mark.parametrize("name", ["ConvexReLURegressor", "ConvexReLUClassifier"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learns_checks_pass(name):
    assert issubclass(SkipTestWarning, Warning)
    check_estimator(getattr(convex, name)(num_gates=20, tol=1e-2))


@pytest.mark.parametrize("gated", [True, False])
def test_the_network_of_raw_data_predicts_what_the_regressor_predicts(rng, gated):
    X, z = data(rng)
    y = 1e3 + 50 * (np.abs(z[:, 0]) - np.maximum(z[:, 1] + z[:, 2], 0))
    model = convex.ConvexReLURegressor(0.5, gated=gated, tol=1e-3, **OPTIONS).fit(X, y)
    new, _ = data(rng, 30)
    np.testing.assert_allclose(model.predict(new), fitted_value(model, new), rtol=1e-9)
    np.testing.assert_allclose(model.network_(new), model.predict(new), rtol=1e-9)
    assert model.score(X, y) > 0.8
    assert model.n_active_ == model.network_.width
    assert model.gap_ >= 0
    if gated:
        assert model.gap_ <= 1e-3 * model.objective_


def test_the_objective_is_that_of_standardised_data(rng):
    """Σ ½ (f − t)² + (β/2) (||W||² + ||a||²) of the weights in standardised units, and it is optimal."""
    X, z = data(rng)
    y = 3 + np.abs(z[:, 0]) + 0.1 * rng.standard_normal(len(z))
    model = convex.ConvexReLURegressor(0.7, tol=1e-7, **OPTIONS).fit(X, y)
    network, spread = model.network_, np.append(X.std(axis=0)[:3], 1.0)
    W = np.asarray(network.hidden) * spread[:, None]
    b = np.asarray(network.hidden_bias) + X.mean(axis=0) @ np.asarray(network.hidden)
    a = np.asarray(network.output) / y.std()
    r = (model.predict(X) - y) / y.std()
    decay = 0.35 * (np.sum(W**2) + np.sum(b**2) + np.sum(a**2))
    assert 0.5 * r @ r + decay == pytest.approx(model.objective_, rel=1e-9)

    random = np.random.RandomState(0)
    scaled = np.concatenate([z, np.zeros((len(z), 1)), np.ones((len(z), 1))], axis=1)
    gates = random.standard_normal((5, 20))
    mask = scaled @ gates >= 0
    residual = -r
    norms = np.linalg.norm(scaled.T @ (mask * residual[:, None]), axis=0)
    assert norms.max() <= 0.7 * (1 + 1e-3)


def test_several_targets_are_programs_of_their_own(rng):
    X, z = data(rng)
    Y = np.stack([np.abs(z[:, 0]), 10 * z[:, 1] + 3], axis=1)
    model = convex.ConvexReLURegressor(0.5, tol=1e-6, **OPTIONS).fit(X, Y)
    alone = convex.ConvexReLURegressor(0.5, tol=1e-6, **OPTIONS).fit(X, Y[:, 1])
    assert model.predict(X).shape == Y.shape
    np.testing.assert_allclose(model.predict(X)[:, 1], alone.predict(X), atol=1e-2)
    column = convex.ConvexReLURegressor(0.5, tol=1e-6, **OPTIONS).fit(X, Y[:, 1:])
    np.testing.assert_array_equal(column.predict(X)[:, 0], alone.predict(X))


@pytest.mark.parametrize("loss", ["cross-entropy", "logistic", "squares"])
@pytest.mark.parametrize("centers", [2, 3])
def test_classifiers(loss, centers):
    X, y = make_blobs(90, 3, centers=centers, random_state=1)
    X, labels = 1e3 * X - 500, np.array(["a", "b", "c"])[y]
    model = convex.ConvexReLUClassifier(0.5, loss=loss, tol=1e-3, **OPTIONS).fit(X, labels)
    assert model.score(X, labels) > 0.9
    assert 0 <= model.gap_ <= 1e-3 * model.objective_
    np.testing.assert_allclose(fitted_value(model, X), model.decision_function(X), rtol=1e-8)
    np.testing.assert_allclose(model.network_(X).T, model.decision_function(X), rtol=1e-8)
    assert hasattr(model, "predict_proba") == (loss != "squares")
    if loss != "squares":
        chances = model.predict_proba(X)
        np.testing.assert_allclose(chances.sum(axis=1), 1)
        np.testing.assert_array_equal(model.classes_[chances.argmax(axis=1)], model.predict(X))


def test_a_relu_classifier(rng):
    X, y = make_blobs(90, 3, centers=3, random_state=1)
    model = convex.ConvexReLUClassifier(0.5, gated=False, tol=1e-2, **OPTIONS).fit(X, y)
    assert isinstance(model.network_, convex.Network)
    assert model.score(X, y) > 0.9
    np.testing.assert_allclose(model.network_(X).T, model.decision_function(X), rtol=1e-8)


def test_the_path_begins_at_zero_and_ends_at_fit(rng):
    X, z = data(rng)
    y = np.abs(z[:, 0]) + z[:, 1]
    model = convex.ConvexReLURegressor(tol=1e-5, **OPTIONS)
    path = model.regularization_path(X, y, num=6, smallest=0.05)
    betas = np.array([point.beta for point in path])
    np.testing.assert_allclose(betas / betas[0], np.logspace(0, np.log10(0.05), 6))
    assert path[0].n_active == 0
    assert path[0].objective == pytest.approx(40)  # ½ Σ t², t of variance 1
    objectives = np.array([point.objective for point in path])
    assert np.all(np.diff(objectives) <= 0)
    assert all(point.gap <= 1e-5 * point.objective for point in path)
    again = convex.ConvexReLURegressor(betas[-1], tol=1e-5, **OPTIONS).fit(X, y)
    assert again.objective_ == pytest.approx(path[-1].objective, rel=2e-5)
    np.testing.assert_allclose(model.predict(X), path[-1].network(X), rtol=1e-12)
    chosen = model.regularization_path(X, y, [1.0, 3.0])
    assert [point.beta for point in chosen] == [3.0, 1.0]


def test_a_loss_of_the_library(rng):
    X, z = data(rng)
    y = np.abs(z[:, 0])
    y[:5] += 100
    model = convex.ConvexReLURegressor(0.1, loss=ss.losses.Huber(0.1), tol=1e-3, **OPTIONS).fit(
        X, y
    )
    plain = convex.ConvexReLURegressor(0.1, tol=1e-3, **OPTIONS).fit(X, y)
    error, plain_error = (np.median(np.abs(m.predict(X) - y)) for m in (model, plain))
    assert error < plain_error


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"beta": 0.0}, {}, "beta.*expected"),
        ({"beta": "1"}, {}, "beta.*expected"),
        ({"num_gates": 0}, {}, "num_gates.*expected"),
        ({"tol": -1.0}, {}, "tol.*expected"),
        ({"loss": "hinge"}, {}, "loss.*expected"),
        ({"gated": "no"}, {}, "gated: expected True or False, got 'no'."),
        ({"loss": "logistic"}, {}, "loss.*expected"),
        ({}, {"y": np.ones(6)}, "y: expected targets that are not all equal"),
        ({}, {"X": np.full((6, 2), np.nan)}, "NaN"),
        ({}, {"y": np.ones(5)}, "inconsistent"),
    ],
)
def test_errors(options, change, message):
    arguments = {"X": np.arange(12.0).reshape(6, 2) ** 2, "y": np.arange(6.0)} | change
    with pytest.raises(ValueError, match=message):
        convex.ConvexReLURegressor(**options).fit(**arguments)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="expected labels of at least two classes, got one class"):
        convex.ConvexReLUClassifier().fit(np.eye(4), np.ones(4))


def test_the_estimators_alone_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "stochsolvers.convex._sklearn")
    monkeypatch.delattr(convex, "_sklearn")
    with pytest.raises(ImportError, match=r"stochsolvers\[sklearn\]"):
        convex.ConvexReLURegressor  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute"):
        convex.ConvexReLU  # noqa: B018
    files = pathlib.Path(convex.__file__).parent.glob("*.py")
    assert [f.name for f in files if "from sklearn" in f.read_text()] == ["_sklearn.py"]
