"""Rendered training charts on disk, of real and augmented tables, drawn in parallel.

The real training tables are few and alike, and a host that only sees them memorises their numbers. So most charts of
pretraining show *augmented* tables: random numbers, and names from the training tables or random ones. Validation and
test tables are never augmented, and none of them is read here.

A shard is a folder with `images.npy` (uint8 [N, 144, 144, 3], memory-mapped) and `tables.jsonl` (a line for each chart:
its table, and its texts with their boxes as in `legible.text_records`).
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sfa_adapters.recipes.synthetic.charts import SIZE, Kind, draw, kinds_for
from sfa_adapters.recipes.synthetic.legible import text_records
from sfa_adapters.recipes.synthetic.real_tables import MONTHS, load_tables
from sfa_adapters.recipes.synthetic.tables import Table

__all__ = ["Level", "Shard", "augmented_table", "render_shard", "shifted"]

Level = Literal["easy", "full", "real"]
CHUNK = 200


def _names(rng: np.random.Generator, n: int, level: Level, known: list[str]) -> tuple[tuple[str, ...], bool]:
    """`n` different names, and whether they are points in time."""
    pick = rng.random()
    if pick < 0.2:
        step = int(rng.choice([1, 2, 5, 10]))
        start = (
            int(rng.integers(1500, 2025 - step * n)) if rng.random() < 0.3 else int(rng.integers(1940, 2025 - step * n))
        )
        return tuple(str(start + step * i) for i in range(n)), True
    if pick < 0.3:
        start = int(rng.integers(12))
        return tuple(MONTHS[(start + i) % 12] for i in range(n)), True
    if pick < 0.5:
        return tuple(known[i] for i in rng.choice(len(known), n, replace=False)), False
    names: dict[str, None] = {}  # a set would have another order in every process
    while len(names) < n:
        length = int(rng.choice([1, 2, 3])) if level == "easy" else int(rng.choice([2, 3, 3, 3]))
        names["".join(chr(65 + c) for c in rng.integers(0, 26, length))] = None
    return tuple(names), False


def augmented_table(rng: np.random.Generator, level: Level, known: list[str]) -> Table:
    """A table like the real ones with random numbers.

    Args:
        rng: random generator.
        level: "easy" has one to three marks, one series and short names; "full" is like the real tables.
        known: names of the real training tables.

    Returns:
        A table whose id starts with `augmented/`.
    """
    many = 2 if level == "full" and rng.random() < 0.2 else 1
    n = (
        int(rng.choice([1, 2, 2, 3, 3]))
        if level == "easy"
        else int(rng.choice([2, 3] if many == 2 else [2, 3, 4, 4, 5, 5]))
    )
    rows, ordered = _names(rng, n, level, known)
    series: tuple[str, ...] = ("",)
    while many == 2 and (len(series) < 2 or set(series) & set(rows)):
        series = _names(rng, 2, level, known)[0]
    decimals = int(rng.choice([0, 0, 1, 1, 2]))
    top = (
        10 ** rng.uniform(1.2, 3.95) if decimals == 0 else rng.uniform(10, 100) if decimals == 1 else rng.uniform(1, 10)
    )
    low = 0.02 if rng.random() < 0.3 else 0.3
    values = np.round(np.maximum(top * rng.uniform(low, 1, (many, n)), 10.0**-decimals), decimals)
    if n > 1 and values.max() == values.min():
        return augmented_table(rng, level, known)
    numbers = tuple(tuple(float(v) for v in column) for column in values)
    return Table("augmented/", "augmented", (), "", rows, series, numbers, decimals, ordered and many == 1 and n > 1)


def _tables(level: Level, count: int, seed: int) -> Iterator[tuple[Table, Kind, int]]:
    rng = np.random.default_rng(seed)
    real = load_tables("train")
    known = sorted({r for t in real for r in t.rows if not r.isdigit()})
    for _ in range(count):
        table = real[int(rng.integers(len(real)))] if level == "real" else augmented_table(rng, level, known)
        kinds = kinds_for(table)
        yield table, kinds[int(rng.integers(len(kinds)))], int(rng.integers(2**31))


def _render_chunk(folder: str, level: Level, start: int, count: int, seed: int) -> tuple[int, list[str]]:
    images = np.lib.format.open_memmap(f"{folder}/images.npy", mode="r+")
    lines = []
    for i, (table, kind, style) in enumerate(_tables(level, count, seed)):
        chart = draw(table, kind, style)
        images[start + i] = chart.image
        lines.append(json.dumps({**asdict(table), "kind": kind, "texts": text_records(table, chart.texts).tolist()}))
    images.flush()
    return start, lines


def render_shard(folder: Path, level: Level, count: int, seed: int, workers: int | None = None) -> "Shard":
    """Renders a shard unless it is already there.

    Args:
        folder: the folder; its name should have level and seed in it.
        level: kind of tables (see `augmented_table`; "real" draws the real training tables).
        count: charts, rounded up to a multiple of 200.
        seed: of everything random; the number of workers changes nothing.
        workers: processes; the number of cores by default.

    Returns:
        The opened shard.
    """
    from rich.progress import track

    if (folder / "tables.jsonl").is_file():
        return Shard(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = -(-count // CHUNK)
    np.lib.format.open_memmap(
        folder / "images.npy", mode="w+", dtype=np.uint8, shape=(chunks * CHUNK, SIZE, SIZE, 3)
    ).flush()
    lines: dict[int, list[str]] = {}
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_render_chunk, str(folder), level, i * CHUNK, CHUNK, seed * 1_000_003 + i)
            for i in range(chunks)
        ]
        for job in track(as_completed(jobs), total=chunks, description=f"rendering {folder.name}"):
            start, rendered = job.result()
            lines[start] = rendered
    temporary = folder / "tables.part"
    temporary.write_text("\n".join(line for start in sorted(lines) for line in lines[start]), encoding="utf-8")
    temporary.rename(folder / "tables.jsonl")  # last: an interrupted shard is rendered again
    return Shard(folder)


class Shard:
    """A rendered shard: `shard.images[i]` is drawn from `shard.tables[i]`; `shard.texts[i]` are its texts."""

    def __init__(self, folder: Path) -> None:
        self.images = np.load(folder / "images.npy", mmap_mode="r")
        self.tables, self.texts = [], []
        for line in (folder / "tables.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            self.texts.append(np.array(record["texts"], dtype=np.int16))
            self.tables.append(_table(record))

    def __len__(self) -> int:
        return len(self.tables)


def _table(record: dict[str, Any]) -> Table:
    del record["kind"], record["texts"]
    for key in ("entities", "rows", "series"):
        record[key] = tuple(record[key])
    record["values"] = tuple(tuple(column) for column in record["values"])
    return Table(**record)


def shifted(image: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The image moved by `dx` px to the right and `dy` px down, white at the uncovered borders."""
    out = np.full_like(image, 255)
    height, width, _ = image.shape
    source = image[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
    out[max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)] = source
    return out
