"""Reads answers of a model from a file: JSON lines or CSV, one sample per row.

Columns: `prediction`; `answers` (or `answer`, or `label`): one text or a list; `image`: a file, relative to the folder
of the file that names it; `printed`: all texts that are printed on the image. The last two may be missing.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfa_adapters.errors import DataError

__all__ = ["Predictions", "read_predictions"]

ANSWER_COLUMNS = ("answers", "answer", "label")


@dataclass(frozen=True)
class Predictions:
    """Answers of a model and the true ones, for each of N samples.

    Attributes:
        predictions: Answers of the model.
        answers: All true answers; empty where the file has none.
        images: Files, or None.
        printed: Texts on the images; empty where they are not known.
    """

    predictions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    images: tuple[Path | None, ...]
    printed: tuple[tuple[str, ...], ...]


def read_predictions(path: str | Path) -> Predictions:
    """Reads answers of a model.

    Args:
        path: A file ending in .jsonl, one JSON object per line, or in .csv, with a header. A number in JSON is taken as
            it is written (12.0 stays "12.0"). In CSV a cell that is a JSON list of texts is a list.

    Returns:
        All rows in their order. An empty answer is no error here: `hallucination_report` counts it as skipped.

    Raises:
        DataError: No such file, another ending, not UTF-8, a broken row, a missing column, an image that is not there,
            or no rows; with the number of the line.
    """
    path = Path(path)
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: expected a file ending in .jsonl or .csv.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    rows = [_row(row, where, path.parent) for where, row in readers[path.suffix.lower()](text, str(path))]
    if not rows:
        raise DataError(f"{path} has no rows.")
    predictions, answers, images, printed = zip(*rows, strict=True)
    return Predictions(predictions, answers, images, printed)


def _json_rows(text: str, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON texts may hold other line breaks
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line, parse_float=str, parse_int=str, parse_constant=str)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object with 'prediction' and 'answers', found {line[:60]!r}.")
        yield where, row


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"{where}: the row has another number of cells than the header. Quote cells with commas."
                )
            yield where, {key: _cell(value) for key, value in row.items() if value or key not in ("image", "printed")}
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not CSV ({error}).") from error


def _cell(value: str) -> str | list[str]:
    """A JSON list of texts, or the cell as it is, since an answer may be "[1"."""
    if value.startswith("["):
        try:
            value_read = json.loads(value)
        except ValueError:
            return value
        if isinstance(value_read, list) and all(isinstance(text, str) for text in value_read):
            return value_read
    return value


def _row(row: Mapping[str, Any], where: str, folder: Path) -> tuple[str, tuple[str, ...], Path | None, tuple[str, ...]]:
    answer_column = next((name for name in ANSWER_COLUMNS if name in row), None)
    if "prediction" not in row or answer_column is None:
        raise DataError(f"{where}: columns {', '.join(row)}; expected prediction and answers (or answer, or label).")
    if not isinstance(row["prediction"], str):
        raise DataError(f"{where}: the prediction is {row['prediction']!r}, expected a text.")
    image = row.get("image")
    if image is not None:
        if not isinstance(image, str) or not (folder / image).is_file():
            raise DataError(f"{where}: no image file {image!r} in {folder}.")
        image = folder / image
    return row["prediction"], _texts(row, answer_column, where), image, _texts(row, "printed", where)


def _texts(row: Mapping[str, Any], column: str, where: str) -> tuple[str, ...]:
    value = row.get(column)
    texts = () if value is None else value if isinstance(value, list) else (value,)
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {column} is {value!r}, expected a text or a list of texts.")
    return tuple(texts)
