"""README's Python blocks run, and print what the README says they print."""

import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", README.read_text(), re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]\d+)?")
SPACE = re.compile(r"[ ─]+")  # as wide as the longest number of a column


def text(line):
    return SPACE.sub(" ", NUMBER.sub("#", line)).strip()


def test_there_are_examples_with_output():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize(("code", "printed"), BLOCKS)
def test_examples_print_what_readme_shows(code, printed, users_environment):
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=users_environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    for ours, theirs in zip(run.stdout.splitlines(), printed.splitlines(), strict=True):
        assert text(ours) == text(theirs)
        for a, b in zip(NUMBER.findall(ours), NUMBER.findall(theirs), strict=True):
            if 0 < abs(float(b)) < 1e-4:  # round-off, which differs between machines
                assert 0 <= float(a) <= 3 * float(b)
            else:
                assert float(a) == pytest.approx(float(b), rel=0.02)
