"""The Python blocks of README, CONTRIBUTING and docs/ run, and print what the page says they print."""

import ast
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    "README.md": 4,
    "CONTRIBUTING.md": 3,
    "docs/index.md": 0,
    "docs/quick_start.md": 2,
    "docs/choosing.md": 1,
    "docs/equivalence.md": 2,
    "docs/certificates.md": 2,
    "docs/scaling.md": 1,
    "docs/results.md": 0,
    "docs/errata.md": 0,
    "docs/bring_your_own.md": 8,
    "docs/proximal_backpropagation.md": 1,
    "docs/equilibrium_networks.md": 3,
    "docs/convex_networks.md": 3,
    "docs/swapping_layers.md": 3,
    "docs/norms.md": 3,
}
EXAMPLE = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.DOTALL)
BLOCKS = {
    f"{page} {number}": block
    for page in PAGES
    for number, block in enumerate(EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8")))
}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")
SPACE = re.compile(r"[ ─]+")  # as wide as the longest number of a column


def text(line):
    return SPACE.sub(" ", NUMBER.sub("#", line)).strip()


def test_there_are_examples_with_output():
    counts = {page: sum(name.startswith(page) for name in BLOCKS) for page in PAGES}
    assert counts == PAGES


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_page_is_tested(path):
    assert str(path.relative_to(ROOT)) in PAGES


def test_every_example_of_a_page_is_tested():
    """A block in a list or without its output would not be found."""
    for page, count in PAGES.items():
        assert (ROOT / page).read_text(encoding="utf-8").count("```python") == count, page


def test_links_lead_to_files():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_the_objects_of_a_users_own_are_short():
    """Each in at most 30 lines, as the page promises."""
    for name, (code, _) in BLOCKS.items():
        if name.startswith(("docs", "CONTRIBUTING")):
            classes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ClassDef)]
            assert all(node.end_lineno - node.lineno < 30 for node in classes)


RUN = """
import contextlib, io, json, sys
import jax

for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    jax.config.update("jax_enable_x64", False)
    print(json.dumps(printed.getvalue()))
"""


@pytest.mark.parametrize("page", [page for page, count in PAGES.items() if count])
def test_examples_print_what_the_page_shows(page, users_environment):
    """The blocks of a page, one after the other in one process, each by itself."""
    blocks = [block for name, block in BLOCKS.items() if name.startswith(page)]
    quickly_compiled = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_cpu_parallel_codegen_split_count=1",
    }
    run = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([code for code, _ in blocks]),
        env={**users_environment, **quickly_compiled},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    outputs = map(json.loads, run.stdout.splitlines())
    for output, (_, printed) in zip(outputs, blocks, strict=True):
        compare(output, printed)


def compare(output, printed):
    for ours, theirs in zip(output.splitlines(), printed.splitlines(), strict=True):
        assert text(ours) == text(theirs)
        for a, b in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
            if 0 < abs(float(b)) < 1e-4:  # round-off, which differs between machines
                assert 0 <= float(a) <= 3 * float(b)
            else:
                assert float(a) == pytest.approx(float(b), rel=0.02)
