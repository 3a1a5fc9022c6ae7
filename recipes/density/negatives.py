"""Pictures without text that look a little like print: maps of roads, rivers and fields, and dense line drawings."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from sfa_adapters.recipes.synthetic.scans import line_art

__all__ = ["draw_map"]


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
