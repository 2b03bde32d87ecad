"""What five kinds of users do in their first ten minutes, in scripts of their own.

Their errors too: each walk provokes some, and finds the cure in the message.
"""

import pathlib
import subprocess
import sys

WALKS = pathlib.Path(__file__).parent / "walks"
NAMES = ["swap", "solver", "norm", "convex", "maintain"]
RUN = """
import runpy, sys

sys.path.append(sys.argv[1])
import compilation

compilation.quicken()
for walk in sys.argv[2:]:
    runpy.run_path(walk, run_name="__main__")
    print("done", walk, flush=True)
"""


def test_every_walk_is_run():
    assert {path.stem for path in WALKS.glob("*.py")} == set(NAMES)


def test_walks_reach_their_ends(quick_environment):
    """One after the other in a process of a user's settings, in which they share what is compiled."""
    walks = [str(WALKS / f"{name}.py") for name in NAMES]
    command = [sys.executable, "-c", RUN, str(WALKS.parent), *walks]
    run = subprocess.run(
        command, env=quick_environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert [line[5:] for line in run.stdout.splitlines() if line.startswith("done ")] == walks
