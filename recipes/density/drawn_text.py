"""Lines of random words in any font and size, with the box of each word: big print, handwriting-like fonts, scripts.

Real pages are mostly printed in a few sizes of a few fonts. These crops have x-heights of 3 to 60 px, in fonts that
imitate handwriting as well, every line a little turned and shifted.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_lines", "letters_of"]

BLOCKS = (
    (0x61, 0x7B),
    (0x3B1, 0x3CA),
    (0x430, 0x450),
    (0x627, 0x64B),
    (0x4E00, 0x9FA5),
    (0x3041, 0x3097),
    (0xAC00, 0xD7A4),
)
MOST = 400  # letters that are tried of a block; Han and Hangul have thousands


@lru_cache(maxsize=16)  # an open font of Han or Hangul letters takes megabytes
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


@cache
def letters_of(path: Path) -> tuple[str, ...]:
    """The letters that a font has, one string per script of which it has most; empty for a font of symbols."""
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(path))
    scripts = []
    for first, stop in BLOCKS:
        step = max(1, (stop - first) // MOST)
        codes = range(first, stop, step)
        present = "".join(chr(code) for code in codes if font.get_char_index(code))
        if len(present) >= 0.8 * len(codes):
            scripts.append(present)
    return tuple(scripts)


def _word(rng: np.random.Generator, letters: str, digits: bool) -> str:
    dense = ord(letters[0]) >= 0x3041  # Han, kana, Hangul: short words
    if digits and rng.random() < 0.2:
        return f"{rng.integers(10 ** int(rng.integers(1, 6)))}"
    count = int(rng.integers(1, 5)) if dense else int(rng.integers(2, 10))
    text = "".join(letters[int(i)] for i in rng.integers(0, len(letters), count))
    return text.capitalize() if rng.random() < 0.2 else text


def draw_lines(
    picture: np.ndarray, rng: np.random.Generator, font: Path, x_height: float, ink: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Writes lines of random words over a picture.

    Args:
        picture: uint8 `[H, W, 3]`.
        rng: Draws words and places.
        font: A font file with letters; see `letters_of`.
        x_height: Height of a small x in px, about: half of the size of the font.
        ink: Colour of the letters.

    Returns:
        The picture, and left, top, right, bottom of each word in px, `[words, 4]`.
    """
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    scripts = letters_of(font)
    letters = scripts[int(rng.integers(len(scripts)))]
    digits = ord(letters[0]) < 0x600  # some Arabic fonts have no Latin digits
    face = _font(font, max(4, round(x_height / 0.48)))
    ascent, descent = face.getmetrics()
    leading = (ascent + descent) * float(rng.uniform(0.9, 1.7))
    boxes = []
    y = float(rng.uniform(-0.5, 1)) * leading
    left, right = sorted(rng.uniform(-0.1, 1.1, 2) * image.width)
    if right - left < 6 * x_height:
        left, right = 0, image.width
    while y < image.height:
        x, end = left, right if rng.random() < 0.8 else rng.uniform(left, right)
        while x < end:
            word = _word(rng, letters, digits)
            rise = float(rng.normal(0, 0.04)) * x_height
            box = draw.textbbox((x, y + rise), word, font=face)
            draw.text((x, y + rise), word, font=face, fill=ink)
            # The extent of the font, as a PDF's text layer has it, not only of these letters.
            boxes.append((box[0], min(box[1], y + 0.2 * ascent), box[2], max(box[3], y + ascent + 0.6 * descent)))
            x = box[2] + x_height * float(rng.uniform(0.4, 1.2))
        y += leading
        if rng.random() < 0.15:
            y += leading * float(rng.uniform(0.5, 3))
    return np.asarray(image), np.array(boxes, dtype=np.float32).reshape(-1, 4)
