"""The rooms of the house, and who may call whom: downwards only, Flax in the skins alone."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FLOORS = [
    {"_typing", "_checks", "_compilation"},
    {"_shards", "_programs"},
    {"_convolution", "_linalg", "_symmetric"},
    {"linear_maps", "losses", "prox", "tensor_product"},
    {"sampling", "proxprop"},
    {"lipschitz"},
    {"problems", "optax"},
    {"estimators"},
    {"step_sizes"},
    {"dropout", "solvers"},
    {"equilibrium", "convex", "plot"},
    {"_kept_constants"},
    {"_layers", "_spectral"},
    {"_equilibria"},
    {"reports"},
    {"surgery"},
    {"nnx", "linen"},
    {"testing"},
]
EXPERIMENTS = ["networks", "output", "data", "training"]
"""Folders below the commands, each of which imports from itself and the earlier ones."""
MAY_IMPORT_FLAX = {"nnx", "linen", "testing", "convex"}


def modules():
    return sorted((ROOT / "stochsolvers").rglob("*.py"))


def room(path):
    return path.relative_to(ROOT / "stochsolvers").parts[0].removesuffix(".py")


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ("stochsolvers", "experiments"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    here = room(path)
    if here == "__init__":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "flax":
            assert here in MAY_IMPORT_FLAX, f"{here} imports flax"
        if parts[0] == "stochsolvers" and parts[1] != here:
            assert floor(parts[1]) < floor(here), f"{here} imports {parts[1]}"


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda p: p.name)
def test_experiments_use_the_public_api_alone(path):
    private = [n for n in imported(path) if n.startswith("stochsolvers.")]
    assert not private, private


def test_folders_of_experiments_import_downwards():
    for path in (ROOT / "experiments").rglob("*/*.py"):
        here = EXPERIMENTS.index(path.parent.name)
        for name in imported(path):
            if name.startswith("experiments."):
                assert name.split(".")[1] in EXPERIMENTS[: here + 1], f"{path} imports {name}"


def test_files_stay_readable():
    paths = [*modules(), *(ROOT / "experiments").rglob("*.py")]
    assert all(len(path.read_text("utf-8").splitlines()) <= 400 for path in paths)


def test_convex_programs_import_flax_in_one_file():
    rooms = [
        path.name for path in modules() if room(path) == "convex" and "flax" in set(imported(path))
    ]
    assert rooms == ["_flax.py"]
