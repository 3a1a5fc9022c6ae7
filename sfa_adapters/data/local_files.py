"""Finds the files of a split in a local folder, and the image files that they name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfa_adapters.errors import DataError

__all__ = ["FileImages", "LocalFiles", "find_split"]

Format = Literal["parquet", "json", "csv"]
FORMATS: dict[str, Format] = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
ALIASES = {"validation": "val", "val": "validation"}
DEEPEST = 2  # levels, for JSON and CSV: deeper down, datasets keep one file of these formats per image
NAMES = "*{0}*.parquet, {0}/*.parquet, {0}.jsonl, {0}.json, {0}.csv, {0}/metadata.jsonl and {0}/metadata.csv"


@dataclass(frozen=True)
class LocalFiles:
    """Files of one split, all of one format; `field` is the key of a JSON file that holds the rows."""

    files: tuple[Path, ...]
    format: Format
    field: str | None = None

    @property
    def kind(self) -> str:
        """`human` or `augmented` if the name of the file contains it, as in the original ChartQA, else empty."""
        name = self.files[0].stem.casefold()
        return next((kind for kind in ("human", "augmented") if kind in name), "")


def find_split(source: Path, split: str, config: str | None = None) -> list[LocalFiles]:
    """Finds the files of a split.

    Args:
        source: A folder, or one file, whose name must contain the name of the split.
        split: Name of the split; `val` and `validation` are the same. An empty name takes any single file.
        config: Folder inside `source`, for sources with several datasets.

    Returns:
        One entry for all parquet files together, else one for each JSON or CSV file, in order of their names.

    Raises:
        DataError: There is none, or there are files of several datasets; lists the patterns and the files.
    """
    if source.is_file():
        if source.suffix not in FORMATS:
            raise DataError(f"{source} is no {', '.join(FORMATS)} file.")
        if split and not _says(source.stem, split):
            raise DataError(
                f"{source} is one file, and its name does not say that it holds the split {split!r}. Give a folder "
                f"with {split}{source.suffix} in it, so that nothing is tested on what it was trained on."
            )
        return _grouped([source])
    folder = source / config if config and (source / config).is_dir() else source
    files: list[Path] = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix not in FORMATS or not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        shallow = path.suffix == ".parquet" or len(inside.parts) <= DEEPEST
        named = _says(path.stem, split) or (
            any(_says(part, split) for part in inside.parts[:-1])
            and (path.suffix == ".parquet" or path.stem == "metadata")
        )
        if shallow and named:
            files.append(path)
    if not files:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise DataError(f"{folder} holds no split {split!r}: looked for {NAMES.format(split)}. Found: {there}.")
    first = next(f for f in ("parquet", "json", "csv") if any(FORMATS[p.suffix] == f for p in files))
    files = [path for path in files if FORMATS[path.suffix] == first]
    if first == "parquet":
        homes = {path.parent.relative_to(folder) for path in files}
        homes = {home.parent if _says(home.name, split) else home for home in homes}
        if len(homes) > 1:
            names = ", ".join(sorted(map(str, homes)))
            raise DataError(f"{folder} holds several data sets ({names}). Say which one: config=...")
    return _grouped(files)


class FileImages:
    """Finds the image files that a dataset names, inside its folder only.

    Args:
        folder: Folder of the dataset; None for datasets whose rows hold the images.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(self, name: str, where: str) -> Path:
        """Finds an image file.

        Args:
            name: Its name or relative path in the dataset.
            where: The row, for errors.

        Raises:
            DataError: It does not exist, or lies outside the folder.
        """
        folder = self.folder
        if folder is None:
            raise DataError(f"{where}: the image is str, expected encoded bytes or a file inside a local folder.")
        tried = (folder / name, *folder.glob(f"*/{name}"), *folder.glob(f"*/png/{name}")) if name else ()
        path = next((path for path in tried if path.is_file()), None)
        if path is None or not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{where}: no image file {name!r} inside {folder}.")
        return path


def _says(name: str, split: str) -> bool:
    """Whether a name contains the name of the split as a word: `test-00000`, `docvqa_test`, not `latest`."""
    return any(
        re.search(rf"(?<![a-z]){re.escape(s)}(?![a-z])", name.casefold()) for s in (split, ALIASES.get(split, split))
    )


def _grouped(files: list[Path]) -> list[LocalFiles]:
    if FORMATS[files[0].suffix] == "parquet":
        return [LocalFiles(tuple(files), "parquet")]
    return [LocalFiles((path,), FORMATS[path.suffix], _field(path)) for path in files]


def _field(path: Path) -> str | None:
    """The key of the rows in a file that is one JSON object, as in DocVQA's challenge; None for lines and lists."""
    if path.suffix != ".json":
        return None
    with path.open(encoding="utf-8-sig") as file:
        start = file.readline()
    if not start.lstrip().startswith("{"):
        return None
    try:
        record: Any = json.loads(start)
    except ValueError:
        return "data"  # an object over several lines
    return "data" if isinstance(record.get("data"), list) else None
