"""README's picture."""

import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from experiments import picture


def test_its_first_iteration_is_the_layer():
    problem = picture.layer_problem(6, 4, 3)
    plain = problem.plain
    layer = np.tanh(plain.inputs @ plain.linear_map.kernel)
    z = ss.ProxGD(1).solve(None, problem).value
    assert jnp.allclose(z, layer, atol=1e-6)


def test_it_is_written(monkeypatch, tmp_path):
    lines = {name: np.array([1.0, 0.1, 1e-12]) for name in picture.TITLES}
    monkeypatch.setattr(picture, "gaps", lambda config: (lines, {1: 2.0, 3: 0.5}))
    path = tmp_path / "folder" / "layer.png"
    picture.main(["--out", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = picture.draw(lines, {1: 2.0}).axes
    assert len(axes.lines) == len(picture.TITLES) + 1
    assert np.isnan(axes.lines[0].get_ydata()[-1])  # below what is drawn
