"""A page with one printed table between lines of text, with the box of every number on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfa_adapters.recipes.synthetic.charts import TextBox
from sfa_adapters.recipes.synthetic.tables import Table

__all__ = ["SIZE", "TablePage", "draw_page"]

SIZE = 448
MARGIN = 20.0
ENGLISH = (
    "the", "table", "below", "lists", "what", "was", "found", "by", "place", "and", "year", "all", "numbers", "are",
    "rounded", "taken", "from", "public", "records",
)  # fmt: skip
Mark = tuple[Literal["value", "row", "series"], int, int]  # role, series, row
SHADES = ((255, 255, 255), (250, 248, 240), (243, 246, 250))


@dataclass(frozen=True, eq=False)
class TablePage:
    """One page; `image` is uint8 [448, 448, 3], `texts` are the texts of the table."""

    table: Table
    image: np.ndarray
    texts: tuple[TextBox, ...]


def draw_page(table: Table, font: Path, seed: int, words: tuple[str, ...] = ENGLISH) -> TablePage:
    """Draws a page.

    Args:
        table: The table.
        font: A font file with every letter of the table and the words.
        seed: Of sizes, colours and places.
        words: Words of the lines around the table; without numbers, so that `texts` has all numbers.

    Returns:
        The page.
    """
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (SIZE, SIZE), SHADES[int(rng.integers(len(SHADES)))])
    pen = _Pen(ImageDraw.Draw(image), font)
    body = float(rng.uniform(11, 15))
    y = pen.lines(words, MARGIN, int(rng.integers(1, 4)), body, rng)
    y = pen.table(table, y + body, float(rng.uniform(15, 22)), ruled=rng.random() < 0.6)
    pen.lines(words, y + 2 * body, int((SIZE - MARGIN - y - 3 * body) / (1.6 * body)), body, rng)
    return TablePage(table, np.asarray(image), tuple(pen.texts))


class _Pen:
    def __init__(self, draw: ImageDraw.ImageDraw, font: Path) -> None:
        self.draw, self.font = draw, font
        self.texts: list[TextBox] = []

    def lines(self, words: tuple[str, ...], y: float, count: int, size: float, rng: np.random.Generator) -> float:
        """Lines of words from `y` on; returns where they end."""
        font = ImageFont.truetype(self.font, size)
        for _ in range(max(0, count)):
            text, most = "", SIZE - 2 * MARGIN
            while font.getlength(text) < 0.85 * most:
                longer = f"{text} {words[int(rng.integers(len(words)))]}".strip()
                if font.getlength(longer) > most:
                    break
                text = longer
            self.draw.text((MARGIN, y), text, font=font, fill=(40, 40, 40))
            y += 1.6 * size
        return y

    def table(self, table: Table, y: float, size: float, ruled: bool) -> float:
        """The table from `y` on; returns where it ends."""
        font = ImageFont.truetype(self.font, size)
        columns = len(table.series)
        width, height = (SIZE - 2 * MARGIN) / (columns + 1), 1.8 * size
        self.draw.text((MARGIN, y), table.title, font=ImageFont.truetype(self.font, 0.8 * size), fill=(0, 0, 0))
        y += 1.5 * size
        self._rule(y)
        if any(table.series):
            for s, name in enumerate(table.series):
                self._cell(name, MARGIN + (s + 2) * width, y, font, ("series", s, 0))
            y += height
            self._rule(y)
        for i, name in enumerate(table.rows):
            self._cell(name, MARGIN + 0.5 * width, y, font, ("row", 0, i))
            for s in range(columns):
                self._cell(table.text(s, i), MARGIN + (s + 2) * width, y, font, ("value", s, i))
            y += height
            if ruled:
                self._rule(y)
        self._rule(y)
        return y

    def _rule(self, y: float) -> None:
        self.draw.line((MARGIN, y, SIZE - MARGIN, y), fill=(90, 90, 90))

    def _cell(self, text: str, right: float, y: float, font: ImageFont.FreeTypeFont, at: Mark) -> None:
        place = (right - 4, y + 0.4 * font.size)
        self.draw.text(place, text, font=font, fill=(0, 0, 0), anchor="ra")
        left, top, end, bottom = self.draw.textbbox(place, text, font=font, anchor="ra")
        self.texts.append(TextBox(text, *at, (left, top, end, bottom)))
