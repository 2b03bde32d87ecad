"""Which modules of a network a user means: paths with wildcards, types and predicates."""

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from stochsolvers import _checks

Where = str | type | Callable[[str, Any], bool] | Sequence[Any]


class Chosen(NamedTuple):
    """A module that is meant.

    Attributes:
      module: itself, or what describes it.
      named: whether it was named by its path or by a predicate, so that leaving it as it is is an error.
    """

    module: Any
    named: bool


def select(where: Where, modules: Mapping[str, Any]) -> dict[str, Chosen]:
    """The modules that are meant, by path, in the order of `modules`.

    Args:
      where: a path such as "blocks.0.conv1"; one with the wildcards *, ? and [...] of `fnmatch`, in which *
        may span several parts of a path; a type; a function of a path and a module that returns True or
        False; or a list or tuple of these.
      modules: all of the network's, by path.

    Raises:
      ValueError: for something else, and for a part of `where` that no module matches.
    """
    chosen: dict[str, Chosen] = {}
    for one in where if isinstance(where, list | tuple) else [where]:
        matches, named = _matches(one, modules)
        if not matches:
            _fail_unmatched(one, modules)
        for path in matches:
            named = named or (path in chosen and chosen[path].named)
            chosen[path] = Chosen(modules[path], named)
    if not chosen:
        _checks.fail("where", "at least one path, type or predicate", repr(where))
    return {path: chosen[path] for path in modules if path in chosen}


def _matches(one: Any, modules: Mapping[str, Any]) -> tuple[list[str], bool]:
    if isinstance(one, str):
        if one in modules:
            return [one], True
        return [path for path in modules if fnmatch.fnmatchcase(path, one)], False
    if isinstance(one, type):
        return [path for path, module in modules.items() if isinstance(module, one)], False
    own = [path for path, module in modules.items() if module is one]
    if own or not callable(one):
        expected = "a path, a type, a function of a path and a module, or a list of these"
        if own:
            _checks.fail("where", expected, f"a module, whose path is {own[0]!r}")
        _checks.fail("where", expected, repr(one))
    return [path for path, module in modules.items() if one(path, module)], True


def _fail_unmatched(one: Any, modules: Mapping[str, Any]) -> None:
    if not isinstance(one, str):
        _checks.fail("where", "something that a layer of the model matches", repr(one))
    close = difflib.get_close_matches(one, list(modules), n=3, cutoff=0.4) or list(modules)[:8]
    _checks.fail("where", f"the path of a module, such as {', '.join(close)}", repr(one))
