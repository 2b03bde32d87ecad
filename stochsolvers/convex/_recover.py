"""From programs to networks and back, and Flax networks as networks, by the names of their parameters."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.convex import _inputs
from stochsolvers.convex._network import GatedNetwork, Network, gated_network, relu_network
from stochsolvers.convex._patterns import Patterns, mask_of
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.convex._relu_problem import ReLUProblem


def recover(problem: GatedProblem | ReLUProblem, value: Array) -> Network | GatedNetwork:
    r"""The balanced network of a program's value, which predicts what the program predicts.

    Its weight decay is the program's penalty, of a `ReLUProblem` and of a `GatedProblem` with the regularizer
    "group", or "nuclear" where joint; of one-vs-rest programs the sum over the outputs, each of which has
    neurons of its own. Neurons of weight zero stay: see `Network.compact`.

    Args:
      problem: on data of shape (n, d).
      value: of its variable.

    Raises:
      ValueError: for what is no program, patches, and values of another shape.
    """
    if not isinstance(problem, GatedProblem | ReLUProblem):
        wanted = "a GatedProblem or a ReLUProblem"
        _checks.fail("problem", wanted, type(problem).__name__)
    _checks.rank("data of the program", problem.X, 2)
    if not _checks.is_real(value):
        _checks.fail("the value", "an array, such as solution.value", _checks.named(value))
    _checks.real_array("the value", value)
    if jnp.shape(value) != problem.shape:
        _checks.fail("shape of the value", problem.shape, jnp.shape(value))
    value = jnp.asarray(value, problem.dtype)
    if isinstance(problem, ReLUProblem):
        return relu_network(jnp.moveaxis(value, 0, 1) if problem.joint else value)
    gates = problem.patterns.gates.astype(problem.dtype)
    return gated_network(gates, value, joint=problem.joint)


def as_network(network: Any) -> Network:
    r"""A two-layer ReLU network as a `Network`.

    Args:
      network: a `Network`; an nnx module with `hidden` and `output`, whose `kernel` and `bias` are those of
        Linears; or linen variables {"params": {"hidden": {"kernel", "bias"}, "output": {...}}}, alone or
        after their module. One output becomes an `output` of shape (m,).

    Raises:
      ValueError: for anything else.
    """
    if isinstance(network, Network):
        return network
    if isinstance(network, tuple) and len(network) == 2:
        network = network[1]
    params = network.get("params", network) if isinstance(network, dict) else None
    try:
        if params is None:
            hidden, output = (_attributes(getattr(network, name)) for name in ("hidden", "output"))
        else:
            hidden, output = params["hidden"], params["output"]
        kernels = jnp.asarray(hidden["kernel"]), jnp.asarray(output["kernel"])
    except (AttributeError, KeyError):
        wanted = "a Network, or a module or variables with hidden and output"
        _checks.fail("network", wanted, type(network).__name__)
    bias, scalar = output.get("bias"), kernels[1].shape[1] == 1
    return Network(
        kernels[0],
        kernels[1][:, 0] if scalar else kernels[1],
        hidden.get("bias"),
        jnp.asarray(bias)[0] if scalar and bias is not None else bias,
    )


def from_network(network: Any, X: Any) -> tuple[Array, Patterns]:
    r"""A network as a feasible value of the cone program over its own patterns.

        v_i = Σ {a_j w_j : a_j > 0},  w_i = Σ {−a_j w_j : a_j < 0},  over the neurons j of pattern D_i on X

    It predicts what the network predicts, and its penalty is at most the network's weight decay.

    Args:
      network: what `as_network` takes. With a hidden bias the program is that of X with a last column of
        ones, and so are the gates. An output bias is no part of it: the program's targets are y less it.
      X: data, shape (n, d).

    Returns:
      The value, shape (2, P, d), or (C, 2, P, d) of several outputs, each with neurons of its own; and the
      patterns of the neurons that are active on X. Not for jit.

    Raises:
      ValueError: for data that do not fit, weights that are not finite, and networks that are zero on X.
    """
    network = as_network(network)
    _checks.rank("X", X, 2)
    _checks.real_array("X", X)
    _inputs.finite("X", X)
    _inputs.finite_fields("the network", network)
    weights = network.hidden
    X = jnp.asarray(X, weights.dtype)
    if network.hidden_bias is not None:
        weights = jnp.concatenate([weights, network.hidden_bias[None]])
        X = jnp.concatenate([X, jnp.ones((len(X), 1), X.dtype)], axis=1)
    mask = np.asarray(mask_of(X, weights))
    outputs = np.asarray(as_kernel(network.output))
    weights = np.asarray(weights)
    alive = np.any(mask & (np.asarray(X @ weights) > 0), axis=0) & np.any(outputs != 0, axis=1)
    if not np.any(alive):
        _checks.fail("network", "one with a neuron that is active on X", "zero everywhere")
    weights, outputs, mask = weights[:, alive], outputs[alive], mask[:, alive]
    packed = np.packbits(mask, axis=0).T
    _, first, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    value = np.zeros((outputs.shape[1], 2, len(first), len(weights)), weights.dtype)
    for c, a in enumerate(outputs.T):
        for part, size in enumerate((np.maximum(a, 0), np.maximum(-a, 0))):
            np.add.at(value[c, part], which.reshape(-1), (weights * size).T)
    patterns = Patterns(jnp.asarray(weights[:, first]), jnp.asarray(mask[:, first]))
    return jnp.asarray(value[0] if network.output.ndim == 1 else value), patterns


def _attributes(linear: Any) -> dict[str, Any]:
    """Kernel and bias of an nnx.Linear."""
    found = {name: getattr(linear, name, None) for name in ("kernel", "bias")}
    arrays = {name: None if v is None else jnp.asarray(v[...]) for name, v in found.items()}
    if arrays["kernel"] is None or getattr(linear, "gates", None) is not None:
        raise AttributeError("kernel")
    return given(arrays)


def as_kernel(output: Array) -> Array:
    return output[:, None] if output.ndim == 1 else output


def given(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if value is not None}
