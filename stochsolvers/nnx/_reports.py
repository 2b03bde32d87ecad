"""Reports on whole NNX networks."""

import functools
from typing import Any

import jax
from flax import nnx

from stochsolvers import _layers, reports
from stochsolvers.nnx._layers import SolverRecord


def certify(
    model: nnx.Module, *inputs: Any, deterministic: bool | None = None, **options: Any
) -> reports.CertificateReport:
    r"""How well every solver layer of a network solves its problem at these inputs, as a table.

    One forward pass of a copy of the model, compiled once for each structure and shape. The model
    itself is unchanged: parameters, statistics, random streams and modes.

    Args:
      model: calls its solver layers directly or within NNX transforms. Layers that sample do so, as
        in any other call of the model.
      *inputs: of the model, for instance a batch of images.
      deterministic: True for full gradients and no dropout, False to sample; None, the default, for
        the modes that the modules have.
      **options: keyword arguments of the model's call. Arrays are traced, the rest is static.

    Returns:
      `CertificateReport`, a row for each call of a solver layer, in call order.
    """
    graph, state = nnx.split(model)
    traced, static = _layers.split_static((inputs, options))
    seen = _observations(graph, state, traced, static, deterministic)
    return reports.certificate_report(seen)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _observations(graph, state, traced, static, deterministic):
    model = nnx.merge(graph, state, copy=True)
    if deterministic is not None:
        model.set_attributes(deterministic=deterministic, raise_if_not_found=False)
    inputs, options = _layers.join_static(traced, static)
    with reports.numbered_calls():
        _, records = nnx.capture(model, SolverRecord)(*inputs, **options)
    flat = nnx.to_flat_state(records)
    return {_name(path[:-1]): record.get_value() for path, record in flat}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
