"""What a replacement does to each layer: its prior, its solver, the modules around it; or why it is left."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from stochsolvers import _checks
from stochsolvers.prox import Prior
from stochsolvers.solvers import Solver
from stochsolvers.surgery._survey import DropoutCall, LayerCall, Survey
from stochsolvers.surgery._where import Chosen

Dropout = Literal["absorb", "keep"]
DROPOUT_CHOICES = ("absorb", "keep")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A layer that is meant.

    Attributes:
      kind: its class.
      obstacle: why no solver can take its place, whatever surrounds it, or "".
      stacked: whether its kernel is that of a stack of layers.
    """

    kind: str
    obstacle: str = ""
    stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What takes a layer's place.

    Attributes:
      input_shape: of its inputs.
      activation: the name of what follows.
      prior: g.
      solver: with the Dropout's rate in it, where that is absorbed.
      normalization: the path of the BatchNorm that is folded in, or None.
      dropout: the path of the Dropout that is switched off, or None.
      tau: 1 − its rate; NaN without one.
      note: what to know, or "".
    """

    input_shape: tuple[int, ...]
    activation: str
    prior: Prior
    solver: Solver
    normalization: str | None = None
    dropout: str | None = None
    tau: float = math.nan
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens to each of the layers that are meant, by path.

    Attributes:
      replaced: with what.
      left: why.
    """

    replaced: dict[str, Replacement]
    left: dict[str, str]


def plan(
    survey: Survey,
    chosen: Mapping[str, Chosen],
    candidates: Mapping[str, Candidate],
    *,
    solver: Solver,
    prior: Prior | Literal["auto"],
    rates: Mapping[str, float],
    dropout: Dropout,
    fold: bool,
    apart: Callable[[str, str], str] = lambda dropout, layer: "",
) -> Plan:
    """Decide for each layer.

    Args:
      survey: of the model.
      chosen: what the user means, by path.
      candidates: the layers among it.
      solver: takes the place of each.
      prior: of each; "auto" for that of its own activation.
      rates: of the model's Dropouts, by path.
      dropout: whether a solver that samples takes over the rate of a Dropout directly before its layer.
      fold: whether a BatchNorm between a layer and its activation is folded in.
      apart: of the paths of a Dropout and of a layer behind it, why the one's rate cannot become the other's
        sampling, or "".

    Raises:
      ValueError: for a layer named by its path or by a predicate that must be left, and where all must.
    """
    replaced: dict[str, Replacement] = {}
    left: dict[str, str] = {}
    calls: dict[str, list[LayerCall]] = {}
    for call in survey.layers:
        calls.setdefault(call.label, []).append(call)
    for path, candidate in candidates.items():
        own = calls.get(path, [])
        reason = candidate.obstacle or _calls_obstacle(own, candidate)
        if not reason:
            reason = _surroundings_obstacle(survey, own[0], prior, fold)
        if reason:
            left[path] = reason
            continue
        replaced[path] = _replacement(own[0], solver, prior)
    for path, reason in left.items():
        if chosen[path].named:
            kind = candidates[path].kind
            _checks.fail(f"layer {path!r}", "one that a solver can replace", f"{kind}: {reason}")
    if not replaced:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:6])
        _checks.fail("where", "a layer that a solver can replace", reasons or "no linear layer")
    if dropout == "absorb":
        _absorb(survey, replaced, solver, rates, apart)
    return Plan(replaced, left)


def _calls_obstacle(calls: list[LayerCall], candidate: Candidate) -> str:
    if not calls:
        return "it is not called at these inputs, or within a transformation that hides its call"
    if len(calls) > 1:
        times = f"it is called {len(calls)} times"
        return f"{times}: give each call a layer of its own, which may share the parameters"
    loops = [name for name in calls[0].loops if name != "cond"]
    if "shard_map" in loops:
        return "it is called within shard_map"
    if loops and not (candidate.stacked and loops == ["scan"]):
        return (
            f"it is called more than once, in a loop ({', '.join(loops)}) with the same parameters"
        )
    return ""


def _surroundings_obstacle(survey: Survey, call: LayerCall, prior: Any, fold: bool) -> str:
    norm = call.normalization
    if norm is not None:
        if not fold:
            return f"the BatchNorm {norm!r} stands before its activation: fold_batch_norm=True folds it in"
        if survey.normalizations.count(norm) > 1:
            return f"the BatchNorm {norm!r} behind it is used more than once"
    if prior == "auto" and call.prior is None:
        given = "a prior of your own" if call.activation else "prior=ss.prox.Zero(), say,"
        return f"{call.reason}; {given} replaces it all the same"
    return ""


def _replacement(call: LayerCall, solver: Solver, prior: Any) -> Replacement:
    note = ""
    if prior == "auto":
        prior = call.prior
        if call.activation == "custom":
            note = "its activation is not a known one: its slopes were checked at 3,200 points, not proved"
    elif call.prior is not None and call.prior != prior:
        note = f"the prior is given; that of its activation is {call.prior!r}"
    elif call.prior is None:
        note = f"the prior is given; {call.reason}"
    return Replacement(
        call.input_shape,
        call.activation,
        prior,
        solver,
        normalization=call.normalization,
        note=note,
    )


def _absorb(
    survey: Survey,
    replaced: dict[str, Replacement],
    solver: Solver,
    rates: Mapping[str, float],
    apart: Callable[[str, str], str],
) -> None:
    """Give the rates of Dropouts to the solvers behind them, where these sample the inputs."""
    by_label: dict[str, list[DropoutCall]] = {}
    for call in survey.dropouts:
        by_label.setdefault(call.label, []).append(call)
    for label, calls in by_label.items():
        readers = sorted({one for call in calls for one in call.readers if one in replaced})
        if not readers:
            continue
        tau = 1.0 - rates[label]
        reason = _keeps(solver)
        if not reason and tau == 0.0:
            reason = "its rate is 1"
        if not reason and (
            any(call.others for call in calls)
            or any(set(call.readers) - set(replaced) for call in calls)
        ):
            reason = "something else reads what it returns"
        reason = reason or next(filter(None, (apart(label, one) for one in readers)), "")
        for reader in readers:
            one = replaced[reader]
            if reason:
                note = f"the Dropout {label} before it stays: {reason}"
                replaced[reader] = dataclasses.replace(one, note=_joined(one.note, note))
            else:
                replaced[reader] = dataclasses.replace(
                    one,
                    solver=_with_tau(solver, tau),
                    dropout=label,
                    tau=tau,
                    note=_joined(one.note, _of_others(calls, label, reader)),
                )


def _of_others(calls: list[DropoutCall], label: str, reader: str) -> str:
    """What to know where a layer shares the masks of an absorbed Dropout with other layers."""
    others = sorted({one for call in calls if reader in call.readers for one in call.readers})
    others = ", ".join(one for one in others if one != reader)
    if not others:
        return ""
    return f"the Dropout {label} is before {others} too: each layer samples by itself, not one mask for all"


def _keeps(solver: Solver) -> str:
    if not solver.stochastic:
        return "the solver does not sample"
    if solver.per_output or not hasattr(solver, "tau"):
        return "the solver does not sample the layer's inputs"
    if getattr(solver, "sampling", None) is not None and not hasattr(solver.sampling, "tau"):  # pyright: ignore
        return "the solver has a sampling of its own"
    return ""


def _with_tau(solver: Any, tau: float) -> Solver:
    if getattr(solver, "sampling", None) is None:
        return dataclasses.replace(solver, tau=tau)
    return dataclasses.replace(solver, sampling=dataclasses.replace(solver.sampling, tau=tau))


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def one_iteration(solver: Any) -> Solver:
    """The solver with one iteration."""
    names = {field.name for field in dataclasses.fields(solver)}
    counts = {name: 1 for name in ("num_iters", "num_outer", "num_inner") if name in names}
    return dataclasses.replace(solver, **counts)


def arguments(inputs: Any) -> tuple[Any, ...]:
    """The model's positional arguments: of a tuple its entries, of anything else this alone."""
    if not isinstance(inputs, tuple):
        return (inputs,)
    if inputs and all(type(one) is int for one in inputs):
        wanted = "an array, or a tuple of the model's arguments"
        _checks.fail("inputs of replace_layers", wanted, f"the shape {inputs}")
    return inputs


def check_options(solver: Any, prior: Any, dropout: Any, inputs: tuple[Any, ...]) -> None:
    """Refuse what is no solver, no prior, no choice and no example."""
    if not isinstance(solver, Solver):
        _checks.fail(
            "solver of replace_layers", "a Solver such as ProxGD(10)", _checks.named(solver)
        )
    if not (isinstance(prior, Prior) or (isinstance(prior, str) and prior == "auto")):
        expected = '"auto" or a Prior such as prox.NonNegative()'
        expected += " (of an activation: prox.Activation(function))"
        _checks.fail("prior of replace_layers", expected, _checks.named(prior))
    _checks.member("dropout of replace_layers", dropout, DROPOUT_CHOICES)
    for leaf in jax.tree.leaves(inputs):
        if 0 in getattr(leaf, "shape", ()):
            _checks.fail("inputs of replace_layers", "at least one example", f"shape {leaf.shape}")
