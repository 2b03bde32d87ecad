"""Proximal backpropagation's command, networks and defaults."""

import json

import jax
import numpy as np
import pytest
import toys
from archives import files_under
from flax import nnx

import stochsolvers as ss
from experiments import proxprop
from experiments.networks.proxprop import ProxPropConfig, ProxPropNet
from experiments.training import evaluation, loop


def run(tiny_cifar, out, *options):
    arguments = f"--dataset cifar10 --epochs 1 --batch-size 30 --data-dir {tiny_cifar}"
    proxprop.main([*arguments.split(), "--out", str(out), *options])
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_command(tiny_cifar, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    options = ["--width", "0.01", "--methods", "backpropagation", "exact", "cg3"]
    rows = run(tiny_cifar, out, *options)
    names = {name for name in files_under(out) if not name.startswith("checkpoints")}
    assert names == {
        *("config.json", "results.jsonl", "summary.csv", "README.md"),
        *("accuracy.png", "progress.png"),
    }
    finals = [row for row in rows if row["kind"] == "final"]
    assert [row["name"] for row in finals] == ["MLP backpropagation", "MLP exact", "MLP cg3"]
    rates = [row["config"]["training"]["learning_rates"] for row in finals]
    assert rates == [[0.05], [0.06], [0.06]]
    steps = [row["config"]["network"]["step"] for row in finals]
    tau = 0.05 * 500 / 30
    assert steps[0] is None
    assert steps[1] == repr(ss.proxprop.Exact(float(f"{tau:.12g}")))
    for row in finals:
        assert row["config"]["training"]["optimizer"] == "nesterov"
        assert 0 <= row["accuracy"] <= 100
    assert "share memory" in (out / "README.md").read_text()
    assert "gain is over backpropagation" in capsys.readouterr().out
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained again"))
    assert run(tiny_cifar, out, *options) == rows
    with pytest.raises(SystemExit, match="holds the results of another run"):
        run(tiny_cifar, out, *options, "--tau", "3")


def test_the_convnet(tiny_cifar, tmp_path):
    options = ["--network", "convnet", "--width", "0.2", "--methods", "exact"]
    *_, final = run(tiny_cifar, tmp_path / "out", *options)
    assert final["name"] == "ConvNet exact"
    assert final["config"]["training"]["optimizer"] == "adam"
    assert final["config"]["training"]["learning_rates"] == [0.001]


def test_networks_are_the_paper_s():
    shapes = {
        "mlp": ((3072, 4000), (4000, 1000), (1000, 4000)),
        "convnet": ((25 * 3, 16), (25 * 16, 20), (25 * 20, 20)),
    }
    counts = {kind: sum(m * n + n for m, n in each) for kind, each in shapes.items()}
    last = {"mlp": 4000 * 10 + 10, "convnet": 1280 * 10 + 10}
    for kind, count in counts.items():
        config = ProxPropConfig(kind, step=ss.proxprop.Exact(0.1))
        model = nnx.eval_shape(lambda config=config: ProxPropNet(config, rngs=nnx.Rngs(0)))
        assert loop.count_parameters(model) == count + last[kind]
        logits = nnx.eval_shape(lambda m: m(jax.numpy.zeros((2, 32, 32, 3))), model)
        assert logits.shape == (2, 10)
        layers = [type(layer) for layer in model.features.layers]
        assert layers == 3 * [ss.nnx.ProxPropLinear if kind == "mlp" else ss.nnx.ProxPropConv]
        assert type(model.classifier) is nnx.Linear
    # the same initial parameters with and without steps
    small = ProxPropConfig("mlp", (4, 4, 1), 2, None, 0.01)
    plain, ours = (
        nnx.state(ProxPropNet(config, rngs=nnx.Rngs(1)))
        for config in (small, ProxPropConfig("mlp", (4, 4, 1), 2, ss.proxprop.Exact(), 0.01))
    )
    jax.tree.map(np.testing.assert_array_equal, plain, ours)


def test_defaults():
    def filled(**options):
        return proxprop.Config(dataset="cifar10", **options).filled()

    paper = filled()
    assert (paper.epochs, paper.batch_size, paper.tau, paper.rate) == (50, 500, 0.05, 1.0)
    backpropagation = paper.train_config(3, "backpropagation")
    assert (backpropagation.learning_rates, backpropagation.momentum) == ((0.05,), 0.95)
    assert (backpropagation.weight_decay, backpropagation.seed) == (0.0, 3)
    assert paper.step("backpropagation") is None
    assert paper.step("exact") == ss.proxprop.Exact(0.05)
    assert paper.step("cg10") == ss.proxprop.ConjugateGradients(0.05, 10)
    half = filled(batch_size=250)
    assert (half.tau, half.rate, half.plain_rate) == (0.1, 0.5, 0.05)
    convnet = filled(network="convnet")
    assert (convnet.tau, convnet.rate) == (1.0, 1e-3)
    assert convnet.train_config(0).optimizer == "adam"
    assert filled(tau=2.0).tau == 2.0
    smoke = proxprop.Config(smoke=True).filled()
    assert (smoke.methods, smoke.batch_size, smoke.epochs) == (proxprop.SMOKE_METHODS, 32, 2)


def test_pixels_are_between_zero_and_one():
    toy = toys.dataset()
    scaled = proxprop.in_unit_interval(toy)
    images = evaluation.normalise(toy.train.images, scaled.mean, scaled.std)
    least = toy.train.images.min() / toy.train.images.max()
    np.testing.assert_allclose((images.min(), images.max()), (least, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tau", "0"], "tau: expected a positive number, got 0"),
        (["--rate", "-1"], "rate: expected a positive number"),
        (["--methods"], "methods: expected at least one"),
        (["--methods", "cg4"], "cg4"),
        (["--network", "resnet"], "resnet"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        proxprop.main(options)
    assert message in capsys.readouterr().err
