"""Formats a table of texts for a terminal without cutting cells: columns that do not fit go into a further table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

__all__ = ["terminal_table"]

FRAME = 3  # characters that a column adds to its text: two spaces and a line


def terminal_table(lines: Sequence[Sequence[str]], title: str, width: int | None = None) -> Group:
    """Formats lines of cells as one or several tables that fit the terminal.

    If the columns do not fit, intervals are put below their values; if that is not enough, the columns continue in a
    further table with the same first column.

    Args:
        lines: The headers, then the cells.
        title: Title of the first table.
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
    """Breaks a cell into lines: an interval below its value, the words of a name below each other."""
    value, bracket, interval = cell.partition(" [")
    return f"{value}\n[{interval}" if bracket else cell.replace(" ", "\n")


def _table(columns: Sequence[Sequence[str]], title: str | None) -> Table:
    table = Table(title=None if title is None else escape(title))
    for column in columns:
        table.add_column(escape(column[0]), no_wrap=True)
    for cells in list(zip(*columns, strict=True))[1:]:
        table.add_row(*map(escape, cells))
    return table
