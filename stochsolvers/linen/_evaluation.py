"""A forward pass in evaluation, also of networks that ask what is mutable to know whether they train."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from flax import errors
from flax.core import DenyList

from stochsolvers.linen._layers import STATE

_Result = TypeVar("_Result")


def in_evaluation(run: Callable[[Any], _Result], also: Sequence[str] = ()) -> _Result:
    """`run(mutable)`, with what `module.apply` may write: no more than `also`, if the call does with that.

    A call that writes batch statistics, say, fails with that and is run with everything mutable but
    "solver_state": what it writes is dropped, and the constants are not refreshed.
    """
    try:
        return run(list(also))
    except errors.ModifyScopeVariableError:
        return run(DenyList(STATE))
