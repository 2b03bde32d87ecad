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
# # Swap a trained layer for a solver, and finetune
#
# A block of a trained network, linear → activation, is one iteration of a proximal solver. `replace_layers`
# lets it run on, in the model as it is and with the weights that it has. This notebook trains a small
# network, swaps its hidden layers, looks at what more iterations change, and finetunes.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx
from sklearn.datasets import load_digits

import stochsolvers as ss

plt.rcParams.update(ss.plot.STYLE)
images, labels = load_digits(return_X_y=True)
images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
train, test = slice(0, 400), slice(400, None)  # few to train on, 1,397 to test


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 64, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


@nnx.jit
def accuracy(model):
    """Of the test images, in percent."""
    return 100 * jnp.mean(jnp.argmax(model(images[test]), 1) == labels[test])


def loss_of(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@functools.partial(jax.jit, static_argnames=("graph", "steps"))
def descend(graph, params, rest, key, rate, steps):
    """The parameters after steps of Adam on random batches of 50."""
    optimizer = optax.adam(rate)

    def step(carry, key):
        params, state = carry
        batch = jax.random.choice(key, train.stop, (50,))
        gradient = jax.grad(
            lambda params: loss_of(nnx.merge(graph, params, rest), images[batch], labels[batch])
        )(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def trained(model, seed, steps, rate):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    nnx.update(model, descend(graph, params, rest, jax.random.key(seed), rate, steps))
    return model


models = [trained(Net(nnx.Rngs(seed)), seed, 300, 2e-3) for seed in range(3)]
print("test accuracy (%):", *(f"{accuracy(model):.1f}" for model in models))

# %% [markdown]
# ## Swap
#
# Three iterations in both hidden layers. The report says what is in their place: the prior whose proximal
# operator is the activation, the constant that sets the step, how much the outputs change, and how well the
# layer's own convex problem is solved (`gap`). One iteration is the plain model, to the last bit.

# %%
plain = models[0]
swapped = nnx.clone(plain)
layers = ["first", "second"]
report = ss.nnx.replace_layers(
    swapped, layers, solver=ss.ProxGD(3), ridge=1e-3, inputs=images[train]
)
print(report)
ss.plot.report(report)
plt.show()

# %% [markdown]
# ## What more iterations do, without any training
#
# With `normalize=True`, the default, the first iterate is the trained layer. In the paper's scaling it is
# that layer's output divided by L, so that a trained network finds its activations shrunk.

# %%
counts = (1, 3, 30)
curves = {}
for normalize in (True, False):
    for count in counts:
        model = nnx.clone(plain)
        ss.nnx.replace_layers(
            model,
            layers,
            solver=ss.ProxGD(count),
            inputs=images[:1],
            normalize=normalize,
            measure=False,
        )
        curves.setdefault(normalize, []).append(float(accuracy(model)))

_, axes = plt.subplots(figsize=(6.4, 3.6))
for i, (normalize, values) in enumerate(curves.items()):
    name = "normalised" if normalize else "the paper's scaling"
    axes.semilogx(counts, values, "o-" if normalize else "s--", color=ss.plot.COLORS[i], label=name)
axes.axhline(float(accuracy(plain)), color="0.4", linestyle=":", label="the plain network")
axes.set_xticks(counts, [str(count) for count in counts])
axes.minorticks_off()
axes.set(xlabel="iterations in both layers", ylabel="test accuracy (%)")
axes.legend()
plt.show()
print("normalised:", *(f"{value:.1f}" for value in curves[True]))
print("the paper's scaling:", *(f"{value:.1f}" for value in curves[False]))

# %% [markdown]
# ## A surprise: the layer becomes a decoder of its own input
#
# The first layer was trained to classify, and nothing else. But what its block iterates on is ½‖A\* z − x‖²
# + …: more iterations find non-negative activations z that explain the input. Below, digits, and A\* z
# drawn as images: after one iteration (the trained ReLU layer, at its best single scale) and after 100.

# %%
kernel, bias = plain.first.kernel[...], plain.first.bias[...]
problem = ss.LayerProblem(ss.Dense(kernel), images, bias=bias, prior=ss.prox.NonNegative())
decoded, active = {"input": images}, {}
for count in (1, 100):
    z = ss.prox_gd(problem.normalized(), num_iters=count, momentum=True).value
    back = z @ kernel.T
    back = back * jnp.vdot(back, images) / jnp.vdot(back, back)
    error = jnp.linalg.norm(back - images) / jnp.linalg.norm(images)
    name = f"{count} iteration{'s' * (count > 1)}"
    decoded[name] = back
    active[name] = float(100 * (z > 1e-6).mean())
    print(f"{name}: error {error:.1%} of the input's norm, {active[name]:.0f}% of the units are on")

figure, grid = plt.subplots(3, 10, figsize=(7.4, 2.6))
for row, (name, values) in zip(grid, decoded.items(), strict=True):
    for place, axes in enumerate(row):
        shown = values[test][jnp.argmax(labels[test] == place)].reshape(8, 8)
        axes.imshow(shown, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %% [markdown]
# ## Finetune
#
# What counts is the network that was finetuned as long with its plain layers. Three networks, the same
# steps and rate for every arm.

# %%
results = {"plain, finetuned": [], "3 iterations": [], "3 iterations, finetuned": []}
for seed, model in enumerate(models):
    control, solver = nnx.clone(model), nnx.clone(model)
    ss.nnx.replace_layers(solver, layers, solver=ss.ProxGD(3), inputs=images[:1], measure=False)
    results["3 iterations"].append(float(accuracy(solver)))
    for name, one in (("plain, finetuned", control), ("3 iterations, finetuned", solver)):
        results[name].append(float(accuracy(trained(one, seed, 200, 5e-4))))

ss.plot.table(results, label="test accuracy (%), three networks")
plt.show()

# %% [markdown]
# Parameters stayed the same variables at the same paths all along: `restore_layers` gives the plain layers
# back, with what they have learnt meanwhile.

# %%
ss.nnx.restore_layers(swapped)
print("as before the swap:", bool(jnp.array_equal(swapped(images[test]), plain(images[test]))))
