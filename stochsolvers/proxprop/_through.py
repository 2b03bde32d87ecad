"""The implicit step of any differentiable block, by conjugate gradients."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from stochsolvers import _checks
from stochsolvers._typing import Array
from stochsolvers.proxprop._steps import ConjugateGradients
from stochsolvers.proxprop._systems import conjugate_gradients
from stochsolvers.proxprop._trees import Parameters


def through(function: Callable[..., Any], step: ConjugateGradients) -> Callable[..., Any]:
    r"""The block with the same values, whose parameters take the implicit step in reverse mode.

        d = (JᵀJ + I/τ)⁻¹ Jᵀ G,     J = ∂ function(parameters, *inputs) / ∂ parameters,

    by conjugate gradients, all parameters and outputs being one system: the Gauss–Newton step of
    ½||outputs − targets||², damped by 1/τ, where G = outputs − targets. For a linear block it is the step of
    `apply`. The cotangent of the inputs is the ordinary one. A block of several layers, such as a solver
    layer of K iterations, is linearised as a whole.

    The backward pass computes the block again and then J and Jᵀ once in each iteration. Forward mode through
    the block must be possible (for J); through the result it is refused.

    Args:
      function: takes `(parameters, *inputs)` to an array or a tree of arrays, for a whole batch at once.
        Everything that it depends on and that is differentiated is one of its arguments, trees of arrays; it
        is structure, so define it once. Of a Flax module,
        `lambda parameters, rest, x: nnx.merge(graph, parameters, rest)(x)`.
      step: `ConjugateGradients`; there is no factorisation to be exact with.

    Returns:
      a function of the same arguments, for `jax.grad`, `jax.vjp` and `jax.value_and_grad`.

    Raises:
      ValueError: at once, for another step.
    """
    if not callable(function):
        _checks.fail("function of through", "a function", type(function).__name__)
    if not isinstance(step, ConjugateGradients):
        _checks.fail("step of through", "a ConjugateGradients", repr(step))

    @functools.wraps(function)
    def block(parameters: Any, *inputs: Any) -> Any:
        return _through(function, parameters, inputs, step)

    return block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(
    function: Callable[..., Any], parameters: Any, inputs: Any, step: ConjugateGradients
) -> Any:
    return function(parameters, *inputs)


def _forward(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    return _through(function, *arguments), arguments


def _backward(function: Callable[..., Any], arguments: Any, cotangent: Any) -> tuple[Any, ...]:
    parameters, inputs, step = arguments
    own, given = Parameters.of(parameters), Parameters.of(inputs)

    def of_inputs(leaves: Any) -> Any:
        return function(parameters, *given.rebuilt(leaves))

    def of_parameters(leaves: Any) -> Any:
        return function(own.rebuilt(leaves), *given.rebuilt(given.widened()))

    d_inputs = jax.vjp(of_inputs, given.leaves)[1](cotangent)[0]
    dtype = jnp.result_type(jnp.float32, *own.widened()) if own.leaves else jnp.dtype(jnp.float32)
    tau = jnp.asarray(step.tau, dtype)
    d = implicit_step(of_parameters, own.widened(), cotangent, tau, step.num_iters)
    return own.cotangent(own.like(d)), given.cotangent(d_inputs), None


_through.defvjp(_forward, _backward)


def implicit_step(
    outputs: Callable[[Any], Any], parameters: Any, cotangent: Any, tau: Array, num_iters: int
) -> Any:
    """(τ JᵀJ + I)⁻¹ τ JᵀG by conjugate gradients, J that of `outputs` at the parameters, of any trees."""
    value, forward = jax.linearize(outputs, parameters)
    backward = jax.linear_transpose(forward, parameters)
    flat, unravel = ravel_pytree(parameters)
    if not flat.size:
        return parameters

    def pull(cotangent: Any) -> Array:
        like = jax.tree.map(lambda g, v: g.astype(v.dtype), cotangent, value)
        return ravel_pytree(backward(like)[0])[0][:, None]

    def gram(vector: Array) -> Array:
        return tau * pull(forward(unravel(vector[:, 0])))

    return unravel(conjugate_gradients(gram, tau * pull(cotangent), num_iters)[:, 0])
