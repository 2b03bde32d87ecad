"""The maintainer of the tenth month: adds a prior, a sampling, a solver, bumps the version, runs one test.

Needs a checkout or an unpacked source distribution, and the extra `test`.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from flax import nnx

import stochsolvers as ss
from stochsolvers import testing

ROOT = pathlib.Path(__file__).parents[2]


def message(call):
    """What an error says."""
    try:
        call()
    except TypeError as error:
        return str(error)
    raise RuntimeError("no error")


# each in at most 30 lines, as CONTRIBUTING.md says
@ss.value_object
class Deadzone(ss.Prior):
    """g(u) = γ |u| on [−1, 1], else ∞: prox_{ηg}(v) = clip(soft(v, ηγ), −1, 1)."""

    gamma: float = 1.0

    def _value(self, u):
        return jnp.where(jnp.all(jnp.abs(u) <= 1), self.gamma * jnp.sum(jnp.abs(u)), jnp.inf)

    def _prox(self, v, step):
        return jnp.clip(jnp.sign(v) * jax.nn.relu(jnp.abs(v) - step * self.gamma), -1, 1)


@ss.value_object
class One(ss.estimators.FeatureEstimator):
    """One feature, w = n1 on it."""

    def draw(self, key, problem, z):
        n = problem.linear_map.in_features
        chosen = jax.random.randint(key, problem.batch_shape, 0, n)
        return n * jax.nn.one_hot(chosen, n, dtype=problem.dtype)

    def expected_smoothness(self, problem):  # w ≤ n1
        n = problem.linear_map.in_features
        return n * ss.lipschitz_constant(problem.linear_map, grid="padded") + problem.ridge


@ss.value_object
class Averaged(ss.Solver):
    """z⁺ = ½ z + ½ prox(z − η ∇F(z))."""

    num_iters: int = ss.static_field()

    def step(self, run, k, z, memory):
        point = z - run.step_size(k) * run.gradient(z)
        return ss.Step(0.5 * (z + run.prox(point, k)), memory, point)


testing.check_prior(Deadzone(0.3), (3, 4))
key = jax.random.key(0)
A, x = ss.Dense(jax.random.normal(key, (6, 3)) / 3), jax.random.normal(key, (2, 6))
problem = ss.LayerProblem(A, x, prior=Deadzone(0.3), ridge=0.1)
draws = jax.vmap(lambda key: One().draw(key, problem, jnp.zeros((2, 3))))
assert jnp.allclose(draws(jax.random.split(key, 4000)).mean(0), 1, atol=0.2)  # E[w] = 1
step = ss.InverseExpectedSmoothness()
sampled = ss.ms2gd(key, problem, sampling=One(), step_size=step, num_outer=8, num_inner=60)
averaged = Averaged(200).solve(None, problem, certify=True)
assert (averaged.certificate < 1e-4).all()
assert jnp.allclose(sampled.value, averaged.value, atol=1e-2)
layer = ss.nnx.SolverLinear(6, 3, solver=Averaged(20), prior=Deadzone(0.3), rngs=nnx.Rngs(0))
assert layer(x).shape == (2, 3)
assert "_prox" in message(type("Empty", (ss.Prior,), {}))  # what is missing has a name

# where a thing belongs: CONTRIBUTING.md's map names every room
contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
tree = contributing.split("## Where things are")[1].split("## ")[0]
named = set(re.findall(r"[\w.]+(?:/|\.py)", tree))
rooms = {f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / "stochsolvers").glob("[!_]*")}
assert rooms - {"py.typed"} <= named, rooms - named
folders = {"stochsolvers/", "experiments/", "benchmarks/", "tests/", "docs/", "notebooks/"}
assert folders <= named
assert all((ROOT / folder).is_dir() for folder in folders)

# a new version: the release steps name its places, and one test tells which was forgotten
with tempfile.TemporaryDirectory() as copy:
    for folder in ("stochsolvers", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, pathlib.Path(copy, folder), ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    places = ["pyproject.toml", "stochsolvers/__init__.py", "CITATION.cff", "CHANGELOG.md"]
    release = contributing.split("## Release")[1]
    assert all(place in release for place in places)
    for place in places[:-1]:
        text = (ROOT / place).read_text("utf-8")
        pathlib.Path(copy, place).write_text(text.replace(ss.__version__, "9.9.9", 1), "utf-8")
    shutil.copy(ROOT / places[-1], copy)  # is forgotten
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "one_version"]
    environment = {**os.environ, "PYTHONPATH": copy, "PYTHONDONTWRITEBYTECODE": "1"}
    command.append("tests/test_packaging.py")
    outcome = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 1, outcome
    assert "[9.9.9]" in outcome.stdout  # the heading that CHANGELOG.md lacks
    assert "1 failed" in outcome.stdout
print("a prior, a sampling, a solver, a version")
