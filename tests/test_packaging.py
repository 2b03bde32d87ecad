"""pyproject.toml: what the extras require, what the distributions hold."""

import ast
import pathlib
import re
import subprocess
import sys
import tomllib

import jax.numpy as jnp
import pytest
from flax import nnx

import stochsolvers as ss

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TARGETS = PROJECT["tool"]["hatch"]["build"]["targets"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
OURS = {"stochsolvers", "experiments", "benchmarks"}
MODULES = {"scikit-learn": "sklearn", "orbax-checkpoint": "orbax"}
"""Modules that are not called as their distributions are."""
NEEDED_BY_OTHERS = {"array_record", "importlib_resources", "tabulate"}
"""What tensorflow-datasets and pandas import without requiring it."""


def modules_of(*extras):
    """The third-party modules that extras install by name, those of the library included."""
    found, waiting = set(), [*PROJECT["project"]["dependencies"]]
    waiting += [requirement for extra in extras for requirement in EXTRAS[extra]]
    while waiting:
        name, listed = re.match(r"([\w.-]+)(?:\[(.*?)\])?", waiting.pop()).groups()
        if name == "stochsolvers":
            waiting += [each for extra in listed.split(",") for each in EXTRAS[extra]]
        else:
            found.add(MODULES.get(name, name.replace("-", "_")))
    return found


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(*folders):
    """The first names of all modules that the files of some folders import, anywhere in a file."""
    names = set()
    for path in python_files(*folders):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    return names


def third_party(*folders):
    beside = {path.stem for path in python_files("tests")} | {
        path.name for path in (ROOT / "tests").iterdir() if path.is_dir()
    }
    return imported(*folders) - OURS - beside - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("stochsolvers", ["plot", "sklearn", "testing"]),
        ("experiments", ["experiments", "tensorboard"]),
        ("benchmarks", ["benchmarks"]),
        ("notebooks", ["docs"]),
        ("tests", ["test"]),
    ],
)
def test_what_is_imported_is_required(folder, extras):
    assert third_party(folder) <= modules_of(*extras)


def test_what_experiments_require_is_imported():
    own = modules_of("experiments", "tensorboard") - modules_of()
    assert own - NEEDED_BY_OTHERS <= third_party("experiments")
    assert own >= NEEDED_BY_OTHERS


def test_the_plot_extra_is_matplotlib_alone():
    assert modules_of("plot") - modules_of() == {"matplotlib"}


def test_benchmarks_run_on_their_own_requirements():
    """They import parts of the experiments; packages of the other extras are hidden."""
    hidden = modules_of("experiments", "testing") - modules_of("benchmarks")
    assert {"sklearn", "matplotlib", "tensorflow_datasets", "chex", "tqdm"} <= hidden
    names = [f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("[!_]*.py")]
    code = f"import importlib, sys; sys.modules.update(dict.fromkeys({hidden}))\n"
    code += f"for name in {names}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=240)


def test_extras_that_messages_name_exist():
    named = {
        extra
        for path in python_files("stochsolvers", "experiments", "benchmarks")
        for extra in re.findall(r"stochsolvers\[([\w,-]+)\]", path.read_text("utf-8"))
    }
    assert {"plot", "tensorboard"} <= named <= EXTRAS.keys()


def test_without_matplotlib_the_chart_names_its_extra(monkeypatch):
    report = ss.lipschitz_report(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.zeros((1, 3)).shape)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'stochsolvers\[plot\]'"):
        report.plot()


def test_one_version():
    version = PROJECT["project"]["version"]
    assert ss.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_pypi_shows_absolute_links():
    """README's relative links, as the build rewrites them, lead to the repository."""
    text = (ROOT / "README.md").read_text("utf-8")
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    assert all(link.startswith("https://") for link in links)
    hosts = ("https://github.com/", "https://raw.githubusercontent.com/")
    home = PROJECT["project"]["urls"]["Repository"].removeprefix(hosts[0])
    assert all(link.startswith(tuple(host + home for host in hosts)) for link in links)


def test_the_wheel_holds_the_library_alone():
    assert TARGETS["wheel"]["packages"] == ["stochsolvers"]


def test_the_source_distribution_holds_what_its_tests_import_and_read():
    used = imported("tests")
    for path in python_files("tests"):
        constants = (
            n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant)
        )
        used |= {node.value for node in constants if isinstance(node.value, str)}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text("utf-8").split()}
    here = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - ignored
    included = {name.removeprefix("/") for name in TARGETS["sdist"]["include"]}
    assert {"README.md", "tests", *OURS} <= used & here
    assert used & here <= included | {"pyproject.toml"}  # which is always there
    assert included <= here
