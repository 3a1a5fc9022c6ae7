"""`Sheet`: a page to draw on, with random words in the fonts of matplotlib and the box of every word."""

from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfa_adapters.recipes.synthetic.scans import Colour, Rect
from sfa_adapters.recipes.synthetic.tables import Split

__all__ = ["SIZE", "Sheet", "line", "paragraphs", "size_of", "table"]

SIZE = 448
FACES: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
        "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBolIta", "cmr10", "cmb10", "cmtt10",
    ),
    "test": ("STIXGeneralItalic", "STIXGeneralBol", "cmss10", "cmti10", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique"),
}  # fmt: skip
FACES["val"] = FACES["train"]
# Syllables of three alphabets; the cm fonts hold Latin letters only.
LETTERS = (("bcdfghklmnprstvw", "aeiou"), ("бвгдзклмнпрстшж", "аеиоуя"), ("βγδζθκλμνπρστφ", "αεηιου"))


@lru_cache(maxsize=256)  # sizes are any tenth of a pixel: a long run would keep thousands of open fonts
def font_of(face: str, pixels: float) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)


@cache
def x_height_of(face: str) -> float:
    """Height of an x over the size of the font."""
    _, top, _, bottom = font_of(face, 200).getbbox("x", anchor="ls")
    return (bottom - top) / 200


class Sheet:
    """A page to draw on. Places are in px of the finished page; it may be drawn larger and then resized."""

    def __init__(
        self, rng: np.random.Generator, split: Split, scale: tuple[float, float], colours: tuple[Colour, Colour]
    ) -> None:
        self.rng, self.scale = rng, scale
        self.split: Split = split
        self.paper, self.ink = colours
        self.image = Image.new("RGB", (round(SIZE * scale[0]), round(SIZE * scale[1])), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.words: list[tuple[float, float, float, float, float]] = []
        self.alphabet = LETTERS[0] if rng.random() < 0.8 else LETTERS[int(rng.integers(1, 3))]

    def face(self) -> str:
        """A font face of the split."""
        faces = FACES[self.split]
        return faces[int(self.rng.integers(len(faces)))]

    def rectangle(self, rect: Rect, fill: Colour | None = None, outline: Colour | None = None, width: int = 1) -> None:
        """Fills or outlines a rectangle."""
        (a, b), (left, top, right, bottom) = self.scale, rect
        self.draw.rectangle(
            (left * a, top * b, max(right * a, left * a), max(bottom * b, top * b)), fill, outline, width
        )

    def paste(self, picture: np.ndarray, rect: Rect) -> None:
        """Pastes a picture, uint8 `[H, W, 3]`, into a rectangle."""
        (a, b), (left, top, right, bottom) = self.scale, rect
        size = max(1, round((right - left) * a)), max(1, round((bottom - top) * b))
        self.image.paste(
            Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), (round(left * a), round(top * b))
        )

    def letters(self, face: str) -> tuple[str, str]:
        """Consonants and vowels that a face has."""
        return LETTERS[0] if face.startswith("cm") else self.alphabet

    def write(self, text: str, x: float, y: float, face: str, x_height: float, ink: Colour | None = None) -> float:
        """Writes one word with its baseline at (x, y), records its box, and returns its width."""
        a, b = self.scale
        font = font_of(face, round(x_height / x_height_of(face) * b, 1))
        _, top, _, bottom = font.getbbox("Hg", anchor="ls")
        left, _, right, _ = font.getbbox(text, anchor="ls")
        self.draw.text((x * a, y * b), text, font=font, fill=ink or self.ink, anchor="ls")
        self.words.append((x + left / a, y + top / b, x + right / a, y + bottom / b, x_height))
        return font.getlength(text) / a


def word_of(rng: np.random.Generator, letters: tuple[str, str]) -> str:
    pick = rng.random()
    if pick < 0.15:
        number = f"{rng.integers(10 ** int(rng.integers(1, 6))):,}" if pick < 0.08 else f"{rng.uniform(0, 100):.1f}"
        return number + ("%" if pick < 0.03 else "")
    text = ""
    for _ in range(int(rng.choice([1, 2, 2, 3, 3, 4]))):
        text += letters[0][int(rng.integers(len(letters[0])))] + letters[1][int(rng.integers(len(letters[1])))]
        if rng.random() < 0.3:
            text += letters[0][int(rng.integers(len(letters[0])))]
    text = text.capitalize() if pick > 0.85 else text.upper() if pick > 0.82 else text
    return text + ("," if pick < 0.22 else "." if pick < 0.28 else "")


def size_of(rng: np.random.Generator, low: float = 3.5, high: float = 14.0) -> float:
    """A random x-height in px, log-uniform."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def paragraphs(sheet: Sheet, rect: Rect, x_height: float | None = None) -> None:
    """Writes text from top to bottom, flush left or justified, with headings and gaps between paragraphs."""
    rng, (left, top, right, bottom) = sheet.rng, rect
    body, face = x_height or size_of(rng), sheet.face()
    leading, justified = float(rng.uniform(2.3, 3.3)), rng.random() < 0.5
    y = top
    while True:
        heading = x_height is None and rng.random() < 0.12
        size, style = (body * float(rng.uniform(1.3, 2.5)), sheet.face()) if heading else (body, face)
        for _ in range(1 if heading else int(rng.integers(2, 9))):
            y += size * leading
            if y + size * 0.6 > bottom:
                return
            line(sheet, (left, right), y, style, size, justified and not heading)
        y += body * leading * float(rng.uniform(0.2, 1.0))


def line(sheet: Sheet, span: tuple[float, float], y: float, face: str, size: float, justified: bool = False) -> None:
    """Writes one line of words with its baseline at `y`, as many as fit."""
    font = font_of(face, round(size / x_height_of(face) * sheet.scale[1], 1))
    space, room = size * 0.6, (span[1] - span[0]) * float(sheet.rng.uniform(0.3, 1) if not justified else 1)
    words, used = [], 0.0
    for _ in range(60):
        word = word_of(sheet.rng, sheet.letters(face))
        width = font.getlength(word) / sheet.scale[0]
        if used + width > room:
            break
        words.append(word)
        used += width + space
    spread = (span[1] - span[0] - used + space) / (len(words) - 1) if justified and len(words) > 3 else 0.0
    x = span[0]
    for word in words:
        x += sheet.write(word, x, y, face, size) + space + max(0.0, spread)


def table(sheet: Sheet, rect: Rect) -> None:
    """Draws a table of names and numbers, with or without rules, stripes and empty cells."""
    rng, (left, top, right, bottom) = sheet.rng, rect
    size, face = size_of(rng, 3.5, 9), sheet.face()
    height = size * float(rng.uniform(2.4, 5))
    rows = max(1, min(int((bottom - top) / height), int(rng.integers(3, 40))))
    columns = max(1, min(int((right - left) / (size * 9)), int(rng.integers(2, 9))))
    width = (right - left) / columns
    rules = str(rng.choice(["none", "rows", "grid", "head"]))
    grey = tuple(int(0.5 * p + 0.5 * i) for p, i in zip(sheet.paper, sheet.ink, strict=True))
    shade = tuple(int(0.88 * p + 0.12 * i) for p, i in zip(sheet.paper, sheet.ink, strict=True))
    striped = rng.random() < 0.25
    for r in range(rows + 1):
        y = top + r * height
        if striped and r % 2 == 0 and r < rows:
            sheet.rectangle((left, y, right, y + height), fill=shade)
        if rules in ("rows", "grid") or (rules == "head" and r in (0, 1, rows)):
            sheet.rectangle((left, y, right, y), fill=grey)
    if rules == "grid":
        for c in range(columns + 1):
            sheet.rectangle((left + c * width, top, left + c * width, top + rows * height), fill=grey)
    empty = float(rng.uniform(0, 0.4))
    for r in range(rows):
        for c in range(columns):
            if rng.random() > empty or r == 0:
                number = c > 0 and r > 0 and rng.random() < 0.8
                text = (
                    f"{rng.uniform(0, 10 ** rng.integers(1, 5)):,.1f}" if number else word_of(rng, sheet.letters(face))
                )
                length = (
                    font_of(face, round(size / x_height_of(face) * sheet.scale[1], 1)).getlength(text) / sheet.scale[0]
                )
                if length < width - size:
                    x = left + (c + 1) * width - length - size / 2 if number else left + c * width + size / 2
                    sheet.write(text, x, top + r * height + height / 2 + size * 0.6, face, size)
