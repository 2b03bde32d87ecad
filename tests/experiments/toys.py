"""A small network on a small data set, and a program that trains it, to be killed or multiplied.

python toys.py OPTIONS     (JSON; see `main`)
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import stochsolvers as ss
from experiments import data
from experiments.data import datasets
from experiments.output import terminal
from experiments.training import checkpoints, loop, parallel, training_step

CONFIG = loop.TrainConfig(epochs=3, batch_size=16, learning_rates=(0.1, 0.01), seed=1)
STEPS = 4
"""Of an epoch."""


class TinyFeatures(nnx.Module):
    """Linear layer, batch normalisation, dropout."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(64, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)

    def __call__(self, images):
        return self.dropout(self.norm(self.first(images.reshape(len(images), -1))))


class TinyNet(nnx.Module):
    """Features, a solver, a classifier."""

    def __init__(self, *, tau: float = 0.5, rngs: nnx.Rngs):
        self.features = TinyFeatures(rngs=rngs)
        solver = ss.ProxSG(tau=tau, num_iters=3)
        self.solver = ss.nnx.SolverLinear(12, 8, solver=solver, ridge=1e-3, rngs=rngs)
        self.classifier = nnx.Linear(8, 2, rngs=rngs)
        self.is_stochastic = True

    def head(self, features):
        return self.classifier(self.solver(features))

    def __call__(self, images):
        return self.head(self.features(images))


def dataset(seed: int = 0) -> data.Dataset:
    """Images of two classes, bright above or bright below, 8×8; 16·STEPS to train."""
    rng = np.random.default_rng(seed)

    def split(count):
        labels = rng.integers(0, 2, count).astype(np.int32)
        images = rng.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 * label : 4 * label + 4] += 150
        return data.Split(images, labels)

    train = split(16 * STEPS + 3)
    mean, std = datasets.pixel_statistics(train.images)
    return data.Dataset("toy", train, split(24), split(40), ("up", "down"), mean, std)


def train(folder=None, *, config=CONFIG, tau=0.5, **options) -> loop.Trained:
    """Train the small network."""
    return loop.train(
        lambda rngs: TinyNet(tau=tau, rngs=rngs),
        dataset(),
        config,
        label="toy",
        checkpoint=folder,
        **options,
    )


def digest(trained: loop.Trained) -> str:
    """Of all numbers of the model: parameters, statistics, constants, counts of its streams."""
    return checkpoints.digest(checkpoints.host_arrays(nnx.state(trained.model)).values())


def interrupted_bar(step: int, number: int):
    """A progress bar that sends the process a signal at a step."""

    class Bar(loop.tqdm):
        def update(self, n=1):
            super().update(n)
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == step:
                os.kill(os.getpid(), number)

    return Bar


def recorded_losses():
    """The list of the loss of each step from now on."""
    compiled_step, losses = training_step.compiled_step, []

    def recording(*args, **options):
        step = compiled_step(*args, **options)

        def run(*args):
            state, metrics = step(*args)
            losses.append(float(metrics[0]))
            return state, metrics

        return run

    training_step.compiled_step = recording
    return losses


def split_kernels(mesh) -> dict[str, list[float]]:
    """Solver layers whole and with kernels split over output features: how far they are apart."""
    options = {"solver": ss.ProxSG(0.5, num_iters=10), "rngs": nnx.Rngs(0)}
    layers = [
        (ss.nnx.SolverLinear(24, 16, **options), (4, 24)),
        (ss.nnx.SolverConv(4, 8, (3, 3), strides=2, **options), (4, 6, 6, 4)),
    ]
    found = {"parts": [], "distances": []}
    for layer, shape in layers:
        graph, state = nnx.split(layer)
        inputs = jax.random.normal(jax.random.key(1), shape)
        solve = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state, copy=True)(x))
        whole, kernel = solve(state, inputs), state["kernel"]
        features = jax.sharding.PartitionSpec(*[None] * (kernel[...].ndim - 1), parallel.AXIS)
        kernel[...] = jax.device_put(kernel[...], jax.sharding.NamedSharding(mesh, features))
        shards = kernel[...].addressable_shards
        found["parts"].append(len({str(shard.index) for shard in shards}))
        found["distances"].append(float(np.abs(solve(state, inputs) - whole).max()))
    return found


def split_batch(mesh) -> float:
    """Prox-SG of a whole batch and of one split over the devices: how far apart, for the same key."""
    kernel = jax.random.normal(jax.random.key(0), (24, 16)) / 5
    inputs = jax.random.normal(jax.random.key(1), (16, 24))

    @jax.jit
    def solve(inputs):
        problem = ss.LayerProblem(ss.Dense(kernel), inputs)
        return ss.prox_sg(jax.random.key(2), problem, tau=6, step_size=0.1, num_iters=5).value

    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(parallel.AXIS))
    return float(np.abs(solve(jax.device_put(inputs, rows)) - solve(inputs)).max())


def mapped_batch(mesh) -> dict[str, float]:
    """Parts of a batch, each on a device by `shard_map` and each alone: how far apart."""
    kernel = jax.random.normal(jax.random.key(0), (12, 8)) / 3
    inputs = jax.random.normal(jax.random.key(1), (16, 12))

    def problem(inputs):
        return ss.LayerProblem(ss.Dense(kernel), inputs, ridge=0.1)

    functions = {
        "prox_gd": lambda x: ss.prox_gd(problem(x), num_iters=30, momentum=True, tol=1e-3).value,
        "certificate": lambda x: problem(x).certificate(jnp.abs(x[:, :8])),
        # the same masks in every part: the key is the same
        "prox_sg": lambda x: ss.prox_sg(jax.random.key(2), problem(x), tau=3, num_iters=5).value,
        # a kernel of its own on each device
        "constant": lambda x: ss.lipschitz_constant(ss.Dense(x))[None],
    }
    rows, found = jax.sharding.PartitionSpec(parallel.AXIS), {}
    for name, function in functions.items():
        mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows))
        alone = jax.jit(function)
        parts = [alone(part) for part in jnp.split(inputs, mesh.size)]
        whole = np.concatenate(parts)
        found[name] = float(np.max(np.abs(mapped(inputs) - whole)) / np.max(np.abs(whole)))
    return found


def main(
    folder=None,
    kill_at=None,
    kill_in_save=None,
    processes=None,
    process=None,
    port=None,
    sharded=False,
    terminate_at=None,
):
    """Train; print the losses, the scores, the model's digest and the number of devices.

    Args:
      folder: of the checkpoints.
      kill_at: kill -9 at this step.
      kill_in_save: kill -9 when the checkpoint of this step is complete but not committed.
      processes: how many there are.
      process: which one this is.
      port: of the first one.
      sharded: try solver layers with split kernels and solvers with split batches, too.
      terminate_at: train once more, from the beginning, in the folder "terminated" beside the first;
        SIGTERM at this step, if this is the last process. Then go on from there, print the steps since
        and the digest, and end with the status that the signal gave.
    """
    if kill_at is not None:
        loop.tqdm = interrupted_bar(kill_at, signal.SIGKILL)
    if kill_in_save is not None:
        commit = os.rename

        def kill(source, target, **options):
            if Path(target).name == str(kill_in_save):
                os.kill(os.getpid(), signal.SIGKILL)
            commit(source, target, **options)

        os.rename = os.replace = kill
    if port:
        mesh = parallel.Machine(None, f"127.0.0.1:{port}", processes, process).mesh()
    else:
        mesh = parallel.Machine(jax.device_count()).mesh()
    losses = recorded_losses()
    trained = train(folder and Path(folder), mesh=mesh)
    found = {
        "steps": losses[:],
        "losses": [record["train_loss"] for record in trained.history],
        "scores": [record["validation_accuracy"] for record in trained.history],
        "devices": mesh.size,
        "digest": digest(trained),
    }
    if sharded:
        found |= split_kernels(mesh)
        found["distance_of_batches"] = split_batch(mesh)
        found["distances_of_parts"] = mapped_batch(mesh)
    print(json.dumps(found), flush=True)
    if terminate_at is not None:
        parallel.AGREE_EVERY, bar = 3, loop.tqdm
        if not terminal.is_first():
            loop.tqdm = interrupted_bar(terminate_at, signal.SIGTERM)
        terminated = Path(folder).with_name("terminated")
        try:
            train(terminated, mesh=mesh)
        except SystemExit as stopped:
            status, loop.tqdm = stopped.code, bar
        stopped_at = max(int(step.name) for step in terminated.iterdir() if step.name.isdecimal())
        del losses[:]
        again = {"digest": digest(train(terminated, mesh=mesh)), "steps": losses}
        print(json.dumps({**found, "stopped_at": stopped_at, "again": again}), flush=True)
        sys.exit(status)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
