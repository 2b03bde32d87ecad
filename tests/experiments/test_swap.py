"""Solvers in networks of today: the networks, and one run from end to end."""

import contextlib
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import swap
from experiments.networks import ModernConfig
from experiments.output import panels
from experiments.training import loop


@pytest.mark.parametrize(
    ("name", "count"), [("cnn", 280_314), ("resnet", 77_850), ("transformer", 107_978)]
)
def test_networks(name, count):
    config = ModernConfig(name, (8, 8, 1))

    def logits():
        return config.build(nnx.Rngs(0))(jnp.zeros((2, 8, 8, 1)))

    assert nnx.eval_shape(logits).shape == (2, 10)
    model = nnx.eval_shape(lambda: ModernConfig(name).build(nnx.Rngs(0)))
    assert loop.count_parameters(model) == count


@pytest.mark.parametrize("options", [{"name": "mlp"}, {"width": 0.0}, {"image_shape": (4, 4, 1)}])
def test_configurations_are_checked(options):
    with pytest.raises(ValueError, match="expected"):
        ModernConfig(**options)


@pytest.fixture
def images(tmp_path):
    """A file of 8×8 images of two classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    pixels = rng.integers(0, 60, (60, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        image[4 * label : 4 * label + 4] += 150
    np.savez(tmp_path / "halves.npz", images=pixels, labels=labels)
    return tmp_path / "halves.npz"


def run(images, out, *more):
    common = "--epochs 1 --finetune-epochs 1 --batch-size 8 --trials 2 --width 0.1 --num-samples 2"
    arguments = [*common.split(), "--dataset", str(images), "--out", str(out), *more]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        swap.main(arguments)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return rows, printed.getvalue()


def test_a_run_from_end_to_end(images, tmp_path, monkeypatch):
    arguments = (images, tmp_path / "out", "--networks", "cnn", "--arms", "one", "sampled")
    rows, printed = run(*arguments)
    finals = {row["arm"]: row for row in rows if row["kind"] == "final"}
    assert list(finals) == ["baseline", "control", "one", "sampled"]
    assert "Prox-SG, hidden layers" in printed
    # one iteration is the network as it was
    assert finals["one"]["start_validation_accuracy"] == finals["baseline"]["validation_accuracy"]
    assert finals["sampled"]["std"] is not None
    for name in ("accuracy.png", "gains.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    gain = finals["one"]["accuracy"] - finals["control"]["accuracy"]
    assert panels.swaps(rows)["CNN"]["one iteration"] == [gain]
    assert "as swapped" in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run(*arguments)[0] == rows
