"""Pictures of `sfa study tokens`: charts on blank paper, and cut-outs of real pages with questions about their words.

Both are 192 x 192 px, with the letters that the tower can read at its own patch size of 12 px. A chart of 144 px is at
a random place; the rest is white. A cut-out is scaled so that its words are about 13 px high, and asks

* for the word in a coloured box ("red word"), up to three of them;
* for the number in a marked row ("blue row"), where the row has one number: a bar at the left border marks it.

Answers about cut-outs are in upper case, because the nano tokenizer and its reading heads know no others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.density.real_pages import RealPage, read_part
from sfa_adapters.recipes.synthetic.charts import SIZE, draw, kinds_for
from sfa_adapters.recipes.synthetic.legible import LENGTH, RECORD, codes, text_records
from sfa_adapters.recipes.synthetic.questions import pick_questions
from sfa_adapters.recipes.synthetic.tables import Split, Table

__all__ = ["SIDE", "CutOuts", "Picture", "chart_picture", "scaled_records"]

SIDE = 192
WORD_HEIGHT = 13.0  # px of a box of `pdftotext`, which is about twice as high as its small letters
COLOURS = {"red": (220, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 230), "orange": (255, 140, 0)}
WORD, NUMBER = re.compile(r"[A-Za-z0-9]{2,5}"), re.compile(r"\d{1,4}(\.\d{1,2})?")
WORDS, ROWS = 3, 1  # questions about a cut-out, at most
FEWEST = 4  # words that fit a question; a cut-out with fewer is drawn again
TRIES = 200
MARGIN = (4, 5)  # px around a word: reading heads expect the boxes of charts, which have as many empty ones


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture.

    Attributes:
        image: uint8 `[192, 192, 3]`.
        records: Its texts as `legible.text_records` writes them, int16 `[texts, 19]`.
        questions: Pairs of question and answer.
    """

    image: np.ndarray
    records: np.ndarray
    questions: tuple[tuple[str, str], ...]


def chart_picture(table: Table, rng: np.random.Generator, means: Sequence[float] = (4.0, 0.0, 1.0)) -> Picture:
    """A chart at a random place on white paper.

    Args:
        table: What it shows.
        rng: For its kind, style, place and questions.
        means: Mean numbers of value, difference and largest questions.
    """
    kinds = kinds_for(table)
    chart = draw(table, kinds[int(rng.integers(len(kinds)))], int(rng.integers(2**31)))
    left, top = (int(v) for v in rng.integers(0, SIDE - SIZE + 1, 2))
    image = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    image[top : top + SIZE, left : left + SIZE] = chart.image
    records = text_records(table, chart.texts)
    records[:, :4] += np.array([left, top, left, top], dtype=np.int16)
    questions = tuple((question.text, question.answer) for question in pick_questions(table, means, rng))
    return Picture(image, records, questions)


class CutOuts:
    """Cut-outs of the pages of one part of the set of real pages.

    Args:
        folder: Folder of `sfa density pages`.
        part: train, val or test.

    Raises:
        DataError: There are no pages, or they were made before their words were kept.
    """

    def __init__(self, folder: Path, part: Split) -> None:
        pages = read_part(folder, part)
        if any(page.words is None for page in pages):
            raise DataError(f"{folder} has boxes without words. Make the pages again: sfa density pages --out FOLDER")
        self.pages = [page for page in pages if page.script == "latin"]

    def picture(self, rng: np.random.Generator, only: str | None = None) -> Picture:
        """A cut-out at a random place of a random page.

        Args:
            rng: Random generator.
            only: "word" or "row": questions of this kind only, and at least one.

        Raises:
            DataError: No place of 200 has the words.
        """
        for _ in range(TRIES):
            page = self.pages[int(rng.integers(len(self.pages)))]
            picture = _cut(page, rng, only)
            if picture is not None:
                return picture
        raise DataError(f"{TRIES} places of the pages have no {only or 'word'} to ask for.")


@cache
def _small(path: Path, factor: float) -> np.ndarray:
    """A page scaled down, kept in memory: decoding one takes as long as a step of training."""
    import cv2

    from sfa_adapters.images import as_image

    return cv2.resize(as_image(path), None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def _cut(page: RealPage, rng: np.random.Generator, only: str | None) -> Picture | None:
    heights = page.boxes[:, 3] - page.boxes[:, 1]
    factor = round(float(np.clip(WORD_HEIGHT / np.median(heights), 0.2, 1.0)), 3)
    small = _small(page.path, factor)
    left, top = (int(rng.integers(0, max(size - SIDE, 0) + 1)) for size in (small.shape[1], small.shape[0]))
    image = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    part = small[top : top + SIDE, left : left + SIDE]
    image[: part.shape[0], : part.shape[1]] = part
    boxes = page.boxes * factor - np.array([left, top, left, top], dtype=np.float32)
    inside = np.flatnonzero((boxes[:, :2] >= 1).all(1) & (boxes[:, 2:] <= SIDE - 1).all(1)).tolist()
    boxes, words = boxes[inside], [(page.words or ())[i] for i in inside]
    upright = [3 < b[3] - b[1] < 24 and b[2] - b[0] > 3 for b in boxes]
    asked = [i for i, word in enumerate(words) if upright[i] and WORD.fullmatch(word)]
    rows = [i for i in _single_numbers(boxes, words) if upright[i]]
    if len(asked) < FEWEST or (only == "row" and not rows):
        return None
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))]
    questions = []
    if only != "row":
        for i in rng.permutation(asked)[:WORDS]:
            questions.append((f"{colours[-1]} word", words[i].upper()))
            _frame(image, boxes[i], COLOURS[colours.pop()])
    if only != "word":
        for i in rng.permutation(rows)[:ROWS]:
            questions.append((f"{colours[-1]} row", words[i]))
            image[int(boxes[i][1]) : int(boxes[i][3]) + 1, :4] = COLOURS[colours.pop()]
    return Picture(image, _records(boxes, words), tuple(questions))


def _single_numbers(boxes: np.ndarray, words: Sequence[str]) -> list[int]:
    """Numbers that are the only text with a digit in their row, and not the only text."""
    chosen = []
    for i, word in enumerate(words):
        if not NUMBER.fullmatch(word):
            continue
        middle = (boxes[:, 1] + boxes[:, 3]) / 2
        row = np.flatnonzero((middle > boxes[i, 1]) & (middle < boxes[i, 3]))
        if len(row) > 1 and sum(any(c.isdigit() for c in words[int(j)]) for j in row) == 1:
            chosen.append(i)
    return chosen


def _frame(image: np.ndarray, box: np.ndarray, colour: tuple[int, int, int]) -> None:
    left, top = (max(int(v) - 1, 0) for v in box[:2])
    right, bottom = (min(int(v) + 2, SIDE - 1) for v in box[2:])
    for rows, columns in (
        (slice(top, top + 1), slice(left, right + 1)), (slice(bottom, bottom + 1), slice(left, right + 1)),
        (slice(top, bottom + 1), slice(left, left + 1)), (slice(top, bottom + 1), slice(right, right + 1)),
    ):  # fmt: skip
        image[rows, columns] = colour


def _records(boxes: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """Words as records of texts; a long one in pieces of `LENGTH` letters, each with its part of the box."""
    records = []
    for box, word in zip(boxes, words, strict=True):
        if not re.fullmatch(r"[A-Za-z0-9.]+", word):
            continue
        step = (box[2] - box[0]) / len(word)
        for start in range(0, len(word), LENGTH):
            piece = word[start : start + LENGTH].upper()
            left = box[0] + start * step
            edges = (left - MARGIN[0], box[1] - MARGIN[1], left + len(piece) * step + MARGIN[0], box[3] + MARGIN[1])
            records.append([*(round(float(v)) for v in edges), *codes(piece), *[-1] * (2 * LENGTH)])
    return np.array(records, dtype=np.int16).reshape(-1, RECORD)


def scaled_records(records: np.ndarray, factor: float) -> np.ndarray:
    """Records of the same texts on a picture that was made smaller by a factor."""
    scaled = records.copy()
    scaled[:, :4] = np.round(records[:, :4] * factor)
    return scaled
