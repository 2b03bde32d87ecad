r"""Training of a two-layer ReLU network from its convex program, beyond the sampled one.

    gated program → its neurons as ReLU neurons → polish → separate → polish → … until the gap stands still

The cone program over sampled patterns has an optimum far above that of the network, so it is not solved.
Polishing is L-BFGS on the network's own objective; separation (`separate`) adds unit neurons u with
||Θ(X u)₊|| > β, Θ = −∂ℓ, which lower the objective to first order: without them the network is optimal.

References:
  Pilanci and Ergen 2020; Mishkin, Sahiner and Pilanci 2022 (gated programs); Bach 2017 (conditional
  gradients); Liu and Nocedal 1989 (L-BFGS).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from stochsolvers import _checks
from stochsolvers._typing import Array, Scalar, at_least_float32, value_object
from stochsolvers.convex import _inputs
from stochsolvers.convex._fista import FISTA
from stochsolvers.convex._gap import DualPoint, NetworkGap, dual_point, evaluated_response
from stochsolvers.convex._network import Network, gated_network
from stochsolvers.convex._patterns import sample_patterns
from stochsolvers.convex._problems import GatedProblem
from stochsolvers.convex._separate import Responses, distinct, search_responses
from stochsolvers.convex._solve import solve
from stochsolvers.losses import Loss, Squares


@value_object
class Training:
    """What `train_network` returns.

    Attributes:
      network: the best network, balanced, without neurons of weight zero.
      gap: its searched gap, which is no proof; `network_gap` has others.
      objectives: after each polish, shape (rounds,); they do not rise.
      gaps: the searched gap then, shape (rounds,).
      widths: number of neurons then, shape (rounds,).
    """

    network: Network
    gap: NetworkGap
    objectives: np.ndarray
    gaps: np.ndarray
    widths: np.ndarray


def train_network(
    key: Array,
    X: Any,
    y: Any,
    beta: Scalar,
    *,
    loss: Loss = Squares(),  # noqa: B008 - immutable
    hidden_bias: bool = False,
    init: Network | None = None,
    width: int = 100,
    num_gates: int = 200,
    tol: float = 1e-3,
    num_rounds: int = 10,
    num_iters: int = 1000,
    num_starts: int = 256,
    num_new: int = 16,
) -> Training:
    r"""Minimise Σ_k ℓ(f(x_k), y_k) + (β/2)(||W||² + ||b||² + ||a||²) over two-layer ReLU networks f.

    Args:
      key: of gates and starts.
      X: data, shape (n, d).
      y: targets, shape (n,), or (C, n) for C outputs that share their neurons.
      beta: β > 0, traced by what is compiled: a path of β compiles once.
      loss: ℓ.
      hidden_bias: whether neurons have a bias, which is decayed as the weight of a feature 1.
      init: a network to begin with, of at most `width` neurons, in place of the gated program.
      width: the most neurons; those that separation adds take the places of the smallest.
      num_gates: Gaussian gates of the gated program.
      tol: stop at a searched gap ≤ tol · objective, or where a round lowers neither it nor the objective by
        tol/10 of it.
      num_rounds: the most separations.
      num_iters: the most L-BFGS iterations of a polish.
      num_starts: ascents of a separation, besides those from the neurons.
      num_new: the most neurons added at once.

    Returns:
      `Training`. Not for jit: rounds are counted on the host, and what they do is compiled once.

    Raises:
      ValueError: for shapes that do not fit, NaN, β ≤ 0 and counts below 1.
    """
    _checks.random_key("key", key)
    if init is not None:
        _checks.instance("init", init, Network, "a Network, or None")
    _checks.rank("X", X, 2)
    _checks.real_array("X", X)
    _checks.real_array("y", y)
    _inputs.finite("X", X)
    _inputs.finite("y", y)
    _inputs.positive_number("beta", beta)
    _inputs.number("tol", tol)
    counts = {"width": width, "num_gates": num_gates, "num_rounds": num_rounds, "num_new": num_new}
    for name, value in (counts | {"num_iters": num_iters, "num_starts": num_starts}).items():
        _checks.count(name, value)
    dtype = at_least_float32(jnp.result_type(X))
    data = jnp.asarray(X, dtype)
    if hidden_bias:
        data = jnp.concatenate([data, jnp.ones((len(data), 1), dtype)], axis=1)
    args = data, jnp.asarray(y, dtype), jnp.asarray(beta, dtype), loss
    gates_key, key = jax.random.split(key)
    network = (
        _gated_start(gates_key, *args, num_gates) if init is None else _joined(init, hidden_bias)
    )
    network = polish(_padded(network, width), *args, num_iters=num_iters)
    best, history = None, []
    for k in range(num_rounds):
        network = network.balanced()
        found, gap = _searched_gap(jax.random.fold_in(key, k), network, *args, num_starts)
        history.append((gap.objective, gap.gap, len(network.active(1e-6))))
        if best is None or gap.objective <= best[1].objective:
            best = network, gap
        if gap.relative <= tol or _stands_still(history, tol) or k + 1 == num_rounds:
            break
        network = _inserted(network, found, float(beta), num_new)
        network = polish(network, *args, num_iters=num_iters)
    assert best is not None
    objectives, gaps, widths = map(np.array, zip(*history, strict=True))
    network = best[0].compact()
    return Training(_split(network) if hidden_bias else network, best[1], objectives, gaps, widths)


def _stands_still(history: list[tuple[float, float, int]], tol: float) -> bool:
    if len(history) < 3:
        return False
    (then, gap_then, _), (now, gap_now, _) = history[-3], history[-1]
    return then - now <= 0.1 * tol * abs(now) and gap_then - gap_now <= 0.1 * tol * abs(now)


def _gated_start(key: Array, X: Array, y: Array, beta: Array, loss: Loss, num: int) -> Network:
    """The neurons of the gated program, each with that half of its line that holds most of D_i X v_i."""
    patterns = sample_patterns(key, X, num)
    problem = GatedProblem(X, y, patterns, beta, loss=loss, joint=y.ndim == 2)
    value = solve(problem, solver=FISTA(max_iters=300), tol=1e-2, certify=False).value
    gated = gated_network(patterns.gates, value, joint=y.ndim == 2)
    linear = X @ gated.hidden
    energy = jnp.where(X @ gated.gates >= 0, jnp.sign(linear) * linear**2, 0)
    sign = jnp.where(jnp.sum(energy, axis=0) >= 0, 1, -1).astype(X.dtype)
    return Network(gated.hidden, gated.output)._scaled(sign, sign)


def polish(
    network: Network, X: Array, y: Array, beta: Array, loss: Loss, *, num_iters: int = 1000
) -> Network:
    """L-BFGS on the network's objective until it stalls: it falls by less than 10 units of round-off."""
    return _polish(network, X, y, beta, loss, jnp.asarray(num_iters))


@jax.jit
def _polish(
    network: Network, X: Array, y: Array, beta: Array, loss: Loss, num_iters: Array
) -> Network:
    def objective(network):
        return network.objective(X, y, beta, loss=loss)

    optimiser = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(objective)
    window, eps = 20, 10 * float(jnp.finfo(X.dtype).eps)

    def step(carry):
        k, network, state, best, least, before, _ = carry
        value, gradient = value_and_grad(network, state=state)
        better = value < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), network, best)
        least = jnp.minimum(value, least)
        updates, state = optimiser.update(
            gradient, state, network, value=value, grad=gradient, value_fn=objective
        )
        ended = (k % window == 0) & (before - least <= eps * jnp.abs(least)) & (k > 0)
        before = jnp.where(k % window == 0, least, before)
        ended = ended | ~jnp.isfinite(value)
        return k + 1, optax.apply_updates(network, updates), state, best, least, before, ended

    def goes_on(carry):
        return (carry[0] <= num_iters) & ~carry[-1]

    start = objective(network)
    carry = jnp.zeros((), num_iters.dtype), network, optimiser.init(network), network  # pyright: ignore[reportArgumentType]
    carry = (*carry, start, jnp.full_like(start, jnp.inf), jnp.zeros((), bool))
    return lax.while_loop(goes_on, step, carry)[3]


def _searched_gap(
    key: Array, network: Network, X: Array, y: Array, beta: Array, loss: Loss, num_starts: int
) -> tuple[Responses, NetworkGap]:
    point = dual_point(network, X, y, float(beta), loss)
    noise_key, key = jax.random.split(key)
    noise = jax.random.normal(noise_key, network.hidden.shape, X.dtype)
    size = jnp.linalg.norm(network.hidden, axis=0) / jnp.sqrt(jnp.asarray(len(noise), X.dtype))
    starts = jnp.concatenate([network.hidden, network.hidden + 0.3 * size[None, :] * noise], axis=1)
    found = search_responses(key, X, point.theta, starts=starts, num_starts=num_starts)
    gap = point.gap(_evaluated(point, found), "searched")
    units = np.asarray(found.units, np.float64)[:, distinct(found, 16)]
    better = point.corrected(
        np.concatenate([np.asarray(network.hidden, np.float64), units], axis=1)
    )
    again = search_responses(key, X, better.theta, starts=starts, num_starts=num_starts)
    return found, gap.tightened(better.gap(_evaluated(better, again), "searched"))


def _evaluated(point: DualPoint, found: Responses) -> float:
    return evaluated_response(point.data, point.theta, np.asarray(found.units, np.float64))


def _inserted(network: Network, found: Responses, beta: float, num: int) -> Network:
    """The violating units as small neurons in the places of the smallest."""
    kept = distinct(found, min(num, network.width), beta)
    units, outputs = np.asarray(found.units), np.asarray(found.outputs)
    sizes = np.prod([np.asarray(size) for size in network.sizes()], axis=0)
    places = np.argsort(sizes)[: len(kept)]
    alive = sizes[sizes > 0]
    small = np.sqrt(1e-3 * float(alive.mean())) if alive.size else 0.03
    output = outputs[:, kept].T if network.output.ndim == 2 else outputs[0, kept]
    return dataclasses.replace(
        network,
        hidden=network.hidden.at[:, places].set(small * units[:, kept]),
        output=network.output.at[places].set(small * output),
    )


def _padded(network: Network, width: int) -> Network:
    """The largest neurons, and neurons of weight zero to make up the width."""
    sizes = np.prod([np.asarray(size) for size in network.sizes()], axis=0)
    network = network.take(np.sort(np.argsort(-sizes)[:width]))
    missing = width - network.width
    output = ((0, missing),) + ((0, 0),) * (network.output.ndim - 1)
    hidden = jnp.pad(network.hidden, ((0, 0), (0, missing)))
    return dataclasses.replace(network, hidden=hidden, output=jnp.pad(network.output, output))


def _joined(network: Network, hidden_bias: bool) -> Network:
    """The hidden bias as the weights of a last feature."""
    if (network.hidden_bias is not None) != hidden_bias or network.output_bias is not None:
        wanted = "a network without output bias" + ", with a hidden bias" * hidden_bias
        _checks.fail("init", wanted, "another")
    if network.hidden_bias is None:
        return network
    hidden = jnp.concatenate([network.hidden, network.hidden_bias[None]])
    return Network(hidden, network.output)


def _split(network: Network) -> Network:
    return Network(network.hidden[:-1], network.output, hidden_bias=network.hidden[-1])
