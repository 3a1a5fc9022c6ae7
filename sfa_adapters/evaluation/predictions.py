"""Files of answers in JSON lines, to which answers are appended, also after a restart.

A file has one object per row: `index`, `id`, `question`, `answers`, `prediction`, `split`, `printed`, `truncated`,
`failed`, and `image` where the image is a file. `sfa analyze hallucination` reads the same file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.files import write_whole
from sfa_adapters.heads.metadata import PrunedMetadata

__all__ = ["Prediction", "PredictionFile", "metadata_of_answers", "read_answers", "write_atomically"]


@dataclass(frozen=True)
class Prediction:
    """The answer of a host to one row.

    Attributes:
        index: Index of the row among all rows.
        id: Id of the row.
        question: The question as in the data, without the prompt around it.
        answers: All true answers; empty if the data has none.
        prediction: The host's answer; empty for a row that failed.
        split: "human" or "augmented" in ChartQA, the type of question in OCRBench, else empty.
        printed: Texts that are known to be printed on the image.
        truncated: Whether the answer was cut at the largest length. It is scored as it is.
        failed: Why the row could not be answered (a broken image), else empty. It counts as wrong.
        image: File of the image, if it is one.
    """

    index: int
    id: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    split: str = ""
    printed: tuple[str, ...] = ()
    truncated: bool = False
    failed: str = ""
    image: str | None = None


class PredictionFile:
    """A file of predictions, with a second file beside it for the settings that they were made with.

    Every process writes its own file, so that several can answer at once: the first one `path`, the others
    `<name>.1.jsonl` and so on. `merge` joins them to one file, in the order of the rows.

    Args:
        path: The file, ending in .jsonl.
        rank: Rank of this process.

    Raises:
        RecipeError: `path` does not end in .jsonl.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise RecipeError(f"{self.path}: the file of predictions must end in .jsonl.")
        self.part = self.path if rank == 0 else self.path.with_suffix(f".{rank}.jsonl")
        self.settings = self.path.with_suffix(".settings.json")

    def parts(self) -> list[Path]:
        """All existing files, including those of other processes."""
        others = self.path.parent.glob(f"{self.path.stem}.*.jsonl")
        numbered = [p for p in others if p.name[len(self.path.stem) + 1 : -len(".jsonl")].isdigit()]
        return [p for p in (self.path, *sorted(numbered)) if p.is_file()]

    def start(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings, or compares them with those of existing answers.

        Raises:
            RecipeError: The folder cannot be written, the settings differ or are missing; names them.
        """
        settings = json.loads(json.dumps(settings))  # tuples are lists in the file
        there = self.parts()
        if there and not self.settings.is_file():
            raise RecipeError(
                f"{there[0]} has no {self.settings.name} beside it, so its settings are not known. Use another folder."
            )
        if there:
            known = json.loads(self.settings.read_text(encoding="utf-8"))
            names = sorted(n for n in known.keys() | settings.keys() if known.get(n) != settings.get(n))
            if names:
                differences = ", ".join(f"{n}: {known.get(n)!r} there, {settings.get(n)!r} now" for n in names)
                raise RecipeError(
                    f"{there[0]} holds answers made with other settings ({differences}). "
                    "Use another folder, or delete it to start again."
                )
            return
        write_atomically(self.settings, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")

    def read(self) -> dict[int, Prediction]:
        """Reads existing answers by index. Removes an incomplete line at the end of this process's file."""
        _repair(self.part)
        return {p.index: p for part in self.parts() for p in _read_part(part)}

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Appends answers and flushes them to disk.

        Raises:
            RecipeError: The file cannot be written; earlier answers are safe.
        """
        lines = "".join(json.dumps(_as_row(p), ensure_ascii=False) + "\n" for p in predictions)
        try:
            with self.part.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RecipeError(
                f"{self.part} cannot be written ({error.strerror}). Earlier answers are safe; make room or choose "
                "another folder, and run the same command again."
            ) from error

    def merge(self) -> list[Prediction]:
        """Joins the files of all processes to one, in the order of the rows; returns its answers."""
        predictions = self.read()
        ordered = [predictions[index] for index in sorted(predictions)]
        parts = self.parts()
        if parts != [self.path] or [p.index for p in _read_part(self.path)] != sorted(predictions):
            text = "".join(json.dumps(_as_row(p), ensure_ascii=False) + "\n" for p in ordered)
            write_atomically(self.path, text)
            for part in parts:
                if part != self.path:
                    part.unlink()
        return ordered


def read_answers(path: str | Path) -> list[Prediction]:
    """Reads a complete file of predictions.

    Raises:
        DataError: It is missing or empty, or a line is not a prediction; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}. `sfa eval` writes predictions.jsonl into its folder.")
    predictions = _read_part(path)
    if not predictions:
        raise DataError(f"{path} has no answers.")
    return predictions


def metadata_of_answers(path: str | Path) -> PrunedMetadata | None:
    """The pruned heads of the model behind a file of predictions; None if there are none, or none are recorded.

    Raises:
        DataError: The settings beside the file cannot be read.
    """
    settings = Path(path).with_suffix(".settings.json")
    if not settings.is_file():
        return None
    try:
        pruned = json.loads(settings.read_text(encoding="utf-8")).get("pruned")
        return None if pruned is None else PrunedMetadata.from_dict(pruned)
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{settings} cannot be read ({error}).") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a file atomically: a kill or a full disk leaves the old one.

    Raises:
        RecipeError: It cannot be written.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        raise RecipeError(f"{path} cannot be written ({error.strerror}). Choose a folder that can be.") from error


def _as_row(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON object, without its empty fields; `image` must be missing if there is none."""
    row = asdict(prediction)
    return {key: value for key, value in row.items() if value or key in ("index", "id", "answers", "prediction")}


def _repair(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            file.truncate(whole)


def _read_part(path: Path) -> list[Prediction]:
    predictions = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # behind the last line break is an incomplete line, or nothing
        try:
            row = json.loads(line)
            texts: dict[str, Any] = {key: tuple(row[key]) for key in ("answers", "printed") if key in row}
            predictions.append(Prediction(**{"question": "", **row, **texts}))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a line that `sfa eval` writes ({error}).") from error
    return predictions


def same_questions(first: Sequence[Prediction], second: Sequence[Prediction]) -> bool:
    """Whether two lists answer the same rows in the same order."""
    keys = [[(p.id, p.question, p.answers) for p in each] for each in (first, second)]
    return keys[0] == keys[1]
