"""Rendered document pages with the box of every printed word: text in columns, tables, charts, mixtures, blanks.

Words are random (syllables, numbers), in the fonts of matplotlib. A page of the training split and one of the
test split share no font face, no photograph and no table. Every page is a pure function of (kind, split, seed).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from sfa_adapters.adat.labels import box_density
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic.charts import draw, kinds_for
from sfa_adapters.recipes.synthetic.plots import plot
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.recipes.synthetic.scans import Colour, Rect, artefacts, blank_paper, line_art, photograph
from sfa_adapters.recipes.synthetic.sheet import SIZE, Sheet, line, paragraphs, size_of, table
from sfa_adapters.recipes.synthetic.tables import SPLITS, Split

__all__ = ["KINDS", "SIZE", "Page", "PageKind", "box_density", "mixture", "render_page", "text_page"]

PageKind = Literal["text", "table", "chart", "mixed", "blank", "sparse", "lines", "photo"]
KINDS: tuple[PageKind, ...] = get_args(PageKind)
# Share of each kind in `mixture`: more than half have text, and every kind of page without text is included.
SHARES = {
    "text": 0.22, "table": 0.14, "chart": 0.2, "mixed": 0.16, "blank": 0.06, "sparse": 0.06, "lines": 0.06, "photo": 0.1
}  # fmt: skip


@dataclass(frozen=True)
class Page:
    """One rendered page.

    Attributes:
        image: uint8 `[SIZE, SIZE, 3]`.
        boxes: float32 `[words, 4]`, left, top, right, bottom of every printed word, px; from ascender to descender.
        x_heights: float32 `[words]`, height of a small x, px.
        kind: kind of page.
    """

    image: np.ndarray
    boxes: np.ndarray
    x_heights: np.ndarray
    kind: PageKind


def _chart(sheet: Sheet, rect: Rect) -> None:
    """Draws a matplotlib figure, or pastes small charts of `charts.py` at their size or enlarged."""
    rng, (left, top, right, bottom) = sheet.rng, rect
    if rng.random() < 0.5 and min(right - left, bottom - top) >= 120:
        picture, boxes, x_heights = plot(rng, round(right - left), round(bottom - top))
        sheet.paste(picture, rect)
        offset = np.array([left, top, left, top])
        sheet.words += [(*(box + offset), size) for box, size in zip(boxes, x_heights, strict=True)]
        return
    tables = load_tables(sheet.split)
    side = 144 * float(rng.choice([1.0, 1.0, 1.5, 2.0, 3.0]))
    side = min(side, right - left, bottom - top)
    for y in np.arange(top, bottom - side + 1, side + 6):
        for x in np.arange(left, right - side + 1, side + 6):
            table = tables[int(rng.integers(len(tables)))]
            kinds = kinds_for(table)
            chart = draw(table, kinds[int(rng.integers(len(kinds)))], int(rng.integers(2**31)))
            sheet.paste(chart.image, (x, y, x + side, y + side))
            k = side / 144
            sheet.words += [(*(np.array(t.box) * k + (x, y, x, y)), 4.9 * k) for t in chart.texts]


def _picture(sheet: Sheet, rect: Rect) -> None:
    left, top, right, bottom = rect
    sheet.paste(photograph(sheet.rng, sheet.split, round(bottom - top), round(right - left)), rect)


def _drawing(sheet: Sheet, rect: Rect) -> None:
    left, top, right, bottom = rect
    sheet.paste(line_art(sheet.rng, round(bottom - top), round(right - left), sheet.paper, sheet.ink), rect)


def _nothing(sheet: Sheet, rect: Rect) -> None:
    del sheet, rect


def _mixed(sheet: Sheet, rect: Rect, depth: int = 0) -> None:
    """Splits the page recursively, and fills each part with a random kind of block."""
    rng, (left, top, right, bottom) = sheet.rng, rect
    width, height = right - left, bottom - top
    if depth < 1 or (depth < 4 and max(width, height) > 130 and rng.random() < 0.75):
        cut, gap = float(rng.uniform(0.35, 0.65)), float(rng.uniform(6, 16))
        if width > height:
            middle = left + cut * width
            parts = ((left, top, middle - gap / 2, bottom), (middle + gap / 2, top, right, bottom))
        else:
            middle = top + cut * height
            parts = ((left, top, right, middle - gap / 2), (left, middle + gap / 2, right, bottom))
        for part in parts:
            _mixed(sheet, part, depth + 1)
        return
    blocks: list[Callable[[Sheet, Rect], None]] = [paragraphs, table, _chart, _picture, _drawing, _nothing]
    blocks[int(rng.choice(len(blocks), p=[0.36, 0.16, 0.14, 0.14, 0.1, 0.1]))](sheet, rect)


def _columns(sheet: Sheet, rect: Rect) -> None:
    rng, (left, top, right, bottom) = sheet.rng, rect
    count, gap = int(rng.choice([1, 1, 2, 2, 3])), float(rng.uniform(10, 24))
    width = (right - left - gap * (count - 1)) / count
    size = size_of(rng, 3.0, 6.5 if count == 3 else 10 if count == 2 else 16) if rng.random() < 0.6 else None
    for c in range(count):
        x = left + c * (width + gap)
        end = bottom if rng.random() < 0.7 else top + (bottom - top) * float(rng.uniform(0.2, 1))
        paragraphs(sheet, (x, top, x + width, end), size)


def _sparse(sheet: Sheet, rect: Rect) -> None:
    """Writes one to three page numbers or single lines."""
    rng, (left, top, right, bottom) = sheet.rng, rect
    for _ in range(int(rng.integers(1, 4))):
        face, size = sheet.face(), size_of(rng, 5, 16)
        y, x = float(rng.uniform(top + size * 2, bottom - size)), float(rng.uniform(left, right - size * 8))
        if rng.random() < 0.5:
            sheet.write(str(rng.integers(1000)), x, y, face, size)
        else:
            line(sheet, (x, right), y, face, size)


DRAWERS: dict[PageKind, Callable[[Sheet, Rect], None]] = {
    "text": _columns, "table": table, "chart": _chart, "mixed": _mixed, "blank": _nothing, "sparse": _sparse,
    "lines": _drawing, "photo": _picture,
}  # fmt: skip


def _colours(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Paper and ink: mostly dark on light, sometimes coloured or reversed, always at least 70 gray levels apart."""
    if rng.random() < 0.45:
        return (255, 255, 255), tuple(int(v) for v in rng.integers(0, 60, 3))
    while True:
        paper = tuple(int(v) for v in np.clip(rng.uniform(185, 255) + rng.normal(0, 9, 3), 0, 255))
        ink = tuple(int(v) for v in np.clip(rng.uniform(0, 130) + rng.normal(0, 25, 3), 0, 255))
        if abs(np.dot(paper, (0.3, 0.59, 0.11)) - np.dot(ink, (0.3, 0.59, 0.11))) >= 70:
            return (ink, paper) if rng.random() < 0.15 else (paper, ink)


def render_page(kind: PageKind, seed: int, split: Split = "train") -> Page:
    """Draws one page.

    Args:
        kind: kind of page: "sparse" is nearly blank, "lines" has drawings, grids and hatching without text, "photo" is
            a photograph, sometimes with a caption in it.
        seed: of everything random.
        split: of its fonts, photographs and tables.

    Returns:
        The page, 448 x 448.

    Raises:
        DataError: unknown kind or split.
    """
    if kind not in KINDS or split not in SPLITS:
        raise DataError(
            f"No page kind {kind!r} of split {split!r}. Kinds: {', '.join(KINDS)}; splits: {', '.join(SPLITS)}."
        )
    rng = np.random.default_rng((KINDS.index(kind), SPLITS.index(split), seed))
    tall = float(rng.choice([1.0, 1.0, 1.5, 2.0]))
    wide = tall * float(rng.uniform(0.8, 1.25) if rng.random() < 0.3 else 1.0)
    sheet = Sheet(rng, split, (wide, tall), _colours(rng))
    if kind in ("blank", "sparse"):
        sheet.image.paste(Image.fromarray(blank_paper(rng, sheet.image.height, sheet.image.width, sheet.paper)))
    margin = 0.0 if kind == "photo" else float(rng.uniform(4, 40))
    DRAWERS[kind](sheet, (margin, margin, SIZE - margin, SIZE - margin))
    if kind == "photo" and rng.random() < 0.2:
        dark = np.asarray(sheet.image.convert("L")).mean() < 128
        sheet.ink = (255, 255, 255) if dark else (0, 0, 0)
        _sparse(sheet, (10, 10, SIZE - 10, SIZE - 10))
    return _finish(sheet, kind, strength=float(rng.choice([0.0, 0.5, 1.0], p=[0.4, 0.3, 0.3])))


def text_page(x_height: float, seed: int, split: Split = "test", strength: float = 0.0) -> Page:
    """A page of text of one size, to measure density estimates at that size.

    Args:
        x_height: height of a small x, px.
        seed: of everything random.
        split: of its fonts.
        strength: of the artefacts of a scan, 0 for none.

    Returns:
        The page, 448 x 448.
    """
    sheet = Sheet(
        np.random.default_rng((99, SPLITS.index(split), seed)), split, (1.0, 1.0), ((255, 255, 255), (20, 20, 20))
    )
    paragraphs(sheet, (16, 16, SIZE - 16, SIZE - 16), x_height)
    return _finish(sheet, "text", strength)


def _finish(sheet: Sheet, kind: PageKind, strength: float) -> Page:
    image = sheet.image
    if image.size != (SIZE, SIZE):
        image = image.resize(
            (SIZE, SIZE), Image.Resampling.BOX if sheet.rng.random() < 0.3 else Image.Resampling.BICUBIC
        )
    words = np.array(sheet.words, dtype=np.float32).reshape(-1, 5)
    picture, boxes = artefacts(sheet.rng, np.asarray(image), words[:, :4], sheet.paper, strength)
    boxes = boxes.clip(0, SIZE).astype(np.float32)
    seen = ((boxes[:, 2:] - boxes[:, :2]) > 0.5).all(axis=1)
    return Page(picture, boxes[seen], words[seen, 4], kind)


def mixture(index: int, split: Split = "train") -> Page:
    """Page number `index` of an endless mixture of all kinds, with the shares of `SHARES`."""
    rng = np.random.default_rng((SPLITS.index(split), index, 7))
    kind = KINDS[int(rng.choice(len(KINDS), p=[SHARES[k] for k in KINDS]))]
    return render_page(kind, index, split)
