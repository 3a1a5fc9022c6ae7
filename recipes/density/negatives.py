"""Pictures without text that look a little like print: maps of roads and fields, drawings, curves of noisy data."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from sfa_adapters.recipes.synthetic.scans import line_art

__all__ = ["draw_curves", "draw_map"]


def _walk(rng: np.random.Generator, side: int, bend: float) -> list[tuple[float, float]]:
    """A smooth random line across the picture."""
    x, y = rng.uniform(-0.1, 1.1, 2) * side
    angle, points = rng.uniform(0, 2 * np.pi), []
    for _ in range(60):
        points.append((float(x), float(y)))
        angle += rng.normal(0, bend)
        x, y = x + np.cos(angle) * side / 25, y + np.sin(angle) * side / 25
    return points


def draw_map(rng: np.random.Generator, side: int) -> np.ndarray:
    """A map without names, or a line drawing.

    Args:
        rng: Draws it.
        side: Height and width in px.

    Returns:
        uint8 `[side, side, 3]`.
    """

    def colour(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(v) for v in rng.integers(low, high, 3))

    if rng.random() < 0.4:
        return line_art(rng, side, side, colour(180, 256), colour(0, 120))
    image = Image.new("RGB", (side, side), colour(190, 256))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 10))):  # fields and lakes
        middle, radius = rng.uniform(0, side, 2), rng.uniform(10, side / 2)
        turns = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(5, 14))))
        reach = radius * rng.uniform(0.5, 1.2, len(turns))
        points = [(middle[0] + r * np.cos(t), middle[1] + r * np.sin(t)) for t, r in zip(turns, reach, strict=True)]
        draw.polygon(points, fill=colour(150, 250), outline=colour(60, 200))
    contours = rng.random() < 0.4
    for number in range(int(rng.integers(5, 40))):  # roads, rivers, contour lines
        points = _walk(rng, side, 0.08 if contours else rng.uniform(0.02, 0.5))
        width = 1 if contours else int(rng.integers(1, 6))
        draw.line(points, fill=colour(20, 220) if number % 3 else colour(0, 80), width=width)
        if width > 3:
            draw.line(points, fill=colour(200, 256), width=width - 2)
    for _ in range(int(rng.choice([0, 20, 150]))):  # houses, trees, symbols
        x, y = rng.uniform(0, side, 2)
        a, b = rng.uniform(1.5, 9, 2)
        shape = draw.rectangle if rng.random() < 0.6 else draw.ellipse
        shape((x, y, x + a, y + b), fill=colour(0, 220))
    return np.asarray(image)


def draw_curves(rng: np.random.Generator, side: int) -> np.ndarray:
    """A plot without letters: noisy and smooth curves, dashes, markers, bars, error bars, contours, a grid.

    Jagged curves are what an estimator of text takes for print first: strokes of the same width in all directions.

    Args:
        rng: Draws it.
        side: Height and width in px.

    Returns:
        uint8 `[side, side, 3]`.
    """
    import cv2

    picture = np.full((side, side, 3), int(rng.integers(235, 256)), np.uint8)

    def colour() -> tuple[int, int, int]:
        r, g, b = (int(v) for v in rng.integers(0, 200, 3))
        return (r, g, b) if rng.random() < 0.7 else (0, 0, 0)

    if rng.random() < 0.5:
        for place in np.arange(rng.uniform(0, 60), side, rng.uniform(20, 90)):
            cv2.line(picture, (0, int(place)), (side, int(place)), (210, 210, 210), 1)
            cv2.line(picture, (int(place), 0), (int(place), side), (210, 210, 210), 1)
    for _ in range(int(rng.integers(1, 6))):
        count = int(np.exp(rng.uniform(np.log(8), np.log(400))))
        x = np.linspace(-0.1, 1.1, count)
        wave = np.sin(x * rng.uniform(2, 40) + rng.uniform(0, 6)) * rng.uniform(0, 0.4)
        y = (
            rng.uniform(0.1, 0.9)
            + wave * np.exp(-x * rng.uniform(0, 3))
            + rng.normal(0, rng.choice([0, 0.01, 0.05, 0.15]), count)
        )
        if rng.random() < 0.4:
            y = rng.uniform(0, 1) + np.cumsum(rng.normal(0, rng.uniform(0.003, 0.05), count))
        points = np.stack([x, y], 1) if rng.random() < 0.8 else np.stack([y, x], 1)
        points = (points * side * 16).astype(np.int32)
        width, ink, kind = int(rng.integers(1, 4)), colour(), rng.random()
        if kind < 0.6:
            cv2.polylines(picture, [points], False, ink, width, cv2.LINE_AA, shift=4)
        elif kind < 0.75:  # dashes
            for start in range(0, count - 1, 2):
                cv2.line(picture, points[start].tolist(), points[start + 1].tolist(), ink, width, cv2.LINE_AA, shift=4)
        else:  # markers with error bars
            reach = int(rng.integers(1, 7)) * 16
            for point in points:
                if kind < 0.9:
                    cv2.circle(picture, point.tolist(), reach, ink, int(rng.choice([-1, 1])), cv2.LINE_AA, shift=4)
                else:
                    x_middle, y_middle = point.tolist()
                    ends = (x_middle, y_middle - 3 * reach), (x_middle, y_middle + 3 * reach)
                    cv2.line(picture, *ends, ink, 1, cv2.LINE_AA, shift=4)
    if rng.random() < 0.3:  # bars
        step = float(rng.uniform(6, 50))
        for left in np.arange(rng.uniform(0, side / 2), side * rng.uniform(0.5, 1), step):
            top = int(rng.uniform(0.2, 0.95) * side)
            cv2.rectangle(picture, (int(left), top), (int(left + step * 0.7), side), colour(), -1)
    return picture
