"""Views of a page for measuring: turned, coloured, faint, scanned, photographed, in other sizes, with their truth.

Every view is a pure function of the page and its number, so that all scorers see the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sfa_adapters.adat.labels import CELL
from sfa_adapters.images import as_image
from sfa_adapters.recipes.density.degrade import faded, jpeg, noisy, photographed, recoloured, shaded
from sfa_adapters.recipes.density.real_pages import LARGE, RealPage
from sfa_adapters.recipes.density.truth import corners_of, view_density

__all__ = ["VIEWS", "View", "effect_of", "view_of"]

SIDE = 896  # px of the longer side, as `sfa density map` shows a page to the estimator
Effect = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class View:
    """One view of a page, with its truth.

    Attributes:
        picture: uint8 `[H, W, 3]`, whole cells of 16 px.
        density: True density, float32 `[H / 16, W / 16]`.
        middles: Row and column, in cells, of the middle of each word with a letter or a digit, `[words, 2]`.
        coarse: How many cells along a side become one before densities are compared: 1 up to 896 px, 2 and more for
            scans, so that all views are compared in parts of the page of about one size.
    """

    picture: np.ndarray
    density: np.ndarray
    middles: np.ndarray
    coarse: int = 1


@dataclass(frozen=True)
class Shape:
    """How a view is cut.

    Attributes:
        angle: Turn in degrees.
        height: Height of the typical word box in px; by default the whole page is shown, `longer` px long.
        longer: Longer side in px.
        bent: Perspective of a camera.
        sharp: From the page at 600 dpi, where it has one.
    """

    angle: float = 0.0
    height: float | None = None
    longer: int = SIDE
    bent: bool = False
    sharp: bool = False


def _scanned(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return noisy(shaded(picture, rng, 0.15), rng, 3, coloured=False)


EFFECTS: dict[str, Effect] = {
    "as it is": lambda p, r: p,
    "red on yellow": lambda p, r: recoloured(p, (200, 0, 0), (255, 235, 60)),
    "gray 200 on 255": lambda p, r: recoloured(p, (200, 200, 200), (255, 255, 255)),
    "dark mode": lambda p, r: recoloured(p, (230, 230, 230), (24, 24, 28)),
    "JPEG, quality 25": lambda p, r: jpeg(p, 25),
    "noise, sigma 15": lambda p, r: noisy(p, r, 15.0),
    "shadow": lambda p, r: shaded(p, r, 0.6),
    "low contrast": lambda p, r: faded(p, 0.4, 10.0),
    "photograph": photographed,
    "scan": _scanned,
}
# Name of the view: its cut, and what happens to it.
VIEWS: dict[str, tuple[Shape, str]] = {
    "upright": (Shape(), "as it is"),
    **{f"turned by {a}": (Shape(angle=a), "as it is") for a in (90, 180, 270, 5, 30)},
    **{name: (Shape(), name) for name in EFFECTS if name not in ("as it is", "photograph", "scan")},
    "photograph": (Shape(angle=3, bent=True), "photograph"),
    "scan, 300 dpi": (Shape(longer=3508, sharp=True), "scan"),
    "scan, 400 dpi": (Shape(longer=4677, sharp=True), "scan"),
    "scan, 600 dpi": (Shape(longer=7016, sharp=True), "scan"),
    "page of 8,000 px": (Shape(longer=8000, sharp=True), "as it is"),
    "x-height 3 px": (Shape(height=7.0), "as it is"),
    "x-height 40 px": (Shape(height=95.0, sharp=True), "as it is"),
    "x-height 80 px": (Shape(height=190.0, sharp=True), "as it is"),
}


def effect_of(name: str) -> Effect:
    """An effect by its name."""
    return EFFECTS[name]


def view_of(page: RealPage, name: str, number: int) -> View | None:
    """A view of a page; None where the view needs the page at 600 dpi and it has none.

    Args:
        page: The page.
        name: A key of `VIEWS`.
        number: Of the page: chooses shadows, noise and the part that is shown.
    """
    shape, effect = VIEWS[name]
    rng = np.random.default_rng((number, list(VIEWS).index(name)))
    path, boxes = page.path, page.boxes
    if shape.sharp:
        path = path.with_name(path.name.removesuffix(".png") + LARGE)
        if not path.is_file():
            return None
    picture = as_image(path)
    boxes = boxes * (max(picture.shape[:2]) / max(page.size))
    matrix, (height, width) = _matrix(shape, picture.shape[:2], boxes, rng)
    seen = _warped(picture, matrix, (height, width))
    corners = corners_of(boxes, matrix)
    grid = (height // CELL, width // CELL)
    middles = corners[page.readable].mean(axis=1)[:, ::-1] / CELL
    coarse = max(1, round(shape.longer / SIDE))
    return View(EFFECTS[effect](seen, rng), view_density(corners, grid), middles, coarse)


def _matrix(
    shape: Shape, size: tuple[int, ...], boxes: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[int, int]]:
    """From pixels of the page to those of the view, and height and width of the view in whole cells."""
    import cv2

    height, width = size[:2]
    if shape.height is None:
        scale = shape.longer / max(height, width)
    else:
        scale = shape.height / float(np.median(np.minimum(boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0])))
    turn = np.deg2rad(shape.angle)
    c, s = abs(np.cos(turn)), abs(np.sin(turn))
    wanted = np.array((height * c + width * s, height * s + width * c)) * scale
    if shape.height is not None:
        wanted = np.minimum(wanted, SIDE)
    rows, columns = (max(1, round(float(side) / CELL)) * CELL for side in wanted)
    middle = np.array([width / 2, height / 2])
    if shape.height is not None:  # a part of the page around one of its words
        box = boxes[int(rng.integers(len(boxes)))]
        reach = np.minimum(np.array([columns, rows]) / scale / 2, middle)
        middle = np.clip((box[:2] + box[2:]) / 2, reach, np.array([width, height]) - reach)
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    linear = np.array([[cos, -sin], [sin, cos]])
    shift = np.array([columns / 2, rows / 2]) - linear @ middle
    matrix = np.array([[*linear[0], shift[0]], [*linear[1], shift[1]], [0, 0, 1.0]])
    if shape.bent:
        flat = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], dtype=np.float32)
        moved = flat + rng.uniform(-0.06, 0.06, (4, 2)).astype(np.float32) * np.array([columns, rows], np.float32)
        matrix = cv2.getPerspectiveTransform(flat, moved) @ matrix
    return matrix, (rows, columns)


def _warped(picture: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The view of a picture; what is made smaller is averaged first, so that thin strokes stay."""
    import cv2

    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    if scale < 1:  # exact areas, to the size of the view; the rest of the matrix turns and bends
        height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
        smaller = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        back = np.diag([picture.shape[1] / width, picture.shape[0] / height, 1.0])
        picture, matrix = smaller, matrix @ back
    if np.allclose(matrix, np.eye(3), atol=0.02) and picture.shape[:2] == size:
        return picture
    # OpenCV counts from the middle of the first pixel, the matrices here from its corner.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    corner = np.linalg.inv(half) @ matrix @ half
    return cv2.warpPerspective(
        picture, corner, size[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(255, 255, 255)
    )
