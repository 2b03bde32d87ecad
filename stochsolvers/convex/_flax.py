r"""Networks as Flax modules.

Flax is imported where a module is made, and nowhere else in this package. Modules have the data on the first
axis and the outputs, one or several, on the last.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stochsolvers._typing import Array
from stochsolvers.convex._network import GatedNetwork, TwoLayer, through_gates
from stochsolvers.convex._recover import as_kernel, given, recover


def to_nnx(problem: Any, value: Any = None) -> Any:
    r"""An `nnx.Module` with `hidden` and `output` that maps x of shape (..., d) to f(x) of shape (..., C).

    Of a ReLU network both are `nnx.Linear`s. Of a gated network `hidden` has the weights `kernel` and `bias`,
    parameters, and the gates `gates` and `gate_bias`, variables of another type, which are not trained.

    Args:
      problem: a program; or a `Network` or `GatedNetwork`, without a value.
      value: of the program's variable.
    """
    network = _network(problem, value)
    linear, gated_linear, two_layer = _nnx_modules()
    if isinstance(network, GatedNetwork):
        hidden = gated_linear(network)
    else:
        hidden = linear(network.hidden, network.hidden_bias)
    output = linear(as_kernel(network.output), _as_bias(network.output_bias))
    return two_layer(hidden, output)


def to_linen(problem: Any, value: Any = None) -> tuple[Any, Any]:
    r"""A linen module with `hidden` and `output`, and its variables: f(x) = module.apply(variables, x).

    Of a ReLU network both are `nn.Dense`s. The gates of a gated network are variables of the collection
    "gates", which is not trained. Shapes and arguments are those of `to_nnx`.
    """
    network = _network(problem, value)
    gated = isinstance(network, GatedNetwork)
    module = _linen_module()(
        width=network.width,
        outputs=as_kernel(network.output).shape[1],
        hidden_bias=network.hidden_bias is not None,
        output_bias=network.output_bias is not None,
        gated=gated,
        gate_bias=gated and network.gate_bias is not None,
    )
    hidden = {"kernel": network.hidden, "bias": network.hidden_bias}
    output = {"kernel": as_kernel(network.output), "bias": _as_bias(network.output_bias)}
    variables = {"params": {"hidden": given(hidden), "output": given(output)}}
    if gated:
        gates = {"kernel": network.gates, "bias": network.gate_bias}
        variables["gates"] = {"hidden": given(gates)}
    return module, variables


def _network(problem: Any, value: Any) -> TwoLayer:
    if value is None and isinstance(problem, TwoLayer):
        return problem
    arguments: Any = problem, value
    return recover(*arguments)


def _as_bias(bias: Array | None) -> Array | None:
    return None if bias is None else jnp.atleast_1d(bias)


@functools.cache
def _nnx_modules() -> tuple[Any, Any, Any]:
    """A Linear of given weights, a gated layer, and the network of two layers."""
    from flax import nnx

    def linear(kernel, bias):
        layer = nnx.Linear(*kernel.shape, use_bias=bias is not None, rngs=nnx.Rngs(0))
        layer.kernel = nnx.Param(kernel)
        if bias is not None:
            layer.bias = nnx.Param(bias)
        return layer

    class Gates(nnx.Variable):
        """Gates of a gated network, which are not trained."""

    class GatedLinear(nnx.Module):
        """1[Gᵀx + h ≥ 0] ∘ (Wᵀx + b)."""

        def __init__(self, network):
            self.kernel = nnx.Param(network.hidden)
            self.bias = None if network.hidden_bias is None else nnx.Param(network.hidden_bias)
            self.gates = Gates(network.gates)
            self.gate_bias = None if network.gate_bias is None else Gates(network.gate_bias)

        def __call__(self, x):
            level = _affine(x, self.gates, self.gate_bias)
            return through_gates(level, _affine(x, self.kernel, self.bias))

    class TwoLayerNetwork(nnx.Module):
        """Output(hidden(x)), with a ReLU between Linears."""

        def __init__(self, hidden, output):
            self.hidden, self.output = hidden, output

        def __call__(self, x):
            hidden = self.hidden(x)
            return self.output(
                hidden if isinstance(self.hidden, GatedLinear) else jax.nn.relu(hidden)
            )

    return linear, GatedLinear, TwoLayerNetwork


def _affine(x: Any, kernel: Any, bias: Any) -> Array:
    value = jnp.asarray(x) @ kernel[...]
    return value if bias is None else value + jnp.expand_dims(bias[...], range(value.ndim - 1))


@functools.cache
def _linen_module() -> Any:
    from flax import linen as nn

    class GatedDense(nn.Module):
        """1[Gᵀx + h ≥ 0] ∘ (Wᵀx + b)."""

        width: int
        use_bias: bool
        gate_bias: bool

        @nn.compact
        def __call__(self, x):
            shape = (x.shape[-1], self.width)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            gates = self.variable("gates", "kernel", lambda: self._draw(shape)).value
            bias, gate_bias = None, None
            if self.use_bias:
                bias = self.param("bias", nn.initializers.zeros, shape[1:])
            if self.gate_bias:
                gate_bias = self.variable("gates", "bias", jnp.zeros, shape[1:]).value
            return through_gates(_affine(x, gates, gate_bias), _affine(x, kernel, bias))

        def _draw(self, shape):
            return jax.random.normal(self.make_rng("params"), shape)

    class TwoLayerNetwork(nn.Module):
        """Output(hidden(x)), with a ReLU between Denses."""

        width: int
        outputs: int
        hidden_bias: bool = False
        output_bias: bool = False
        gated: bool = False
        gate_bias: bool = False

        @nn.compact
        def __call__(self, x):
            if self.gated:
                hidden = GatedDense(self.width, self.hidden_bias, self.gate_bias, name="hidden")(x)
            else:
                hidden = nn.Dense(self.width, use_bias=self.hidden_bias, name="hidden")(x)
                hidden = nn.relu(hidden)
            return nn.Dense(self.outputs, use_bias=self.output_bias, name="output")(hidden)

    return TwoLayerNetwork
