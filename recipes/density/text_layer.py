"""The text layer of a PDF page: the box of each word, the script, and a rule that says whether it can be believed.

`pdftotext -bbox` gives the boxes. A layer lies when it claims words that are not printed (white or hidden text), when
it lacks words that are printed (a scan, letters drawn as outlines), or when its boxes are not where the letters are.
The rule, of which every number is fixed in this file:

1. The page and its picture have the same shape, within 1%.
2. The words have at least 60 characters.
3. At most 3% of the words are invisible: the gray levels in their box span less than 40 levels of 255.
4. At most 10% of the area in which the detector of an OCR engine sees text lies outside all words. Boxes of words are
   first grown by half of their height, because the detector's boxes are wider than words.
5. At most 20% of the words of two or more letters or digits have a box that is more than four times as high as the ink
   in it, or that reaches over the border.

The OCR engine is asked because it is neither the estimator nor the edge labels, which are measured on these pages.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from html import unescape

import numpy as np

from sfa_adapters.adat.labels import filled

__all__ = ["SCRIPTS", "TextLayer", "layer_fault", "read_layers", "script_of"]

SCRIPTS = ("latin", "greek", "cyrillic", "arabic", "hebrew", "chinese", "japanese", "korean", "other")
FEWEST, INVISIBLE, UNLISTED, MISPLACED = 60, 0.03, 0.10, 0.20
SPAN = 40  # gray levels between the darkest and the lightest 2% of the pixels in a visible word
TALL = 4.0  # a box this many times as high as its ink is not where the letters are
SHAPE = 0.01
# Letters by the first word of their Unicode name; kana and Han are told apart below.
FIRST = {
    "LATIN": "latin", "GREEK": "greek", "CYRILLIC": "cyrillic", "ARABIC": "arabic", "HEBREW": "hebrew",
    "CJK": "chinese", "HIRAGANA": "japanese", "KATAKANA": "japanese", "HANGUL": "korean",
}  # fmt: skip
PAGE = re.compile(r'<page width="([\d.]+)" height="([\d.]+)">(.*?)</page>', re.DOTALL)
WORD = re.compile(r'<word xMin="([-\d.]+)" yMin="([-\d.]+)" xMax="([-\d.]+)" yMax="([-\d.]+)">(.*?)</word>', re.DOTALL)


@dataclass(frozen=True)
class TextLayer:
    """The words of one page.

    Attributes:
        size: Width and height of the page in points.
        boxes: Left, top, right, bottom of each word in points, `[words, 4]`.
        words: Their texts.
    """

    size: tuple[float, float]
    boxes: np.ndarray
    words: tuple[str, ...]


def read_layers(xhtml: str) -> list[TextLayer]:
    """Reads what `pdftotext -bbox` prints: one text layer per page.

    Args:
        xhtml: The output of the program. It is not well-formed XML where a font has odd names for its letters, and so
            is searched, not parsed.
    """
    layers = []
    for width, height, content in PAGE.findall(xhtml):
        matches: list[tuple[str, ...]] = WORD.findall(content)
        words = [unescape(match[4]).strip() for match in matches]
        boxes = np.array([match[:4] for match in matches], dtype=np.float64).reshape(-1, 4)
        kept = (
            (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & np.array([bool(w) for w in words], dtype=bool)
        )
        texts = tuple(word for word, keep in zip(words, kept, strict=True) if keep)
        layers.append(TextLayer((float(width), float(height)), boxes[kept], texts))
    return layers


@cache
def _script_of_letter(letter: str) -> str | None:
    if not letter.isalpha():
        return None
    name = unicodedata.name(letter, "").partition(" ")[0]
    return FIRST.get(name.partition("-")[0], "other")


def script_of(words: tuple[str, ...]) -> str:
    """The script of a page: the most frequent one other than Latin with at least 30% of the letters, else Latin.

    A manual has Latin names and commands in every language. Han letters count as Japanese where kana are at least a
    twentieth of both.
    """
    counts = Counter(script for word in words for letter in word if (script := _script_of_letter(letter)))
    total = sum(counts.values())
    if counts["japanese"] * 20 >= counts["japanese"] + counts["chinese"] > 0:
        counts["japanese"] += counts.pop("chinese", 0)
    others = [(number, script) for script, number in counts.items() if script != "latin" and number >= 0.3 * total > 0]
    return max(others)[1] if others else "latin"


def layer_fault(picture: np.ndarray, layer: TextLayer, text_areas: np.ndarray) -> str | None:
    """Why the text layer of a page cannot be believed, or None where it can.

    Args:
        picture: The rendered page, uint8 `[H, W, 3]`.
        layer: Its text layer.
        text_areas: Boxes in which an OCR engine's detector sees text, in px, `[n, 4]`.

    Returns:
        The broken part of the rule, in a few words.
    """
    height, width = picture.shape[:2]
    if abs(width / height * layer.size[1] / layer.size[0] - 1) > SHAPE:
        return "another shape than its picture"
    if sum(map(len, layer.words)) < FEWEST:
        return f"fewer than {FEWEST} characters"
    scale = np.tile((width / layer.size[0], height / layer.size[1]), 2)
    boxes = layer.boxes * scale
    gray = picture.mean(axis=2)
    inks = [_ink(gray, box) for box in boxes]
    if np.mean([ink is None for ink in inks]) > INVISIBLE:
        return "invisible words"
    outside = ((boxes < -1) | (boxes > np.tile((width, height), 2) + 1)).any(axis=1)
    # A dash or a full stop is flat in every font.
    judged = [sum(map(str.isalnum, word)) > 1 for word in layer.words]
    wrong = outside | np.array([ink is not None and ink * TALL < 1 for ink in inks], dtype=bool)
    if any(judged) and np.mean(wrong[judged]) > MISPLACED:
        return "boxes that are not where the letters are"
    if _unlisted(text_areas, boxes, (height, width)) > UNLISTED:
        return "printed words that are not in it"
    return None


def _ink(gray: np.ndarray, box: np.ndarray) -> float | None:
    """Share of the height of a box between its first and last row with ink; None where nothing is visible in it."""
    left, top = np.maximum(np.floor(box[:2]).astype(int), 0)
    right, bottom = np.ceil(box[2:]).astype(int)
    part = gray[top:bottom, left:right]
    if part.size == 0:
        return None
    low, high = np.quantile(part, (0.02, 0.98))
    if high - low < SPAN:
        return None
    paper = np.median(part)
    rows = np.flatnonzero((np.abs(part - paper) > (high - low) / 3).any(axis=1))
    return (rows[-1] - rows[0] + 1) / len(part) if len(rows) else None


def _unlisted(areas: np.ndarray, boxes: np.ndarray, shape: tuple[int, int]) -> float:
    """Share of the areas, by size, that lies outside all boxes grown by half of their height."""
    if len(areas) == 0:
        return 0.0
    more = 0.5 * np.minimum(boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0])[:, None]
    listed = filled(np.round(np.concatenate([boxes[:, :2] - more, boxes[:, 2:] + more], axis=1)).astype(int), shape)
    seen = filled(np.round(areas).astype(int), shape)
    return float((seen & ~listed).sum() / max(seen.sum(), 1))
