"""A table of texts for a terminal, in which no cell is cut: what is too wide goes below."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

__all__ = ["terminal_table"]

FRAME = 3  # characters that a column adds to its text: two spaces and a line


def terminal_table(lines: Sequence[Sequence[str]], title: str, width: int | None = None) -> Group:
    """Lays lines of cells out in tables that fit.

    Where they do not fit side by side, intervals go below their values; where that is not enough, the columns go on in
    a further table with the same first column.

    Args:
        lines: The headers, then the cells.
        title: Above the first table.
        width: In characters; that of the terminal by default.

    Returns:
        The tables.
    """
    width = Console().width if width is None else width
    columns = [list(column) for column in zip(*lines, strict=True)]
    if sum(_width(column) + FRAME for column in columns) + 1 > width:
        columns = [columns[0], *([_narrow(cell) for cell in column] for column in columns[1:])]
    label, parts = columns[0], list[list[list[str]]]()
    left = 0
    for column in columns[1:]:
        needed = _width(column) + FRAME
        if not parts or needed > left:
            parts.append([])
            left = width - _width(label) - FRAME - 1
        parts[-1].append(column)
        left -= needed
    return Group(*(_table([label, *part], title if n == 0 else None) for n, part in enumerate(parts or [[]])))


def _width(column: Sequence[str]) -> int:
    return max(len(line) for cell in column for line in cell.split("\n"))


def _narrow(cell: str) -> str:
    """An interval stands below its value, and the words of a name below each other."""
    value, bracket, interval = cell.partition(" [")
    return f"{value}\n[{interval}" if bracket else cell.replace(" ", "\n")


def _table(columns: Sequence[Sequence[str]], title: str | None) -> Table:
    table = Table(title=None if title is None else escape(title))
    for column in columns:
        table.add_column(escape(column[0]), no_wrap=True)
    for cells in list(zip(*columns, strict=True))[1:]:
        table.add_row(*map(escape, cells))
    return table
