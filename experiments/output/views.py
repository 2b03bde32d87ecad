"""What the tables of each kind of run show, and how a number is written."""

import dataclasses
from typing import Any

import pandas as pd

from experiments.output import maps
from experiments.output.rows import (
    Rows,
    Table,
    are_implicit,
    are_objectives,
    are_swapped,
    have_control,
)


@dataclasses.dataclass(frozen=True)
class View:
    """The tables of one kind of run.

    Attributes:
      printed: columns of the table in the terminal.
      page: columns of the page, before `ENDS`.
      caption: text below the page's table.
      stored: further columns of the CSV file.
    """

    printed: tuple[str, ...]
    page: tuple[str, ...]
    caption: str
    stored: tuple[str, ...] = ()


ENDS = ("schedule", "seeds", "hardware")
SCORES = ("network", "test %", "± trials", "full gradient")
PLAIN = View(
    (*SCORES, "validation %", "gain", "paper"),
    ("network", "paper", *SCORES[1:], "difference", "validation %", "gain"),
    """\
Test accuracy after the last epoch, the test images read once. ± after an accuracy is the sample standard
deviation over seeds (n − 1), given two or more; ± trials that over repeated tests of one trained network
(n), which samples, mean over the seeds. Full gradient: the same network without sampling. Difference:
from the paper. Validation %: of a network that samples, the mean of as many tests; rows without a
validation_std have a single one. Gain: over dropout in the same layers or, for a swapped network, over
the baseline that was finetuned as long, seed by seed. Where a seed diverged, there is no mean.""",
)
CONTROLLED = View(
    (*SCORES, "validation %", "gain", "over no dropout", "paper"),
    (*PLAIN.page, "over no dropout"),
    f"{PLAIN.caption}\nOver no dropout: gain over the same network without dropout, seed by seed.",
    ("gain_over_none", "gain_over_none_std"),
)
MAP = View(
    (*SCORES, "validation %", "over no dropout", "gain", "seconds an epoch"),
    (*SCORES, "validation %", "over no dropout", "gain", "seconds an epoch"),
    """\
All networks, the test images read once for each, after the last epoch; ± is the sample standard deviation
over seeds (n − 1), ± trials that over repeated tests of one network (n), which samples; full gradient: the
same network without sampling. Over no dropout, gain: test accuracy over that of the network without dropout,
and with dropout at its best rate on the validation images, seed by seed. Seconds an epoch: median after the
first, which compiles, mean over the seeds.""",
    ("gain_over_none", "gain_over_none_std", "epoch_seconds"),
)
IMPLICIT = dataclasses.replace(
    PLAIN,
    caption="""\
Test accuracy after the last epoch, the test images read once; ± is the sample standard deviation over seeds
(n − 1). Gain: over backpropagation, seed by seed. The paper (Frerix et al. 2018) has curves only, and its
curves of conjugate gradients are not to be compared with these: in its published code the search direction
and the residual share memory, so that its directions are not conjugate from the second step on.""",
)
SWAPPED = View(
    (*SCORES, "as swapped", "validation %", "gain"),
    (*SCORES, "as swapped", "validation %", "gain"),
    """\
Test accuracy after the last epoch, the test images read once. As swapped: validation accuracy of the trained
network with the solvers in place, before it is finetuned. Gain: test accuracy over that of the network as it
was, finetuned as long, seed by seed. ± is the sample standard deviation over seeds (n − 1); ± trials that
over repeated tests of one network (n), which samples; full gradient: the same network without sampling.""",
    ("start_validation_accuracy", "start_seed_std"),
)
DESCENT = ("network", "test %", "validation %")
DESCENT += ("objective", "relative gap", "bound", "neurons", "seconds")
OBJECTIVES = View(
    DESCENT,
    (*DESCENT, "β/β_max"),
    """\
Objective: Σ_j ½(f(x_j) − y_j)² + (β/2)(||W||² + ||a||²), all outputs together, at the last weights. Relative
gap: (objective − lower bound)/objective, with the best lower bound of the networks with the same activation:
"exact" is the certificate of the gated program, which bounds every network with its gates; "bound" is proved
for ReLU networks of any width, and loose; there is none for more than 300 features. Neurons: those that are
not zero (of Adam and SGD above 0.001 times the largest). The gated program chose β/β_max on the validation
images, learning rates were chosen likewise from a grid, and the test images were read once. Seconds:
compilation and training with the rate that was chosen, without the choices and the scores. ± is the sample
standard deviation over seeds (n − 1).""",
    (
        *("family", "objective", "lower_bound", "gap", "bound", "neurons", "fraction"),
        "search_seconds",
    ),
)


def of(rows: Rows) -> View:
    """The view of some rows."""
    if are_objectives(rows):
        return OBJECTIVES
    if are_swapped(rows):
        return SWAPPED
    if maps.is_map(rows):
        return MAP
    if are_implicit(rows):
        return IMPLICIT
    return CONTROLLED if have_control(rows) else PLAIN


def percent(mean: Any, std: Any = None) -> str:
    """An accuracy in the paper's format, "72.86 ± 0.177"; "" for None or NaN."""
    return "" if pd.isna(mean) else f"{mean:.2f}" + ("" if pd.isna(std) else f" ± {std:.3f}")


def cells(summary: Table) -> Table:
    """The columns of all views as text, from the summary of a run."""

    def accuracy(key: str, spread: str) -> list[str]:
        return list(map(percent, summary[key], summary[spread]))

    def number(key: str, form: str) -> list[str]:
        return ["" if pd.isna(value) else format(value, form) for value in summary[key]]

    tested = accuracy("accuracy", "seed_std")
    columns: dict[str, Any] = {
        "network": summary["name"],
        "test %": [a or b for a, b in zip(summary["diverged"], tested, strict=True)],
        "± trials": number("trial_std", ".3f"),
        "full gradient": accuracy("full_gradient_accuracy", "full_gradient_seed_std"),
        "as swapped": accuracy("start_validation_accuracy", "start_seed_std"),
        "validation %": accuracy("validation_accuracy", "validation_seed_std"),
        "gain": accuracy("gain", "gain_seed_std"),
        "over no dropout": accuracy("gain_over_none", "gain_over_none_std"),
        "seconds an epoch": number("epoch_seconds", ".2f"),
        "paper": accuracy("paper_accuracy", "paper_std"),
        "difference": number("difference", "+.2f"),
        "objective": number("objective", ".5g"),
        "relative gap": number("gap", ".2g"),
        "neurons": number("neurons", ".0f"),
        "seconds": number("train_seconds", ".1f"),
        "β/β_max": summary["fraction"],
        **{key: summary[key] for key in ("bound", *ENDS)},
    }
    return pd.DataFrame(columns)
