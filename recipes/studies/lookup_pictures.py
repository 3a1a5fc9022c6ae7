"""Pictures of the lookup study: a table of real handwritten digits with headers, and lookups in it as targets.

A picture is a grid of cells of 8x8 pixels. A table of random size is at a random place; each of its cells shows a
digit. The first row and the first column are headers. There are two tasks:

    headers      every cell of the body predicts the digit of its row's header and that of its column's header
    crossing     one row header has a red background and one column header a blue one; the CLS token predicts the digit
                 where that row and that column cross

The digits are the 1,797 of the UCI test set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998) in
scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from sfa_adapters.errors import DataError
from sfa_adapters.install import install_command
from sfa_adapters.recipes.studies.training import NONE

__all__ = ["BLANK", "CELL", "DigitBank", "Lookups", "digit_bank", "draw_lookups"]

CELL = 8  # pixels
BLANK = 10  # label of a cell outside of the table
NOISE = 0.05
Split = Literal["train", "val", "test"]
BOUNDS: dict[Split, tuple[int, int]] = {"train": (0, 1200), "val": (1200, 1400), "test": (1400, 1797)}


@dataclass(frozen=True)
class DigitBank:
    """Handwritten digits of one split; no image is in two splits.

    Attributes:
        images: Ink, `[count, 8, 8]`, 0 to 1.
        labels: 0 to 9, `[count]`.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Lookups:
    """A batch of pictures.

    Attributes:
        patches: Pixels of each cell, `[batch, rows * columns, 3 * 8 * 8]`, -0.2 to 1.
        answers: The digit where the marked row and column cross, `[batch]`.
        digits: The digit of each cell, `BLANK` outside of the table, `[batch, rows * columns]`.
        headers: Digits of the headers of each cell's row and column, `NONE` outside of the body,
            `[batch, rows * columns, 2]`.
    """

    patches: Tensor
    answers: Tensor
    digits: Tensor
    headers: Tensor


@cache
def digit_bank(split: Split) -> DigitBank:
    """The digits of a split.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(f"The digits come with scikit-learn. Run: {install_command('study')}") from None
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[slice(*BOUNDS[split])]
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, CELL, CELL) / 16
    return DigitBank(pixels[chosen], torch.tensor(labels)[chosen])


def draw_lookups(bank: DigitBank, batch: int, grid: tuple[int, int], generator: torch.Generator) -> Lookups:
    """Draws pictures.

    Args:
        bank: Digits.
        batch: Number of pictures.
        grid: Rows and columns of cells of a picture; a table has three or more of each.
        generator: Random generator.
    """
    height, width = grid

    def between(low: int, high: Tensor | int) -> Tensor:
        room = torch.as_tensor(high).expand(batch) - low + 1
        return low + (torch.rand(batch, generator=generator) * room).long().minimum(room - 1)

    table_rows, table_columns = between(3, height), between(3, width)
    top, left = between(0, height - table_rows), between(0, width - table_columns)
    target_row = top + between(1, table_rows - 1)
    target_column = left + between(1, table_columns - 1)
    rows = torch.arange(height)[None, :, None]
    columns = torch.arange(width)[None, None, :]
    upper, first = top[:, None, None], left[:, None, None]
    inside = (rows >= upper) & (rows < upper + table_rows[:, None, None])
    inside = inside & (columns >= first) & (columns < first + table_columns[:, None, None])
    header = inside & ((rows == upper) | (columns == first))
    chosen = torch.randint(len(bank.labels), (batch, height, width), generator=generator)
    digits = bank.labels[chosen]
    ink = bank.images[chosen] * inside[..., None, None]
    ground = torch.zeros(batch, height, width, 3)
    ground[header] = 0.15
    each = torch.arange(batch)
    ground[each, target_row, left] = torch.tensor([0.7, 0.0, 0.0])
    ground[each, top, target_column] = torch.tensor([0.0, 0.0, 0.7])
    # The same noise in all three colours, because drawing noise takes half of the time.
    noise = NOISE * torch.randn(batch, height, width, 1, CELL, CELL, generator=generator)
    body = inside & ~header
    of_row = digits[each[:, None], torch.arange(height), left[:, None]][:, :, None].expand(-1, -1, width)
    of_column = digits[each[:, None], top[:, None], torch.arange(width)][:, None, :].expand(-1, height, -1)
    headers = torch.where(body[..., None], torch.stack((of_row, of_column), -1), NONE)
    pixels = ground[..., None, None] + 0.8 * ink[:, :, :, None] + noise - 0.2
    return Lookups(
        pixels.reshape(batch, height * width, 3 * CELL * CELL),
        digits[each, target_row, target_column],
        torch.where(inside, digits, BLANK).reshape(batch, height * width),
        headers.reshape(batch, height * width, 2),
    )
