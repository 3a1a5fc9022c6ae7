"""Dense reading targets for pretraining: what each patch of a vision tower should predict about its text.

An answer of four characters is a weak training signal for a tower that cannot read yet. While a host is pretrained,
linear heads predict more from every patch that shows a printed text: its letters, the whole text, its partner (the
number of a name, the name of a number), and the series. The heads are not kept; the model itself has no such part.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.recipes.synthetic.charts import TextBox
from sfa_adapters.recipes.synthetic.tables import Table

__all__ = ["LENGTH", "RECORD", "Cuttings", "ReadingHeads", "codes", "mark_patches", "reading_targets", "text_records"]

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789."
BLANK = len(ALPHABET)
LENGTH = 5  # characters of the longest text, and one that marks its end
RECORD = 4 + 3 * LENGTH
SLOTS = 3  # letters whose middle falls into one patch of 12 pixels, from left to right
SPACE = {
    "I": 0.3,
    "J": 0.3,
    ".": 0.32,
    "M": 0.86,
    "W": 0.99,
    **dict.fromkeys("0123456789", 0.64),
}  # widths in em, else 0.69


def codes(text: str) -> list[int]:
    """The characters of a text as numbers, `LENGTH` of them, with `BLANK` behind its end."""
    return ([ALPHABET.index(c) for c in text] + [BLANK] * LENGTH)[:LENGTH]


def text_records(table: Table, texts: Sequence[TextBox]) -> np.ndarray:
    """The texts of one chart as numbers, for storing beside its image.

    Args:
        table: the table of the chart.
        texts: the texts that are printed on it.

    Returns:
        int16 [texts, 19]: the box in pixels (left, top, right, bottom), then five character codes each of the text, its
        partner and its series; -1 where there is none.
    """
    rows = []
    one = len(table.series) == 1
    for t in texts:
        partner = series = [-1] * LENGTH
        if t.role == "value":
            partner = codes(table.rows[t.row])
            series = [-1] * LENGTH if one else codes(table.series[t.series])
        elif t.role == "row" and one:
            partner = codes(table.text(0, t.row))
        rows.append([*(round(v) for v in t.box), *codes(t.text), *partner, *series])
    return np.array(rows, dtype=np.int16).reshape(-1, RECORD)


def _patches(left: int, top: int, right: int, bottom: int, side: int, patch: int) -> tuple[slice, slice]:
    # The box has a line of empty pixels above and below the letters; a text of one letter still has one patch.
    def span(low: int, high: int, margin: int) -> slice:
        first, last = (low + margin) // patch, (high - margin) // patch
        if last < first:
            first = last = (low + high) // 2 // patch
        return slice(max(0, first), min(side - 1, last) + 1)

    return span(top, bottom, 5), span(left, right, 4)


def mark_patches(
    table: Table, record: np.ndarray, mark: tuple[int, int], shift: tuple[int, int], side: int, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Patches of the number and of the name of one mark.

    Args:
        table: the table of the chart.
        record: `text_records` of the chart.
        mark: series and row.
        shift: by how many pixels (right, down) the image was moved.
        side: patches along one side of the image.
        patch: pixels along one side of a patch.

    Returns:
        bool [side * side] for the number, and for the name.
    """
    series, row = mark
    name = codes(table.rows[row])
    group = [-1] * LENGTH if len(table.series) == 1 else codes(table.series[series])
    marks = np.zeros((2, side, side), dtype=bool)
    for r in record.tolist():
        value = r[4 + LENGTH :] == name + group
        if value or (r[4 : 4 + LENGTH] == name and r[-1] == -1):
            box = (r[0] + shift[0], r[1] + shift[1], r[2] + shift[0], r[3] + shift[1])
            marks[(0 if value else 1, *_patches(*box, side, patch))] = True
    return marks[0].ravel(), marks[1].ravel()


def reading_targets(records: Sequence[np.ndarray], shifts: Sequence[tuple[int, int]], side: int, patch: int) -> Tensor:
    """Reading targets of every patch.

    Args:
        records: `text_records` of B charts.
        shifts: by how many pixels (right, down) each image was moved.
        side: patches along one side of the image.
        patch: pixels along one side of a patch.

    Returns:
        int64 [B, side * side, 18]: codes of the (up to three) letters in the patch itself, then of the text that it
        belongs to, its partner and its series; -100 where there is none. The box of a text has about five empty pixels
        to each side that do not count.
    """
    out = np.full((len(records), side, side, SLOTS + 3 * LENGTH), -100, dtype=np.int64)
    for b, (record, (dx, dy)) in enumerate(zip(records, shifts, strict=True)):
        full = np.where(record < 0, -100, record)
        for i, r in enumerate(record.tolist()):
            left, top, right, bottom = r[0] + dx, r[1] + dy, r[2] + dx, r[3] + dy
            out[(b, *_patches(left, top, right, bottom, side, patch), slice(SLOTS, None))] = full[i, 4:]
            text = [c for c in r[4 : 4 + LENGTH] if c != BLANK]
            widths = [SPACE.get(ALPHABET[c], 0.69) for c in text]
            pen, scale = left, (right - left) / sum(widths)
            row = min(side - 1, max(0, (top + bottom) // 2 // patch))
            for code, width in zip(text, widths, strict=True):
                column = min(side - 1, max(0, int(pen + width * scale / 2) // patch))
                pen += width * scale
                for slot in range(SLOTS):
                    if out[b, row, column, slot] < 0:
                        out[b, row, column, slot] = code
                        break
    letters = out[..., :SLOTS]
    letters[(letters < 0) & (letters[..., :1] >= 0)] = BLANK
    return torch.from_numpy(out).flatten(1, 2)


class Cuttings:
    """Texts cut out of rendered charts, to compose pages of text, with ten times as many texts as a chart."""

    def __init__(self, images: np.ndarray, records: Sequence[np.ndarray]) -> None:
        self.pieces: list[np.ndarray] = []
        self.codes: list[np.ndarray] = []
        for image, record in zip(images, records, strict=True):
            for r in record:
                left, top, right, bottom = (int(v) for v in np.clip(r[:4], 0, image.shape[0]))
                if right - left > 4 and bottom - top > 7:
                    self.pieces.append(np.array(image[top:bottom, left:right]))
                    self.codes.append(r[4:])

    def page(self, rng: np.random.Generator, pixels: int) -> tuple[np.ndarray, np.ndarray]:
        """A page of random texts.

        Args:
            rng: random generator.
            pixels: side of the page.

        Returns:
            uint8 [pixels, pixels, 3], and its records as in `text_records`, without partners.
        """
        page = np.full((pixels, pixels, 3), 255, dtype=np.uint8)
        records = []
        top = int(rng.integers(0, 8))
        while top < pixels - 12:
            left = int(rng.integers(0, 12))
            while True:
                i = int(rng.integers(len(self.pieces)))
                height, width, _ = self.pieces[i].shape
                if left + width > pixels or top + height > pixels:
                    break
                page[top : top + height, left : left + width] = self.pieces[i]
                record = np.concatenate(([left, top, left + width, top + height], self.codes[i]))
                record[4 + LENGTH :] = -1
                records.append(record)
                left += width + int(rng.integers(2, 12))
            top += 11 + int(rng.integers(0, 5))
        return page, np.array(records, dtype=np.int16).reshape(-1, RECORD)


class ReadingHeads(nn.Module):
    """Linear heads over the tower's patches, used in pretraining only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Linear(width, (SLOTS + 3 * LENGTH) * (BLANK + 1))

    def forward(self, patches: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of letters, text, partner and series over the patches that have one.

        Args:
            patches: [B, N, width] the tower's output without prefix tokens.
            targets: [B, N, 18] from `reading_targets`.

        Returns:
            [4] losses.
        """
        chosen = (targets >= 0).any(-1)
        wanted = targets[chosen]
        logits = self.heads(self.norm(patches[chosen])).float().unflatten(-1, (SLOTS + 3 * LENGTH, BLANK + 1))
        loss = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-100, reduction="none")
        ends = (0, SLOTS, SLOTS + LENGTH, SLOTS + 2 * LENGTH, SLOTS + 3 * LENGTH)
        parts = [(loss[:, i:j].sum(), (wanted[:, i:j] >= 0).sum()) for i, j in pairwise(ends)]
        return torch.stack([total / count.clamp(min=1) for total, count in parts])
