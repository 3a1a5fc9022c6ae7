"""Pictures of tables for a pretrained tower, 112 x 112 px, with targets for every patch of 14 px.

A table is at a random place on white paper. Its first row and first column are headers. A patch whose centre is on a
body cell has two targets: what the header of its column shows, and what the header of its row shows. To predict them, a
token must get the content of two other places, one in its column and one in its row.

    colours     a cell is one patch and has one of ten colours
    digits      a cell is 2 x 2 patches and shows a real handwritten digit; at one patch this tower cannot read them
    rendered    cells of any width and height with gaps between them, at any place: rows and columns of cells do not
                coincide with rows and columns of patches; ten colours, because this tower cannot read print of this
                size

Patches whose centre is on paper, on a gap or on a header have no target. A picture depends on the task, the split, a
seed and its number only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.lookup_pictures import Split, digit_bank
from sfa_adapters.recipes.studies.training import NONE

__all__ = ["GRID", "KINDS", "Pictures", "Task", "draw_pictures"]

Task = Literal["colours", "digits", "rendered"]
PATCH, GRID = 14, 8  # pixels of a patch; patches on each side
SIDE = PATCH * GRID
KINDS = 10  # colours, or digits
SPLITS: dict[Split, int] = {"train": 1, "val": 2, "test": 3}
NOISE = 0.03
RENDERED_CELL, RENDERED_GAP = (9, 22), (1, 3)  # pixels, both ends included
# Red, green, blue, yellow, magenta, cyan, orange, brown, grey, black: no two are near each other.
PALETTE = np.array(
    [
        (220, 30, 30), (40, 170, 50), (40, 60, 220), (240, 220, 40), (225, 40, 210),
        (40, 215, 225), (245, 145, 20), (115, 65, 25), (140, 140, 140), (10, 10, 10),
    ],
    dtype=np.float32,
) / 255  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which DINOv2 was trained with

Spans = Sequence[tuple[int, int]]  # first pixel, and the first one after the last


@dataclass(frozen=True)
class Pictures:
    """Pictures with their targets.

    Attributes:
        pixels: Normalised for DINOv2, `[count, 3, 112, 112]`.
        headers: What the headers of a patch's column and of its row show, `NONE` where there is no question,
            `[count, 64, 2]`.
        content: What the cell under a patch shows itself, `NONE` outside of the table, `[count, 64]`.
    """

    pixels: Tensor
    headers: Tensor
    content: Tensor


def draw_pictures(task: Task, split: Split, numbers: Sequence[int], seed: int) -> Pictures:
    """Draws pictures.

    Args:
        task: Kind of pictures.
        split: Pictures of different splits share neither random numbers nor digits.
        numbers: Numbers of the pictures in the split.
        seed: Of everything random.

    Raises:
        DataError: There is no such task, or scikit-learn, which has the digits, is missing.
    """
    if task not in get_args(Task):
        raise DataError(f"task={task!r} is none of {', '.join(get_args(Task))}.")
    drawn = [_draw(task, split, np.random.default_rng((seed, SPLITS[split], number))) for number in numbers]
    pixels, headers, content = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return Pictures((pixels.permute(0, 3, 1, 2) - mean) / std, headers, content)


def _draw(task: Task, split: Split, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, columns = (_rendered(random), _rendered(random)) if task == "rendered" else _aligned(task, random)
    shown = random.integers(KINDS, size=(len(rows), len(columns)))
    paper = np.ones((SIDE, SIDE, 3), dtype=np.float32)
    for row, (top, bottom) in enumerate(rows):
        for column, (left, right) in enumerate(columns):
            cell = paper[top:bottom, left:right]
            kind = shown[row, column]
            cell[:] = PALETTE[kind] if task != "digits" else _written(kind, split, bottom - top, random)[..., None]
    paper += NOISE * random.standard_normal(paper.shape, dtype=np.float32)
    row_of, column_of = _cell_under_patches(rows), _cell_under_patches(columns)
    inside = (row_of[:, None] >= 0) & (column_of >= 0)
    body = (row_of[:, None] > 0) & (column_of > 0)
    content = np.where(inside, shown[row_of[:, None], column_of], NONE)
    headers = np.stack(np.broadcast_arrays(shown[0, column_of], shown[row_of, 0][:, None]), -1)
    headers = np.where(body[..., None], headers, NONE)
    return paper.clip(0, 1), headers.reshape(-1, 2).astype(np.int64), content.reshape(-1).astype(np.int64)


def _aligned(task: Task, random: np.random.Generator) -> tuple[Spans, Spans]:
    """Rows and columns of cells that are whole patches, with white lines of 2 px between them."""
    cell = PATCH if task == "colours" else 2 * PATCH
    places = SIDE // cell
    spans = []
    for _ in range(2):
        count = int(random.integers(3, places + 1))
        first = int(random.integers(places - count + 1))
        spans.append([(cell * number + 1, cell * (number + 1) - 1) for number in range(first, first + count)])
    return spans[0], spans[1]


def _rendered(random: np.random.Generator) -> Spans:
    """Four to eight rows (or columns) of cells of random sizes, as many as fit, at a random place on the paper."""
    while True:
        wanted = int(random.integers(4, 9))
        sizes = random.integers(RENDERED_CELL[0], RENDERED_CELL[1] + 1, size=wanted)
        gap = int(random.integers(RENDERED_GAP[0], RENDERED_GAP[1] + 1))
        begins = np.concatenate(([0], np.cumsum(sizes + gap)[:-1]))
        fitting = int((begins + sizes <= SIDE).sum())
        spans = [(int(begin), int(begin + size)) for begin, size in zip(begins, sizes, strict=True)][:fitting]
        offset = int(random.integers(SIDE - spans[-1][1] + 1))
        spans = [(begin + offset, end + offset) for begin, end in spans]
        # A table without a question, where no centre of a patch is on a body cell, is drawn again.
        if (_cell_under_patches(spans) > 0).any():
            return spans


def _cell_under_patches(spans: Spans) -> np.ndarray:
    """For each patch along one side, the number of the span that its centre lies in, -1 for none, `[8]`."""
    # A patch has an even number of pixels: its centre is the edge between two, and counts to the right or lower one.
    centres = PATCH * np.arange(GRID) + PATCH // 2
    inside = np.array([(begin <= centres) & (centres < end) for begin, end in spans])
    return np.where(inside.any(0), inside.argmax(0), -1)


def _written(kind: int, split: Split, side: int, random: np.random.Generator) -> np.ndarray:
    """A handwritten digit, black on white, `[side, side]`."""
    bank = digit_bank(split)
    choices = torch.nonzero(bank.labels == kind)[:, 0]
    ink = bank.images[choices[int(random.integers(len(choices)))]]
    large = functional.interpolate(ink[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0]
    return 1 - large.numpy()
