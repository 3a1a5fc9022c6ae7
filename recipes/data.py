"""One loader for chart questions: rendered charts, or ChartQA from the hub or a local folder.

ChartQA is in use with three column schemas, told apart by their columns:

* `HuggingFaceM4/ChartQA`: image, query, label (a list);
* `ahmed-masry/ChartQA`: imgname, query, label, image (encoded bytes);
* `lmms-lab/ChartQA`: question, answer, image.

Images are never decoded before the size in their header is known to be sane, and no code that comes with data is run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.images import MAX_BYTES, MAX_PIXELS, as_image, read_image
from sfa_adapters.recipes.charts import TextBox, draw, kinds_for
from sfa_adapters.recipes.questions import QUESTION_TYPES, QuestionType, questions_for
from sfa_adapters.recipes.sources import load_tables
from sfa_adapters.recipes.tables import SPLITS, Split

__all__ = ["MAX_BYTES", "MAX_PIXELS", "ChartSample", "chart_samples", "load_charts", "read_image"]

SCHEMAS: dict[str, tuple[str, str]] = {  # name -> (question column, answer column)
    "ahmed-masry/ChartQA": ("query", "label"),
    "HuggingFaceM4/ChartQA": ("query", "label"),
    "lmms-lab/ChartQA": ("question", "answer"),
}


@dataclass(frozen=True)
class ChartSample:
    """One question about one chart.

    Attributes:
        image: uint8 [H, W, 3].
        question: the question.
        answers: every answer that counts as right; at least one.
        texts: what is printed on the chart, with boxes; empty where it is not known (ChartQA).
        type: "value", "difference" or "largest"; ChartQA's own "human" or "augmented" where given; else empty.
        kind: kind of chart, or empty.
        id: table and kind of a rendered chart, or file and row.
    """

    image: np.ndarray
    question: str
    answers: tuple[str, ...]
    texts: tuple[TextBox, ...]
    type: str
    kind: str
    id: str

    @property
    def answer(self) -> str:
        """The first right answer."""
        return self.answers[0]

    @property
    def boxes(self) -> tuple[TextBox, ...]:
        """The printed numbers with their pixel boxes."""
        return tuple(t for t in self.texts if t.is_number)


def load_charts(source: str | Path, split: str, limit: int | None = None, seed: int = 0) -> list[ChartSample]:
    """Load chart questions.

    Args:
        source: "rendered" for charts drawn from real tables; a hub id such as "HuggingFaceM4/ChartQA"; or a local
            folder with parquet files, JSON lines beside their images, or an imagefolder with metadata.
        split: "train", "val" or "test"; for a hub id, the name that it uses there.
        limit: at most so many questions; needed for "rendered", 200 by default.
        seed: which questions of a rendered split are drawn; a real dataset is read in its own order.

    Returns:
        The samples, in a fixed order.

    Raises:
        DataError: unknown split or schema, empty split, a row without an answer, an unreadable or oversized image.
    """
    if source == "rendered":
        if split not in SPLITS:
            raise DataError(f"Rendered charts have no split {split!r}. Use one of {', '.join(SPLITS)}.")
        return chart_samples(split, 200 if limit is None else limit, seed)  # pyright: ignore[reportArgumentType]
    rows, name = _open(source, split)
    samples = []
    for i, row in enumerate(rows):
        if limit is not None and i >= limit:
            break
        samples.append(_sample(row, f"{name}, row {i}", Path(source) if Path(source).is_dir() else None))
    if not samples:
        raise DataError(f"{name} has no rows. Check the split name and that the files were downloaded completely.")
    return samples


def chart_samples(
    split: Split, limit: int, seed: int = 0, types: Sequence[QuestionType] = QUESTION_TYPES
) -> list[ChartSample]:
    """Draw questions about the real tables of one split, question types in turn, each about a chart of its own.

    Args:
        split: which tables.
        limit: how many questions.
        seed: which ones.
        types: question types that take turns.

    Returns:
        `limit` samples.
    """
    rng = np.random.default_rng(seed)
    tables = load_tables(split)
    samples: list[ChartSample] = []
    order: list[int] = []
    while len(samples) < limit:
        order = order or rng.permutation(len(tables)).tolist()
        table = tables[order.pop()]
        wanted = types[len(samples) % len(types)]
        fitting = [q for q in questions_for(table) if q.type == wanted]
        if fitting:
            question = fitting[int(rng.integers(len(fitting)))]
            kinds = kinds_for(table)
            chart = draw(table, kinds[int(rng.integers(len(kinds)))])
            answers = (question.answer,)
            id_ = f"{table.id} ({chart.kind})"
            samples.append(ChartSample(chart.image, question.text, answers, chart.texts, wanted, chart.kind, id_))
    return samples


def _open(source: str | Path, split: str) -> tuple[Iterable[Mapping[str, Any]], str]:
    import datasets

    folder = Path(source)
    if folder.is_dir():
        parquet = sorted(p for p in folder.rglob("*.parquet") if split in p.relative_to(folder).as_posix())
        lines = [
            p for n in (f"{split}.jsonl", f"{split}/metadata.jsonl", f"{split}.json") if (p := folder / n).is_file()
        ]
        if parquet:
            files = [str(p) for p in parquet]
            data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
            name = str(parquet[0] if len(parquet) == 1 else folder)
        elif lines:
            data = datasets.load_dataset("json", data_files=str(lines[0]), split="train", streaming=True)
            name = str(lines[0])
        else:
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
            raise DataError(
                f"{folder} holds no split {split!r}: looked for *{split}*.parquet, {split}.jsonl, {split}.json and "
                f"{split}/metadata.jsonl. Found: {there}."
            )
    else:
        if str(source).startswith((".", "/", "~")):
            raise DataError(
                f"There is no folder {source}. Give a folder, a hub id such as HuggingFaceM4/ChartQA, or 'rendered'."
            )
        data, name = datasets.load_dataset(str(source), split=split, streaming=True), f"{source} ({split})"
    if isinstance((data.features or {}).get("image"), datasets.Image):
        data = data.cast_column("image", datasets.Image(decode=False))  # bytes: the size is checked before decoding
    return data, name


def _sample(row: Mapping[str, Any], where: str, folder: Path | None) -> ChartSample:
    question_column, answer_column = next(
        (columns for columns in SCHEMAS.values() if columns[0] in row and columns[1] in row), ("", "")
    )
    image_column = next((c for c in ("image", "file_name", "imgname") if row.get(c) is not None), "")
    if not question_column or not image_column:
        raise DataError(
            f"{where}: unknown columns {', '.join(row)}. Known are image/query/label, imgname/query/label/image and "
            "question/answer/image."
        )
    label = row[answer_column]
    answers = tuple(str(a).strip() for a in (label if isinstance(label, list | tuple) else [label]) if a is not None)
    if not answers or not all(answers):
        raise DataError(f"{where}: no answer in column {answer_column!r} (found {label!r}). Remove or repair the row.")
    if not isinstance(row[question_column], str) or not row[question_column].strip():
        raise DataError(f"{where}: no question in column {question_column!r} (found {row[question_column]!r}).")
    image = as_image(_file(row[image_column], where, folder), where)
    kind = row.get("type") or row.get("human_or_machine")
    return ChartSample(image, row[question_column].strip(), answers, (), "" if kind is None else str(kind), "", where)


def _file(value: Any, where: str, folder: Path | None) -> bytes | Path:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or folder is None:
        raise DataError(
            f"{where}: the image is {type(value).__name__}, expected encoded bytes or a file inside a local folder."
        )
    path = next(
        (p for p in (folder / value, *folder.glob(f"*/{value}"), *folder.glob(f"*/png/{value}")) if p.is_file()), None
    )
    if path is None or not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where}: no image file {value!r} inside {folder}.")
    return path
