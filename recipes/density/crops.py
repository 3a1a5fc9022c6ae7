"""Crops of pages with the truth of their text density, in any size of print, turn and perspective.

The truth is drawn from word boxes, moved as the page is moved: filled, blurred and averaged as `labels.box_density`
does it. Print that is too small to see at this scale, or too large for the 95 px that the network sees, has no truth:
its cells have weight 0, and the estimator may say what it likes there. Cells without text always count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sfa_adapters.adat.labels import CELL
from sfa_adapters.recipes.density.truth import corners_of, heights_of, view_density

__all__ = ["CELLS", "Crop", "cut", "place"]

CELLS = 16  # along a side of a crop
SIDE = CELLS * CELL
SMALLEST, LARGEST = (
    5.0,
    80.0,
)  # px, height of a word box (x-height about 2.3 and 37 px) that the network is asked to see


@dataclass(frozen=True)
class Crop:
    """A crop and its truth.

    Attributes:
        picture: uint8 `[256, 256, 3]`.
        density: float32 `[16, 16]`.
        weight: How much each cell counts, in [0, 1], float32 `[16, 16]`.
    """

    picture: np.ndarray
    density: np.ndarray
    weight: np.ndarray


def place(
    rng: np.random.Generator, shape: tuple[int, int], scale: float, near: np.ndarray | None = None, side: int = SIDE
) -> np.ndarray:
    """A random view of a page: the matrix that takes its pixels to those of a crop, `[3, 3]`.

    Half of the views stand upright, a quarter are turned by 90, 180 or 270 degrees, the rest by any angle, small ones
    more often. One in five has the perspective of a camera.

    Args:
        rng: Draws it.
        shape: Height and width of the page in px.
        scale: Pixels of the crop over pixels of the page.
        near: A point (x, y) of the page that shall lie in the crop, in px; by default any part of the page.
        side: Of the crop in px.
    """
    pick = rng.random()
    if pick < 0.45:
        angle = 0.0
    elif pick < 0.7:
        angle = float(rng.integers(1, 4)) * 90.0
    else:
        angle = float(rng.normal(0, 4)) if rng.random() < 0.5 else float(rng.uniform(-180, 180))
    turn = np.deg2rad(angle)
    height, width = shape
    # The middle of the crop lies where the crop is on the page as far as it can.
    reach = min(side / scale / 2, min(shape) / 2)
    if near is None:
        x = rng.uniform(reach, max(reach, width - reach))
        y = rng.uniform(reach, max(reach, height - reach))
    else:
        x, y = near + rng.uniform(-0.4, 0.4, 2) * side / scale
    c, s = np.cos(turn) * scale, np.sin(turn) * scale
    matrix = np.array([[c, -s, side / 2 - c * x + s * y], [s, c, side / 2 - s * x - c * y], [0, 0, 1.0]])
    if rng.random() < 0.2:
        matrix = _perspective(rng, side) @ matrix
    if rng.random() < 0.25:  # mirrored print is not read, but found
        matrix = np.array([[-1, 0, side - 1], [0, 1, 0], [0, 0, 1.0]]) @ matrix
    return matrix


def _perspective(rng: np.random.Generator, side: int) -> np.ndarray:
    import cv2

    corners = np.array([[0, 0], [side, 0], [side, side], [0, side]], dtype=np.float32)
    moved = corners + rng.uniform(-0.1, 0.1, (4, 2)).astype(np.float32) * side
    return cv2.getPerspectiveTransform(corners, moved)


def cut(
    levels: Sequence[np.ndarray], boxes: np.ndarray, matrix: np.ndarray, outside: tuple[int, ...] | None = None
) -> Crop:
    """Cuts a crop out of a page, and draws its truth.

    Args:
        levels: The page and its halvings, uint8 `[H, W, 3]`; the one nearest above the size of the crop is read.
        boxes: Left, top, right, bottom of each word in px of the page, `[words, 4]`.
        matrix: From pixels of the page to those of the crop, as `place` gives it.
        outside: Colour around the page; by default its border is repeated.
    """
    import cv2

    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    number = min(len(levels) - 1, max(0, int(np.floor(-np.log2(scale) + 0.25)))) if scale < 1 else 0
    half = np.array([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]])
    there = matrix @ np.linalg.inv(np.linalg.matrix_power(half, number))
    border = cv2.BORDER_REPLICATE if outside is None else cv2.BORDER_CONSTANT
    method = cv2.INTER_CUBIC if scale > 1.3 else cv2.INTER_LINEAR
    picture = cv2.warpPerspective(
        levels[number], there, (SIDE, SIDE), flags=method, borderMode=border, borderValue=outside or (0, 0, 0)
    )
    corners = corners_of(boxes, matrix)
    heights = heights_of(corners)
    seen = (heights >= SMALLEST) & (heights <= LARGEST)
    density = view_density(corners, (CELLS, CELLS), around=1)
    unseen = view_density(corners[~seen], (CELLS, CELLS), around=1)
    return Crop(picture, density, np.clip(1 - 3 * unseen, 0, 1))
