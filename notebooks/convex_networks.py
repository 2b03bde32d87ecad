# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training a network as a convex program
#
# Training a two-layer ReLU network with weight decay is a convex problem in other variables (Pilanci and
# Ergen, ICML 2020): one group of weights for every pattern in which a neuron can be on and off over the
# data. So a trained network can be compared with the best one there is, and the comparison is a proof.

# %%
import functools

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import stochsolvers as ss

jax.config.update("jax_enable_x64", True)
plt.rcParams.update(ss.plot.STYLE)

# %% [markdown]
# ## Twelve data on a line
#
# With a feature that is 1 (the neurons' bias) twelve data have 24 patterns, so all of them can be
# enumerated: the program over all patterns is exact, and its optimum is the least objective of every
# network of any width.

# %%
rng = np.random.default_rng(3)
inputs = np.sort(rng.uniform(-2, 2, 12))
X = np.stack([inputs, np.ones(12)], 1)
y = np.sin(3 * inputs) + 0.1 * rng.normal(size=12)
beta = 0.02
patterns = ss.convex.enumerate_patterns(X)
problem = ss.convex.ReLUProblem(X, y, patterns, beta)
solution = ss.convex.solve(problem, solver=ss.convex.InteriorPoint(), tol=1e-8)
best = ss.convex.prune(ss.convex.recover(problem, solution.value).compact(1e-4), X)
optimum = float(problem.objective(solution.value))
print(
    f"{patterns.num} patterns, optimum {optimum:.4f}, certified to {float(solution.certificate):.0e}"
)
print(f"as a network: {best.width} neurons, objective {float(best.objective(X, y, beta)):.4f}")

# %% [markdown]
# ## Twenty starts of gradient descent
#
# Networks of the width that the optimum needs, and wider ones, by Adam from random starts.


# %%
@functools.partial(jax.jit, static_argnames=("width", "steps"))
def descend(keys, X, y, beta, *, width, steps=4000):
    """Networks and objectives after Adam with a decaying rate, one for each key."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    d = X.shape[1]

    def run(key):
        first, second = jax.random.split(key)
        network = ss.convex.Network(
            jax.random.normal(first, (d, width)) / (d / 2) ** 0.5,
            jax.random.normal(second, (width,)) / width**0.5,
        )

        def update(carry, _):
            network, state = carry
            gradient = jax.grad(lambda one: one.objective(X, y, beta))(network)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(network, updates), state), None

        (network, _), _ = jax.lax.scan(update, (network, optimizer.init(network)), length=steps)
        return network, network.objective(X, y, beta)

    return jax.vmap(run)(keys)


keys = jax.random.split(jax.random.key(0), 20)
widths = (best.width, 4 * best.width, 16 * best.width)
found = {width: descend(keys, X, y, beta, width=width) for width in widths}
line = np.linspace(-2.3, 2.3, 300)
points = np.stack([line, np.ones_like(line)], 1)
_, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.8))
predict = jax.vmap(lambda network: network(points))
for prediction in np.asarray(predict(found[widths[0]][0])):
    left.plot(line, prediction, color=ss.plot.COLORS[5], lw=0.8, alpha=0.7)
left.plot([], [], color=ss.plot.COLORS[5], label=f"Adam, {widths[0]} neurons, 20 starts")
left.plot(line, best(points), color=ss.plot.COLORS[1], lw=2.2, label="the optimum")
left.plot(inputs, y, "ko", ms=5)
left.set(xlabel="x", ylabel="f(x)")
left.legend(fontsize=8)
for i, (width, (_, objectives)) in enumerate(found.items()):
    excess = np.sort(np.asarray(objectives)) / optimum - 1
    right.semilogy(
        np.arange(1, 21),
        100 * excess,
        "o" + ss.plot.DASHES[i],
        ms=4,
        color=ss.plot.COLORS[i],
        label=f"{width} neurons",
    )
    near, worst = int(np.sum(excess < 0.01)), excess[-1]
    print(
        f"{width:3} neurons: {near} of 20 starts within 1% of the optimum, the worst {worst:.0%} above"
    )
right.set(xlabel="start, sorted", ylabel="objective above the optimum (%)")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## How far from optimal is this network?
#
# `network_gap` asks it of any two-layer network, however it was trained. Each answer has its word: *exact*
# over all patterns, *bound* proved and loose, *searched* no proof.

# %%
width = widths[0]
k = int(np.argmax(found[width][1]))
worst = jax.tree.map(lambda leaf: leaf[k], found[width][0])
for method in ("enumerate", "bound", "search"):
    gap = ss.convex.network_gap(worst, X, y, beta, method=method)
    print(f"{method:9} {gap.word:8} at most {gap.relative:.0%} of the objective above the optimum")

# %% [markdown]
# ## A surprise: a convex program whose optimum is worse than plain descent
#
# With more data not all patterns can be enumerated, and it is tempting to sample some and solve the convex
# program over these. That program keeps every neuron within the cell of its pattern, and its optimum is
# above what descent on a network of as many neurons finds. (`train_network` therefore starts from the
# *gated* program, which has no cones, and polishes.)

# %%
digits = load_digits()
keep = np.isin(digits.target, (3, 8))
D = digits.data[keep][:150] / 16
t = np.where(digits.target[keep][:150] == 8, 1.0, -1.0)
patterns = ss.convex.sample_patterns(jax.random.key(1), D, 50)
largest = float(ss.convex.GatedProblem(D, t, patterns, 1.0).beta_max())
strength = 0.02 * largest
cones = ss.convex.ReLUProblem(D, t, patterns, strength)
gated = ss.convex.GatedProblem(D, t, patterns, strength)
solved = ss.convex.solve(cones, tol=1e-2)
rows = {
    "ReLU program, 50 patterns": float(cones.objective(solved.value)),
    "Adam, 50 neurons, 3 starts": descend(keys[:3], D, t, strength, width=50)[1].tolist(),
    "gated program, 50 patterns": float(gated.objective(ss.convex.solve(gated).value)),
}
certified = float(solved.certificate) / rows["ReLU program, 50 patterns"]
print(f"the ReLU program's optimum is at most {certified:.1%} below its value")
ss.plot.table(rows, label="objective on 150 digits, 3 against 8 (less is better)")
plt.show()

# %% [markdown]
# ## A path of regularisation
#
# From β_max, above which the best network is zero, downwards: each optimum starts at the last, with a
# certified gap at every stop. How many neurons does the best network need?

# %%
betas = largest * 2.0 ** -np.arange(0.5, 7.6, 0.5)
path = ss.convex.regularization_path(gated, betas, tol=1e-4)
rest = digits.data[keep][150:] / 16
truth = digits.target[keep][150:] == 8
neurons = [int(gated.num_active(one.value)) for one in path]
scores = [100 * np.mean((np.asarray(gated.predict(one.value, rest)) > 0) == truth) for one in path]
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
left.semilogx(betas / largest, neurons, "o-", ms=4, color=ss.plot.COLORS[0])
left.set(xlabel="β/β$_{max}$", ylabel="neurons of the optimum (of 50)")
right.semilogx(betas / largest, scores, "o-", ms=4, color=ss.plot.COLORS[1])
right.set(xlabel="β/β$_{max}$", ylabel="accuracy on the other digits (%)")
plt.show()
gaps = [
    float(one.certificate / gated.with_beta(b).objective(one.value))
    for one, b in zip(path, betas, strict=True)
]
print(f"{len(path)} optima, certified gaps of at most {max(gaps):.1e} of the objective")
print("neurons:", neurons)
