"""The small examples of convex landscapes: their numbers against independent ones, and their files."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize

from experiments import landscape
from experiments.training import landscape_examples


def test_no_descent_goes_below_the_optimum_of_three_data():
    numbers, _ = landscape_examples.three(landscape.Config())
    X, y, beta = landscape_examples.THREE, landscape_examples.TARGETS, 0.1
    rng = np.random.default_rng(0)

    def objective(w):
        """Its value and its gradient."""
        hidden, output = w[:12].reshape(2, 6), w[12:]
        neurons = np.maximum(X @ hidden, 0)
        r = neurons @ output - y
        slope = X.T @ (np.outer(r, output) * (neurons > 0))
        gradient = np.concatenate([slope.ravel(), neurons.T @ r]) + beta * w
        return 0.5 * np.sum(r**2) + beta / 2 * np.sum(w**2), gradient

    found = [minimize(objective, rng.normal(size=18), jac=True).fun for _ in range(30)]
    assert min(found) > numbers["optimum"] - 1e-6
    assert min(found) < numbers["optimum"] + 1e-3
    assert numbers["network"] == pytest.approx(numbers["optimum"], abs=1e-5)
    assert numbers["patterns"] == 4  # of two lines through zero, with that of no active datum
    assert numbers["gap"] < 1e-6


def test_the_command_writes_pictures_and_numbers(tmp_path, capsys):
    landscape.main(["--out", str(tmp_path), "--smoke", "--only", "starts", "gan", "--gates", "30"])
    stored = json.loads((tmp_path / "landscape.json").read_text())
    starts, gan = stored["examples"]["starts"], stored["examples"]["gan"]
    for width in ("width 4", "width 20"):
        assert starts[width]["least"] > starts["optimum"]
    assert gan["distance of the moments"] == pytest.approx(gan["lambda"])
    printed = capsys.readouterr().out
    for name in ("starts", "gan"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}: " in printed
    assert "versions" in stored
    with pytest.raises(SystemExit):
        landscape.main(["--only", "four"])
    assert "only: expected some of three" in capsys.readouterr().err
