"""Figure 2: the proximal operators lie where the closed forms of the paper put them."""

import numpy as np

from experiments import figure2


def test_curves_are_the_papers_operators():
    softplus, tanh = (figure2.values(panel, 41) for panel in figure2.PANELS)
    v, activation, operators = softplus
    np.testing.assert_allclose(activation, np.log1p(np.exp(v)), rtol=1e-5)
    np.testing.assert_allclose(operators[1.0], v / 2 + np.sqrt(v**2 / 4 + 1), rtol=1e-4)
    v, activation, operators = tanh
    np.testing.assert_allclose(activation, np.tanh(v), rtol=1e-5, atol=1e-6)
    for step, u in operators.items():  # the root in (−1, 1) of the cubic
        cubic = u**3 - v * u**2 - (1 + 0.2 * step) * u + v
        np.testing.assert_allclose(cubic, 0, atol=1e-5)
        assert np.all(np.abs(u) < 1)


def test_command_draws_the_picture(tmp_path, capsys):
    figure2.main(["--out", str(tmp_path), "--smoke"])
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "softplus" in printed
    assert "tanh" in printed
