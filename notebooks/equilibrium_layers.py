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
# # Equilibrium layers
#
# An equilibrium layer returns the solution of z = h(z) in place of some iterations of a layer,
#
# $$h(z) = W^\top\sigma(W z + c),\qquad c = U x + b,\qquad \sigma = \mathrm{prox}_g.$$
#
# h is the gradient of a convex function, so the equilibrium is the minimiser of an objective G that can be
# written down, with ∇G(z) = z − h(z) (Xie et al., TPAMI 2023). That is what makes the pictures below
# possible.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import stochsolvers as ss

plt.rcParams.update(ss.plot.STYLE)

# %% [markdown]
# ## Two units, so that it can be seen
#
# The level sets of G, and three solvers on their way from the same point. ‖W‖ = 0.98: along the direction
# of that singular value the plain iteration comes nearer by 0.98² a step only.

# %%
rotation = jnp.array([[0.8, -0.6], [0.6, 0.8]])
W = ss.Dense((rotation * jnp.array([0.98, 0.4])) @ rotation.T)
problem = ss.equilibrium.EquilibriumProblem(W, jnp.array([0.03, 0.02]))
start = jnp.array([1.45, 2.2])
solvers = {
    "plain": lambda n: ss.FixedPoint(n),
    "FISTA": lambda n: ss.ProxGD(n, momentum=True, restart=True),
    "Anderson": lambda n: ss.Anderson(n),
}
counts = (1, 2, 4, 8, 12)
paths = {
    name: np.stack(
        [start] + [ss.equilibrium.solve(problem, solver=make(n), init=start).value for n in counts]
    )
    for name, make in solvers.items()
}
exact = ss.equilibrium.solve(problem, solver=ss.Anderson(500, tol=1e-6)).value
x, y = np.meshgrid(np.linspace(-0.4, 2.4, 90), np.linspace(-0.3, 2.4, 90))
G = jax.vmap(problem.objective)(jnp.stack([x.ravel(), y.ravel()], 1)).reshape(x.shape)
_, axes = plt.subplots(figsize=(6.4, 5.6))
above = np.log10(np.maximum(G - problem.objective(exact), 1e-4))
axes.contour(
    x, y, above, levels=np.arange(-3.5, 1, 0.5), colors="0.8", linewidths=0.9, linestyles="-"
)
for i, (name, path) in enumerate(paths.items()):
    style = {"marker": "os^"[i], "ms": 8 - 2 * i, "color": ss.plot.COLORS[i]}
    axes.plot(*path.T, ss.plot.DASHES[i], lw=1.2, mfc="white", label=name, **style)
axes.plot(*exact, "*", ms=13, color="k", label="equilibrium")
axes.set(xlabel="z₁", ylabel="z₂", aspect="equal", title="after 0, 1, 2, 4, 8 and 12 iterations")
axes.grid(visible=False)
axes.legend(loc="lower right")
plt.show()
for name, path in paths.items():
    print(f"{name:9} distance after 12 iterations {np.linalg.norm(path[-1] - exact):.3f}")

# %% [markdown]
# ## A distance that is proved
#
# For ω = ‖W‖ < 1 every point has a certified distance from the equilibrium, ‖z − z\*‖ ≤ ‖z − h(z)‖/(1 −
# ω²). Each example of a batch stops by itself.

# %%
rng = np.random.default_rng(0)
W = ss.equilibrium.normalized(ss.Dense(jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)), 0.95)
problem = ss.equilibrium.EquilibriumProblem(W, jnp.asarray(rng.normal(size=(32, 128)), jnp.float32))
runs = {
    "plain": ss.FixedPoint(300, tol=1e-5),
    "FISTA, restarted": ss.ProxGD(300, momentum=True, restart=True, tol=1e-5),
    "Anderson": ss.Anderson(300, tol=1e-5),
}
runs = {name: ss.equilibrium.solve(problem, solver=solver) for name, solver in runs.items()}
axes = ss.plot.convergence(runs)
axes.set(xlim=(0, 1 + max(int(run.iterations.max()) for run in runs.values())))
plt.show()
for name, run in runs.items():
    print(
        f"{name:17} {run.iterations.min()} to {run.iterations.max()} iterations, "
        f"certified distance {problem.distance(run.value).max():.1e}"
    )

# %% [markdown]
# ## In a network
#
# One equilibrium layer and a linear one, on digits. Its derivative is one linear system at the equilibrium:
# no iterate of the forward pass is kept.

# %%
images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
train, test = slice(0, 1000), slice(1000, None)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.equilibrium = ss.nnx.EquilibriumLinear(
            64, 48, solver=ss.Anderson(60, tol=1e-3), rngs=rngs
        )
        self.last = nnx.Linear(48, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(self.equilibrium(x))


@nnx.jit
def step(model, optimizer, batch):
    def loss_of(model):
        logits = model(images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    loss, gradient = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradient)
    return loss


@nnx.jit
def evaluated(model):
    """Test accuracy in percent, and the iterations that each example takes."""
    right = jnp.argmax(model(images[test]), 1) == labels[test]
    return 100 * jnp.mean(right), model.equilibrium.solve(images[test]).iterations


def evaluation():
    model.eval()
    accuracy, iterations = evaluated(model)
    model.train()
    return f"test accuracy {accuracy:.1f}%, {iterations.min()} to {iterations.max()} iterations"


model = Net(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)
print("before training:", evaluation())
for _ in range(12):
    for batch in rng.permutation(train.stop).reshape(-1, 100):
        step(model, optimizer, batch)
print("after training:", evaluation())
model.eval()
print(ss.certify(model, images[test]))

# %% [markdown]
# ## A surprise: which equilibrium is a choice
#
# At ω = 1 a layer may have many equilibria, and a plain iteration returns one that depends on where it
# started. Sequential averaging returns the one that a second objective R prefers, with the same weights and
# the same layer: here R = ½‖z − a‖² with a = (2, −3, 1), and the equilibria of h(z) = Wᵀ max(W z, 0), W =
# diag(1, 1, ½), are all (z₁, z₂, 0) with z₁, z₂ ≥ 0.

# %%
degenerate = ss.equilibrium.EquilibriumProblem(
    ss.Dense(jnp.diag(jnp.array([1, 1, 0.5]))), jnp.zeros(3)
)
target, begin = jnp.array([2.0, -3.0, 1.0]), jnp.array([5.0, 4.0, 3.0])
averaging = ss.equilibrium.SequentialAveraging(lambda z: z - target, 0.9, 0.1, num_iters=3000)
for name, solver in {"plain": ss.FixedPoint(3000), "averaging": averaging}.items():
    z = ss.equilibrium.solve(degenerate, solver=solver, init=begin).value
    print(
        f"{name:10} {np.round(np.asarray(z), 2) + 0.0}, ‖z − h(z)‖ = "
        f"{jnp.linalg.norm(z - degenerate.layer(z)):.0e}, R = {0.5 * jnp.sum((z - target) ** 2):.2f}"
    )
