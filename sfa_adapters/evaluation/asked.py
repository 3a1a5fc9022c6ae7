"""Decodes the images of rows and makes batches for a host; rows that fail are kept with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from sfa_adapters.data.collator import Collator
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image

__all__ = ["Asked", "Batches", "Images", "row_at"]


@dataclass(frozen=True)
class Asked:
    """One row with its decoded image, or the reason why it cannot be used.

    Attributes:
        index: Index of the row.
        row: The row.
        image: Its decoded image or images; None if it failed.
        failed: Why the row cannot be used, else empty.
    """

    index: int
    row: Row
    image: Any
    failed: str


class Images(Dataset[Asked]):
    """Dataset of the rows that are still to be answered, decoded; a broken image is a reason, not an exception."""

    def __init__(self, rows: Sequence[Row], todo: Sequence[int]) -> None:
        self.rows, self.todo = rows, todo

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, place: int) -> Asked:
        index = self.todo[place]
        row = row_at(self.rows, index)
        if isinstance(row.image, DataError):
            return Asked(index, row, None, str(row.image))
        try:
            return Asked(index, row, as_image(row.image, row.id), "")
        except DataError as error:
            return Asked(index, row, None, str(error))


def row_at(rows: Sequence[Row], index: int) -> Row:
    """Reads a row; for an unreadable record gives an empty row with the error in place of its image."""
    try:
        return rows[index]
    except DataError as error:
        return Row(f"row {index}", error, "", ())


class Batches:
    """Collates rows to a batch; rows that cannot be encoded are left out, and the others kept."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, questions: Sequence[Asked]) -> tuple[list[Asked], dict[str, Any] | None]:
        """Returns the rows, with reasons for those that fail, and a batch of the others (None if all fail)."""
        good = [one for one in questions if not one.failed]
        batch = self._encode(good)
        if isinstance(batch, str):
            tried = {one.index: self._encode([one]) for one in good}
            reasons = {index: encoded for index, encoded in tried.items() if isinstance(encoded, str)}
            if not reasons:
                raise DataError(batch)  # each works alone, so the error is of no single row
            questions = [Asked(o.index, o.row, None, reasons[o.index]) if o.index in reasons else o for o in questions]
            batch = self._encode([one for one in questions if not one.failed])
        assert not isinstance(batch, str)
        return list(questions), batch

    def _encode(self, questions: Sequence[Asked]) -> dict[str, Any] | str | None:
        if not questions:
            return None
        try:
            return self.collator([{"row": one.row, "image": one.image, "skipped": ()} for one in questions])
        except DataError as error:
            return str(error)
