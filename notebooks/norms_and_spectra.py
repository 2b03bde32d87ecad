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
# # Norms and spectra of a trained network
#
# How much can a layer amplify its input? ‖A‖, the largest singular value of what the layer does, with its
# padding and strides. This notebook trains two small convolutional networks, one of them normalised to ‖A‖
# = 1 in every layer, looks at their spectra, and asks what the bounds are worth.

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
bunch = load_digits()
images = jnp.asarray(bunch.images[..., None] / 16, jnp.float32)
labels = jnp.asarray(bunch.target)
train, test = slice(0, 1000), slice(1000, None)
SHAPES = {"conv1": (8, 8), "conv2": (4, 4)}


class Net(nnx.Module):
    def __init__(self, rngs, normalised=False):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.last = nnx.Linear(512, 10, rngs=rngs)
        if normalised:
            for name in ("conv1", "conv2", "last"):
                layer, shape = getattr(self, name), SHAPES.get(name)
                setattr(self, name, ss.nnx.SpectralNorm(layer, spatial_shape=shape))

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), strides=(2, 2))
        x = nnx.relu(self.conv2(x))
        return self.last(x.reshape(len(x), -1))


@nnx.jit
def step(model, optimizer, batch):
    def loss_of(model):
        logits = 20 * model(images[batch])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


def trained(normalised, epochs=15):
    model, rng = Net(nnx.Rngs(0), normalised), np.random.default_rng(0)
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    for _ in range(epochs):
        for batch in rng.permutation(train.stop).reshape(-1, 50):
            step(model, optimizer, batch)
    return model


def map_of(name, kernel):
    return ss.Conv(kernel, SHAPES[name]) if name in SHAPES else ss.Dense(kernel)


def baked(normalised):
    """A plain network with the kernels that the normalised one computes with."""
    model = Net(nnx.Rngs(0))
    for name in ("conv1", "conv2", "last"):
        inner = getattr(normalised, name).layer_instance
        kernel = inner.kernel[...]
        getattr(model, name).kernel[...] = kernel / ss.spectral_norm(map_of(name, kernel))
        getattr(model, name).bias[...] = inner.bias[...]
    return model


initial = Net(nnx.Rngs(0))
networks = {"free": trained(False), "normalised": baked(trained(True))}


def correct(model):
    return jnp.argmax(model(images[test]), 1) == labels[test]


for name, model in networks.items():
    print(f"{name}: {100 * correct(model).mean():.1f}% of the test images")

# %% [markdown]
# ## The norm of a convolution is not that of its reshaped kernel
#
# Frameworks normalise the kernel reshaped to a matrix; the layer's norm is another number. (Flax and torch
# both do.)

# %%
for name, model in {"at initialisation": initial, **networks}.items():
    kernel = model.conv2.kernel[...]
    reshaped = jnp.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
    norm = ss.spectral_norm(map_of("conv2", kernel))
    print(f"conv2 {name:17} reshaped kernel {reshaped:.2f}, layer {norm:.2f}")

# %% [markdown]
# ## All singular values
#
# 256 singular values of the second convolution, from its own 256 × 512 matrix, zero padding included.

# %%
convs = {
    name: map_of("conv2", model.conv2.kernel[...])
    for name, model in {"at initialisation": initial, **networks}.items()
}
ss.plot.spectrum(convs)
plt.show()
for name, conv in convs.items():
    print(
        f"{name:18} stable rank {ss.stable_rank(conv):6.1f}, condition {ss.condition_number(conv):.3g}"
    )

# %% [markdown]
# ## Which waves does it amplify?
#
# Lemma 2 of the paper: at every spatial frequency a circular layer is a small matrix of channels, and its
# largest singular value is the gain for waves of that frequency. The middle is the constant image, the
# edges are stripes of one pixel, and the dot is the wave with the largest gain. Here is the first
# convolution, on a grid of 32 × 32 frequencies.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2))
for ax, (name, model) in zip(axes, {"at initialisation": initial, **networks}.items(), strict=True):
    conv = ss.Conv(model.conv1.kernel[...], (32, 32), padding="CIRCULAR")
    ss.plot.frequencies(conv, ax=ax)
    ax.set_title(f"{name}\n{ax.get_title()}", fontsize=9)
    ax.grid(visible=False)
plt.show()

# %% [markdown]
# ## A bound, and what is attained
#
# `lipschitz_report` multiplies along the graph and proves ‖f(x) − f(y)‖ ≤ L ‖x − y‖ for all inputs. What a
# network attains on its data is the norm of its Jacobian there, far below L.

# %%
bounds = {}
for name, model in networks.items():
    report = ss.lipschitz_report(model, (1, 8, 8, 1))
    jacobians = jax.jit(jax.vmap(jax.jacrev(lambda x, model=model: model(x[None])[0])))(
        images[test]
    )
    attained = np.linalg.norm(np.asarray(jacobians).reshape(len(jacobians), 10, -1), 2, axis=(1, 2))
    bounds[name] = report.bound
    print(report)
    print(
        f"attained on the test images: {attained.max():.3g} at most, {attained.mean():.3g} in the mean\n"
    )
ss.plot.report(ss.lipschitz_report(networks["free"], (1, 8, 8, 1)))
plt.show()

# %% [markdown]
# ## A surprise: the bounded network is as accurate, and certified
#
# If the largest logit leads by a margin m, no perturbation shorter than m/(√2 L) changes the class. The
# free network has larger margins, but an L that is larger still, and next to nothing is certified. Divided
# by their norms in training, the layers of the other network give L = 1 and lose no accuracy in this run, of
# one seed. (0.1 is the norm of a change of one pixel by a tenth of the range from white to black.)

# %%
radii = np.linspace(0, 0.5, 101)
_, axes = plt.subplots(figsize=(6.4, 3.6))
for i, (name, model) in enumerate(networks.items()):
    logits = jnp.sort(model(images[test]), 1)
    radius = np.where(correct(model), logits[:, -1] - logits[:, -2], -1) / np.sqrt(2) / bounds[name]
    share = [100 * np.mean(radius >= r) for r in radii]
    axes.plot(radii, share, label=name, color=ss.plot.COLORS[i], linestyle="-" if i else "--")
    print(f"{name}: certified at 0.1 {share[20]:.1f}%, at 0.2 {share[40]:.1f}%")
axes.set(
    xlabel="radius ‖δ‖₂ of the perturbation", ylabel="correct and certified (%)", ylim=(0, 100)
)
axes.legend()
plt.show()
