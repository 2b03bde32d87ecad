"""The Python blocks of README, CONTRIBUTING and docs/ run, and print what the page says they print."""

import ast
import contextlib
import json
import pathlib
import re
import subprocess
import sys
import threading

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


RUN = f"""
import contextlib, io, json, sys
import jax

sys.path.append({str(ROOT / "tests")!r})
import compilation

compilation.quicken()
for code in map(json.loads, sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "example", "exec"), {{"__name__": "__main__"}})
    jax.config.update("jax_enable_x64", False)
    print(json.dumps(printed.getvalue()), flush=True)
"""
LIMIT = 600  # seconds, of a block


class Examples:
    """A process that runs blocks, one after the other, each by itself; another one after an error."""

    def __init__(self, environment, errors):
        self.environment, self.errors, self.process = environment, errors, None

    def __call__(self, code):
        """What the block prints."""
        process = self._running()
        process.stdin.write(json.dumps(code) + "\n")
        process.stdin.flush()
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        printed = process.stdout.readline()
        timer.cancel()
        assert printed, self.errors.read_text(encoding="utf-8")
        return json.loads(printed)

    def _running(self):
        if self.process is None or self.process.poll() is not None:
            self.close()
            with self.errors.open("w", encoding="utf-8") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", RUN],
                    env=self.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
        return self.process

    def close(self):
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="module")
def examples(quick_environment, tmp_path_factory):
    errors = tmp_path_factory.mktemp("examples") / "errors"
    examples = Examples(quick_environment, errors)
    yield examples
    examples.close()


@pytest.mark.parametrize("page", [page for page, count in PAGES.items() if count])
def test_examples_print_what_the_page_shows(page, examples):
    """The blocks of a page, one after the other in a process of a user's settings."""
    for name, (code, printed) in BLOCKS.items():
        if name.startswith(page):
            compare(examples(code), printed)


def compare(output, printed):
    for ours, theirs in zip(output.splitlines(), printed.splitlines(), strict=True):
        assert text(ours) == text(theirs)
        for a, b in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
            if 0 < abs(float(b)) < 1e-4:  # round-off, which differs between machines
                assert 0 <= float(a) <= 3 * float(b)
            else:
                assert float(a) == pytest.approx(float(b), rel=0.02)
