"""Records as columns, and as aligned text."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def columns(rows: Sequence[Any], kind: type) -> dict[str, list[Any]]:
    """The rows, dataclasses of one `kind`, as a list for each field."""
    names = [field.name for field in dataclasses.fields(kind)]
    return {name: [getattr(row, name) for row in rows] for name in names}


def text(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """An aligned table: the first column to the left, the others to the right, a rule below the headers."""
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join([line(headers), "  ".join("─" * width for width in widths), *map(line, cells)])
