"""Equilibria z = Wᵀσ(W z + c): evaluations, products and memory of the backward pass, torchdeq.

    python -m benchmarks.equilibrium

Counts are of a batch, until its last example has converged to 1e-6, in float64. torchdeq is compared where it
can be imported (`pip install torch torchdeq`); nothing here needs it.
"""

import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import stochsolvers as ss
from benchmarks import measure
from benchmarks._equilibrium_steps import training_figures
from benchmarks.record import Figure, Goal, Options, main

SIZE, INPUTS, BATCH, OMEGA, TOL, CAP = 200, 50, 16, 0.95, 1e-6, 5000
PEER_BATCH, PEER_TOL, PEER_CAP = 64, 1e-5, 200
PAUSE = 0.05
PEERS: dict[str, dict[str, Any]] = {
    "torchdeq, Anderson both ways": {"forward": {}, "backward": "anderson"},
    "torchdeq, Anderson of λ = 1e-8, plain backward": {
        "forward": {"lam": 1e-8},
        "backward": "fixed_point_iter",
    },
}
KINDS = ("Gaussian", "decaying", "orthogonal")
ACTIVATIONS = {"ReLU": jax.nn.relu, "tanh": jnp.tanh}


@ss.value_object
class Equilibrium(ss.FixedPointProblem):
    """z = Wᵀσ(W z + c)."""

    weights: jax.Array
    drive: jax.Array
    activation: str = ss.static_field()
    symmetric = True

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """(batch,)."""
        return self.drive.shape[:-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(batch, n)."""
        return self.drive.shape

    @property
    def dtype(self) -> Any:
        """Dtype of z."""
        return self.drive.dtype

    def layer(self, z: jax.Array) -> jax.Array:
        """Wᵀσ(W z + c)."""
        return ACTIVATIONS[self.activation](z @ self.weights.T + self.drive) @ self.weights


def benchmark(options: Options) -> Sequence[Figure]:
    """Counts for three spectra of W and two activations, then times."""
    size = 24 if options.quick else SIZE
    figures: list[Figure] = []
    cases = list(itertools.product(KINDS, ACTIVATIONS))
    with jax.enable_x64(True):
        for kind, activation in cases[2::3] if options.quick else cases:
            problem = equilibrium(kind, activation, size, BATCH, jnp.float64)
            figures += _counts(f"{kind} W, {activation}, n = {size}, ω = {OMEGA}", problem)
    steps = training_figures(options)
    return [*figures, _memory(size), *steps, *_against_torchdeq(options, size)]


def equilibrium(kind: str, activation: str, size: int, batch: int, dtype: Any) -> Equilibrium:
    """W with ‖W‖ = ω and c = U x, U and x Gaussian."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(size, size))
    if kind == "orthogonal":
        W = np.linalg.qr(W)[0]
    if kind == "decaying":
        left, _, right = np.linalg.svd(W)
        W = left / np.sqrt(np.arange(1, size + 1)) @ right
    W *= OMEGA / np.linalg.norm(W, 2)
    drive = rng.normal(size=(batch, INPUTS)) @ rng.normal(size=(INPUTS, size)) / math.sqrt(INPUTS)
    return Equilibrium(jnp.asarray(W, dtype), jnp.asarray(drive, dtype), activation)


def _counts(what: str, problem: Equilibrium) -> Iterator[Figure]:
    solvers = {
        "Anderson": ss.Anderson(CAP, tol=TOL),
        "FISTA with restart": ss.ProxGD(CAP, tol=TOL, momentum=True, restart=True),
    }
    plain = _iterations(ss.FixedPoint(CAP, tol=TOL), problem)
    for name, solver in solvers.items():
        count = _iterations(solver, problem)
        yield Figure(
            f"evaluations of h to {TOL:g}, {what}, {name}",
            "plain iteration",
            count / plain,
            goal=Goal("≤", 0.6) if name == "Anderson" else None,
            detail={"evaluations": {name: count, "plain": plain}},
        )
    direct, fixed = _conjugate_gradients(problem), _backward_iterations(problem)
    yield Figure(
        f"products of the backward pass to {TOL:g}, {what}, conjugate gradients",
        "fixed point u = v + Jᵀu",
        direct / fixed,
        goal=Goal("≤", 0.5),
        detail={"products": {"conjugate gradients": direct, "fixed point": fixed}},
    )


def _iterations(solver: ss.Solver, problem: Equilibrium) -> int:
    solution = solver.solve(None, problem)
    assert solution.iterations is not None
    if not np.all(solution.status == ss.Status.CONVERGED):
        raise ValueError(f"{type(solver).__name__} has not converged in {CAP} iterations")
    return int(np.max(solution.iterations))


def _cotangent(problem: Equilibrium) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=problem.shape), problem.dtype)


def _conjugate_gradients(problem: Equilibrium) -> int:
    """The least `max_iters` with which no example's derivative is NaN."""
    z = ss.Anderson(CAP, tol=1e-12).solve(None, problem).value
    cotangent = _cotangent(problem)

    def solved(count: int) -> bool:
        def product(drive):
            moved = Equilibrium(problem.weights, drive, problem.activation)
            solver = ss.FixedPoint(1, derivative=ss.Implicit(TOL, max_iters=count))
            return jnp.vdot(cotangent, solver.solve(None, moved, init=z).value)

        return bool(jnp.all(jnp.isfinite(jax.grad(product)(problem.drive))))

    least, most = 0, 1
    while not solved(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if solved(middle) else (middle, most)
    return most


def _backward_iterations(problem: Equilibrium) -> int:
    """Products with J until ||v + J u − u|| ≤ tol ||v|| for every example, u ← v + J u."""
    z, v = ss.Anderson(CAP, tol=1e-12).solve(None, problem).value, _cotangent(problem)
    _, jacobian = jax.linearize(problem.layer, z)

    @jax.jit
    def count(v):
        def step(carry):
            k, u, _ = carry
            new = v + jacobian(u)
            return k + 1, new, jnp.max(problem.norm(new - u) / problem.norm(v))

        first = jnp.array(0), v, jnp.array(jnp.inf)
        return jax.lax.while_loop(lambda carry: carry[2] > TOL, step, first)[0]

    return int(count(v))


def _memory(size: int) -> Figure:
    problem = equilibrium("Gaussian", "ReLU", size, PEER_BATCH, jnp.float32)

    def bytes_of(num_iters: int) -> int:
        solver = ss.Anderson(num_iters, tol=PEER_TOL)

        def solve(weights, drive):
            return solver.solve(None, Equilibrium(weights, drive, problem.activation)).value

        both = measure.value_and_gradient(solve)
        return measure.temporary_bytes(both, problem.weights, problem.drive)

    few, many = bytes_of(10), bytes_of(1000)
    return Figure(
        f"peak memory of value and implicit gradient, n = {size}, Anderson, at most 1,000 iterations",
        "at most 10 iterations",
        many / few,
        goal=Goal("≤", 1.0),
        detail={"bytes": {"10": few, "1000": many}},
    )


def _against_torchdeq(options: Options, size: int) -> Iterator[Figure]:
    batch = 4 if options.quick else PEER_BATCH
    if importlib.util.find_spec("torchdeq") is None:
        print("torchdeq cannot be imported: its rows are left out")
        return
    for kind, activation in (("Gaussian", "ReLU"), ("orthogonal", "tanh")):
        problem = equilibrium(kind, activation, size, batch, jnp.float32)
        sides = {"ours": _ours(problem)} | {
            name: _theirs(problem, **settings) for name, settings in PEERS.items()
        }
        times = measure.interleaved(
            {f"{side}, {c}": call for side, calls in sides.items() for c, call in calls.items()},
            rounds=options.rounds,
            pause=PAUSE,
        )
        detail: dict[str, Any] = {"seconds": {side: time.median for side, time in times.items()}}
        what = f"equilibrium of {kind} W, {activation}, n = {size}, batch {batch}, to {PEER_TOL:g}"
        for name in PEERS:
            error = _gradient_error(sides["ours"], sides[name])
            for call in sides["ours"]:
                yield Figure(
                    f"{what}, Anderson, {call}",
                    name,
                    times[f"ours, {call}"].over(times[f"{name}, {call}"]),
                    goal=Goal("≤", 1.0),
                    detail=detail | {"relative difference of gradients": error},
                )


def _ours(problem: Equilibrium) -> dict[str, Callable[[], Any]]:
    solver = ss.Anderson(PEER_CAP, tol=PEER_TOL, derivative=ss.Implicit(PEER_TOL))

    def solve(weights, drive):
        return solver.solve(None, Equilibrium(weights, drive, problem.activation)).value

    arguments = problem.weights, problem.drive
    both = measure.value_and_gradient(solve)
    return {
        "forward": functools.partial(jax.jit(solve), *arguments),
        "value and implicit gradient": functools.partial(both, *arguments),
    }


def _theirs(
    problem: Equilibrium, *, forward: dict[str, Any], backward: str
) -> dict[str, Callable[[], Any]]:
    torch: Any = importlib.import_module("torch")
    torchdeq: Any = importlib.import_module("torchdeq")
    W, c = (torch.tensor(np.asarray(a)) for a in (problem.weights, problem.drive))
    activation = {"ReLU": torch.relu, "tanh": torch.tanh}[problem.activation]
    torch.set_num_threads(1)  # faster than more of them on two cores
    settings = {
        f"{way}_{name}": value
        for way in "fb"
        for name, value in (("max_iter", PEER_CAP), ("tol", PEER_TOL), ("stop_mode", "rel"))
    }
    deq = torchdeq.get_deq(ift=True, f_solver="anderson", b_solver=backward, **settings)

    def solve(W, c):
        start = torch.zeros(problem.shape)
        layer = lambda z: activation(z @ W.T + c) @ W  # noqa: E731
        return deq(layer, start, solver_kwargs=dict(forward))[0][-1]

    def value():
        deq.eval()
        with torch.no_grad():
            return solve(W, c).numpy()

    def both():
        deq.train()
        leaves = [a.clone().requires_grad_() for a in (W, c)]
        loss = 0.5 * (solve(*leaves) ** 2).sum()
        loss.backward()
        return loss.detach().numpy(), [leaf.grad.numpy() for leaf in leaves]

    return {"forward": value, "value and implicit gradient": both}


def _gradient_error(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """||our gradient − theirs|| / ||theirs||, the larger of those with respect to W and c."""
    pairs = zip(*(side["value and implicit gradient"]()[1] for side in (ours, theirs)), strict=True)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


if __name__ == "__main__":
    main("equilibrium", benchmark, None)
