"""A figure with pictures, each with a question, the true answer, and the answer of each model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["AnsweredPicture", "draw_answer_page"]

RIGHT, WRONG = "#1a7f37", "#b3261e"
PAGE = (3, 4)  # rows and columns


@dataclass(frozen=True, eq=False)
class AnsweredPicture:
    """One picture of the page.

    Attributes:
        image: uint8 `[height, width, 3]`.
        question: A question about it.
        true: The true answer.
        answers: Name of each model, its answer, and whether that is right.
    """

    image: np.ndarray
    question: str
    true: str
    answers: Sequence[tuple[str, str, bool]]


def draw_answer_page(pictures: Sequence[AnsweredPicture], title: str, path: Path) -> None:
    """Draws the first twelve pictures.

    Args:
        pictures: The pictures.
        title: Title of the figure.
        path: The file to write.
    """
    from matplotlib.figure import Figure

    rows, columns = PAGE
    figure = Figure(figsize=(3.9 * columns, 5.9 * rows), dpi=110, layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        if number >= len(pictures):
            axis.set_axis_off()
            continue
        picture = pictures[number]
        axis.imshow(picture.image, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(picture.question, 30)), fontsize=14)
        lines = [(f"true: {picture.true}", "black")]
        for name, answer, right in picture.answers:
            verdict = "right" if right else "wrong"
            lines.append((f"{name}: {answer or '(nothing)'}  {verdict}", RIGHT if right else WRONG))
        for line, (text, colour) in enumerate(lines):
            axis.text(0.02, -0.08 - 0.09 * line, text, color=colour, fontsize=14, transform=axis.transAxes)
    figure.suptitle(title, fontsize=18)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
