"""Equilibrium networks: parameters, one run from end to end, and going on with what is finished."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from archives import tiny_records, write_archive
from flax import nnx

from experiments import opteq
from experiments.networks import EquilibriumNet, EquilibriumNetConfig
from experiments.training import loop
from experiments.training.loop import count_parameters


@pytest.mark.parametrize("method", ["plain", "unrolled", "equilibrium"])
@pytest.mark.parametrize(("width", "count"), [(32, 76_010), (49, 168_864)])
def test_all_methods_have_the_same_parameters(method, width, count):
    config = EquilibriumNetConfig(method=method, width=width)
    model = nnx.eval_shape(lambda: EquilibriumNet(config, rngs=nnx.Rngs(0)))
    assert count_parameters(model) == count
    assert model.features.size == 2 * width * 16


@pytest.mark.parametrize(
    "options", [{"method": "deep"}, {"width": 0}, {"bound": 1.0}, {"image_shape": (4, 4, 1)}]
)
def test_configurations_are_checked(options):
    with pytest.raises(ValueError, match="expected"):
        EquilibriumNetConfig(**options)


def run(archive, out, *options):
    arguments = f"--dataset cifar10 --epochs 1 --batch-size 30 --widths 3 --data-dir {archive}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        opteq.main([*arguments.split(), "--out", str(out), *options])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return rows, printed.getvalue()


def test_a_run_from_end_to_end(tmp_path, monkeypatch):
    archive, out = tmp_path / "cifar", tmp_path / "out"
    write_archive(archive, tiny_records(np.random.default_rng(0)))
    with jax.enable_x64(False):
        rows, printed = run(archive, out, "--methods", "plain", "equilibrium")
        finals = [row for row in rows if row["kind"] == "final"]
        assert [row["name"] for row in finals] == ["OptEq3 plain", "OptEq3 equilibrium"]
        assert "monDEQ" in printed
        for row in finals:
            assert 0 <= row["accuracy"] <= 100
            assert row["config"]["training"]["optimizer"] == "adamw"
        assert all(norm <= 0.95 for norm in finals[1]["norms"])
        assert len(finals[1]["norms"]) == 2
        curves = [row for row in rows if row["kind"] == "residuals"]
        assert [(row["layer"], row["deterministic"]) for row in curves] == [
            (f"tier {k}", plain) for k in (1, 2) for plain in (True, False)
        ]
        assert all(row["middle"][-1] < row["middle"][0] for row in curves)
        for name in ("accuracy.png", "residual.png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")

        monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
        again, _ = run(archive, out, "--methods", "plain", "equilibrium")
        assert again == rows
