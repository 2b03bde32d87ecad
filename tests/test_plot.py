"""Pictures: what is drawn is what the library computed, and what cannot be drawn is refused in words."""

import ast
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

import stochsolvers as ss

mpl.use("Agg")


@pytest.fixture
def axes():
    return Figure().subplots()


@pytest.fixture(scope="module")
def solved():
    rng = np.random.default_rng(0)
    A = ss.Dense(jnp.asarray(rng.normal(size=(12, 5)) / 3))
    problem = ss.LayerProblem(
        A, jnp.asarray(rng.normal(size=(3, 12))), prior=ss.prox.NonNegative(), ridge=0.1
    )
    runs = {
        count: ss.prox_gd(problem, num_iters=count, trace_objective=True, certify=True)
        for count in (4, 12)
    }
    return problem, {f"{count} iterations": run for count, run in runs.items()}


def lines(ax):
    return {line.get_label(): line.get_xydata().T for line in ax.lines}


def test_gaps_to_a_known_minimum(axes, solved):
    _, runs = solved
    minimum = np.asarray(runs["12 iterations"].objectives[-1]) - 0.5
    assert ss.plot.convergence(runs, minimum=minimum, work=0.25, ax=axes) is axes
    for name, run in runs.items():
        x, y = lines(axes)[name]
        np.testing.assert_allclose(x, 0.25 * np.arange(1, len(x) + 1))
        np.testing.assert_allclose(y, (np.asarray(run.objectives) - minimum).mean(1))
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "work, in full gradients"


def test_certified_gaps_enclose_the_true_ones(axes, solved):
    problem, runs = solved
    ss.plot.convergence(runs, ax=axes)
    # the minimum by projected coordinate descent in numpy
    kernel, x = np.asarray(problem.linear_map.kernel), np.asarray(problem.inputs)
    hessian, c = kernel.T @ kernel + 0.1 * np.eye(5), x @ kernel
    z = np.zeros((3, 5))
    for _ in range(500):
        for i in range(5):
            z[:, i] = np.maximum(z[:, i] + (c - z @ hessian)[:, i] / hessian[i, i], 0)
    least = 0.5 * ((z @ kernel.T - x) ** 2).sum(1) + 0.05 * (z**2).sum(1)
    for (name, run), band in zip(runs.items(), axes.collections, strict=True):
        gap = (np.asarray(run.objectives) - least).mean(1)
        certified = lines(axes)[name][1]
        assert np.all(certified >= gap * (1 - 1e-9))
        ends = band.get_paths()[0].vertices
        for k, value in enumerate(gap, 1):
            assert ends[ends[:, 0] == k, 1].min() <= value * (1 + 1e-9)
    best = runs["12 iterations"]
    objectives, certificate = np.asarray(best.objectives), np.asarray(best.certificate)
    cheap = (objectives - objectives[-1] + certificate).mean(1)
    assert np.all(lines(axes)["12 iterations"][1] <= cheap * (1 + 1e-9))


def test_residuals_and_the_certificate_in_the_legend(axes, solved):
    _, runs = solved
    run = runs["4 iterations"]
    stopped = np.asarray(run.residuals).copy()
    stopped[2:, 0] = 0  # an example that has stopped
    plain = ss.Solution(jnp.zeros((3, 5)), jnp.asarray(stopped), None, jnp.ones(3, bool))
    ss.plot.convergence({"plain": plain}, certificate={"plain": [0.1, 0.02, 0.3]}, ax=axes)
    (label, (_, y)), *_ = lines(axes).items()
    assert label == "plain, gap ≤ 3.0e-01"
    np.testing.assert_allclose(y, [row[row > 0].mean() for row in stopped])
    with pytest.raises(ValueError, match="objectives of the solutions: expected traced"):
        ss.plot.convergence(plain, minimum=0.0, ax=axes)
    with pytest.raises(ValueError, match="finite for an example, got infinite for all"):
        ss.plot.convergence(run, certificate=np.full(3, np.inf), ax=axes)


def test_uncertified_examples_are_left_out(axes, solved):
    run = solved[1]["12 iterations"]
    certificate = np.asarray(run.certificate).copy()
    certificate[1] = np.inf
    ss.plot.convergence(run, certificate=certificate, ax=axes)
    objectives = np.asarray(run.objectives)[:, [0, 2]]
    want = (objectives - objectives[-1] + certificate[[0, 2]]).mean(1)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), want)


@pytest.mark.parametrize("shape", [(5,), (4, 6)])
def test_frequencies_are_those_of_the_dft(axes, rng, shape):
    kernel = rng.normal(size=(*(3,) * len(shape), 2, 3))
    conv = ss.Conv(jnp.asarray(kernel), shape, padding="CIRCULAR")
    tensor = np.fft.fftn(kernel, s=shape, axes=range(len(shape)))
    want = np.linalg.svd(tensor, compute_uv=False)[..., 0]
    got = ss.lipschitz.frequency_norms(conv)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    np.testing.assert_allclose(got.max() ** 2, ss.lipschitz_constant(conv), rtol=1e-9)
    ss.plot.frequencies(conv, ax=axes)
    drawn = axes.collections[0].get_array() if len(shape) == 2 else axes.lines[0].get_ydata()
    np.testing.assert_allclose(drawn.reshape(shape), np.fft.fftshift(want), rtol=1e-10)
    marked = [float(c[0]) for c in axes.lines[-1].get_data()][-len(shape) :]
    place = np.unravel_index(np.argmax(np.fft.fftshift(want)), shape)
    ticks = [np.fft.fftshift(np.fft.fftfreq(n)) for n in shape]
    if len(shape) == 2:
        marked = marked[::-1]
        np.testing.assert_allclose(marked, [t[i] for t, i in zip(ticks, place, strict=True)])
    assert axes.get_title() == f"greatest {want.max():.3g}, least {want.min():.3g}"


def test_strided_and_grouped_frequencies(rng):
    """Of the written-out matrix: its singular values are the union over folded frequencies and groups."""
    kernel = jnp.asarray(rng.normal(size=(3, 2, 4)))
    conv = ss.Conv(kernel, (6,), padding="CIRCULAR", strides=2, feature_group_count=2)
    matrix = jax.vmap(conv)(jnp.eye(24).reshape(24, 6, 4)).reshape(24, -1)
    norms = ss.lipschitz.frequency_norms(conv)
    assert norms.shape == (3,)
    np.testing.assert_allclose(norms.max(), np.linalg.norm(matrix, 2), rtol=1e-10)
    singular = np.linalg.svd(matrix, compute_uv=False)
    assert all(np.isclose(singular, value).any() for value in norms)


def test_spectra_are_the_matrices_own(axes, rng):
    dense, kernel = rng.normal(size=(7, 4)), jnp.asarray(rng.normal(size=(2, 2, 1, 2)))
    conv = ss.Conv(kernel, (3, 3))
    ss.plot.spectrum({"dense": ss.Dense(jnp.asarray(dense)), "conv": conv}, ax=axes)
    matrix = jax.vmap(conv)(jnp.eye(9).reshape(9, 3, 3, 1)).reshape(9, -1)
    for name, one in (("dense", dense), ("conv", np.asarray(matrix))):
        x, y = lines(axes)[name]
        want = np.linalg.svd(one, compute_uv=False)
        np.testing.assert_allclose(y, want, rtol=1e-9)
        np.testing.assert_allclose(x, 100 * np.arange(len(want)) / len(want))


def test_activations(axes):
    ss.plot.activation(ss.prox.SymmetricLogBarrier(0.1), jnp.tanh, steps=(1.0, 0.5), ax=axes)
    drawn = lines(axes)
    v, y = drawn["tanh"]
    np.testing.assert_allclose(y, np.tanh(v))
    for step in (1.0, 0.5):  # optimality: v − u = η g′(u), g′ = 0.2 u / (1 − u²)
        v, u = drawn[f"prox of ηg, η = {step:g}"]
        np.testing.assert_allclose(v - u, step * 0.2 * u / (1 - u**2), atol=1e-8)
    with pytest.raises(ValueError, match="sum of functions of single entries, got Entropy"):
        ss.plot.activation(ss.prox.Entropy(), ax=axes)


def test_tables(axes):
    results = {"D-D": {"dropout": [51.0, 52.0], "Prox-SG": [60.0, np.nan]}, "ND": {"dropout": 57.0}}
    ss.plot.table(results, label="accuracy (%)", ax=axes)
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    assert [list(x) for x in dots] == [[51.0, 52.0], [60.0], [57.0]]
    assert [text.get_text() for text in axes.texts] == ["51.50", "60.00", "57.00"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dropout", "Prox-SG"]
    gains = Figure().subplots()
    ss.plot.table({"plain": [1.0, 3.0], "ours": [4.0, 5.0]}, baseline="plain", ax=gains)
    assert [text.get_text() for text in gains.texts] == ["+0.00", "+2.50"]
    for bad in ({}, {"a": "text"}, [1.0]):
        with pytest.raises(ValueError, match="results"):
            ss.plot.table(bad, ax=axes)
    with pytest.raises(ValueError, match="baseline: expected a method with a result"):
        ss.plot.table({"a": 1.0}, baseline="b", ax=axes)


def test_reports():
    def row(name, gap):
        return ss.reports.LayerCertificate(name, 1, 1, 1, 1.0, 5, gap, gap, gap, 0.5, 0.5, True)

    gaps = {"first": 1e-3, "second": np.inf, "third": 0.0, "last": 1e-6}
    report = ss.reports.CertificateReport(tuple(row(*one) for one in gaps.items()))
    ax = ss.plot.report(report, ax=Figure().subplots())
    assert ax.lines[0].get_xydata().tolist() == [[1e-3, 0], [1e-6, 3]]
    assert [text.get_text() for text in ax.texts] == ["no finite certificate", "solved exactly"]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(gaps)
    with pytest.raises(ValueError, match=r"report: expected a report with a method plot\(ax\)"):
        ss.plot.report({})


def test_axes_are_the_callers_or_new(monkeypatch, solved):
    import matplotlib.pyplot as plt

    run = solved[1]["4 iterations"]
    before = dict(mpl.rcParams)
    new = ss.plot.convergence(run)
    assert new.figure.number in plt.get_fignums()
    assert not new.spines["top"].get_visible()
    plt.close(new.figure)
    assert dict(mpl.rcParams) == before
    with pytest.raises(ValueError, match=r"ax of plot\.convergence: expected matplotlib Axes"):
        ss.plot.convergence(run, ax=new.figure)
    with pytest.raises(ValueError, match="solutions: expected a Solution, or a mapping"):
        ss.plot.convergence([run])
    with pytest.raises(ValueError, match="a LinearMap, or a mapping of names to such, got int for"):
        ss.plot.spectrum({"one": 1})
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (
        lambda: ss.plot.convergence(run),
        lambda: ss.plot.activation(ss.prox.L1(1.0)),
        lambda: ss.plot.table({"one": 1.0}),
        lambda: ss.plot.spectrum(ss.Dense(jnp.eye(2))),
    ):
        with pytest.raises(
            ImportError, match=r"needs matplotlib: pip install 'stochsolvers\[plot\]'"
        ):
            draw()


def test_matplotlib_is_imported_in_functions_alone():
    for path in pathlib.Path(ss.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "matplotlib" not in ast.unparse(node), path
