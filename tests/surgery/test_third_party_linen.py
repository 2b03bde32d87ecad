"""Linen networks that nobody here wrote, a ResNet and the head of SegFormer: replaced, restored, bounded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_resnet
import numpy as np
import pytest
from flax import traverse_util
from jax_models.models import segformer
from linen_variables import drawn

import stochsolvers as ss


class Segmentation(nn.Module):
    """The head of SegFormer, on four scales of the input itself."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        scales = [nn.avg_pool(x, (size, size), (size, size)) for size in (1, 2, 4, 8)]
        return segformer.SegFormerHead(emb_dim=8)(scales, deterministic)


RESNET = jax_resnet.ResNet(
    jax_resnet.ResNetBlock, stage_sizes=[1, 1], n_classes=5, hidden_sizes=(8, 16)
)
# the stem and the first convolution of each block; the second ones are added to a shortcut
RESNET_NAMES = [f"layers_{i}/ConvBlock_0/Conv_0" for i in (0, 2, 3)]


@pytest.fixture(
    scope="module",
    params=[
        (RESNET, 16, RESNET_NAMES, {"another array is added": 4}),
        # the fusion of the scales; before it they are resized and joined, after it is the output
        (
            Segmentation(),
            8,
            ["SegFormerHead_0/Conv_0"],
            {"and no elementwise activation": 4, "its output leaves the network": 1},
        ),
    ],
    ids=["resnet", "segformer"],
)
def network(request):
    """A network with trained-looking statistics, its variables, images; what can be replaced, and why not."""
    rng = np.random.default_rng(5)
    module, size, names, reasons = request.param
    x = jnp.asarray(rng.normal(size=(2, size, size, 3)), jnp.float32)
    return module, drawn(module, rng, x), x, names, reasons


@pytest.mark.optimized
def test_replaced_and_restored(network):
    module, variables, x, names, reasons = network
    plain = jax.jit(module.apply)(variables, x)
    swapped, own, report = ss.linen.replace_layers(
        module, variables, "*", solver=ss.ProxGD(1), inputs=x, measure=False
    )
    assert [row.name for row in report.rows] == names
    assert all(row.normalization for row in report.rows)
    for reason, count in reasons.items():
        assert sum(reason in one.reason for one in report.left) == count
    kept = traverse_util.flatten_dict(own["solver_state"], sep="/")
    assert sorted({path.rpartition("/")[0] for path in kept}) == names
    np.testing.assert_array_equal(jax.jit(swapped.apply)(own, x), plain)
    again, variables_again = ss.linen.restore_layers(swapped, own)
    assert again is module
    jax.tree.map(np.testing.assert_array_equal, variables_again, dict(variables))


def test_its_bound_holds(network):
    module, variables, x, names, _ = network
    swapped, own, _ = ss.linen.replace_layers(
        module, variables, names[len(names) // 2], solver=ss.ProxGD(3), inputs=x, measure=False
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
