"""Numeric hallucination: classifies wrong numbers in answers as misread from the image or fabricated.

Every answer falls into one class:

* `correct`: by relaxed accuracy;
* `misread`: wrong, with a number, and all its numbers are printed on the image;
* `fabricated`: wrong, and one of its numbers is printed nowhere on the image;
* `other`: wrong, without a number.

This is our own definition; there is no standard one.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image
from sfa_adapters.metrics import RelaxedMode, relaxed_accuracy
from sfa_adapters.numerals import numbers_in, unprinted_numbers
from sfa_adapters.ocr import ocr_texts
from sfa_adapters.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AnswerClass", "HallucinationReport", "Judgement", "Skipped", "hallucination_report"]

AnswerClass = Literal["correct", "misread", "fabricated", "other"]
CLASSES: tuple[AnswerClass, ...] = get_args(AnswerClass)
NO_ANSWER, NO_TEXT = "no true answer", "OCR found no text"
NO_IMAGE, BAD_IMAGE = "neither printed texts nor an image", "the image cannot be used"


@dataclass(frozen=True)
class Judgement:
    """One judged answer.

    Attributes:
        index: number of the sample among all samples.
        kind: its class.
        numbers: all numbers in the answer.
        unprinted: those of them that are printed nowhere on the image.
        strict: whether it is right in the strict mode of relaxed accuracy.
    """

    index: int
    kind: AnswerClass
    numbers: tuple[float, ...]
    unprinted: tuple[float, ...]
    strict: bool


@dataclass(frozen=True)
class Skipped:
    """A sample that was not judged, with the reason; `detail` is the error where there was one."""

    index: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class HallucinationReport:
    """Classes of all answers, with 95% intervals (bootstrap over samples).

    Attributes:
        judged: the samples that have a class, in their order; at least one.
        skipped: all other samples; they count in no share.
        mode: mode of `relaxed_accuracy`.
    """

    judged: tuple[Judgement, ...]
    skipped: tuple[Skipped, ...]
    mode: RelaxedMode

    @property
    def counts(self) -> dict[AnswerClass, int]:
        """Number of answers in each class."""
        kinds = Counter(j.kind for j in self.judged)
        return {kind: kinds[kind] for kind in CLASSES}

    @property
    def shares(self) -> dict[AnswerClass, Interval]:
        """Share of each class among the judged answers; the values add up to 1."""
        return {kind: bootstrap(np.array([j.kind == kind for j in self.judged])) for kind in CLASSES}

    @property
    def skip_reasons(self) -> dict[str, int]:
        """How many samples were skipped for each reason."""
        return dict(Counter(s.reason for s in self.skipped))

    def _measures(self) -> dict[str, list[bool]]:
        """For the classes and variants of the definition, one truth value per answer that they apply to."""
        numeric = [j for j in self.judged if j.numbers]
        wrong = [j.kind in ("misread", "fabricated") for j in self.judged]
        measures: dict[str, list[bool]] = {kind: [j.kind == kind for j in self.judged] for kind in CLASSES}
        return measures | {
            "numeric hallucination": wrong,
            "numeric hallucination, of answers with a number": [j.kind != "correct" for j in numeric],
            "number not on the image, of answers with a number": [bool(j.unprinted) for j in numeric],
            "numeric hallucination, but right in strict mode": [
                w and j.strict for w, j in zip(wrong, self.judged, strict=True)
            ],
        }

    def table(self) -> list[dict[str, Any]]:
        """The numbers, one row each: the four classes, variants of the definition, and skipped samples by reason.

        Returns:
            Rows with `quantity`, `count`, `of` (the number of answers that it applies to), `share` and the ends of its
            95% interval, `low` and `high`, all three in [0, 1], NaN where it applies to no answer. `numeric
            hallucination` is misread and fabricated together. Skipped samples are counted among all samples, without an
            interval.
        """
        rows: list[dict[str, Any]] = []
        for quantity, values in self._measures().items():
            share = bootstrap(np.array(values))
            row = {"quantity": quantity, "count": sum(values), "of": len(values)}
            rows.append(row | {"share": share.value, "low": share.low, "high": share.high})
        total, nan = len(self.judged) + len(self.skipped), float("nan")
        for reason, count in self.skip_reasons.items():
            row = {"quantity": f"skipped: {reason}", "count": count, "of": total}
            rows.append(row | {"share": count / total, "low": nan, "high": nan})
        return rows

    def to_json(self) -> str:
        """Everything as JSON: `mode`, `table` (NaN is null), `judged` and `skipped` with the index of each sample."""
        finite = [
            {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()}
            for row in self.table()
        ]
        # A number of 400 digits is infinite, which JSON does not have, so numbers are written as texts.
        judged = [
            {"index": j.index, "kind": j.kind, "unprinted": [f"{n:.15g}" for n in j.unprinted], "strict": j.strict}
            for j in self.judged
        ]
        record = {"mode": self.mode, "table": finite, "judged": judged, "skipped": [vars(s) for s in self.skipped]}
        return json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False)

    def to_csv(self, path: str | Path) -> Path:
        """Writes `table` as CSV."""
        rows = self.table()
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return Path(path)

    def figure(self) -> Figure:
        """Bars of the shares with their intervals; `hallucination_compare.compare` draws several reports."""
        from sfa_adapters.analysis.hallucination_compare import compare

        return compare({"": self})


def hallucination_report(
    predictions: Sequence[str],
    answers: Sequence[str | Sequence[str]],
    *,
    images: Sequence[Any] | None = None,
    printed: Sequence[Sequence[str] | None] | None = None,
    mode: RelaxedMode = "reference",
) -> HallucinationReport:
    """Classifies every answer as correct, misread, fabricated or other.

    Numbers are compared by value: "1,234" is 1234 and "25%" is 25. A sign does not count (a dash may be a range, and
    OCR drops thin ones), and dates are compared part by part.

    Args:
        predictions: N answers of the model.
        answers: for each, the true answer or all that count as right; a sample without one is skipped.
        images: for each, anything that `sfa_adapters.images.as_image` takes, to be read by OCR, or None. Samples whose
            image has no text or cannot be used are skipped **whether or not the answer is right**: otherwise only
            wrong answers would be left out.
        printed: for each, all texts printed on the image; takes precedence over `images`. None and empty mean unknown.
        mode: mode of `relaxed_accuracy`.

    Returns:
        The report, with every skipped sample.

    Raises:
        DataError: the lengths differ, a value is not a text, both `images` and `printed` are missing, or no sample can
            be judged.
        ModuleNotFoundError: an image must be read, and the OCR engine is missing; says how to install it.
        ValueError: unknown mode.
    """
    if images is None and printed is None:
        raise DataError("Give the texts printed on the images (printed=...), or images=... to be read by OCR.")
    lengths = {"predictions": len(predictions), "answers": len(answers)}
    lengths |= {name: len(given) for name, given in (("images", images), ("printed", printed)) if given is not None}
    if len(set(lengths.values())) > 1:
        raise DataError(f"One entry per sample is needed, found {lengths}.")
    read: dict[bytes, tuple[str, ...]] = {}  # several questions may be about one chart
    judged: list[Judgement] = []
    skipped: list[Skipped] = []
    for index, (prediction, true) in enumerate(zip(predictions, answers, strict=True)):
        if not isinstance(prediction, str):
            raise DataError(f"Sample {index}: the prediction is {prediction!r}, expected a text.")
        accepted = [text for text in _texts(true, f"Sample {index}: the answer") if text.strip()]
        if not accepted:
            skipped.append(Skipped(index, NO_ANSWER))
            continue
        there = _texts(None if printed is None else printed[index], f"Sample {index}: printed")
        try:
            there = there or _read(None if images is None else images[index], read)
        except _UnreadableError as error:
            skipped.append(Skipped(index, *error.args))
            continue
        judged.append(_judge(index, prediction, accepted, there, mode))
    if not judged:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in Counter(s.reason for s in skipped).items())
        raise DataError(f"None of the {len(predictions)} samples can be judged. {reasons or 'Give at least one.'}")
    return HallucinationReport(tuple(judged), tuple(skipped), mode)


class _UnreadableError(Exception):
    """The text on an image is not known; the arguments are those of `Skipped`."""


def _texts(value: Any, where: str) -> tuple[str, ...]:
    """Converts one text, several texts or None to a tuple of texts."""
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if isinstance(texts, np.ndarray):  # a list in a parquet file
        texts = texts.tolist()
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where} is {value!r}, expected a text or a sequence of texts.")
    return tuple(texts)


def _read(image: Any, read: dict[bytes, tuple[str, ...]]) -> tuple[str, ...]:
    """Texts on an image by OCR; `read` caches them by the content of the image."""
    if image is None:
        raise _UnreadableError(NO_IMAGE)
    try:
        picture = as_image(image)
    except DataError as error:
        raise _UnreadableError(BAD_IMAGE, str(error)) from error
    key = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).digest()
    if key not in read:
        read[key] = ocr_texts(picture)
    if not read[key]:
        raise _UnreadableError(NO_TEXT)
    return read[key]


def _judge(index: int, prediction: str, accepted: Sequence[str], there: Sequence[str], mode: RelaxedMode) -> Judgement:
    numbers, unprinted = tuple(numbers_in(prediction)), tuple(unprinted_numbers(prediction, there))
    kind: AnswerClass = "fabricated" if unprinted else "misread" if numbers else "other"
    if any(relaxed_accuracy(prediction, true, mode) for true in accepted):
        kind = "correct"
    return Judgement(index, kind, numbers, unprinted, any(relaxed_accuracy(prediction, t, "strict") for t in accepted))
