"""`open_rows`: opens questions about images from the hub or from local files, in the known layouts of columns."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, overload

from sfa_adapters.data.datasets import Questions, Skipped, StreamedQuestions
from sfa_adapters.data.local_files import FileImages, LocalFiles, find_split
from sfa_adapters.data.rows import Columns, Row
from sfa_adapters.data.sources import Part, StreamedRows, TableRows
from sfa_adapters.errors import DataError

__all__ = ["Questions", "Row", "Skipped", "StreamedQuestions", "StreamedRows", "TableRows", "open_rows"]

LOOKED_AT = 100  # rows that are read to check that a split has answers


@overload
def open_rows(
    source: str | Path,
    split: str,
    config: str | None = None,
    limit: int | None = None,
    streaming: Literal[False] = False,
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
) -> TableRows: ...
@overload
def open_rows(
    source: str | Path,
    split: str,
    config: str | None = None,
    limit: int | None = None,
    *,
    streaming: Literal[True],
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
) -> StreamedRows: ...
def open_rows(
    source: str | Path,
    split: str,
    config: str | None = None,
    limit: int | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    answered: bool = True,
) -> TableRows | StreamedRows:
    """Opens questions about images; images are not decoded.

    Args:
        source: A hub id such as `HuggingFaceM4/ChartQA`; a local folder with parquet, JSON lines, JSON or CSV files and
            images beside them, or one that `Dataset.save_to_disk` wrote; or one such file.
        split: Name of the split in the source; `val` and `validation` are the same in a folder.
        config: Configuration of a hub dataset (`DocVQA`), or a folder inside a local one.
        limit: Keep only this many rows, the first ones.
        streaming: Read rows while iterating, without a download or a copy in advance.
        columns: Field -> column, for columns with other names than the known ones; see `sfa_adapters.data.rows.FIELDS`.
        answered: Whether answers are needed; False to predict only.

    Returns:
        The rows, in a fixed order.

    Raises:
        DataError: The source, configuration or split does not exist, a split is empty or has no answers, or a column is
            missing.
    """
    local = Path(source).expanduser()
    if local.exists():
        parts = _from_disk(local, split, config, streaming, columns)
    elif str(source).startswith((".", "/", "~")):
        raise DataError(f"There is no folder or file {source}. Give one, or a hub id such as HuggingFaceM4/ChartQA.")
    else:
        parts = _from_hub(str(source), split, config, streaming, columns)
    for part in parts:
        _look(replace(part, answered=False), answered)
    parts = [replace(part, answered=answered) for part in parts]
    return StreamedRows(parts, limit) if streaming else TableRows(parts, limit)


def _look(part: Part, answered: bool) -> None:
    """Checks early, on the first rows, that a split has usable rows with answers."""
    looked, reason = 0, ""
    for number, record in enumerate(islice(iter(part.data), LOOKED_AT)):
        looked += 1
        try:
            if not answered or any(row.answers for row in part.rows(record, number)):
                return
        except DataError as error:
            reason = reason or str(error)
    if not looked:
        raise _empty(part.where)
    if reason:
        raise DataError(f"None of the first {looked} rows of {part.where} can be used. {reason}")
    raise DataError(
        f"{part.where} has no answers in its first {looked} rows, as test splits of DocVQA, InfographicVQA and "
        "TextVQA: they are graded on a server. Use the validation split, or open it to predict only (answered=False)."
    )


def _from_disk(
    source: Path, split: str, config: str | None, streaming: bool, columns: Mapping[str, str] | None
) -> list[Part]:
    import datasets

    images = FileImages(source if source.is_dir() else source.parent)
    if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
        stored = _loaded(lambda: datasets.load_from_disk(str(source)), str(source))
        if isinstance(stored, datasets.DatasetDict):
            if split not in stored:
                raise DataError(f"{source} holds no split {split!r}. Found: {', '.join(map(str, stored))}.")
            stored = stored[split]
        return [_part(stored.to_iterable_dataset() if streaming else stored, str(source), split, images, "", columns)]
    parts = []
    for group in find_split(source, split, config):
        one = len(group.files) == 1
        where = str(group.files[0] if one else source)
        data = _loaded(functools.partial(_read, group, streaming), where)
        name = split or "row" if group.format == "parquet" else group.files[0].stem
        parts.append(_part(data, where, name, images, group.kind, columns))
    return parts


def _read(group: LocalFiles, streaming: bool) -> Any:
    import datasets

    if group.format == "csv":  # every cell stays text: "007" is no number, and an empty cell no NaN
        with group.files[0].open(newline="", encoding="utf-8-sig") as file:
            table = datasets.Dataset.from_list(list(csv.DictReader(file)))
        return table.to_iterable_dataset() if streaming else table
    options: dict[str, Any] = {"field": group.field} if group.field else {}
    files = [str(path) for path in group.files]
    return datasets.load_dataset(group.format, data_files=files, split="train", streaming=streaming, **options)


def _from_hub(
    source: str, split: str, config: str | None, streaming: bool, columns: Mapping[str, str] | None
) -> list[Part]:
    import datasets

    where = f"{source} ({split})" if config is None else f"{source}, {config} ({split})"
    data = _loaded(lambda: datasets.load_dataset(source, config, split=split, streaming=streaming), where)
    return [_part(data, where, split, FileImages(None), "", columns)]


def _loaded(load: Callable[[], Any], where: str) -> Any:
    """Calls `load`, and turns errors of the `datasets` library into one that names the source."""
    from datasets.exceptions import DatasetsError

    try:
        return load()
    except (DatasetsError, OSError, ValueError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        if "corresponds to no data" in str(error):
            raise _empty(where) from error
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{where} cannot be opened: {reason[0].rstrip('.')}. Check name, configuration and split, that the files "
            "are complete, and the network where it is on the hub."
        ) from error


def _empty(where: str) -> DataError:
    return DataError(f"{where} has no rows. Check the split name and that the files were downloaded completely.")


def _part(data: Any, where: str, name: str, images: FileImages, kind: str, columns: Mapping[str, str] | None) -> Part:
    import datasets

    features = data.features or {}
    there = list(features) or list(next(iter(data), {}))
    for column, feature in features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image):  # bytes: the size is checked before decoding
            data = data.cast_column(column, datasets.Image(decode=False))
        elif isinstance(inner, datasets.Image):
            data = data.cast_column(column, datasets.List(datasets.Image(decode=False)))
    if not there:
        raise _empty(where)
    return Part(data, Columns.of(there, where, columns), where, name, images, kind)
