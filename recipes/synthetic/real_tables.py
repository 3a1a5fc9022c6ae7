"""Real tables, cut out of the data files of the packages `vega-datasets` and `gapminder`.

Both packages are read as plain CSV and JSON files without being imported: `gapminder` needs `pkg_resources`, which
setuptools no longer ships.
"""

import csv
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sfa_adapters.errors import DataError
from sfa_adapters.install import install_command
from sfa_adapters.recipes.synthetic.tables import SPLITS, Split, Table, chunks, make_table, split_of, windows

__all__ = ["MONTHS", "Sheet", "load_sheets", "load_tables"]

SECTORS = (  # no totals: a total in the training split would reveal a part of the test split
    "mining_and_logging",
    "construction",
    "durable_goods",
    "nondurable_goods",
    "wholesale_trade",
    "retail_trade",
    "utilities",
    "transportation_and_warehousing",
    "information",
    "financial_activities",
    "professional_and_business_services",
    "education_and_health_services",
    "leisure_and_hospitality",
    "other_services",
    "government",
)
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


@dataclass(frozen=True)
class Sheet:
    """Many rows and columns of numbers of one quantity, from which tables are cut.

    Attributes:
        source: Name of the file.
        title: The quantity.
        cells: Full name of the row to name of the column to value; every row has every column.
        by_column: Whether columns belong to splits (`source:column`); if not, rows do (`source:row`).
    """

    source: str
    title: str
    cells: Mapping[str, Mapping[str, float]]
    by_column: bool = False


def _file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)  # finds a top-level package without running its __init__
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"The real charts need the package {package!r}. Run: {install_command('demo')}")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise DataError(f"{package} no longer ships {name} (looked at {path}). Run: {install_command('demo')}")
    return path


def _rows(name: str) -> list[dict[str, Any]]:
    path = _file("gapminder", name) if name == "gapminder.csv" else _file("vega_datasets", f"_data/{name}")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))


METRICS = {"lifeExp": "Life expectancy in years", "pop": "Population", "gdpPercap": "GDP per person in dollars"}


def _countries() -> dict[str, dict[str, dict[str, float]]]:
    """Metric to country to year to value."""
    data: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in _rows("gapminder.csv"):
        for metric in METRICS:
            data[metric][r["country"]][r["year"]] = float(r[metric])
    return data


def _gapminder() -> Iterator[Table | None]:
    data = _countries()
    countries = sorted(data["pop"])
    years = sorted(data["pop"][countries[0]])
    for split in SPLITS:
        mine = [c for c in countries if split_of(f"gapminder:{c}") == split]
        for metric, title in METRICS.items():
            values = data[metric]
            for i, year in enumerate(years):
                for group in chunks(mine, f"{metric}{year}{split}"):
                    names = [f"gapminder:{c}" for c in group]
                    key = f"{metric}/{year}/" + "-".join(group)
                    yield make_table(
                        "gapminder", key, names, f"{title}, {year}", group, {"": [values[c][year] for c in group]}
                    )
                if i % 3 == 0 and i + 3 < len(years):  # the same countries in two years: grouped bars
                    pair = (year, years[i + 3])
                    for group in chunks(mine, f"{metric}{pair}{split}"):
                        group = group[:3]
                        names = [f"gapminder:{c}" for c in group]
                        key = f"{metric}/{'-'.join(pair)}/" + "-".join(group)
                        columns = {y: [values[c][y] for c in group] for y in pair}
                        yield make_table("gapminder", key, names, title, group, columns)
            for country in mine:
                for w in windows(len(years) // 2, f"{metric}{country}"):
                    span = years[1::2][w]
                    line = {"": [values[country][y] for y in span]}
                    key = f"{metric}/{country}/{span[0]}-{span[-1]}"
                    yield make_table(
                        "gapminder", key, [f"gapminder:{country}"], f"{title}, {country}", span, line, True
                    )


def _series(source: str, entity: str, title: str, points: Sequence[tuple[str, float]]) -> Iterator[Table | None]:
    """Tables of one entity over time, from (short name, value) in order."""
    for w in windows(len(points), source + entity + title):
        part = points[w]
        key = f"{entity}/{title}/{w.start}"
        yield make_table(
            source, key, [f"{source}:{entity}"], title, [p[0] for p in part], {"": [p[1] for p in part]}, True
        )


def _mean(groups: dict[Any, list[float]]) -> dict[Any, float]:
    return {k: sum(v) / len(v) for k, v in groups.items()}


def _vega() -> Iterator[Table | None]:
    stocks: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for r in _rows("stocks.csv"):
        stocks[r["symbol"]].append((r["date"][:3], float(r["price"])))
    for symbol, points in stocks.items():
        yield from _series("stocks", symbol, f"Price of {symbol}", points)

    jobs = _rows("us-employment.csv")
    for split in SPLITS:
        mine = [s for s in SECTORS if split_of(f"us-employment:{s}") == split]
        for r in jobs[::3]:
            for group in chunks(mine, r["month"] + split):
                names = [f"us-employment:{s}" for s in group]
                key = r["month"] + "/" + "-".join(group)
                values = [float(r[s]) * 1000 for s in group]
                yield make_table("us-employment", key, names, f"Jobs, {r['month'][:7]}", group, {"": values})

    barley: dict[tuple[str, int], list[tuple[str, float]]] = defaultdict(list)
    for r in _rows("barley.json"):
        barley[r["site"], int(r["year"])].append((r["variety"].replace("No. ", "N"), float(r["yield"])))
    for (site, year), points in barley.items():
        for seed in "abc":
            for group in chunks(points, f"{site}{year}{seed}"):
                names, values = [p[0] for p in group], [p[1] for p in group]
                key = f"{site}/{year}/" + "-".join(names)
                yield make_table("barley", key, [f"barley:{site}"], f"Barley yield, {site} {year}", names, {"": values})

    for column in ("Miles_per_Gallon", "Horsepower", "Displacement", "Weight_in_lbs"):
        groups: dict[tuple[str, str], list[float]] = defaultdict(list)
        for r in _rows("cars.json"):
            if r[column] is not None:
                groups[r["Origin"], r["Year"][:4]].append(float(r[column]))
        means = _mean(groups)
        for origin in ("USA", "Europe", "Japan"):
            points = [(year, v) for (o, year), v in sorted(means.items()) if o == origin]
            yield from _series("cars", origin, f"{column.replace('_', ' ')}, {origin}", points)

    for column in ("precipitation", "temp_max", "temp_min", "wind"):
        groups = defaultdict(list)
        for r in _rows("seattle-weather.csv"):
            groups[r["date"][:7]].append(float(r[column]))
        means = _mean(groups)
        for year in ("2012", "2013", "2014", "2015"):
            points = [(MONTHS[int(m[5:]) - 1], v) for m, v in sorted(means.items()) if m.startswith(year)]
            yield from _series("weather", f"Seattle {year}", f"Seattle {column}, {year}", points)

    states: dict[str, int] = defaultdict(int)
    for r in _rows("airports.csv"):
        if r["country"] == "USA" and len(r["state"]) == 2 and r["state"] != "NA":
            states[r["state"]] += 1
    for split in SPLITS:
        mine = [s for s in sorted(states) if split_of(f"airports:{s}") == split]
        for seed in "abcdef":
            for group in chunks(mine, f"airports{split}{seed}"):
                names = [f"airports:{s}" for s in group]
                yield make_table(
                    "airports", "-".join(group), names, "Airports", group, {"": [states[s] for s in group]}
                )


def _held_out() -> Iterator[Table | None]:
    crimea = _rows("crimea.json")
    for cause in ("wounds", "other", "disease"):
        points = [(MONTHS[int(r["date"][5:7]) - 1], float(r[cause])) for r in crimea]
        yield from _series("crimea", "army", f"Deaths from {cause}", points)
    for r in crimea:
        causes = {"": [float(r[c]) for c in ("wounds", "other", "disease")]}
        yield make_table(
            "crimea", r["date"], ["crimea:army"], f"Deaths, {r['date'][:7]}", ["wounds", "other", "disease"], causes
        )
    wheat = [r for r in _rows("wheat.json") if r.get("wages") is not None]
    yield from _series(
        "wheat", "price", "Price of wheat in shillings", [(str(r["year"]), float(r["wheat"])) for r in wheat]
    )
    yield from _series(
        "wheat", "wages", "Weekly wages in shillings", [(str(r["year"]), float(r["wages"])) for r in wheat]
    )
    power: dict[str, dict[str, float]] = defaultdict(dict)
    for r in _rows("iowa-electricity.csv"):
        power[r["year"][:4]][r["source"]] = float(r["net_generation"])
    for year, mix in power.items():
        yield make_table(
            "iowa-electricity",
            year,
            ["iowa-electricity:IA"],
            f"Power in Iowa, {year}",
            list(mix),
            {"": list(mix.values())},
        )
    for r in _rows("burtin.json"):
        drugs = ("Penicillin", "Streptomycin", "Neomycin")
        yield make_table(
            "burtin",
            r["Bacteria"],
            ["burtin:all"],
            f"Dose for {r['Bacteria']}",
            drugs,
            {"": [float(r[d]) for d in drugs]},
        )
    for column in ("sepalLength", "sepalWidth", "petalLength", "petalWidth"):
        groups: dict[str, list[float]] = defaultdict(list)
        for r in _rows("iris.json"):
            groups[r["species"]].append(float(r[column]))
        means = _mean(groups)
        yield make_table("iris", column, ["iris:all"], f"Mean {column} in cm", list(means), {"": list(means.values())})
    driving = _rows("driving.json")
    yield from _series("driving", "gas", "Price of gas", [(str(r["year"]), float(r["gas"])) for r in driving])
    yield from _series("driving", "miles", "Miles per person", [(str(r["year"]), float(r["miles"])) for r in driving])
    for column in ("race", "gender", "type"):
        counts: dict[str, int] = defaultdict(int)
        for r in _rows("la-riots.csv"):
            counts[r[column]] += 1
        yield make_table(
            "la-riots", column, ["la-riots:all"], f"Deaths by {column}", list(counts), {"": list(counts.values())}
        )


@cache
def _all_tables() -> tuple[Table, ...]:
    tables = {t.id: t for part in (_gapminder(), _vega(), _held_out()) for t in part if t is not None}
    return tuple(tables.values())


def load_tables(split: Split) -> list[Table]:
    """All tables of one split, always in the same order.

    Args:
        split: "train", "val" or "test".

    Returns:
        Tables whose entities all belong to `split`.

    Raises:
        DataError: unknown split, or one of the two packages is not installed.
    """
    if split not in SPLITS:
        raise DataError(f"Unknown split {split!r}. Use one of {', '.join(SPLITS)}.")
    return [t for t in _all_tables() if split_of(t.entities[0]) == split]


@cache
def _all_sheets() -> tuple[Sheet, ...]:
    countries = _countries()
    sheets = [Sheet("gapminder", title, countries[metric]) for metric, title in METRICS.items()]
    for year in ("1931", "1932"):
        barley: dict[str, dict[str, float]] = defaultdict(dict)
        for r in _rows("barley.json"):
            if str(r["year"]) == year:
                barley[r["variety"].replace("No. ", "N")][r["site"]] = float(r["yield"])
        sheets.append(Sheet("barley", f"Barley yield, {year}", barley, by_column=True))
    return tuple(sheets)


def load_sheets(split: Split) -> list[Sheet]:
    """All sheets with the entities of one split only, from which larger tables are cut.

    Args:
        split: "train", "val" or "test".

    Returns:
        Sheets with at least two rows and two columns.

    Raises:
        DataError: unknown split, or one of the two packages is not installed.
    """
    if split not in SPLITS:
        raise DataError(f"Unknown split {split!r}. Use one of {', '.join(SPLITS)}.")
    sheets = []
    for sheet in _all_sheets():
        cells: dict[str, dict[str, float]] = {}
        for row, values in sheet.cells.items():
            kept = {
                c: v for c, v in values.items() if split_of(f"{sheet.source}:{c if sheet.by_column else row}") == split
            }
            if len(kept) > 1:
                cells[row] = kept
        if len(cells) > 1:
            sheets.append(Sheet(sheet.source, sheet.title, cells, sheet.by_column))
    return sheets
