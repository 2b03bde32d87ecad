"""One device, eight devices and two processes give the same run."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import toys

from experiments.training import loop, parallel, training_step

TERMINATED = 5
"""The step at which one of two processes has to end; they ask each other every three steps."""
STOPPED = 6
EIGHT = "--xla_force_host_platform_device_count=8"


def start(options, flags=""):
    flags = f"{os.environ['XLA_FLAGS']} {flags}"  # compiled as here
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, toys.__file__, json.dumps(options)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process, expected=0):
    printed, errors = process.communicate(timeout=180)
    assert process.returncode == expected, errors
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setattr(
            training_step, "compiled_step", training_step.compiled_step
        )  # put back at the end
        losses, history = toys.recorded_losses(), toys.train().history
    return {
        "steps": losses,
        "losses": [record["train_loss"] for record in history],
        "scores": [record["validation_accuracy"] for record in history],
    }


def assert_same_run(found, alone):
    assert len(alone["steps"]) == 3 * toys.STEPS >= 10
    np.testing.assert_allclose(found["steps"], alone["steps"], rtol=1e-5)
    np.testing.assert_allclose(found["losses"], alone["losses"], rtol=1e-5)
    assert found["scores"] == alone["scores"]


def test_eight_devices(alone):
    found = result(start({"sharded": True}, EIGHT))
    assert found["devices"] == 8
    assert_same_run(found, alone)
    # solver layers, dense and convolutional, whose kernels are split over output features
    assert found["parts"] == [8, 8]
    assert max(found["distances"]) < 1e-5
    # the same masks for the same batch: those of another key move the solution by 1
    assert found["distance_of_batches"] < 1e-5
    # and by hand, with shard_map
    assert len(found["distances_of_parts"]) == 4
    assert max(found["distances_of_parts"].values()) < 1e-5, found["distances_of_parts"]


def start_two(folder, **options):
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"folder": str(folder), "processes": 2, "port": port, **options}
    return [start({**options, "process": number}) for number in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, and their folder; beside it, that of a run which one had to end, resumed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    both = start_two(folder, terminate_at=TERMINATED)
    return [result(process, expected=143) for process in both], folder


def test_two_processes(alone, two):
    for found in two[0]:
        assert found["devices"] == 2
        assert_same_run(found, alone)
    # what two processes saved, one reads
    again = toys.train(two[1])
    losses = [record["train_loss"] for record in again.history]
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-5)


def test_sigterm_to_one_of_two_processes_stops_both(two):
    assert STOPPED % toys.STEPS
    for found in two[0]:
        # both at the next step at which they ask each other
        assert found["stopped_at"] == STOPPED
        assert found["again"]["digest"] == found["digest"]
        assert len(found["again"]["steps"]) == 3 * toys.STEPS - STOPPED


def test_devices_are_counted():
    assert parallel.data_mesh().size == 1
    with pytest.raises(parallel.DeviceError, match=r"devices: expected 1 to \d+, got 0"):
        parallel.data_mesh(0)


def test_batches_are_split_evenly():
    mesh = jax.sharding.AbstractMesh((3,), (parallel.AXIS,))
    with pytest.raises(loop.ConfigurationError, match="a multiple of the 3 devices, got 16"):
        loop.steps_per_epoch(toys.dataset(), toys.CONFIG, mesh)
