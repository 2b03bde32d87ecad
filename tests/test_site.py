"""The site's own code: docstrings as reStructuredText, links between pages, the reference of public names."""

import doctest
import importlib
import pathlib
import pkgutil
import sys

import jax
import jax.numpy as jnp
import pytest

import stochsolvers as ss

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def site():
    """The modules of docs/_site, by name."""
    sys.path.insert(0, str(DOCS))
    yield lambda name: importlib.import_module(f"_site.{name}")
    sys.path.remove(str(DOCS))


def test_punctuation_of_formulas_is_no_markup(site):
    lines = [
        "argmin_u ½||u − v||² of A* z and X_ or",
        "",
        "    z ← prox(z*)",
        "",
        "- one",
        "  more",
    ]
    assert site("docstrings").convert(lines) == [
        r"argmin_u ½\|\|u − v\|\|² of A\* z and X\_ or",
        "",
        "::",
        "",
        "   z ← prox(z*)",
        "",
        "- one",
        "  more",
        "",
    ]


def test_names_in_docstrings_are_links(site):
    inline = site("docstrings").inline
    assert inline("`LayerProblem.certificate`") == (
        ":py:obj:`LayerProblem.certificate <stochsolvers.LayerProblem.certificate>`"
    )
    assert inline("`ss.prox.L1`s") == r":py:obj:`ss.prox.L1 <stochsolvers.prox.L1>`\ s"
    assert inline("`x + 1` and `no_such_name`") == "``x + 1`` and ``no_such_name``"


def test_fields_keep_their_text(site):
    lines = [":param x: |x| of `L1`", "    and more", "", ":returns: A* z"]
    assert site("docstrings").convert(lines) == [
        r":param x: \|x\| of :py:obj:`L1 <stochsolvers.prox.L1>`",
        "    and more",
        "",
        r":returns: A\* z",
        "",
    ]


def test_every_public_name_is_in_the_reference_once(site):
    pages = site("generate").reference()
    assert len(pages) >= 20
    for module, names in pages.items():
        shown = {name.rpartition(".")[2] for name, _ in names}
        public = {
            name
            for name, value in vars(importlib.import_module(module)).items()
            if not name.startswith("_")
            and (getattr(value, "__module__", "") or "").startswith("stochsolvers")
        }
        if hasattr(importlib.import_module(module), "__path__"):
            assert public <= shown, module
    own = [
        name
        for module, names in pages.items()
        for name, _ in names
        if name.startswith(module + ".")
    ]
    homes = [name for name in own if name.count(".") == 1]
    assert {"stochsolvers.LayerProblem", "stochsolvers.prox_gd"} <= set(homes)
    assert all(pkgutil.resolve_name(name) is not None for name in own)


def test_links_between_pages(site):
    relink = site("generate").relink
    text = "[a](../benchmarks/README.md) [b](norms.md#x) [c](../stochsolvers) [d](https://e.org)"
    assert relink(text, "docs/choosing.md", "choosing.md", "https://home") == (
        "[a](generated/benchmarks.md) [b](norms.md#x) [c](https://home/tree/main/stochsolvers) "
        "[d](https://e.org)"
    )
    assert relink(
        "[a](../figure2)",
        "experiments/results/table2_digits/README.md",
        "generated/results/x/i.md",
        "",
    ) == ("[a](/tree/main/experiments/results/figure2)")


def test_code_has_no_links(site):
    text = "```python\nprint(layers[0](h))\n```\n"
    assert site("generate").relink(text, "docs/norms.md", "norms.md", "https://home") == text


def test_examples_of_docstrings():
    modules = [ss] + [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(ss.__path__, "stochsolvers.")
    ]
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    for module in modules:
        for test in finder.find(module, globs={"ss": ss, "jax": jax, "jnp": jnp}):
            runner.run(test)
    assert runner.failures == 0
    assert runner.tries >= 12
