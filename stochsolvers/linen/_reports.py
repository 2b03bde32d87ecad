"""Reports on whole Linen networks."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from stochsolvers import _layers, reports
from stochsolvers._typing import Array
from stochsolvers.linen._layers import RECORDS


def certify(
    module: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    rngs: Mapping[str, Array] | None = None,
    **options: Any,
) -> reports.CertificateReport:
    r"""How well every solver layer of a network solves its problem at these inputs, as a table.

    One `apply`, compiled once for each module and shape; no variable is updated.

    Args:
      module: the network.
      variables: its variables.
      *inputs: of the network, for instance a batch of images.
      rngs: keys of the random streams, where layers sample.
      **options: keyword arguments of the network's call, such as a `deterministic` of its own. Arrays
        are traced, the rest is static.

    Returns:
      `CertificateReport`, a row for each call of a solver layer, in call order.
    """
    traced, static = _layers.split_static((inputs, options))
    try:
        hash(module)
        observe = functools.partial(_observations, module)
    except TypeError:  # arrays among its attributes: nothing to remember the compilation by
        observe = jax.jit(functools.partial(_observe, module), static_argnums=3)
    return reports.certificate_report(observe(variables, rngs, traced, static))


def _observe(module, variables, rngs, traced, static):
    inputs, options = _layers.join_static(traced, static)
    with reports.numbered_calls():
        _, written = module.apply(variables, *inputs, rngs=rngs, mutable=[RECORDS], **options)
    flat = traverse_util.flatten_dict(written.get(RECORDS, {}))
    return {"/".join(path[:-1]): calls for path, calls in flat.items()}


_observations = functools.partial(jax.jit, static_argnums=(0, 4))(_observe)
