"""Small tables with the numbers of one chart, and their splits into training, validation and test.

A *table* is what one chart shows: one or two series over two to five rows. Tables of one source overlap (the same
country in two years), so splits are made by what they are cut from, never by the tables themselves:

* gapminder: a **country** belongs to one split, and a table holds countries of one split only, so no number of a test
  country is ever seen in training;
* stocks, employment, barley, cars, weather, airports: the **entity** (symbol, sector, site, ...) belongs to one split;
* crimea, wheat, iowa-electricity, burtin, iris are whole sources held out for the test; driving and la-riots for
  validation.

Names are cut to three letters (years keep four digits) so that they stay legible on a chart of 144 pixels.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["SPLITS", "Split", "Table", "chunks", "make_table", "split_of", "windows"]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

HELD_OUT: dict[str, Split] = {
    "crimea": "test",
    "wheat": "test",
    "iowa-electricity": "test",
    "burtin": "test",
    "iris": "test",
    "driving": "val",
    "la-riots": "val",
}


@dataclass(frozen=True)
class Table:
    """The numbers of one chart, already rounded as the chart prints them.

    Attributes:
        id: unique name, `source/...`.
        source: the file it was cut from.
        entities: what belongs to a split (`gapminder:Kenya`, `stocks:MSFT`, ...).
        title: the quantity.
        rows: names of the marks, three letters or a year, unique.
        series: names of the series; one empty string where there is only one.
        values: `[series][row]`, printable numbers.
        decimals: digits after the point, the same for the whole table.
        ordered: whether the rows are points in time, so that a line chart suits them.
    """

    id: str
    source: str
    entities: tuple[str, ...]
    title: str
    rows: tuple[str, ...]
    series: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    decimals: int
    ordered: bool

    def text(self, series: int, row: int) -> str:
        """The number as the chart prints it."""
        return f"{self.values[series][row]:.{self.decimals}f}"


def split_of(entity: str) -> Split:
    """The split of an entity (`source:name`): a whole source by `HELD_OUT`, else 70/10/20% by a hash."""
    source = entity.partition(":")[0]
    if source in HELD_OUT:
        return HELD_OUT[source]
    share = int.from_bytes(hashlib.sha256(entity.encode()).digest()[:4]) / 2**32
    return "test" if share < 0.2 else "val" if share < 0.3 else "train"


def _short(name: str) -> str:
    plain = "".join(c for c in name if c.isalnum()).upper()
    return plain[:4] if plain.isdigit() else plain[:3]


def make_table(
    source: str,
    key: str,
    entities: Iterable[str],
    title: str,
    rows: Sequence[str],
    columns: Mapping[str, Sequence[float]],
    ordered: bool = False,
    most_rows: int = 5,
) -> Table | None:
    """Rounds and checks one table.

    Args:
        source: the file it is cut from.
        key: makes its id unique within the source.
        entities: what belongs to a split.
        title: the quantity; a unit is added where the numbers are scaled.
        rows: full names of the rows.
        columns: full name of each series (empty where there is only one) and its values.
        ordered: the rows are points in time.
        most_rows: tables with more rows are refused.

    Returns:
        The table, or None where it does not suit a chart: equal names, negative or nearly equal values.
    """
    names = tuple(_short(r) for r in rows)
    series = tuple(_short(s) for s in columns)
    flat = [v for column in columns.values() for v in column]
    if (
        not 2 <= len(names) <= most_rows
        or len(set(names)) < len(names)
        or len(set(series)) < len(series)
        or "" in names
    ):
        return None
    if any(not math.isfinite(v) or v < 0 for v in flat) or max(flat) <= 0 or min(flat) > 0.87 * max(flat):
        return None  # nearly equal numbers: with 5% tolerance, reading any mark would count as reading the right one
    # At most four digits are printed: big numbers are given in thousands, millions, ..., as charts do.
    power = max(0, math.ceil((math.log10(max(flat)) - 3.99) / 3))
    unit = ("", " (thousands)", " (millions)", " (billions)")[power]
    top = max(flat) / 1000**power
    whole = power == 0 and all(v == round(v) for v in flat)
    decimals = 0 if whole or top >= 100 else 1 if top >= 10 else 2
    values = tuple(tuple(round(v / 1000**power, decimals) for v in column) for column in columns.values())
    if min(min(column) for column in values) <= 0 and decimals == 0 and max(map(max, values)) < 20:
        return None
    return Table(f"{source}/{key}", source, tuple(entities), title + unit, names, series, values, decimals, ordered)


def chunks(items: Sequence[Any], seed: str) -> Iterator[list[Any]]:
    """Cuts a shuffled copy of `items` into groups of two to five."""
    rng = random.Random(seed)  # noqa: S311
    pool = rng.sample(list(items), len(items))
    while len(pool) >= 2:
        size = rng.choice((2, 3, 3, 4, 4, 5))
        yield pool[:size]
        pool = pool[size:]


def windows(n: int, seed: str) -> Iterator[slice]:
    """Runs of two to five neighbours that cover `n` points in time without overlapping."""
    rng, start = random.Random(seed), 0  # noqa: S311
    while start < n - 1:
        size = rng.choice((2, 3, 4, 5))
        yield slice(start, start + size)
        start += size
