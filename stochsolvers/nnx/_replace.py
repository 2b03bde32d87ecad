"""A solver in the place of layers of a trained NNX model, and back."""

import zlib
from typing import Any, Literal

import jax
from flax import nnx

from stochsolvers import _checks, _layers, surgery
from stochsolvers._typing import Scalar
from stochsolvers.losses import Squares
from stochsolvers.nnx import _changes, _stand_ins, _survey
from stochsolvers.nnx._solver_layer import SolverLayer
from stochsolvers.prox import Prior
from stochsolvers.reports._known_layers import inherits_unchanged
from stochsolvers.solvers import Solver
from stochsolvers.surgery import _measurement, _plan, _where


def replace_layers(
    model: nnx.Module,
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
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> surgery.ReplacementReport:
    r"""Replace layers of a trained model by solvers, in place; `restore_layers` undoes it.

    A layer y = A x + b, followed by the activation σ, becomes the w_K with σ(w_K) = z_K, where z_K is the
    K-th iterate on

        minimise_z ½||A* z − x||² − <b, z> + (λ/2)||z||² + g(z),    prox_g = σ,

    so that the model's own code, which applies σ afterwards, runs unchanged. With `normalize` and one
    iteration the model is the plain one, to the last bit. One trace of the model at `inputs`, in evaluation,
    finds σ, the size of images, a BatchNorm between the layer and σ, and a Dropout directly before the layer:

    - The BatchNorm y ↦ s y + t is folded in: the problem has the map s A and the bias s b + t, and the layer
      returns y + (w_K − w_1)/s, which the model's BatchNorm makes w_K. It keeps its running statistics, in
      training too. The layer holds copies of s and t, as it holds L: after other values of the BatchNorm are
      loaded or trained, call `refresh_lipschitz(model)`.
    - The Dropout's rate p becomes the sampling τ = 1 − p of a solver that samples inputs, and the Dropout is
      switched off. Other solvers leave it.

    Parameters stay the same variables at the same paths, so that checkpoints of parameters and optimiser
    states go both ways. Beside them the layers hold what solver layers hold.

    Args:
      model: the network. Its layers may be called within `nnx.jit`, `nnx.remat`, `nnx.vmap` and `nnx.scan`
        over a stack.
      where: the layers: a path such as "blocks.0.conv1"; one with wildcards, "blocks.*.conv1" or "*"; a
        type, `nnx.Conv`; a function of a path and a module; or a list of these.
      solver: such as `ProxGD(3)` or `ProxSG(tau=0.5, num_iters=10)`.
      inputs: of the model: an array, or a tuple of its arguments. What the report measures is at these.
      prior: g of all of them; "auto" finds that of each activation.
      normalize: in normalised units, see `LayerProblem.normalized`; else the paper's scaling, in which one
        iteration is not the plain layer.
      ridge: λ.
      dropout: "keep" leaves the model's Dropouts on.
      fold_batch_norm: False leaves layers before a BatchNorm as they are.
      measure: run the model for the report's changes and gaps; False only traces it.
      rngs: streams for solvers that sample, with the key "dropout" or a default; by default that of the
        absorbed Dropout.
      **options: keyword arguments of the model's call. Arrays are traced, the rest is static.

    Returns:
      `ReplacementReport`.

    Raises:
      ValueError: where nothing matches; for a layer named by its path or by a predicate that cannot be
        replaced, with the reason; where none of the others can. Those are named in the report otherwise.
    """
    if not isinstance(model, nnx.Module):
        _checks.fail("model of replace_layers", "an nnx.Module", type(model).__name__)
    arguments = _plan.arguments(inputs)
    _plan.check_options(solver, prior, dropout, arguments)
    modules = _survey.modules_of(model)
    chosen = _where.select(where, modules)
    found = _plan.plan(
        _survey.survey(model, arguments, options),
        chosen,
        candidates := _survey.candidates(model, chosen),
        solver=solver,
        prior=prior,
        rates={p: m.rate for p, m in modules.items() if isinstance(m, nnx.Dropout)},
        dropout=dropout,
        fold=fold_batch_norm,
    )
    for path, one in found.replaced.items():
        _check_random(modules, path, one, rngs)
    changed: list[Any] = []
    try:
        for path, one in found.replaced.items():
            settings = _layers.Settings(
                one.solver, one.prior, ridge, Squares(), normalize, "pre_activation"
            )
            _replace(modules, path, one, settings, rngs, changed)
        changes = _measurement.NOT_MEASURED
        if measure:
            changes = _changes.measured(model, found, arguments, options)
    except BaseException:
        for module in changed:
            _stand_ins.restore(module)
        raise
    kinds = {path: candidate.kind for path, candidate in candidates.items()}
    rows = _measurement.rows(found.replaced, kinds, changes)
    left = tuple(
        surgery.LayerLeft(path, kinds[path], reason) for path, reason in found.left.items()
    )
    return surgery.ReplacementReport(rows, left, changes.one, changes.all, _notes(found))


def restore_layers(model: nnx.Module) -> None:
    """Make the layers that `replace_layers` replaced plain ones again, in place, with their present weights.

    Dropouts and BatchNorms get their own behaviour back. A model without replaced layers stays as it is.
    """
    _checks.instance("model of restore_layers", model, nnx.Module, "an nnx.Module")
    for _, module in list(nnx.iter_modules(model)):
        _stand_ins.restore(module)


def _replace(
    modules: Any,
    path: str,
    one: _plan.Replacement,
    settings: _layers.Settings,
    rngs: Any,
    changed: list[Any],
) -> None:
    """Change one layer, its BatchNorm and its Dropout; what is changed is appended to `changed`."""
    layer: Any = modules[path]
    base = inherits_unchanged(type(layer), tuple(_survey.SOLVERS))
    stack = _survey.stack_shape(layer)
    dropout = modules[one.dropout] if one.dropout is not None else None
    stream = _stream(path, one, dropout, rngs, stack)
    deterministic = _deterministic(modules, dropout)
    fold = None
    if one.normalization is not None:
        norm: Any = modules[one.normalization]
        _stand_ins.become(norm, _stand_ins.FrozenBatchNorm)
        changed.append(norm)
        fold = norm.fold()
    before = set(vars(layer))
    _stand_ins.become(layer, _survey.SOLVERS[base])
    changed.append(layer)
    pixels = _survey.spatial_shape(layer, one.input_shape)
    if pixels is not None:
        layer.spatial_shape = pixels
    layer.folds = tuple((one.normalization or "").split(".")) if one.normalization else ()
    layer.init_stochastic(deterministic, "dropout", None)
    if stream is not None:
        layer.rngs = stream
    try:
        layer._init_solver(settings, trained=True, fold=fold)
    finally:
        _stand_ins.keep_track(layer, set(vars(layer)) - before)
    if dropout is not None and type(dropout) is not _stand_ins.AbsorbedDropout:
        _stand_ins.become(dropout, _stand_ins.AbsorbedDropout)
        changed.append(dropout)


def _deterministic(modules: Any, dropout: Any) -> bool:
    """The mode of the model, as its Dropout or one of its modules has it."""
    for module in ([dropout] if dropout is not None else []) + list(modules.values()):
        if isinstance(module, nnx.Dropout | SolverLayer):
            return bool(module.deterministic)
        if isinstance(module, nnx.BatchNorm):
            return bool(module.use_running_average)
    return False


def _check_random(modules: Any, path: str, one: _plan.Replacement, rngs: Any) -> None:
    if not one.solver.stochastic or rngs is not None:
        return
    if one.dropout is None or modules[one.dropout].rngs is None:
        expected = "nnx.Rngs(dropout=0), say, for a solver that samples"
        _checks.fail(f"rngs of the layer {path!r}", expected, None)


def _stream(path: str, one: _plan.Replacement, dropout: Any, rngs: Any, stack: Any) -> Any:
    """A random stream of the layer's own; streams of the model are not advanced."""
    if not one.solver.stochastic:
        return None
    if rngs is not None:
        if not isinstance(rngs, nnx.Rngs | nnx.RngStream):
            _checks.fail("rngs", "an nnx.Rngs or None", type(rngs).__name__)
        source = rngs["dropout"] if isinstance(rngs, nnx.Rngs) else rngs
        key = source()
        return nnx.RngStream(jax.random.split(key, stack) if stack else key, tag="dropout")
    key = dropout.rngs.key[...]
    number = zlib.crc32(path.encode())
    if key.ndim == 0:
        key = jax.random.fold_in(key, number)
        return nnx.RngStream(jax.random.split(key, stack) if stack else key, tag="dropout")
    keys = jax.vmap(lambda one: jax.random.fold_in(one, number))(key.reshape(-1))
    return nnx.RngStream(keys.reshape(key.shape), tag="dropout")


def _notes(found: _plan.Plan) -> tuple[str, ...]:
    notes = []
    if any(one.normalization for one in found.replaced.values()):
        notes.append(
            "BatchNorms that are folded in keep their running statistics, in training too. The solvers hold "
            "copies of their scales and shifts: after other values are loaded or trained, call "
            "refresh_lipschitz(model)."
        )
    if any(one.dropout for one in found.replaced.values()):
        notes.append("Dropouts whose rates the solvers sample with are off until restore_layers.")
    return tuple(notes)
