"""`Row`: one question about one image; and `Columns`, which makes rows from the columns of known datasets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.vlm.page import Box

__all__ = ["FIELDS", "Box", "Columns", "Row"]

# The fields of a row, and their column names in the known datasets; the first one that exists is used.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "file_name", "image_local_name", "imgname", "image_path"),
    "question": ("question", "query"),
    "answers": ("answers", "answer", "label"),
    "id": ("questionId", "question_id", "id"),
    "split": ("human_or_machine", "type", "question_types", "question_type", "answer_type", "template_id"),
    "printed": ("printed",),
    "boxes": ("boxes",),
    "bbox": ("answer_bbox", "bbox_answer"),  # DVQA: left, top, width, height
}
NEEDED = ("image", "question", "answers")
KNOWN = (
    "image, query, label (HuggingFaceM4/ChartQA, ahmed-masry/ChartQA)",
    "image, question, answer (lmms-lab/ChartQA, DVQA, echo840/OCRBench)",
    "image, question, answers (DocVQA, InfographicVQA, TextVQA)",
    "images, texts (subsets of HuggingFaceM4/the_cauldron)",
    "file_name or imgname in place of image, for files in a local folder",
)
HUMAN = ("human", "augmented")  # ClassLabel 0 and 1 of HuggingFaceM4/ChartQA


@dataclass(frozen=True)
class Row:
    """One question about one image.

    Attributes:
        id: The id of the question in the data, else split and number; the same every time.
        image: The image as it is in the data, undecoded where possible: a path, encoded bytes, a PIL image or an array.
        question: The question, stripped.
        answers: Every answer that counts as right, stripped; empty if the data has none.
        split: `human` or `augmented` in ChartQA, the type of the question in others, else empty.
        printed: The texts printed on the image, where they are known.
        boxes: (left, top, right, bottom) in pixels of the marks that the answer is read from, where they are known.
        page_size: Width and height of the page in the pixels of `boxes`; None means those of the image.
        kind: The type of the question as in the data.
        where: File and number of the record, for messages.
    """

    id: str
    image: Any = field(compare=False, repr=False)
    question: str
    answers: tuple[str, ...]
    split: str = ""
    printed: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    page_size: tuple[int, int] | None = None
    kind: str = ""
    where: str = ""

    @property
    def target(self) -> str:
        """The answer to train on: the most common one (case does not count), or the first of several such.

        Raises:
            DataError: There is no answer.
        """
        if not self.answers:
            raise DataError(f"{self.where or self.id}: the question has no answer to train on.")
        counts = Counter(answer.casefold() for answer in self.answers)
        most = max(counts.values())
        return next(answer for answer in self.answers if counts[answer.casefold()] == most)


@dataclass(frozen=True)
class Columns:
    """Which column of a dataset holds which field of a `Row`.

    Attributes:
        names: Field -> column, for the fields that exist.
        packed: Whether a record holds one image and many questions (`images`, `texts`).
        there: All columns.
    """

    names: Mapping[str, str]
    packed: bool
    there: tuple[str, ...]

    @classmethod
    def of(cls, there: Sequence[str], where: str, given: Mapping[str, str] | None = None) -> Columns:
        """Finds the fields among the columns.

        Args:
            there: Names of the columns.
            where: Named in errors.
            given: Field -> column, for columns with other names than the known ones.

        Raises:
            DataError: A needed field has no column; lists the columns and the known layouts.
        """
        given = dict(given or {})
        wrong = [name for name in given if name not in FIELDS]
        if wrong:
            raise DataError(f"columns has a field {wrong[0]!r}. Fields are {', '.join(FIELDS)}.")
        gone = [f"{name} ({column!r})" for name, column in given.items() if column not in there]
        packed = not given and "images" in there and "texts" in there
        columns = {name: next((c for c in FIELDS[name] if c in there), "") for name in FIELDS} | given
        missing = gone or ([] if packed else [name for name in NEEDED if not columns[name]])
        if missing:
            raise DataError(
                f"{where}: no column for {', '.join(missing)}. There are: {', '.join(there) or 'none'}. Known are: "
                f"{'; '.join(KNOWN)}. Name other columns: columns={{'question': 'my_question', ...}}."
            )
        return cls({name: column for name, column in columns.items() if column}, packed, tuple(there))

    def count(self, record: Mapping[str, Any]) -> int:
        """Number of questions in a record."""
        return len(record["texts"] or ()) if self.packed else 1

    def rows(
        self, record: Mapping[str, Any], where: str, name: str, file: Callable[[str, str], Any], kind: str = ""
    ) -> Iterator[Row]:
        """Makes the rows of one record.

        Args:
            record: Column -> value.
            where: Named in errors.
            name: The id of the row if the record has none.
            file: Finds an image file, from its name and `where`.
            kind: The `kind` of rows whose record has none.

        Yields:
            The rows.

        Raises:
            DataError: A value cannot be used; names record and column.
        """
        if self.packed:
            yield from self._packed(record, where, name, file)
            return
        values = {f: record[column] for f, column in self.names.items()}
        image = values["image"]
        if image is None:  # a column of file names replaces an empty column of images
            image = next((record[c] for c in FIELDS["image"] if record.get(c) is not None), None)
        question = values["question"]
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: no question in column {self.names['question']!r} (found {question!r}).")
        row_id = values.get("id")
        kind = self.kind(record) or kind
        yield Row(
            id=name if row_id is None or row_id == "" else str(row_id),
            image=_image(image, where, file),
            question=question.strip(),
            answers=_texts(values["answers"], f"{where}, column {self.names['answers']!r}"),
            split=short(kind),
            printed=_texts(values.get("printed"), f"{where}, column 'printed'"),
            boxes=_boxes(values, where),
            kind=kind,
            where=where,
        )

    def kind(self, record: Mapping[str, Any]) -> str:
        """The type of the question as in the data; the ClassLabel of ChartQA by its name."""
        column = self.names.get("split", "")
        value = record.get(column) if column else None
        if column == "human_or_machine" and value in (0, 1):
            return HUMAN[int(value)]
        if isinstance(value, np.ndarray | list | tuple):
            return ", ".join(str(part) for part in value)
        return "" if value is None else str(value)

    def _packed(
        self, record: Mapping[str, Any], where: str, name: str, file: Callable[[str, str], Any]
    ) -> Iterator[Row]:
        images, texts = record["images"] or (), record["texts"] or ()
        if len(images) != 1:
            raise DataError(f"{where}: {len(images)} images; questions about one image each are read.")
        image = _image(images[0], where, file)
        for number, text in enumerate(texts):
            user, assistant = text.get("user"), text.get("assistant")
            if not isinstance(user, str) or not user.strip():
                raise DataError(f"{where}: no question in texts[{number}]['user'] (found {user!r}).")
            answers = _texts(assistant, f"{where}, texts[{number}]['assistant']")
            yield Row(f"{name}.{number}", image, user.strip(), answers, where=where)


def short(kind: str) -> str:
    """Maps the types `human` and `augmented`, which datasets name differently, to one name each."""
    plain = kind.casefold()
    if plain.startswith("human"):
        return "human"
    return "augmented" if plain.startswith(("augment", "machine")) else kind


def _image(value: Any, where: str, file: Callable[[str, str], Any]) -> Any:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return file(value, where)
    if value is None:
        raise DataError(f"{where}: no image.")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """Converts one text or number, or several, to stripped texts; blank ones are dropped."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = value if isinstance(value, list | tuple) else [value]
    texts = []
    for one in values:
        if isinstance(one, float) and math.isnan(one):
            one = None  # an empty cell of a table
        if one is not None and (isinstance(one, bool) or not isinstance(one, str | int | float)):
            raise DataError(f"{where}: found {one!r}, expected a text, a number, or a list of them.")
        text = "" if one is None else f"{one:.15g}" if isinstance(one, float) else str(one).strip()
        if text:
            texts.append(text)
    return tuple(texts)


def _boxes(values: Mapping[str, Any], where: str) -> tuple[Box, ...]:
    boxes, corner = values.get("boxes"), values.get("bbox")
    boxes_read = [] if boxes is None else [tuple(float(v) for v in box) for box in boxes]
    if corner is not None and len(corner) == 4:
        left, top, width, height = (float(v) for v in corner)
        boxes_read.append((left, top, left + width, top + height))
    if any(len(box) != 4 for box in boxes_read):
        raise DataError(f"{where}: boxes {boxes!r} must be (left, top, right, bottom) each.")
    return tuple((b[0], b[1], b[2], b[3]) for b in boxes_read)
