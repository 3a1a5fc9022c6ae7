"""Datasets of questions for a data loader: images are opened here, unusable rows are skipped and reported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from sfa_adapters.data.rows import Row
from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image

__all__ = ["Questions", "Skipped", "StreamedQuestions"]

MOST_SKIPPED = 1000  # as many unusable rows in succession mean that the data is broken
MAX_ASPECT = 200  # Qwen's processor refuses longer strips; other processors leave nothing of them


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used, with the reason."""

    id: str
    reason: str


class Questions(Dataset[dict[str, Any]]):
    """Map-style dataset of rows with their images opened.

    A row that cannot be used (a broken or oversized image, no answer) is replaced by the next usable one, so that every
    index gives an example, always the same, and batches keep their size. Skipped rows are listed in the example, so
    they are reported with the batch, also from worker processes.

    Args:
        rows: The rows.
        answered: Whether a row needs an answer; False to predict only.

    Raises:
        DataError: There are no rows.
    """

    def __init__(self, rows: Sequence[Row], answered: bool = True) -> None:
        if not len(rows):
            raise DataError("There are no rows. Check the split, the limit and that the files are complete.")
        self.rows, self.answered = rows, answered

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Opens an example.

        Args:
            index: Its number; negative ones count from the end.

        Returns:
            `row`, its `image` uint8 `[H, W, 3]`, and `skipped`, a tuple of the rows that were skipped before it.

        Raises:
            IndexError: There is no such number.
            DataError: No row can be used, or 1,000 in succession cannot; the text names the first.
        """
        count = len(self.rows)
        if not -count <= index < count:
            raise IndexError(f"There is no row {index}, there are {count}.")
        skipped: list[Skipped] = []
        for step in range(min(count, MOST_SKIPPED)):
            opened = _open(self.rows, (index + step) % count, self.answered)
            if not isinstance(opened, Skipped):
                return opened | {"skipped": tuple(skipped)}
            skipped.append(opened)
        raise _hopeless(skipped)


class StreamedQuestions(IterableDataset[dict[str, Any]]):
    """Iterable dataset of streamed rows with their images opened; unusable rows are reported in the next example.

    The order depends on seed and epoch only. Worker processes share the rows between them. To resume, skip the examples
    that were used (`skip`, or let `Trainer` do so): they are the same in every run.

    Args:
        rows: The rows of `open_rows(..., streaming=True)`, or any rows that can be iterated more than once.
        seed: Seed of the order.
        buffer: Size of the shuffle buffer in rows; 0 keeps the order. Only for rows of `open_rows`.
        skip: Examples to skip at the start of the first epoch, shared between worker processes: with worker processes,
            a multiple of their number times the batch.
        answered: Whether a row needs an answer.
    """

    def __init__(
        self, rows: Iterable[Row], seed: int = 0, buffer: int = 1000, skip: int = 0, answered: bool = True
    ) -> None:
        self.rows, self.seed, self.buffer, self.skip, self.answered = rows, seed, buffer, skip, answered
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next pass; `Trainer` calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skipped: list[Skipped] = []
        passed = 0
        for row in self._own():
            example = row if isinstance(row, Skipped) else _example(row, self.answered)
            if isinstance(example, Skipped):
                skipped.append(example)
                if len(skipped) == MOST_SKIPPED:
                    raise _hopeless(skipped)
                continue
            passed += 1
            if self.epoch or passed > self._share():
                yield example | {"skipped": tuple(skipped)}
            skipped = []
        if not passed and skipped:
            raise _hopeless(skipped)

    def _own(self) -> Iterator[Row | Skipped]:
        """The rows of this worker process, in order."""
        ordered = getattr(self.rows, "ordered", None)
        if ordered is not None:
            yield from ordered(self.seed + self.epoch if self.buffer else None, self.buffer)
            return
        worker = get_worker_info()
        for number, row in enumerate(self.rows):
            if worker is None or number % worker.num_workers == worker.id:
                yield row

    def _share(self) -> int:
        worker = get_worker_info()
        if worker is None:
            return self.skip
        return self.skip // worker.num_workers + (worker.id < self.skip % worker.num_workers)


def _open(rows: Sequence[Row], index: int, answered: bool) -> dict[str, Any] | Skipped:
    try:
        row = rows[index]
    except DataError as error:
        return Skipped(f"row {index}", str(error))
    return _example(row, answered)


def _example(row: Row, answered: bool) -> dict[str, Any] | Skipped:
    if answered and not row.answers:
        return Skipped(row.id, f"{row.where or row.id}: no answer")
    try:
        image = as_image(row.image, row.where or row.id)
    except DataError as error:
        return Skipped(row.id, str(error))
    return _narrow(row, image) or {"row": row, "image": image}


def _narrow(row: Row, image: np.ndarray) -> Skipped | None:
    long, short = max(image.shape[:2]), min(image.shape[:2])
    if long < MAX_ASPECT * short:
        return None
    return Skipped(row.id, f"the image is {image.shape[1]} x {image.shape[0]} pixels: too long a strip to be read")


def _hopeless(skipped: Sequence[Skipped]) -> DataError:
    first = skipped[0]
    return DataError(f"{len(skipped)} rows in succession cannot be used; the first is {first.id}: {first.reason}")
