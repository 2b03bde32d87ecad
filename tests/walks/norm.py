"""Someone only wants the exact spectral norm of a convolution, its gradient, and the norm in training.

Needs no extra.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import stochsolvers as ss


def dense(function, shape):
    """The matrix of a linear function, from the identity."""
    size = int(np.prod(shape))
    columns = function(jnp.eye(size).reshape(size, *shape)).reshape(size, -1)
    return np.asarray(columns, np.float64)


def message(call):
    """What an error says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


# the layers as Flax has them: dense, zero padding, strides, circular, transposed
shape = (1, 6, 6, 2)
rngs = nnx.Rngs(0)
layers = {
    "dense": (nnx.Linear(12, 5, use_bias=False, rngs=rngs), (1, 12)),
    "zero padding": (nnx.Conv(2, 3, (3, 3), use_bias=False, rngs=rngs), shape),
    "strided": (nnx.Conv(2, 3, (3, 3), strides=2, use_bias=False, rngs=rngs), shape),
    "transposed": (nnx.ConvTranspose(2, 3, (3, 3), strides=2, use_bias=False, rngs=rngs), shape),
}
for name, (layer, inputs_shape) in layers.items():
    truth = np.linalg.norm(dense(layer, inputs_shape[1:]), 2)
    norm = ss.spectral_norm(ss.nnx.linear_map_of(layer, inputs_shape))
    np.testing.assert_allclose(norm, truth, rtol=1e-4, err_msg=name)
    print(f"{name:12} norm {norm:.3f}")

# proved: two numbers around it
kernel = layers["zero padding"][0].kernel[...]
lower, upper = ss.spectral_norm_bracket(ss.Conv(kernel, (6, 6)))
truth = np.linalg.norm(dense(layers["zero padding"][0], shape[1:]), 2)
assert lower <= truth * (1 + 1e-6)
assert truth <= upper * (1 + 1e-6)

# the derivative is u vᵀ: along the kernel itself the norm is linear
norm = jax.jit(jax.value_and_grad(lambda kernel: ss.spectral_norm(ss.Conv(kernel, (6, 6)))))
value, slope = norm(kernel)
np.testing.assert_allclose(jnp.vdot(slope, kernel), value, rtol=1e-4)

# a gradient step that lowers the norm, and then a projection that bounds it
moved = norm(kernel - 0.01 * slope)[0]
assert moved < value
optimizer = optax.chain(
    optax.sgd(0.1), ss.optax.project_spectral_norm(1.0, maps=lambda _, k: ss.Conv(k, (6, 6)))
)
updates, _ = optimizer.update(slope, optimizer.init(kernel), kernel)
assert norm(optax.apply_updates(kernel, updates))[0] < 1 + 1e-4

# in training: the layer's own norm, not that of its kernel as a matrix
layer = ss.nnx.SpectralNorm(nnx.Conv(2, 3, (3, 3), rngs=rngs), spatial_shape=(6, 6), bound=0.5)
layer.train()
images = jax.random.normal(jax.random.key(0), (4, *shape[1:]))
for _ in range(3):
    layer(images, update_stats=True)
layer.eval()
offset = layer(jnp.zeros(shape))
np.testing.assert_allclose(
    np.linalg.norm(dense(lambda x: layer(x) - offset, shape[1:]), 2), 0.5, rtol=1e-3
)

# what cannot be meant is refused in words that help
assert "Conv(W, shape)" in message(lambda: ss.spectral_norm(kernel))
assert "'CIRCULAR'" in message(lambda: ss.Conv(kernel, (6, 6), padding="circular"))
assert "variable[...]" in message(lambda: ss.Conv(layers["strided"][0].kernel, (6, 6)))
assert "such as x.shape" in message(lambda: ss.nnx.linear_map_of(layers["strided"][0], images))
