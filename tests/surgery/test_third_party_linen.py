"""A Linen ResNet that nobody here wrote, `jax_resnet`: replaced, restored, bounded."""

import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import pytest
from flax import traverse_util
from linen_variables import drawn

import stochsolvers as ss


@pytest.fixture(scope="module")
def network():
    """A ResNet of two basic blocks with trained-looking statistics, its variables, and images."""
    rng = np.random.default_rng(5)
    module = jax_resnet.ResNet(
        jax_resnet.ResNetBlock, stage_sizes=[1, 1], n_classes=5, hidden_sizes=(8, 16)
    )
    x = jnp.asarray(rng.normal(size=(2, 16, 16, 3)), jnp.float32)
    return module, drawn(module, rng, x), x


@pytest.mark.optimized
def test_resnet(network):
    module, variables, x = network
    plain = jax.jit(module.apply)(variables, x)
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "*", solver=ss.ProxGD(1), inputs=x, measure=False
    )
    # the stem and the first convolution of each block; the second ones are added to a shortcut
    names = [f"layers_{i}/ConvBlock_0/Conv_0" for i in (0, 2, 3)]
    assert [row.name for row in report.rows] == names
    assert all(row.normalization for row in report.rows)
    reasons = [one.reason for one in report.left]
    assert sum("another array is added" in reason for reason in reasons) == 4
    kept = traverse_util.flatten_dict(own["solver_state"], sep="/")
    assert sorted({path.rpartition("/")[0] for path in kept}) == names
    np.testing.assert_array_equal(jax.jit(swapped.apply)(own, x), plain)
    again, variables_again = ss.linen.restore_layers(swapped, own)
    assert again is module
    jax.tree.map(np.testing.assert_array_equal, variables_again, dict(variables))


def test_its_bound_holds(network):
    module, variables, x = network
    swapped, own, _ = ss.linen.replace_layers(
        module, variables, "layers_2/*", solver=ss.ProxGD(3), inputs=x, measure=False
    )

    def sampled(apply, variables):
        """The largest gain of the derivative in some directions."""
        directions = jnp.asarray(np.random.default_rng(0).normal(size=(4, *x.shape)), jnp.float32)

        def gain(direction):
            tangent = jax.jvp(lambda x: apply(variables, x), (x,), (direction,))[1]
            return jnp.linalg.norm(tangent) / jnp.linalg.norm(direction)

        return jax.jit(lambda d: jax.lax.map(gain, d))(directions).max()

    bound = ss.lipschitz_report(swapped, own, x.shape).bound
    assert sampled(swapped.apply, own) <= bound < np.inf
