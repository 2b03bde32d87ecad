"""The examples of `experiments.landscape`: each returns its numbers and what draws its picture."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import stochsolvers as ss
from experiments import data
from experiments.data import vectors
from experiments.training import stochastic_descent

Numbers = dict[str, Any]
Drawing = Callable[[Figure], None]
THREE = np.array([[2.0, 2.0], [3.0, 3.0], [1.0, 0.0]])
TARGETS = np.array([1.0, -1.0, 2.0])


def exact_program(X: np.ndarray, y: np.ndarray, beta: float) -> tuple[Any, Any]:
    """The cone program over all patterns of the data, and its solution."""
    with jax.enable_x64(True):
        patterns = ss.convex.enumerate_patterns(X)
        problem = ss.convex.ReLUProblem(X, y, patterns, beta)
        return problem, ss.convex.solve(problem, solver=ss.convex.InteriorPoint(), tol=1e-8)


def relative_gap(problem: Any, solution: Any) -> float:
    """The largest certified gap of the programs, in units of their objectives."""
    return float(jnp.max(solution.certificate / problem.objective(solution.value)))


def three(config: Any) -> tuple[Numbers, Drawing]:
    """The slides' example: three data in the plane, two of them on one ray."""
    beta = 0.1
    with jax.enable_x64(True):
        problem, solution = exact_program(THREE, TARGETS, beta)
        network = ss.convex.prune(ss.convex.recover(problem, solution.value).compact(1e-4), THREE)
        numbers = {
            "patterns": problem.patterns.num,
            "optimum": float(problem.objective(solution.value)),
            "gap": float(solution.certificate),
            "network": float(network.objective(THREE, TARGETS, beta)),
            "neurons": int(network.width),
        }
        gates, mask = np.asarray(problem.patterns.gates), np.asarray(problem.patterns.mask)
        weights = np.asarray(network.hidden)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for k, (row, target) in enumerate(zip(THREE, TARGETS, strict=True)):
            axes.plot(row[0], row[1], "ko")
            axes.annotate(
                f"$x_{k + 1}$, y = {target:g}".replace("-", "−"),
                row,
                (5, 5),
                textcoords="offset points",
            )
            across = np.array([-row[1], row[0]]) / np.linalg.norm(row)
            x, y = np.stack([-4 * across, 4 * across], 1)
            axes.plot(x, y, color="0.7", lw=1)
        for gate, column in zip(gates.T, mask.T, strict=True):
            place = 2.6 * gate / np.linalg.norm(gate)
            axes.text(
                place[0], place[1], "".join("01"[int(on)] for on in column), ha="center", color="C0"
            )
        for column in weights.T:
            axes.annotate(
                "", column, (0, 0), arrowprops={"arrowstyle": "->", "color": "C1", "lw": 2}
            )
        axes.plot([], [], color="C1", lw=2, label="neurons of the optimal network")
        axes.plot([], [], color="0.7", label="where a datum switches a neuron")
        axes.set(xlim=(-3.5, 4.7), ylim=(-3.5, 4), aspect="equal", title="cells and their patterns")
        axes.legend(loc="lower left", fontsize=8)

    return numbers, draw


def starts(config: Any) -> tuple[Numbers, Drawing]:
    """Ten random starts of gradient descent on networks of two widths beside the convex optimum."""
    rng = np.random.default_rng([config.seed, 5])
    X = np.concatenate([rng.normal(size=(6, 1)), np.ones((6, 1))], axis=1)
    y, beta, steps = rng.normal(size=6), 0.02, 200 if config.smoke else 20_000
    problem, solution = exact_program(X, y, beta)
    with jax.enable_x64(True):
        optimum = float(problem.objective(solution.value))
    widths = (4, 20)
    descents = {}
    for width in widths:
        keys = jax.random.split(jax.random.key(config.seed), 10)
        run = functools.partial(_descend, X=X, y=y, beta=beta, width=width, steps=steps)
        descents[width] = np.asarray(jax.jit(jax.vmap(run))(keys))
    numbers = {
        "optimum": optimum,
        "gap": float(solution.certificate),
        **{
            f"width {width}": {
                "least": float(values[:, -1].min()),
                "largest": float(values[:, -1].max()),
                "within 1%": int(np.sum(values[:, -1] <= 1.01 * optimum)),
            }
            for width, values in descents.items()
        },
    }

    def draw(figure: Figure) -> None:
        for axes, (width, values) in zip(
            figure.subplots(1, 2, sharey=True), descents.items(), strict=True
        ):
            axes.loglog(np.arange(1, steps + 1), values.T, color="C0", lw=1, alpha=0.7)
            axes.axhline(optimum, color="k", ls="--", label="convex optimum")
            axes.set(title=f"{width} neurons, ten starts", xlabel="step")
            axes.legend()
        figure.axes[0].set_ylabel("objective")

    return numbers, draw


def _descend(key, *, X, y, beta, width, steps):
    """The objective after each step of gradient descent with momentum from a random network."""
    first, second = jax.random.split(key)
    X, y = jnp.asarray(X), jnp.asarray(y)
    network: Any = ss.convex.Network(
        jax.random.normal(first, (X.shape[1], width)) / np.sqrt(2),
        jax.random.normal(second, (width,)) / np.sqrt(width),
    )
    optimiser = optax.sgd(5e-3, momentum=0.9)

    def objective(network):
        return network.objective(X, y, beta)

    def step(carry, _):
        network, state = carry
        value, slope = jax.value_and_grad(objective)(network)
        updates, state = optimiser.update(slope, state)
        return (optax.apply_updates(network, updates), state), value

    return jax.lax.scan(step, (network, optimiser.init(network)), length=steps)[1]


def path(config: Any) -> tuple[Numbers, Drawing]:
    """Neurons of an optimal network of fewest neurons along the regularisation path."""
    rng = np.random.default_rng([config.seed, 7])
    X = np.concatenate([rng.normal(size=(8, 2)), np.ones((8, 1))], axis=1)
    y = rng.normal(size=8)
    with jax.enable_x64(True):
        patterns = ss.convex.enumerate_patterns(X)
        problem = ss.convex.ReLUProblem(X, y, patterns, 1.0)
        largest = float(problem.beta_max())
        fractions = np.geomspace(0.99, 1e-3, 4 if config.smoke else 25)
        counts, errors, gaps = [], [], []
        for fraction in fractions:
            one = problem.with_beta(fraction * largest)
            solution = ss.convex.solve(one, solver=ss.convex.InteriorPoint(), tol=1e-7)
            network = ss.convex.recover(one, solution.value).compact(1e-3)
            network = ss.convex.prune(network, X)
            counts.append(int(network.width))
            errors.append(float(np.mean((network(X) - y) ** 2)))
            gaps.append(relative_gap(one, solution))
    numbers = {
        "patterns": patterns.num,
        "fractions": [float(f"{f:.4g}") for f in fractions],
        "neurons": counts,
        "mean squared errors": errors,
        "largest relative gap": max(gaps),
    }

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        left.step(fractions, counts, where="mid", marker="o", ms=3)
        left.set(
            xscale="log",
            xlabel="β / β$_{max}$",
            ylabel="neurons",
            title="fewest neurons of an optimum",
        )
        right.loglog(fractions, errors, "o-", ms=3, color="C1")
        right.set(xlabel="β / β$_{max}$", ylabel="mean squared error", title="training error")

    return numbers, draw


def _images(config: Any) -> vectors.Vectors:
    source = data.read(config.dataset, config.data_dir)
    examples = 300 if config.smoke else config.examples
    return vectors.vectors(source.dataset(config.seed, examples))


def stochastic(config: Any) -> tuple[Numbers, Drawing]:
    """SGD on the convex program, which is `ss.ProxSG`, beside SGD on a ReLU network of as many neurons.

    The rate of the network's is the best of five. The two networks differ, and so do their least
    objectives; the lower bound is that of the convex program.
    """
    images = _images(config)
    classes, epochs, batch = len(images.classes), 2 if config.smoke else config.epochs, 64
    X, y = jnp.asarray(images.train[0]), jnp.asarray(vectors.targets(images.train[1], classes))
    fraction, per_epoch = 0.01, -(-len(X) // batch)
    patterns = ss.convex.sample_patterns(jax.random.key(config.seed), X, config.gates)
    problem = ss.convex.GatedProblem(X, y, patterns, 1.0, joint=True, loss=ss.losses.CrossEntropy())
    problem = problem.with_beta(fraction * problem.beta_max())
    solver = ss.ProxSG(batch, per_epoch)
    optimum = ss.convex.solve(problem, tol=1e-2)
    held, labels = (jnp.asarray(a) for a in images.validation)

    @jax.jit
    def epoch(key, problem, V):
        V = solver.solve(key, problem, init=V).value
        hits = jnp.argmax(problem.predict(V, held), axis=0) == labels
        return V, problem.objective(V), 100 * jnp.mean(hits)

    V, convex = jnp.zeros(problem.shape), []
    for k in range(epochs):
        V, *scores = epoch(jax.random.fold_in(jax.random.key(config.seed), k), problem, V)
        convex.append([float(score) for score in scores])
    network = stochastic_descent.best_descent(
        config.seed, X, y, problem, (held, labels), epochs, batch
    )
    lower = float(problem.objective(optimum.value)) * (1 - relative_gap(problem, optimum))
    numbers = {
        "data": list(X.shape),
        "gates": patterns.num,
        "beta": float(problem.beta),
        "lower bound": lower,
        "convex objective": [v for v, _ in convex],
        "network objective": [v for v, _ in network],
        "convex accuracy": [a for _, a in convex],
        "network accuracy": [a for _, a in network],
    }

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for color, (name, scores) in enumerate(
            {"convex program": convex, "ReLU network": network}.items()
        ):
            values, accuracies = np.array(scores).T
            x = np.arange(1, epochs + 1)
            left.plot(x, values, f"C{color}o-", ms=3, label=f"SGD on the {name}")
            right.plot(x, accuracies, f"C{color}o-", ms=3)
        left.axhline(lower, color="k", ls="--", label="certified lower bound of the convex program")
        left.set(yscale="log", xlabel="epoch", ylabel="objective", ylim=(lower / 3, None))
        right.set(xlabel="epoch", ylabel="validation accuracy (%)")
        left.legend(fontsize=8, loc="lower left")

    return numbers, draw


def gan(config: Any) -> tuple[Numbers, Drawing]:
    r"""A Wasserstein GAN with a quadratic discriminator: G* = U (Σ² − λI)₊^{1/2} Vᵀ, X = U Σ Vᵀ.

    It is the least generated data, in the Frobenius norm, whose second moments are within λ of the real
    ones, ||XᵀX − GᵀG||₂ ≤ λ. The generator of two layers that makes G* of noise Z, (Z W₁)₊W₂ = G*, is then
    fitted by the convex program of its gates.
    """
    source = data.read(config.dataset, config.data_dir)
    pixels = source.dataset(config.seed).train.images[: 300 if config.smoke else 1000]
    if config.dataset == "digits":
        pixels = pixels[:, :: vectors.PATCH, :: vectors.PATCH]
    n, shape = len(pixels), pixels.shape[1:]
    X = pixels.reshape(n, -1) / float(pixels.max())
    mean = X.mean(axis=0)
    X = X - mean
    left, values, right = np.linalg.svd(X, full_matrices=False)
    lam = values[min(10, len(values) - 1)] ** 2
    G = (left * np.sqrt(np.maximum(values**2 - lam, 0))) @ right
    distance = np.linalg.norm(X.T @ X - G.T @ G, 2)
    rng = np.random.default_rng([config.seed, 11])
    Z = rng.normal(size=(n, 40)).astype(np.float32)
    patterns = ss.convex.sample_patterns(jax.random.key(config.seed), Z, config.gates)
    varies = G.std(axis=0) > 1e-6
    target = G[:, varies].T.astype(np.float32)
    problem = ss.convex.GatedProblem(Z, target, patterns, 1.0, joint=True)
    problem = problem.with_beta(0.001 * problem.beta_max())
    solution = ss.convex.solve(problem, tol=1e-2)
    made, fresh = np.zeros_like(G), np.zeros_like(G)
    made[:, varies] = np.asarray(problem.predict(solution.value, Z)).T
    noise = rng.normal(size=Z.shape).astype(np.float32)
    fresh[:, varies] = np.asarray(problem.predict(solution.value, noise)).T
    numbers = {
        "lambda": float(lam),
        "rank": int(np.sum(values**2 > lam)),
        "distance of the moments": float(distance),
        "relative gap of the generator": relative_gap(problem, solution),
        "relative error of the generator": float(np.linalg.norm(made - G) / np.linalg.norm(G)),
    }
    shown = {"real": X, "closed form": G, "generator": made, "generator, fresh noise": fresh}

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(shown), 10, squeeze=False)
        for line, (name, rows) in zip(grid, shown.items(), strict=True):
            for axes, row in zip(line, rows, strict=False):
                axes.imshow((row + mean).reshape(shape).clip(0, 1), cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)

    return numbers, draw


def layers(config: Any) -> tuple[Numbers, Drawing]:
    """Each layer is a gated program on the hidden units of the one before, certified to a relative gap."""
    images = _images(config)
    splits = {name: getattr(images, name) for name in ("train", "validation")}
    classes, depth = len(images.classes), 2 if config.smoke else 4
    gates = max(2, config.gates // 20)
    y = vectors.targets(images.train[1], classes)
    features = {name: np.asarray(X) for name, (X, _) in splits.items()}
    accuracies: dict[str, list[float]] = {name: [] for name in splits}
    gaps = []
    for k in range(depth):
        X = features["train"]
        key = jax.random.fold_in(jax.random.key(config.seed), k)
        patterns = ss.convex.sample_patterns(key, X, gates)
        problem = ss.convex.GatedProblem(X, y, patterns, 1.0)
        problem = problem.with_beta(0.01 * jnp.min(problem.beta_max()))
        solution = ss.convex.solve(problem, tol=1e-3)
        gaps.append(relative_gap(problem, solution))
        for name, (_, labels) in splits.items():
            outputs = np.asarray(problem.predict(solution.value, features[name]))
            accuracies[name].append(float(100 * np.mean(outputs.argmax(axis=0) == labels)))
        hidden = {name: _units(problem, solution.value, rows) for name, rows in features.items()}
        scale = hidden["train"].std() or 1.0
        features = {
            name: np.concatenate([rows / scale, np.ones((len(rows), 1), np.float32)], axis=1)
            for name, rows in hidden.items()
        }
    numbers = {"gates": gates, "relative gaps": gaps, "accuracy": accuracies}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for color, (name, values) in enumerate(accuracies.items()):
            axes.plot(np.arange(1, depth + 1), values, f"C{color}o-", label=name)
        axes.set(xlabel="layers", ylabel="accuracy (%)", xticks=range(1, depth + 1))
        axes.set_title("layers trained one after the other by convex programs")
        axes.legend()

    return numbers, draw


def _units(problem: Any, V: Any, X: np.ndarray) -> np.ndarray:
    """Hidden units of the gated network: for each gate the outputs of its neurons, shape (n, C P)."""
    gates = np.asarray(problem.patterns.gates)
    products = np.einsum("nd,cpd->ncp", X, np.asarray(V))
    return (products * (X @ gates >= 0)[:, None]).reshape(len(X), -1).astype(np.float32)


def sentence(numbers: Mapping[str, Any]) -> str:
    """The numbers of an example on one line."""
    return "; ".join(f"{key} {_shown(value)}" for key, value in numbers.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({sentence(value)})"
    if isinstance(value, list):
        ends = value if len(value) <= 4 else (value[0], "…", value[-1])
        return ", ".join(map(_shown, ends))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
