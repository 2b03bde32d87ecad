"""The layers under study: plain, with dropout, or solver layers."""

import dataclasses
from typing import Any, Literal, TypeAlias, get_args

import jax
from flax import nnx

import stochsolvers as ss
from experiments.networks import patches

Variant = Literal["D-D", "D-ND", "ND-D"]
Method = Literal[
    "dropout",
    "prox-sg",
    "ms2gd",
    "importance",
    "expected-smoothness",
    "prox-gd",
    "fista",
    "none",
    "prox-sg-constant",
    "prox-gd-no-dropout",
]

NAMES: dict[Method, str] = {
    "dropout": "dropout",
    "none": "no dropout",
    "prox-sg": "Prox-SG",
    "prox-sg-constant": "Prox-SG at 1/L",
    "ms2gd": "mS2GD",
    "importance": "importance",
    "expected-smoothness": "exp. smoothness",
    "prox-gd": "Prox-GD",
    "fista": "FISTA",
    "prox-gd-no-dropout": "Prox-GD, p = 0",
}
"""The methods as tables and pictures name them; "none" is the plain layer, without dropout."""

PLAIN: tuple[Method, ...] = ("none", "dropout")
"""The methods that are no solvers."""
BEHIND_DROPOUT: tuple[Method, ...] = ("prox-gd", "fista")
FULL: tuple[Method, ...] = (*BEHIND_DROPOUT, "prox-gd-no-dropout")
"""The solvers with full gradients."""


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What a ReLU layer is that is marked D: plain, behind dropout, or a solver.

    Attributes:
      method: "none" is the plain layer; "dropout" drops inputs before it. The others solve the layer's
        problem: "prox-sg", "prox-sg-constant" (without decay), "importance" (p_i ∝ L_i) and
        "expected-smoothness" (steps 1/(2𝓛)) sample inputs; "ms2gd" samples in two outer iterations,
        each with one full gradient; "prox-gd" and "fista" take full gradients, with dropout before the
        layer, and "prox-gd-no-dropout" takes them without.
      rate: dropout rate p; a solver that samples takes τ = (1 − p) n1 inputs.
      num_iters: iterations of the solver; for "ms2gd" the total of inner iterations.
      decay: factor on the step size from one iteration to the next; ignored by "prox-sg-constant",
        and by "ms2gd", "prox-gd" and "fista", which converge without it.
      ridge: λ of the solver's problem.
      step_size: a constant step size in place of 1/L or 1/(2𝓛).
      normalize: solve with the map A/√L and the inputs √L x, so that the first iterate is the plain
        layer's output.
    """

    method: Method = "prox-sg"
    rate: float = 0.5
    num_iters: int = 10
    decay: float = 0.9
    ridge: float = 1e-3
    step_size: float | None = None
    normalize: bool = False

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise ValueError(
                f"method: expected one of {', '.join(get_args(Method))}, got {self.method}"
            )
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate: expected a dropout rate in [0, 1), got {self.rate}")

    @property
    def dropout_rate(self) -> float:
        """Rate of the dropout before a plain layer or one with full gradients."""
        return 0.0 if self.method in ("none", "prox-gd-no-dropout") else self.rate

    def solver(self) -> ss.Solver:
        """The solver's configuration.

        Raises:
          ValueError: for "none" and "dropout", which have no solver.
        """
        tau, count = 1.0 - self.rate, self.num_iters
        step_size: dict[str, Any] = {"step_size": self.step_size}
        if self.step_size is None and self.method in ("prox-sg", "importance"):
            step_size = {"decay": self.decay}
        if self.method in ("prox-sg", "prox-sg-constant"):
            return ss.ProxSG(tau, count, **step_size)
        if self.method == "importance":
            sampling = ss.estimators.Importance(tau, by="lipschitz")
            return ss.ProxSG(None, count, sampling=sampling, **step_size)
        if self.method == "expected-smoothness":
            rule = self.step_size or ss.InverseExpectedSmoothness(decay=self.decay)
            return ss.ProxSG(tau, count, step_size=rule)
        if self.method == "ms2gd":
            outer = min(2, count)
            return ss.MS2GD(tau, num_outer=outer, num_inner=count // outer, **step_size)
        if self.method in FULL:
            return ss.ProxGD(count, momentum=self.method == "fista", **step_size)
        raise ValueError(f"method: expected one that solves, got {self.method}")


class DropoutReLU(nnx.Module):
    """Dropout of the inputs, linear map, ReLU: one iteration of Prox-SG, as a plain layer."""

    def __init__(self, in_features: int, out_features: int, *, rate: float, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.linear = nnx.Linear(in_features, out_features, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """ReLU(W dropout(x) + b)."""
        return nnx.relu(self.linear(self.dropout(inputs)))


class DropoutSolver(nnx.Module):
    """Dropout of the inputs, then a deterministic solver.

    Args:
      rate: dropout rate p.
      linear: the solver layer.
      rngs: random streams for the dropout.
    """

    def __init__(self, rate: float, linear: ss.nnx.SolverLinear, *, rngs: nnx.Rngs):
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.linear = linear

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The solution at dropout(x)."""
        return self.linear(self.dropout(inputs))


HiddenLayer: TypeAlias = DropoutReLU | DropoutSolver | ss.nnx.SolverLinear


class ConvReLU(nnx.Module):
    """Convolution, optional batch normalisation, ReLU.

    Args:
      in_features: channels of the inputs.
      out_features: channels of the outputs.
      kernel_size: height and width.
      batch_norm: batch normalisation before the ReLU.
      rngs: random streams of the initialisation.
      **options: those of `nnx.Conv`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        batch_norm: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        # a bias before batch normalisation has no effect
        self.conv = nnx.Conv(
            in_features, out_features, kernel_size, use_bias=not batch_norm, rngs=rngs, **options
        )
        norm = nnx.BatchNorm(out_features, momentum=0.9, rngs=rngs) if batch_norm else None
        self.norm = nnx.data(norm)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """ReLU(norm(A x + b))."""
        x = patches.convolved(self.conv, inputs)
        return nnx.relu(x if self.norm is None else self.norm(x))


def hidden_layer(
    in_features: int, out_features: int, *, marked: bool, block: BlockConfig, rngs: nnx.Rngs
) -> HiddenLayer:
    """A fully-connected ReLU layer; plain where it is not marked D, else what `block` says."""
    if marked and block.method not in PLAIN:
        linear = nnx.Linear(in_features, out_features, rngs=rngs)
        return _solve(linear, block, rngs)
    rate = block.dropout_rate if marked else 0.0
    return DropoutReLU(in_features, out_features, rate=rate, rngs=rngs)


def swap_hidden(layer: HiddenLayer, block: BlockConfig, *, rngs: nnx.Rngs) -> HiddenLayer:
    """A layer with the same parameters, plain or with the dropout or solver of `block`."""
    linear = layer if isinstance(layer, ss.nnx.SolverLinear) else layer.linear
    if block.method not in PLAIN:
        return _solve(linear, block, rngs)
    plain = DropoutReLU(1, 1, rate=block.dropout_rate, rngs=rngs)
    if isinstance(linear, ss.nnx.SolverLinear):
        raise ValueError("swap_hidden: expected a plain layer to swap for dropout, got a solver")
    plain.linear = linear
    return plain


def _solve(linear: nnx.Linear, block: BlockConfig, rngs: nnx.Rngs) -> HiddenLayer:
    twin = ss.nnx.SolverLinear.from_layer(
        linear,
        prior=ss.prox.NonNegative(),
        solver=block.solver(),
        ridge=block.ridge,
        normalize=block.normalize,
        rngs=rngs,
    )
    if block.method in FULL:
        return DropoutSolver(block.dropout_rate, twin, rngs=rngs)
    return twin


def swap_conv(
    layer: ConvReLU, block: BlockConfig, spatial_shape: tuple[int, int]
) -> ss.nnx.SolverConv:
    """A solver layer with the parameters of a trained convolution, in place of it and its ReLU.

    The Lipschitz constant is that of the unpadded grid, as in the paper.

    Args:
      layer: a layer without batch normalisation.
      block: a method with full gradients; the dropout rate is not used.
      spatial_shape: height and width of the layer's inputs.
    """
    if block.method not in BEHIND_DROPOUT:
        raise ValueError(
            f"method of a convolution: expected one of {', '.join(BEHIND_DROPOUT)}, got {block.method}"
        )
    if layer.norm is not None:
        raise ValueError("swap_conv: expected a layer without batch normalisation")
    return ss.nnx.SolverConv.from_layer(
        layer.conv,
        spatial_shape=spatial_shape,
        prior=ss.prox.NonNegative(),
        solver=block.solver(),
        ridge=block.ridge,
        normalize=block.normalize,
    )


def solver_of(layer: Any) -> ss.nnx.SolverLinear | ss.nnx.SolverConv | None:
    """The solver in a layer, or None in a plain one."""
    if isinstance(layer, DropoutSolver):
        return layer.linear
    return layer if isinstance(layer, ss.nnx.SolverLinear | ss.nnx.SolverConv) else None


def has_stochastic_solver(model: nnx.Module) -> bool:
    """Whether a network samples at test time: stochastic solvers do, dropout does not."""
    return any(
        isinstance(module, ss.nnx.SolverLinear | ss.nnx.SolverConv) and module.solver.stochastic
        for _, module in nnx.iter_modules(model)
    )


def set_mode(model: nnx.Module, mode: Literal["train", "test", "deterministic"]) -> None:
    """Switch a model's random layers, in place.

    "train": dropout and solvers sample. "test": dropout is off, solvers sample, as in the paper.
    "deterministic": dropout is off, solvers take full gradients. Batch normalisation updates its
    statistics in "train" only.
    """
    if mode == "train":
        model.train()
        return
    model.eval()
    if mode == "test":
        for _, module in nnx.iter_modules(model):
            if isinstance(module, ss.nnx.SolverLinear | ss.nnx.SolverConv):
                module.deterministic = False
