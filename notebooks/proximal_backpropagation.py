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
# # Proximal backpropagation: the implicit step of a layer's parameters
#
# Backpropagation hands the optimiser AᵀG, one explicit gradient step on a least-squares problem: A maps a
# layer's parameters to its outputs on the batch, G is the cotangent of these. Proximal backpropagation
# takes the implicit step (Frerix, Möllenhoff, Moeller and Cremers, ICLR 2018),
#
# $$d = \Theta - \arg\min_{\Theta'} \tfrac12\|A\Theta' - (A\Theta - G)\|^2
#     + \tfrac1{2\tau}\|\Theta' - \Theta\|^2
#     = (A^\top A + I/\tau)^{-1} A^\top G.$$

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import stochsolvers as ss

plt.rcParams.update(ss.plot.STYLE)
images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
train, test = slice(0, 1000), slice(1000, None)
BATCH = 125

# %% [markdown]
# ## A layer changes its class and nothing else
#
# The parameters are the same variables, the output is the same; what differs is what `grad` returns for
# them.

# %%
layer = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
implicit = ss.nnx.ProxPropLinear.from_layer(layer, step=ss.proxprop.Exact(tau=0.05))


def loss(layer):
    return jnp.mean(nnx.relu(layer(images[:BATCH])) ** 2)


g, d = nnx.grad(loss)(layer)["kernel"][...], nnx.grad(loss)(implicit)["kernel"][...]
tiny = ss.nnx.ProxPropLinear.from_layer(layer, step=ss.proxprop.Exact(tau=1e-6))
limit = nnx.grad(loss)(tiny)["kernel"][...] / 1e-6
print("same outputs:", bool(jnp.array_equal(layer(images), implicit(images))))
print(f"d/τ for τ → 0 is the gradient, to {jnp.linalg.norm(limit - g) / jnp.linalg.norm(g):.0e}")

# %% [markdown]
# ## What the implicit step does to the gradient
#
# Along an eigenvector of AᵀA with the eigenvalue σ², the gradient is multiplied by τ/(1 + τσ²): as it is
# along directions in which the inputs hardly vary, held back along the few in which they vary most, where
# an explicit step of that length would overshoot.

# %%
A = jnp.concatenate([images[:BATCH], jnp.ones((BATCH, 1))], 1)
values = jnp.linalg.eigvalsh(A.T @ A)[::-1]
values = values[values > 1e-3]
_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
left.semilogy(np.arange(1, len(values) + 1), values, "o", markersize=3, color=ss.plot.COLORS[0])
left.set(xlabel="direction", ylabel="eigenvalue σ² of AᵀA", title="inputs of one batch")
for i, tau in enumerate((0.005, 0.05, 0.5)):
    factor = 1 / (1 + tau * values)
    right.plot(np.arange(1, len(values) + 1), factor, label=f"τ = {tau}", color=ss.plot.COLORS[i])
right.set(xlabel="direction", ylabel="step over τ · gradient", title="what is left of the gradient")
right.legend()
plt.show()

# %% [markdown]
# ## A training run for every step size at once
#
# A network 64 → 128 → 128 → 10 with SGD and momentum 0.95 for 5 epochs; the last layer's step is ordinary.
# The step sizes are traced, so one compiled program trains the nine networks of each arm side by side.


# %%
def initial(key):
    keys = jax.random.split(key, 3)
    shapes = ((64, 128), (128, 128), (128, 10))
    return [
        (jax.random.normal(k, s) * np.sqrt(2 / s[0]), jnp.zeros(s[1]))
        for k, s in zip(keys, shapes, strict=True)
    ]


def forward(params, x, step):
    for W, b in params[:-1]:
        h = x @ W + b if step is None else ss.proxprop.apply(ss.Dense(W), x, b, step)
        x = jax.nn.relu(h)
    W, b = params[-1]
    return x @ W + b


def objective(params, x, y, step=None):
    return optax.softmax_cross_entropy_with_integer_labels(forward(params, x, step), y).mean()


@functools.partial(jax.jit, static_argnums=0)
def histories(step_of, strengths):
    """Training loss after each epoch, shape (step sizes, epochs), of runs with lr · τ = strength."""

    def run(strength):
        step, rate = step_of(strength)
        optimizer = optax.sgd(rate, momentum=0.95, nesterov=True)

        def update(carry, batch):
            params, state = carry
            x, y = (jax.lax.dynamic_slice_in_dim(a, batch * BATCH, BATCH) for a in (images, labels))
            gradient = jax.grad(objective)(params, x, y, step)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, _):
            carry, _ = jax.lax.scan(update, carry, jnp.arange(train.stop // BATCH))
            return carry, objective(carry[0], images[train], labels[train])

        params = initial(jax.random.key(0))
        return jax.lax.scan(epoch, (params, optimizer.init(params)), length=5)[1]

    return jax.vmap(run)(strengths)


arms = {
    "backpropagation": lambda strength: (None, strength),
    "implicit, exact": lambda strength: (ss.proxprop.Exact(strength), 1.0),
    "implicit, 3 CG steps": lambda strength: (ss.proxprop.ConjugateGradients(strength, 3), 1.0),
}
strengths = 10.0 ** jnp.arange(-3, 1.01, 0.5)
curves = {name: np.asarray(histories(step_of, strengths)) for name, step_of in arms.items()}

_, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
for i, (name, runs) in enumerate(curves.items()):
    style = {"color": ss.plot.COLORS[i], "linestyle": ss.plot.DASHES[i], "marker": "o", "ms": 3.5}
    last = np.where(runs[:, -1] < 10, runs[:, -1], np.nan)
    left.loglog(strengths, last, label=name, **style)
    best = np.nanargmin(last)
    right.semilogy(np.arange(1, 6), runs[best], label=f"{name}, {strengths[best]:.2g}", **style)
    print(
        f"{name:21} best step {strengths[best]:.2g}: loss {last[best]:.4f}; by step:",
        *(f"{v:.2g}" for v in runs[:, -1]),
    )
left.axhline(np.log(10), color="0.6", linewidth=1, linestyle=":")
left.set(xlabel="step size (rate, or τ at rate 1)", ylabel="training loss after 5 epochs")
right.set(xlabel="epoch", ylabel="training loss", title="each at its best step size")
right.set_xticks(range(1, 6))
left.legend(fontsize=8)
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## A surprise: the better step points far away from the gradient
#
# d is a descent direction for every τ, but how far does it turn away from the gradient? The angle between
# them in the network's first layer, at initialisation, is the larger the larger τ is, and far from small at
# the τ that trains best.

# %%
params = initial(jax.random.key(0))
x, y = images[:BATCH], labels[:BATCH]
gradient = jax.grad(objective)(params, x, y)[0][0]
cosine = jax.jit(
    lambda tau: optax.cosine_similarity(
        jax.grad(objective)(params, x, y, ss.proxprop.Exact(tau))[0][0].ravel(), gradient.ravel()
    )
)
for tau in (1e-3, 1e-2, 1e-1, 10**-0.5, 1.0):
    print(f"τ = {tau:5.2g}: {np.degrees(np.arccos(cosine(tau))):.0f} degrees")
