"""Pseudo labels for text density: which share of each place of a page is text, from edges or from an OCR engine.

Both are made alike: a mask of the text is blurred, scaled by a **fixed** gain and averaged over the cells. The scale
never depends on the image: divided by its own maximum, the specks of a blank page would become text.

An edge alone is not text. Pixels darker or lighter than their surroundings (adaptive threshold) form connected pieces.
A piece counts as a letter or a small word if it is bounded by Canny edges, has the size of print, and is neither a
rule, nor a speck, nor a large figure.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image
from sfa_adapters.ocr import ocr_engine as _ocr_engine

__all__ = ["CELL", "LabelSource", "box_density", "coverage_density", "density_labels", "filled", "ocr_boxes"]

LabelSource = Literal["edges", "ocr"]
CELL = 16  # px of the working image per cell, as in the estimator
SPREAD = 4.0  # px, standard deviation of the blur: a quarter of a cell
GAIN = 1.5  # there is paper between lines of text: a place that is two thirds covered counts as dense
CONTRAST = 20.0  # gray levels, the least difference of ink to its surroundings, however clean the page
NOISE = 4.0  # the same in standard deviations of the page's noise
NOISE_CAP = 12.0  # gray levels; a finely textured page is not noise only
WINDOW = 31  # px of the adaptive threshold: more than twice the stroke of a headline
NEAR, PURE = 49, 0.8  # px, share: around print all ink is dark, or all is light; a photograph has both
TALLEST, WIDEST = 72, 160  # px of the working image: larger pieces are figures and frames
SMALLEST = 5  # px of ink: a point of an i is less, and so is a speck
LONG, SLENDER = 20.0, 9.0  # px, ratio: a piece longer than this, and than this many times its breadth, is a rule
STRAIGHT = 0.85  # if it fills at least this share of that bar; a word of small print is as slender, but has holes
SOLID = 0.75  # a piece that fills more of its box is a bar, a dot, a dash, a full stop or an l
THICK, BESIDE = 10, (9, 33)  # px; solid pieces count up to this breadth, and in this window around a letter
SHARP = 0.35  # least share of a piece that lies beside a Canny edge


def density_labels(image: Any, grid: tuple[int, int] = (28, 28), source: LabelSource = "edges") -> np.ndarray:
    """Labels the text density of one page.

    Args:
        image: Anything that `sfa_adapters.images.as_image` takes. It is first resized to 16 px per cell, as a tower
            with a fixed input would do.
        grid: Rows and columns of the result.
        source: "edges" (OpenCV), or "ocr": boxes found by `rapidocr`, as an independent check of the edges.

    Returns:
        float32 `[rows, columns]`, from 0 (empty paper) to 1 (dense text).

    Raises:
        DataError: The image cannot be used, the grid has no cells, or the source is unknown.
        ModuleNotFoundError: OpenCV or `rapidocr` is missing; they come with the extras `vision` and `ocr`.
    """
    if source not in get_args(LabelSource):
        raise DataError(f"source={source!r} must be one of {', '.join(get_args(LabelSource))}.")
    _check_grid(grid)
    picture = as_image(image)
    if source == "ocr":
        return box_density(ocr_boxes(picture), picture.shape[:2], grid)
    import cv2

    size = (grid[1] * CELL, grid[0] * CELL)
    smaller = picture.shape[0] * picture.shape[1] > size[0] * size[1]
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
    return coverage_density(_text_mask(gray), grid)


def box_density(boxes: np.ndarray, shape: tuple[int, int], grid: tuple[int, int] = (28, 28)) -> np.ndarray:
    """Computes the text density from the boxes of all texts on a page.

    Args:
        boxes: `[n, 4]`, left, top, right, bottom in px; parts outside the page are clipped.
        shape: Height and width of the page in px.
        grid: Rows and columns of the result.

    Returns:
        float32 `[rows, columns]`, in [0, 1], on the scale of `density_labels`.

    Raises:
        DataError: The boxes are not finite or not `[n, 4]`, or the page or grid has no cells.
    """
    _check_grid(grid)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) if np.size(boxes) == 0 else np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all() or min(shape) < 1:
        raise DataError(f"boxes {boxes.shape} must be finite [n, 4] on a page of at least 1 px; the page is {shape}.")
    size = np.array((grid[1] * CELL, grid[0] * CELL))
    scaled = np.round(boxes * np.tile(size / (shape[1], shape[0]), 2)).astype(int)
    return coverage_density(filled(scaled, (size[1], size[0])), grid)


def ocr_boxes(image: np.ndarray) -> np.ndarray:
    """Detects lines of text with `rapidocr` (detection only; its models come with the package).

    Args:
        image: uint8 RGB, `[H, W, 3]`.

    Returns:
        float64 `[n, 4]`: left, top, right, bottom in px, the upright box around each found quadrilateral.

    Raises:
        ModuleNotFoundError: `rapidocr` or `onnxruntime` is missing; the text says how to install them.
    """
    text_boxes = _ocr_engine()(np.ascontiguousarray(image[..., ::-1]), use_det=True, use_cls=False, use_rec=False).boxes
    if text_boxes is None or len(text_boxes) == 0:
        return np.zeros((0, 4))
    corners = np.asarray(text_boxes, dtype=np.float64)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def _check_grid(grid: tuple[int, int]) -> None:
    if len(grid) != 2 or not all(isinstance(side, int | np.integer) and 1 <= side <= 1024 for side in grid):
        raise DataError(f"grid={grid!r} must be two whole numbers from 1 to 1024, rows and columns.")


def coverage_density(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Text density from a text mask, on the fixed scale: blur, gain, at most 1, mean over each cell."""
    import cv2

    smooth = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), SPREAD, borderType=cv2.BORDER_REPLICATE)
    full = np.minimum(smooth * GAIN, 1.0)
    return full.reshape(grid[0], CELL, grid[1], CELL).mean(axis=(1, 3), dtype=np.float32)


def filled(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Mask that is True inside the boxes, `[n, 4]` in whole px; every box is at least 1 px wide and high."""
    height, width = shape
    left, top = boxes[:, 0], boxes[:, 1]
    right, bottom = np.maximum(boxes[:, 2], left + 1), np.maximum(boxes[:, 3], top + 1)
    x = np.clip((left, right), 0, width)
    y = np.clip((top, bottom), 0, height)
    corners = np.zeros((height + 1, width + 1), dtype=np.int32)  # sums over both axes fill all boxes at once
    for i, j, sign in ((0, 0, 1), (0, 1, -1), (1, 0, -1), (1, 1, 1)):
        np.add.at(corners, (y[i], x[j]), sign)
    return corners.cumsum(0).cumsum(1)[:-1, :-1] > 0


def _noise(gray: np.ndarray) -> float:
    """Standard deviation of the noise in gray levels: on paper the median neighbour differs only by noise."""
    typical = float(np.median(np.abs(np.diff(gray.astype(np.int16), axis=1)))) if gray.shape[1] > 1 else 0.0
    return min(typical / (0.6745 * 2**0.5), NOISE_CAP)


def _text_mask(gray: np.ndarray) -> np.ndarray:
    """Where letters and small words stand, bool `[H, W]`, from a gray page at 16 px per cell."""
    import cv2

    noise = _noise(gray)
    least = max(CONTRAST, NOISE * noise)
    smooth = cv2.GaussianBlur(gray, (0, 0), 0.8) if noise > 1.5 else gray
    # A step of h gray levels has a gradient of 4 h in OpenCV's 3 x 3 Sobel filter.
    edges = cv2.dilate(cv2.Canny(smooth, 2 * least, 4 * least, L2gradient=True), np.ones((3, 3), np.uint8)) > 0
    # Against the local median, paper is never ink: print covers less than half of any window. Against the local mean,
    # as in cv2.adaptiveThreshold, the paper around a word would be light ink.
    paper = cv2.medianBlur(smooth, WINDOW)
    depths = cv2.subtract(paper, smooth), cv2.subtract(smooth, paper)  # dark ink, light ink
    inks = [depth > least for depth in depths]
    shares = [
        cv2.blur(np.where(ink, depth, 0).astype(np.float32), (NEAR, NEAR))
        for ink, depth in zip(inks, depths, strict=True)
    ]
    total = np.maximum(shares[0] + shares[1], 1e-6)
    pieces = [_letters(ink.astype(np.uint8), edges, share / total) for ink, share in zip(inks, shares, strict=True)]
    boxes, solid = (np.concatenate(part) for part in zip(*pieces, strict=True))
    letters = filled(boxes[~solid], gray.shape)
    # A full stop, a dash and a small l are solid, like dots, dashes and specks: they are text only beside letters.
    beside = cv2.dilate(letters.astype(np.uint8), np.ones((BESIDE[0], BESIDE[1]), np.uint8)) > 0
    row, column = (boxes[:, 1::2].mean(1).astype(int), boxes[:, ::2].mean(1).astype(int))
    inside = beside[row.clip(0, gray.shape[0] - 1), column.clip(0, gray.shape[1] - 1)]
    return letters | filled(boxes[solid & inside], gray.shape)


def _letters(ink: np.ndarray, edges: np.ndarray, purity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Selects the connected pieces of ink that can be letters.

    Args:
        ink: uint8 `[H, W]`, 1 where there is ink.
        edges: bool `[H, W]`, beside a Canny edge.
        purity: `[H, W]`, how much of the ink around is of this kind, in [0, 1].

    Returns:
        Boxes stretched to the height of a line, whole px `[n, 4]`, and which of them are solid, bool `[n]`.
    """
    import cv2

    count, pieces, stats, centres = cv2.connectedComponentsWithStats(ink, connectivity=8)
    left, top, width, height, area = stats.T.astype(np.int64)
    sharp = np.bincount(pieces[edges], minlength=count) / np.maximum(area, 1)
    short, box = np.minimum(width, height), width * height
    length, breadth = _axes(pieces, count)
    rule = (length > LONG) & (length > SLENDER * breadth) & (area > STRAIGHT * length * breadth)
    keep = (area >= SMALLEST) & (height >= 3) & (height <= TALLEST) & (width <= WIDEST) & (sharp >= SHARP) & ~rule
    solid = area >= SOLID * box
    keep &= ~solid | (short <= THICK)
    column, row = np.round(centres).astype(np.int64).T
    keep[1:] &= purity[row[1:], column[1:]] >= PURE
    keep[0] = False  # the background
    more = np.ceil(0.25 * height).astype(np.int64)
    return np.stack([left - 1, top - more, left + width + 1, top + height + more], axis=1)[keep], solid[keep]


def _axes(pieces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Length and breadth in px of the bars that have the second moments of each piece, in any direction, `[count]`."""
    y, x = np.nonzero(pieces)
    label = pieces[y, x]
    n = np.maximum(np.bincount(label, minlength=count), 1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(label, values, minlength=count) / n

    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    middle, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    # The variance of a bar of length l is l^2 / 12; a single pixel has the variance 1 / 12.
    return np.sqrt(12 * (middle + spread) + 1), np.sqrt(12 * np.maximum(middle - spread, 0) + 1)
