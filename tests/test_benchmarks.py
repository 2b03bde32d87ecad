"""The benchmarks' own arithmetic, and that their commands run; nothing here asserts a speed."""

import io
import json
import sys

import jax.numpy as jnp
import pytest

from benchmarks import (
    certificates,
    convex,
    convolution,
    dense,
    derivatives,
    equilibrium,
    forms,
    masks,
    measure,
    proxprop,
    record,
    sampling,
    training_step,
)
from benchmarks.record import Figure, Goal

QUICK = record.Options(rounds=2, quick=True)


def test_a_ratio_is_the_median_over_rounds():
    slow, fast = measure.Timing((6.0, 9.0, 2.0)), measure.Timing((1.0, 3.0, 2.0))
    assert slow.median == 6.0
    assert slow.over(fast) == 3.0  # 6, 3, 1
    assert fast.over(slow) == pytest.approx(1 / 3)


def test_sides_take_turns():
    calls = []
    times = measure.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, seconds=0.0
    )
    assert calls[4:] == ["a", "b"] * 3  # two calls each to compile and to choose the repetitions
    assert [len(timing.samples) for timing in times.values()] == [3, 3]


def test_temporary_bytes_are_those_of_the_compiled_program():
    kept = measure.temporary_bytes(lambda x: jnp.sort(x) @ jnp.sort(-x), jnp.ones(10_000))
    assert 40_000 <= kept <= 200_000


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal("≤", 3), 3.0, True),
        (Goal("≤", 3), 3.1, False),
        (Goal("≥", 4), 4.0, True),
        (Goal("≥", 4), 3.9, False),
    ],
)
def test_goals(goal, value, met):
    assert goal.met_by(value) is met


def test_the_page_shows_hits_and_misses(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record.measure, "matmul_rate", lambda: 1e11)
    monkeypatch.setattr(record.measure, "bandwidth", lambda: 1e10)
    figures = [
        Figure("a hit", "b", 2.0, goal=Goal("≤", 3), floor=1.5),
        Figure("a miss", "b", 4.0, goal=Goal("≤", 3)),
        Figure("an error", "c", 1.25e-7, ""),
    ]
    record.write("dense", QUICK, figures)
    (path,) = tmp_path.glob("*.json")
    stored = json.loads(path.read_text())
    assert stored["command"] == "python -m benchmarks.dense --rounds 2"
    assert {"versions", "hardware", "date", "rates_per_second"} <= set(stored)
    page = record.page(record.read_all())
    assert "| a hit | b | 2× | ≤ 3× | yes | 1.5× |" in page
    assert "| a miss | b | 4× | ≤ 3× | **no** |  |" in page
    assert "| an error | c | 1.2e-07 |  |  |  |" in page
    assert "| Solvers of dense layers | `dense` | 3 | 1 of 2 |" in page
    before, _, section = page.partition("### Solvers of dense layers")
    assert "| a miss |" in before.partition("Goals that are missed:")[2]
    assert "| a hit |" not in before
    assert "| a hit |" in section
    assert "float32 matrix product 100 GFLOP/s, elementwise pass 10.0 GB/s" in page


def test_figures_in_an_ascii_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    record.main("dense", lambda _: [Figure("a ratio", "b", 2.0, goal=Goal("≤", 3))], ["--quick"])
    sys.stdout.flush()
    assert b"2x <= 3x yes" in b" ".join(sys.stdout.buffer.getvalue().split())


def test_the_stored_page_is_the_one_of_the_stored_results():
    assert record.PAGE.read_text() == record.page(record.read_all())


@pytest.mark.parametrize(
    "module",
    [
        certificates,
        convex,
        convolution,
        derivatives,
        equilibrium,
        forms,
        masks,
        proxprop,
        sampling,
        training_step,
    ],
    ids=lambda m: m.__name__,
)
def test_commands_run(module, monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)  # every call once a round
    figures = module.benchmark(QUICK)
    assert all(figure.value > 0 or figure.unit == "" for figure in figures)


def test_dense_iterations_against_the_plain_layer(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    figures = list(dense._against_plain((64, 16, 8), 2))
    assert [figure.goal.bound for figure in figures] == [4.5, 7.0, 5.0, 8.0]
    # c, one triangle of the Gram matrix, nine products with it; then the same backwards
    forward, both = dense.flops(4096, 512, 128, 10)
    assert forward == pytest.approx(1 + 2 + 9 / 8)
    assert both == pytest.approx((forward + 2 + 4 + 18 / 8) / 3)
