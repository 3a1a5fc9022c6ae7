"""Pictures of real tables, 144 x 144 pixels, with the box of every text: countries by years, and the like.

A table is cut out of a sheet of one split: some rows and some columns, either way round. It is at a random place, and a
text at any pixel: its rows do not coincide with the patches of a tower. Names are cut to three letters and years keep
four digits, as on the charts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import track

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic.charts import SIZE, Canvas, Chart, TextBox, draw, shared_canvas
from sfa_adapters.recipes.synthetic.questions import Question, questions_for
from sfa_adapters.recipes.synthetic.real_tables import Sheet, load_sheets
from sfa_adapters.recipes.synthetic.tables import Split, Table, make_table

__all__ = [
    "TablePicture",
    "TableSize",
    "ask_all",
    "cut_tables",
    "draw_table",
    "larger_charts",
    "table_pictures",
    "value_questions",
]

NAMES = 27.0  # px of the column with the names of the rows, and the least of a column with numbers
LOWEST = 14.0  # px of a row
TRIES = 1000  # cuts in a row that may be refused: equal short names, values that hardly differ


@dataclass(frozen=True)
class TableSize:
    """Smallest and largest number of rows and of columns of numbers of a table.

    Raises:
        DataError: A picture has no room for them.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]

    def __post_init__(self) -> None:
        most_rows, most_columns = int((SIZE - 4) / LOWEST) - 1, int((SIZE - 2 - NAMES) / NAMES)
        rows, columns = self.rows, self.columns
        if not (2 <= rows[0] <= rows[1] <= most_rows and 1 <= columns[0] <= columns[1] <= most_columns):
            raise DataError(
                f"A picture of {SIZE} px has room for 2 to {most_rows} rows, 1 to {most_columns} columns of numbers, "
                f"least before most; got rows={rows}, columns={columns}."
            )


@dataclass(frozen=True, eq=False)
class TablePicture:
    """One picture; `image` is uint8 [144, 144, 3], `texts` are all printed texts."""

    table: Table
    image: np.ndarray
    texts: tuple[TextBox, ...]


def cut_tables(split: Split, count: int, seed: int, size: TableSize) -> list[Table]:
    """Tables of the countries (or other entities) of one split.

    Args:
        split: "train", "val" or "test"; no entity is in two of them.
        count: Number of tables.
        seed: Of rows and columns.
        size: Size of the tables.

    Raises:
        DataError: The split has no sheet that large, or a package with the data is missing.
    """
    rng, tables, refused = np.random.default_rng(seed), [], 0
    sheets = load_sheets(split)
    while len(tables) < count:
        table = _cut(sheets[int(rng.integers(len(sheets)))], rng, size, f"{seed}/{len(tables)}")
        refused = 0 if table is not None else refused + 1
        if table is not None:
            tables.append(table)
        elif refused > TRIES:
            raise DataError(
                f"The sheets of split {split!r} give no tables of {size.rows} rows, {size.columns} columns."
            )
    return tables


def _cut(sheet: Sheet, rng: np.random.Generator, size: TableSize, key: str) -> Table | None:
    height, width = (int(rng.integers(low, high + 1)) for low, high in (size.rows, size.columns))
    entities_down = rng.random() < 0.7  # as a rule the rows are countries, else they are years
    across = sheet.by_column if entities_down else not sheet.by_column
    rows, columns = list(sheet.cells), list(next(iter(sheet.cells.values())))
    if across:
        rows, columns = columns, rows
    if len(rows) < height or len(columns) < width:
        return None
    down = [str(name) for name in rng.choice(rows, height, replace=False)]
    beside = [str(name) for name in rng.choice(columns, width, replace=False)]
    in_order = rng.random() < 0.5
    down, beside = (sorted(names) if in_order and names[0].isdigit() else names for names in (down, beside))
    values = {b: [sheet.cells[b if across else d][d if across else b] for d in down] for b in beside}
    if width == 1:
        values = {"": values[beside[0]]}
    entities = [f"{sheet.source}:{name}" for name in (down if entities_down else beside)]
    title = sheet.title if width > 1 else f"{sheet.title}, {beside[0]}"
    return make_table(sheet.source, f"cut/{key}", entities, title, down, values, most_rows=size.rows[1])


def draw_table(table: Table, seed: int) -> TablePicture:
    """Draws a table at a random place with random widths, heights, alignment and rules.

    Args:
        table: At most as large as `TableSize` allows.
        seed: Of everything random.
    """
    rng, page = np.random.default_rng(seed), shared_canvas()
    page.reset()
    rows, columns = len(table.rows), len(table.series)
    size = float(rng.uniform(8.4, 9.2))
    left = float(rng.uniform(1, min(6.0, SIZE - 1 - NAMES * (columns + 1))))
    width = float(rng.uniform(NAMES, min(42.0, (SIZE - 1 - left - NAMES) / columns)))
    height = float(rng.uniform(LOWEST, min(24.0, (SIZE - 4) / (rows + 1))))
    top = SIZE - 2 - float(rng.uniform(0, SIZE - 4 - height * (rows + 1)))
    align = ("center", "right")[int(rng.integers(2))]
    _rules(page, (left, top, NAMES + width * columns, height), rows, int(rng.integers(3)))

    def place(column: int, line: int) -> tuple[float, float]:
        x = left + NAMES + width * column + (width / 2 if align == "center" else width - 2)
        return x, top - height * (line + 0.5)

    for s in range(columns):
        if table.series[s]:
            page.legend(table, s, *place(s, 0), size, align, "center_baseline")
    for i in range(rows):
        page.name(table, i, left + 1, place(0, i + 1)[1], size, "left", "center_baseline")
        for s in range(columns):
            page.value(table, (s, i), *place(s, i + 1), size, align, "center_baseline")
    return TablePicture(table, page.image(), page.texts())


def _rules(page: Canvas, at: tuple[float, float, float, float], rows: int, style: int) -> None:
    left, top, width, height = at
    if style == 1:
        for line in range(1, rows + 1, 2):
            page.rectangle(left, top - height * (line + 1), width, height, "#e8eef4")
    if style == 2:
        for line in range(rows + 2):
            page.rule([left, left + width], [top - height * line] * 2, "#999999", 0.6)
    else:
        page.rule([left, left + width], [top - height] * 2, "#333333", 1.0)


def table_pictures(
    split: Split, count: int, seed: int, size: TableSize, console: Console | None = None
) -> list[TablePicture]:
    """Pictures of tables of one split; arguments as in `cut_tables`, and the console for a progress bar, if any."""
    tables = track(
        cut_tables(split, count, seed, size), f"{'drawing tables':<24}", console=console, disable=not console
    )
    return [draw_table(table, seed * 100_003 + number) for number, table in enumerate(tables)]


def larger_charts(split: Split, count: int, seed: int) -> list[Chart]:
    """Charts of larger tables than those of pretraining: 6 to 8 bars, or 4 to 5 rows in two series, in turn."""
    single = cut_tables(split, (count + 1) // 2, seed, TableSize((6, 8), (1, 1)))
    double = cut_tables(split, count // 2, seed + 1, TableSize((4, 5), (2, 2)))
    drawn = [[draw(table, "hbar") for table in single], [draw(table, "grouped") for table in double]]
    return [drawn[number % 2][number // 2] for number in range(count)]


def value_questions(table: Table, most: int, rng: np.random.Generator) -> list[Question]:
    """Up to `most` different questions for the value of a cell, in random order."""
    questions = [question for question in questions_for(table) if question.type == "value"]
    return [questions[i] for i in rng.permutation(len(questions))[:most]]


def ask_all(pictures: Sequence[TablePicture | Chart], most: int, seed: int) -> list[list[Question]]:
    """`value_questions` for each picture, from one seed."""
    rng = np.random.default_rng(seed)
    return [value_questions(picture.table, most, rng) for picture in pictures]
