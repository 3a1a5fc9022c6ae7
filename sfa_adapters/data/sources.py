"""Rows from tables of the `datasets` library, by index or streamed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, overload

from sfa_adapters.data.datasets import Skipped
from sfa_adapters.data.local_files import FileImages
from sfa_adapters.data.rows import Columns, Row
from sfa_adapters.errors import DataError

__all__ = ["Part", "StreamedRows", "TableRows"]


@dataclass(frozen=True, eq=False)
class Part:
    """A table of the `datasets` library: its records and how to read them.

    Attributes:
        data: `Dataset`, or `IterableDataset` if it is streamed.
        columns: Which column holds which field.
        where: Named in errors.
        name: Prefix of the ids of rows that have none.
        images: Finds image files.
        kind: The type of rows whose record has none.
        answered: Whether a row without an answer is unusable.
    """

    data: Any
    columns: Columns
    where: str
    name: str
    images: FileImages
    kind: str = ""
    answered: bool = True

    def rows(self, record: Mapping[str, Any], number: int) -> list[Row]:
        """The rows of record `number`.

        Raises:
            DataError: The record cannot be used; names it.
        """
        where, name = f"{self.where}, row {number}", f"{self.name}-{number}"
        read_rows = list(self.columns.rows(record, where, name, self.images, self.kind))
        if self.answered and not all(row.answers for row in read_rows):
            column = self.columns.names.get("answers", "texts")
            raise DataError(
                f"{where}: no answer in column {column!r} (found {record[column]!r}). Remove or repair the row."
            )
        return read_rows


class TableRows(Sequence[Row]):
    """Rows of tables on disk, read by index; images are not decoded.

    Args:
        parts: The tables, one after the other.
        limit: Keep only this many rows, the first ones.
    """

    def __init__(self, parts: Sequence[Part], limit: int | None = None) -> None:
        self.parts = tuple(parts)
        # Number of the first row of each table, and of each record in tables with several rows per record.
        self._packed = [_starts(part) if part.columns.packed else None for part in self.parts]
        sizes = [len(p.data) if s is None else s[-1] for p, s in zip(self.parts, self._packed, strict=True)]
        self._starts = [0, *accumulate(sizes)]
        self._count = self._starts[-1] if limit is None else min(limit, self._starts[-1])

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        """Reads a row; a slice gives a list.

        Raises:
            DataError: The row cannot be used; names it.
            IndexError: There is no such row.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"There is no row {index}, there are {self._count}.")
        index %= self._count
        which = bisect_right(self._starts, index) - 1  # of tables with the same start, all but the last are empty
        part, packed, index = self.parts[which], self._packed[which], index - self._starts[which]
        record = index if packed is None else bisect_right(packed, index) - 1
        return part.rows(part.data[record], record)[0 if packed is None else index - packed[record]]

    def ordered(self, seed: int | None, buffer: int) -> Iterator[Row | Skipped]:
        """As `StreamedRows.ordered`, but always in the order of the tables."""
        del seed, buffer
        for index in range(len(self)):
            try:
                yield self[index]
            except DataError as error:
                yield Skipped(f"row {index}", str(error))


class StreamedRows:
    """Rows of streamed tables.

    Args:
        parts: The tables, one after the other.
        limit: Keep only this many rows of every pass, the first ones.
    """

    def __init__(self, parts: Sequence[Part], limit: int | None = None) -> None:
        self.parts, self.limit = tuple(parts), limit

    def __iter__(self) -> Iterator[Row]:
        for row in self.ordered(None, 0):
            if isinstance(row, Skipped):
                raise DataError(row.reason)
            yield row

    def ordered(self, seed: int | None, buffer: int) -> Iterator[Row | Skipped]:
        """Iterates over the rows; inside a worker process of a data loader, over its share of them.

        Args:
            seed: Seed of the order; None keeps the order of the tables.
            buffer: Size of the shuffle buffer in rows.

        Yields:
            A row, or an unusable record with the reason.
        """
        yield from islice(self._all(seed, buffer), self.limit)

    def _all(self, seed: int | None, buffer: int) -> Iterator[Row | Skipped]:
        for part in self.parts:
            data = part.data if seed is None else part.data.shuffle(seed=seed, buffer_size=buffer)
            for number, record in enumerate(data):
                try:
                    yield from part.rows(record, number)
                except DataError as error:
                    yield Skipped(f"{part.name}-{number}", str(error))


def _starts(part: Part) -> list[int]:
    """Number of the first row of each record, then the number of all rows; reads no images."""
    texts = part.data.select_columns(["texts"])
    return [0, *accumulate(len(record["texts"] or ()) for record in texts)]
