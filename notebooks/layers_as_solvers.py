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
# # A layer is a convex problem and a choice of algorithm
#
# A block of a network, dropout → linear → activation, is one iteration of a stochastic proximal solver on
#
# $$\min_z\; \tfrac12\|A^* z - x\|^2 - \langle b, z\rangle + \tfrac{\lambda}{2}\|z\|^2 + g(z),$$
#
# with $x$ the block's input, $z$ its output, and the activation the proximal operator of $g$
# (Bibi, Ghanem, Koltun and Ranftl, ICLR 2019). This notebook looks at the statement, then at what more
# iterations buy.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import stochsolvers as ss

jax.config.update("jax_enable_x64", True)  # to see gaps far below the round-off of float32
layer = nnx.Linear(64, 48, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
x = jax.random.normal(jax.random.key(1), (200, 64))
problem = ss.LayerProblem(
    ss.Dense(layer.kernel[...]), x, bias=layer.bias[...], prior=ss.prox.NonNegative(), ridge=0.02
)

# %% [markdown]
# ## One iteration is the layer
#
# Full gradients, unit step, from zero: the plain layer. Half of the input features, sampled: the layer
# after dropout of exactly half of its inputs. The mask is the solver's own, drawn again from its key.

# %%
plain = nnx.relu(layer(x))
one = ss.prox_gd(problem, step_size=1.0, num_iters=1)
print("plain layer:", float(jnp.abs(one.value - plain).max()))

key = jax.random.key(2)
one = ss.prox_sg(key, problem, tau=32, step_size=1.0, num_iters=1)
mask = ss.sampling.tau_nice_mask(jax.random.fold_in(key, 0), 32, 64, (200,))
dropped = nnx.relu(layer(2 * mask * x))
print("dropout layer:", float(jnp.abs(one.value - dropped).max()))

# %% [markdown]
# ## More iterations, and what they are worth
#
# The objective's gap to its minimum, and the certificate that bounds the gap without knowing the
# minimum. The stochastic solvers are shown against the work that they do: an iteration costs the share
# of the input features that it touches (mS2GD's full gradients included).

# %%
best = ss.prox_gd(problem, num_iters=5000, momentum=True).value
least = problem.objective(best).mean()
safe = ss.InverseExpectedSmoothness()
runs = {
    "Prox-GD": (ss.prox_gd(problem, num_iters=150, trace_objective=True), 1.0),
    "FISTA": (ss.prox_gd(problem, num_iters=150, momentum=True, trace_objective=True), 1.0),
    "Prox-SG, τ = n₁/4": (
        ss.prox_sg(key, problem, tau=16, step_size=safe, num_iters=600, trace_objective=True),
        0.25,
    ),
    "mS2GD, τ = n₁/4": (
        ss.ms2gd(
            key, problem, tau=16, step_size=safe, num_outer=15, num_inner=30, trace_objective=True
        ),
        0.25 + 1 / 30,
    ),
}
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for name, (solution, cost) in runs.items():
    gap = np.maximum(np.asarray(solution.objectives).mean(1) - float(least), 1e-12)
    axes.semilogy(cost * np.arange(1, len(gap) + 1), gap, label=name)
axes.set(xlabel="full gradients' worth of work", ylabel="mean gap to the minimum", xlim=(0, 150))
axes.grid(color="0.9")
axes.legend()
plt.show()

# %%
for iterations in (1, 10, 100, 300):
    z = ss.prox_gd(problem, num_iters=iterations).value
    gap = (problem.objective(z) - problem.objective(best)).max()
    print(f"{iterations:5} iterations: gap {gap:.1e}, certified {problem.certificate(z).max():.1e}")

# %% [markdown]
# ## The step at small τ
#
# The paper's first step is $1/L$. For a small sample it is too long: the iterates grow until the decay
# tames them. The expected smoothness of the sampling gives the step that theory supports.

# %%
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
steps = {
    "1/L": ss.InverseLipschitz(),
    "1/L · 0.9ᵏ": ss.InverseLipschitz(decay=0.9),
    "expected smoothness": safe,
}
for name, step in steps.items():
    solution = ss.prox_sg(key, problem, tau=2, step_size=step, num_iters=60, trace_objective=True)
    axes.semilogy(np.asarray(solution.objectives).mean(1) - float(least), label=name)
axes.set(xlabel="iteration", ylabel="mean gap to the minimum", title="Prox-SG, τ = 2 of 64")
axes.grid(color="0.9")
axes.legend()
plt.show()

# %% [markdown]
# ## Convolutions, and the constant that sets the step
#
# A circular convolution is block-diagonalised by the Fourier transform, so its spectral norm is a maximum
# of small eigenvalue problems (lemma 2). Deep networks pad with zeros; then the layer's own grid gives an
# approximation and the padded grid an upper bound. The truth, from the dense matrix of a small layer:

# %%
kernel = jax.random.normal(jax.random.key(3), (3, 3, 4, 6))
for padding in ("CIRCULAR", "SAME", "VALID"):
    A = ss.Conv(kernel, (6, 6), padding=padding)
    matrix = jax.vmap(A)(jnp.eye(6 * 6 * 4).reshape(-1, 6, 6, 4)).reshape(6 * 6 * 4, -1)
    truth = np.linalg.norm(np.asarray(matrix, np.float64), 2) ** 2
    layer_grid, padded = (ss.lipschitz_constant(A, grid=g) for g in ("layer", "padded"))
    print(f"{padding:8}  true {truth:7.3f}   layer {layer_grid:7.3f}   padded {padded:7.3f}")
