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
# with $x$ the block's input, $z$ its output, and the activation the proximal operator of $g$ (Bibi, Ghanem,
# Koltun and Ranftl, ICLR 2019). This notebook looks at the statement, then at what more iterations buy.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import stochsolvers as ss

jax.config.update("jax_enable_x64", True)  # to see gaps far below the round-off of float32
plt.rcParams.update(ss.plot.STYLE)
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
# ## The activation is a proximal operator, and changes with the step
#
# For a ReLU every step gives the same function. For other activations a step η < 1 applies prox of ηg,
# which is nearer to the identity: so a solver in normalised units, whose step is 1, keeps the layer's
# activation.

# %%
_, axes = plt.subplots(1, 3, figsize=(10.5, 3.4))
ss.plot.activation(ss.prox.NonNegative(), nnx.relu, ax=axes[0])
ss.plot.activation(ss.prox.Tanh(), jnp.tanh, ax=axes[1])
ss.plot.activation(ss.prox.SymmetricLogBarrier(0.1), jnp.tanh, ax=axes[2])
for ax, title in zip(axes, ("ReLU", "tanh, exactly", "tanh, as in the paper"), strict=True):
    ax.set_title(title)
    ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## More iterations, and what they are worth
#
# A certificate bounds the gap without knowing the minimum, and with it at every iteration: a band, in which
# the true gap is. The stochastic solvers are shown against the work that they do: an iteration costs the
# share of the input features that it touches (mS2GD's full gradients included).

# %%
safe = ss.InverseExpectedSmoothness()
traced = {"trace_objective": True, "certify": True}
runs = {
    "Prox-GD": ss.prox_gd(problem, num_iters=150, **traced),
    "FISTA": ss.prox_gd(problem, num_iters=150, momentum=True, **traced),
    "Prox-SG, τ = n₁/4": ss.prox_sg(key, problem, tau=16, step_size=safe, num_iters=600, **traced),
    "mS2GD, τ = n₁/4": ss.ms2gd(
        key, problem, tau=16, step_size=safe, num_outer=15, num_inner=30, **traced
    ),
}
work = {"Prox-GD": 1.0, "FISTA": 1.0, "Prox-SG, τ = n₁/4": 0.25, "mS2GD, τ = n₁/4": 0.25 + 1 / 30}
ss.plot.convergence(runs, work=work)
plt.show()

# %%
best = ss.prox_gd(problem, num_iters=5000, momentum=True).value
for iterations in (1, 10, 100, 300):
    z = ss.prox_gd(problem, num_iters=iterations).value
    gap = (problem.objective(z) - problem.objective(best)).max()
    print(f"{iterations:5} iterations: gap {gap:.1e}, certified {problem.certificate(z).max():.1e}")

# %% [markdown]
# ## A surprise: residuals that vanish while nothing is solved
#
# The paper's first step is 1/L, with a decay. For a small sample it is too long: the iterates grow until
# the decay makes them contract, and then they stand still far from the minimum. The residual ‖z_{k+1} −
# z_k‖, which one would watch, goes to zero all the same; the certificate tells the two apart. The expected
# smoothness of the sampling gives the step that theory supports.

# %%
steps = {
    "1/L": ss.InverseLipschitz(),
    "1/L · 0.9ᵏ": ss.InverseLipschitz(decay=0.9),
    "expected smoothness": safe,
}
runs = {
    name: ss.prox_sg(key, problem, tau=2, step_size=step, num_iters=150, **traced)
    for name, step in steps.items()
}
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
without = {
    name: ss.Solution(run.value, run.residuals, None, run.finite) for name, run in runs.items()
}
ss.plot.convergence(without, ax=left)
ss.plot.convergence(runs, minimum=problem.objective(best), ax=right)
left.set_ylim(1e-5, 1e4)
right.set_ylim(1, 1e6)  # at 1/L both go on to grow, beyond all bounds
left.set_title("Prox-SG, τ = 2 of 64: residuals")
right.set_title("gaps")
plt.show()
decayed = runs["1/L · 0.9ᵏ"]
print(
    f"with the decay: last residual {decayed.residuals[-1].max():.1e}, gap ≤ {decayed.certificate.max():.1e}"
)

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
