"""A researcher swaps a block of a trained network for a solver, finetunes it, saves and restores it.

Needs no extra: Orbax comes with Flax.
"""

import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import stochsolvers as ss


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(16, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(64, 32, rngs=rngs)
        self.gated = nnx.Linear(32, 32, rngs=rngs)
        self.last = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.first(x)))
        return self.last(nnx.gelu(self.gated(nnx.tanh(self.second(x)))))


@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def train(model, optimizer, num_steps):
    model.train()
    for _ in range(num_steps):
        step(model, optimizer, x, y)
    model.eval()


def accuracy():
    return float((predict(model, x).argmax(-1) == y).mean())


def message(call):
    """What an error says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("no error")


predict = nnx.jit(lambda model, x: model(x))
rng = np.random.default_rng(0)
y = rng.integers(0, 4, 256)
x = jnp.asarray(rng.normal(size=(4, 16))[y] + rng.normal(size=(256, 16)), jnp.float32)
y = jnp.asarray(y)

model = Net(nnx.Rngs(0, dropout=1))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
train(model, optimizer, 50)
trained, before = accuracy(), predict(model, x)
assert trained > 0.9

# what cannot be meant is refused in words that help
solver = ss.ProxSG(tau=0.5, num_iters=3)
swap = ss.nnx.replace_layers
assert "second" in message(lambda: swap(model, "secnd", solver=solver, inputs=x))
assert "'second'" in message(lambda: swap(model, model.second, solver=solver, inputs=x))
assert "softplus" in message(lambda: swap(model, "gated", solver=solver, inputs=x))
assert "ProxGD(10)" in message(lambda: swap(model, "second", solver=ss.ProxGD, inputs=x))
assert "an array" in message(lambda: swap(model, "second", solver=solver, inputs=x.shape))
assert "(0, 1]" in message(lambda: ss.ProxSG(tau=1.5, num_iters=3))
assert bool((predict(model, x) == before).all())

report = swap(model, "second", solver=solver, inputs=x, rngs=nnx.Rngs(2))
assert [(row.name, row.activation) for row in report.rows] == [("second", "tanh")]
assert report.rows[0].change_one < 1e-5 < report.rows[0].change
assert report.rows[0].gap < jnp.inf
assert "already" in message(lambda: swap(model, "second", solver=solver, inputs=x))

# the optimiser goes on with the parameters that it has; the step follows the weights once an epoch
train(model, optimizer, 30)
ss.nnx.refresh_lipschitz(model)
assert accuracy() > trained - 0.05

# a checkpoint of the parameters loads into the plain network, and into a swapped one
path = pathlib.Path(tempfile.mkdtemp()) / "parameters"
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, nnx.state(model, nnx.Param))
plain = Net(nnx.Rngs(3))
plain.eval()
with ocp.StandardCheckpointer() as checkpointer:
    nnx.update(plain, checkpointer.restore(path, nnx.state(plain, nnx.Param)))
finetuned = predict(model, x)
ss.nnx.restore_layers(model)
assert bool((predict(model, x) == predict(plain, x)).all())
assert type(model.second) is nnx.Linear
swap(plain, "second", solver=solver, inputs=x, rngs=nnx.Rngs(2), measure=False)
assert bool(jnp.allclose(predict(plain, x), finetuned, atol=1e-5))
print(f"accuracy {trained:.3f}, finetuned with the solver {accuracy():.3f}")
