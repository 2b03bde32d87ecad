"""A solver in the place of layers of a trained Linen network, and back."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flax import linen as nn
from flax import traverse_util

from stochsolvers import _checks, _layers, surgery
from stochsolvers._compilation import jit_once
from stochsolvers._typing import Array, Scalar, join_static, split_static
from stochsolvers.linen import _changes, _survey
from stochsolvers.linen._blocks import refresh_lipschitz
from stochsolvers.linen._following import FollowingNorm
from stochsolvers.linen._layers import STATE
from stochsolvers.linen._replaced import Plain, ReplacedLayers, Replacement
from stochsolvers.losses import Squares
from stochsolvers.prox import Prior
from stochsolvers.solvers import Solver
from stochsolvers.surgery import _measurement, _plan, _where


class Replaced(NamedTuple):
    """What `replace_layers` returns.

    Attributes:
      module: the network with solvers in place of layers.
      variables: those that were given, and the solvers' constants as "solver_state".
      report: what was replaced, how much it changes, what was left and why.
    """

    module: ReplacedLayers
    variables: dict[str, Any]
    report: surgery.ReplacementReport


def replace_layers(
    module: nn.Module,
    variables: Mapping[str, Any],
    where: surgery.Where,
    *,
    solver: Solver,
    inputs: Any,
    prior: Prior | Literal["auto"] = "auto",
    normalize: bool = True,
    ridge: Scalar = 0.0,
    dropout: _plan.Dropout = "absorb",
    fold_batch_norm: bool = True,
    measure: bool = True,
    rngs: Mapping[str, Array] | None = None,
    **options: Any,
) -> Replaced:
    r"""A trained network with solvers in place of layers; `restore_layers` undoes it.

    What happens to a layer is said at `stochsolvers.nnx.replace_layers`. The network's code runs as it is,
    with the calls of its layers intercepted; the parameters stay at the same paths, so that checkpoints and
    optimiser states go both ways. What is particular to Linen:

    - A solver that samples does so where the Dropout before its layer would, if its rate was absorbed; else
      where the random stream "dropout" is given to `apply`. A Dropout stays where a lifted transform is
      around it and not around the layer, or the other way round.
    - The scale and the bias of a BatchNorm that is folded in are those of the variables at hand. It keeps its
      running statistics in training too.
    - The constants are kept in "solver_state", which `refresh_lipschitz` recomputes. A layer within `nn.scan`
      or `nn.vmap` keeps its own where the transform lifts that collection, as in `variable_axes={"params": 0,
      "solver_state": 0}`, and computes it at every call otherwise.

    Args:
      module: the network, not bound to variables. Its layers may be called within `nn.jit`, `nn.remat`,
        `nn.vmap` and `nn.scan` over a stack.
      variables: its variables.
      where: the layers: a path such as "blocks_0/Conv_0"; one with wildcards, "blocks_*/Conv_0" or "*"; a
        type, `nn.Conv`; a function of a path and a module; or a list of these.
      solver: such as `ProxGD(3)` or `ProxSG(tau=0.5, num_iters=10)`.
      inputs: of the network: an array, or a tuple of its arguments. What the report measures is at these.
      prior: g of all of them; "auto" finds that of each activation.
      normalize: in normalised units, see `LayerProblem.normalized`; else the paper's scaling, in which one
        iteration is not the plain layer.
      ridge: λ.
      dropout: "keep" leaves the network's Dropouts on.
      fold_batch_norm: False leaves layers before a BatchNorm as they are.
      measure: run the network for the report's changes and gaps; False only traces it.
      rngs: keys of the random streams, where the network's call needs them.
      **options: keyword arguments of the network's call, such as `train=False`: batch normalisation has to be
        called with its running averages. Arrays are traced, the rest is static.

    Returns:
      `Replaced`: the network, its variables and a `ReplacementReport`.

    Raises:
      ValueError: as `stochsolvers.nnx.replace_layers`.
    """
    if not isinstance(module, nn.Module):
        _checks.fail("module of replace_layers", "an nn.Module", type(module).__name__)
    if not isinstance(variables, Mapping):
        got = type(variables).__name__
        _checks.fail("variables", "the collections that init returns (see Module.unbind)", got)
    arguments = _plan.arguments(inputs)
    _plan.check_options(solver, prior, dropout, arguments)
    network = _survey.look(module, variables, arguments, options, rngs)
    chosen = _where.select(where, network.modules)
    candidates = _survey.candidates(network, chosen)
    found = _plan.plan(
        network.survey,
        chosen,
        candidates,
        solver=solver,
        prior=prior,
        rates={p: m.rate for p, m in network.modules.items() if isinstance(m, nn.Dropout)},
        dropout=dropout,
        fold=fold_batch_norm,
        apart=functools.partial(_survey.apart, network),
    )
    layers = tuple(
        _replacement(
            network, path, one,
            _layers.Settings(one.solver, one.prior, ridge, Squares(), normalize, "pre_activation"),
        )
        for path, one in found.replaced.items()
    )  # fmt: skip
    replaced = ReplacedLayers(Plain(module), layers)
    kept = _with_constants(replaced, variables, arguments, options, rngs)
    kinds = {path: candidate.kind for path, candidate in candidates.items()}
    changes = _measurement.NOT_MEASURED
    if measure:
        stacked = {path: candidate.stacked for path, candidate in candidates.items()}
        changes = _changes.measured(replaced, stacked, kept, arguments, options, rngs)
    rows = _measurement.rows(found.replaced, kinds, changes)
    left = tuple(surgery.LayerLeft(path, kinds[path], why) for path, why in found.left.items())
    notes = _notes(found, kept, normalize)
    report = surgery.ReplacementReport(rows, left, changes.one, changes.all, notes)
    return Replaced(replaced, kept, report)


def restore_layers(
    module: nn.Module, variables: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The network without solvers, and its variables without their constants.

    Args:
      module: as `replace_layers` returned it; another one is returned as it is.
      variables: of it, with whatever parameters training has made.
    """
    _checks.instance("module of restore_layers", module, nn.Module, "an nn.Module")
    _checks.instance("variables", variables, Mapping, "a mapping of collections")
    if not isinstance(module, ReplacedLayers):
        return module, dict(variables)
    paths = {one.path for one in module.layers}
    state = traverse_util.flatten_dict(dict(variables.get(STATE, {})))
    rest = {path: value for path, value in state.items() if path[:-1] not in paths}
    plain = {name: value for name, value in variables.items() if name != STATE}
    if rest:
        plain[STATE] = traverse_util.unflatten_dict(rest)
    return module.module, plain


def _replacement(
    network: _survey.Network, path: str, one: _plan.Replacement, settings: _layers.Settings
) -> Replacement:
    own, following, dropouts, stream = _survey.path_of(path), None, (), "dropout"
    if one.normalization is not None:
        norm = network.modules[one.normalization]
        following = FollowingNorm.of(norm, _survey.path_of(one.normalization), own)
    if one.dropout is not None:
        dropouts = (_survey.path_of(one.dropout),)
        stream = network.modules[one.dropout].rng_collection
    return Replacement(own, settings, following, dropouts, stream)


def _with_constants(
    replaced: ReplacedLayers,
    variables: Mapping[str, Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    rngs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The variables with the solvers' constants."""
    traced, static = split_static((arguments, options))

    @jit_once
    def constants(variables: Any, rngs: Any, traced: Any) -> Any:
        inputs, options = join_static(traced, static)
        return refresh_lipschitz(replaced, variables, *inputs, rngs=rngs, **options)[STATE]

    state = constants(dict(variables), rngs, traced)
    return {**variables, STATE: state} if state else dict(variables)


def _notes(found: _plan.Plan, variables: Mapping[str, Any], normalize: bool) -> tuple[str, ...]:
    notes = []
    if any(one.normalization for one in found.replaced.values()):
        notes.append(
            "BatchNorms that are folded in keep their running statistics, in training too; their values are "
            "read from the variables at every call."
        )
    if any(one.dropout for one in found.replaced.values()):
        notes.append("Dropouts whose rates the solvers sample with are off until restore_layers.")
    state = traverse_util.flatten_dict(dict(variables.get(STATE, {})), sep="/")
    without = [
        path
        for path in found.replaced
        if normalize and f"{path}/lipschitz".removeprefix("(model)/") not in state
    ]
    if without:
        notes.append(
            f"L of {', '.join(without)} is computed at every call, as the transform around does not lift "
            '"solver_state".'
        )
    return tuple(notes)
