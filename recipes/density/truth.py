"""Text density from word boxes that were turned, bent or scaled with their page: `labels.box_density` for any view."""

from __future__ import annotations

import numpy as np

from sfa_adapters.adat.labels import CELL, coverage_density

__all__ = ["corners_of", "heights_of", "view_density"]


def corners_of(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The corners of boxes after a view, clockwise from the upper left one.

    Args:
        boxes: Left, top, right, bottom in px, `[n, 4]`.
        matrix: Takes pixels of the page to those of the view, `[3, 3]`.

    Returns:
        x and y in px of the view, `[n, 4, 2]`.
    """
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    # Pixels whose middle lies in a box are in it: the outline runs through the middles of the outermost ones.
    boxes = boxes.astype(np.float64) + np.array([0.5, 0.5, -0.5, -0.5]) / scale
    x, y = boxes[:, [0, 2, 2, 0]], boxes[:, [1, 1, 3, 3]]
    moved = np.stack([x, y, np.ones_like(x)], -1) @ matrix.T
    return moved[..., :2] / np.maximum(moved[..., 2:], 1e-6)


def heights_of(corners: np.ndarray) -> np.ndarray:
    """The shorter side of each box in px: about the height of a line of print, however it is turned, `[n]`."""
    down = np.linalg.norm(corners[:, 3] - corners[:, 0], axis=1)
    return np.minimum(down, np.linalg.norm(corners[:, 1] - corners[:, 0], axis=1))


def view_density(corners: np.ndarray, grid: tuple[int, int], around: int = 0) -> np.ndarray:
    """Text density of a view.

    Args:
        corners: Of all words, `[n, 4, 2]`.
        grid: Rows and columns of the result, in cells of 16 px.
        around: Cells around the view that its border is blurred with; 0 repeats the border, as on a whole page.

    Returns:
        float32 `[rows, columns]` in [0, 1]; the scale of `labels.box_density`.
    """
    import cv2

    rows, columns = grid[0] + 2 * around, grid[1] + 2 * around
    mask = np.zeros((rows * CELL, columns * CELL), dtype=np.uint8)
    moved = corners + around * CELL - 0.5
    seen = (moved.max(1) > -0.5).all(1) & (moved.min(1) < np.array(mask.shape[::-1]) - 0.5).all(1)
    for corner in np.round(moved[seen] * 16).clip(-(2**19), 2**19).astype(np.int32):
        cv2.fillConvexPoly(mask, corner, 1, shift=4)
    density = coverage_density(mask, (rows, columns))
    return density[around : rows - around, around : columns - around]
