"""Every public name once, with a call and its arguments; or why it has none."""

import inspect
import pkgutil
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hostile
import jax
import jax.numpy as jnp
import numpy as np
from hostile import Argument, Sizes, normal

import stochsolvers as ss


class Entry(NamedTuple):
    """A call.

    Attributes:
      call: takes the arguments by name.
      arguments: makes them, of the sizes.
      compares: whether a call in float64 gives the same numbers, which random ones do not.
      on_host: whether it computes with numpy, so that it cannot be traced.
    """

    call: Callable[..., Any]
    arguments: Callable[[Sizes], dict[str, Argument]]
    compares: bool = True
    on_host: bool = False

    def run(self, arguments: dict[str, Any]) -> Any:
        with jax.numpy_rank_promotion("allow"):  # as users have it
            return self.call(**arguments)


def good(arguments: dict[str, Argument]) -> dict[str, Any]:
    return {name: argument.good for name, argument in arguments.items()}


def array(good: Any, *allowed: str) -> Argument:
    return Argument(good, "array", allowed)


def number(good: Any, *allowed: str) -> Argument:
    return Argument(good, "number", allowed)


def count(good: Any, *allowed: str) -> Argument:
    return Argument(good, "count", allowed)


def key(*allowed: str) -> Argument:
    return Argument(hostile.KEY, "key", allowed)


def value(good: Any, *allowed: str) -> Argument:
    """An object of the library."""
    return Argument(good, "object", allowed)


def name(good: Any, *allowed: str) -> Argument:
    return Argument(good, "name", allowed)


def shape(good: Any, *allowed: str) -> Argument:
    return Argument(good, "shape", allowed)


def function(good: Any, *allowed: str) -> Argument:
    return Argument(good, "function", allowed)


OF_RANK_ONE = ("1e30 everywhere", "-1e30 everywhere")
"""Matrices of one large number, whose other singular values are round-off of its size."""

OVERFLOW = ("1e30", "-1e30", *OF_RANK_ONE)
"""Numbers with squares that float32 does not hold: NaN is documented."""


def dense(s: Sizes) -> ss.Dense:
    return ss.Dense(normal(1, s.n1, s.n2))


def conv() -> ss.Conv:
    return ss.Conv(normal(2, 2, 2, 2, 3), (3, 3))


def problem(s: Sizes, **options: Any) -> ss.LayerProblem:
    options = {"bias": normal(4, s.n2), "ridge": 0.3} | options
    return ss.LayerProblem(dense(s), normal(3, s.batch, s.n1), **options)


def solution(result: ss.Solution) -> dict[str, Any]:
    """A solution's arrays; a certificate may be infinite."""
    found = {"value": result.value, "residuals?": result.residuals, "finite": result.finite}
    if result.certificate is not None:
        found["certificate?"] = result.certificate
    return found


def certified(report: ss.reports.CertificateReport) -> list[dict[str, Any]]:
    """A report's numbers; gaps may be infinite, and are those of the precision."""
    return [
        {"L": row.lipschitz, "gap?": row.gap_max, "finite": np.asarray(row.finite)}
        for row in report.rows
    ]


ROOMS = [
    f"stochsolvers.{module.name}"
    for module in pkgutil.iter_modules(ss.__path__)
    if not module.name.startswith("_")
]


def public_names() -> Iterator[tuple[str, Any]]:
    """The classes and functions of every room, as "room.name", and of the package itself.

    A package exports what its `__init__` imports, a file what it defines.
    """
    for room in ["stochsolvers", *ROOMS, "stochsolvers.estimators.forms"]:
        module = __import__(room, fromlist=["_"])
        lazy = ("ConvexReLUClassifier", "ConvexReLURegressor") if room.endswith("convex") else ()
        for name in (*vars(module), *lazy):
            member = getattr(module, name)
            if name.startswith("_") or isinstance(member, types.ModuleType):
                continue
            home = str(getattr(member, "__module__", ""))
            is_own = (
                home.startswith("stochsolvers") if hasattr(module, "__path__") else home == room
            )
            if is_own and (inspect.isclass(member) or callable(member)):
                yield f"{room.removeprefix('stochsolvers').removeprefix('.')}.{name}", member


BASES = {
    "linear_maps.LinearMap", "losses.Loss", "prox.Prior", "estimators.Estimator",
    "estimators.FeatureEstimator", "solvers.Solver", "step_sizes.StepSizeRule",
    "problems.FixedPointProblem", "problems.Problem", "nnx.Equilibrium", "linen.Equilibrium",
}  # fmt: skip
"""Classes to be inherited from; what they check is checked in their subclasses."""

RECORDS = {
    # results
    "solvers.Solution", "solvers.Status", "solvers.Step", "lipschitz.Bracket", "convex.Decomposition",
    "convex.NetworkGap", "convex.Training", "convex.Whitened", "reports.CertificateReport",
    "reports.LayerCertificate", "reports.LayerNorm", "reports.LipschitzReport", "reports.Observation",
    "surgery.LayerLeft", "surgery.ReplacedLayer", "surgery.ReplacementReport",
    "linen.Replaced",
    "testing.StepSizeReport", "solvers.Run",
    # states, which functions of the library make
    "lipschitz.LipschitzState", "lipschitz.NormState", "optax.ProjectState", "optax.ProxState",
    "nnx.SolverRecord", "nnx.SolverState", "nnx.SpectralStat", "linen.ReplacedLayers",
    "problems.Certifier", "equilibrium.EquilibriumCertifier", "equilibrium.HiddenProblem",
    # forms of a gradient, and what they cost, which `forms.gradient_form` chooses
    "estimators.forms.LiteralGradient", "estimators.forms.QuadraticGradient",
    "estimators.forms.ResidualGradient", "estimators.forms.TwoFormGradient",
    # what a step size is made into
    "step_sizes.Constant", "step_sizes.Schedule",
    # decorators and field specifiers of a user's own classes
    ".static_field", ".value_object",
    # commands for tests: they raise AssertionError, with the object's own error as its message
    "testing.assert_equivalent", "testing.check_estimator", "testing.check_layer", "testing.check_linear_map",
    "testing.check_loss", "testing.check_prior", "testing.check_solver", "testing.check_step_size",
    # pictures: what they refuse is in tests/test_plot.py
    "plot.activation", "plot.certificates", "plot.changes", "plot.convergence", "plot.frequencies",
    "plot.norms", "plot.report", "plot.spectrum", "plot.table",
}  # fmt: skip
"""What is made by the library itself, and takes no arguments of a user's."""


def eager(result: Any) -> Any:
    """The arrays of a result, computed."""
    return jax.tree.map(np.asarray, result)


def float32(number: Any) -> jax.Array:
    return jnp.asarray(number, jnp.float32)
