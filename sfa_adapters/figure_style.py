"""How figures look: colours that colour-blind people can distinguish, sizes of letters, white paper.

The paper is white on purpose, also on dark pages: transparent figures would need ink that is weak on both. The colours
are those of Okabe and Ito (2008); each comes with a marker, so that no figure depends on colour alone. matplotlib is
imported only to draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GRAY", "GRID", "INK", "MARKERS", "PAPER", "half_width", "plain_axis"]

ORANGE, BLUE, GREEN, PINK, YELLOW, SKY = "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS = (BLUE, ORANGE, GREEN, PINK, YELLOW, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRAY, GRID, PAPER = "#1b1b1b", "#6b6b6b", "#dddddd", "#ffffff"

# A figure that is read at 440 pixels: 80 of them are an inch, and letters of 10 pt are 11 pixels high.
HALF_WIDTH, DPI = 5.5, 160  # inches; pixels per inch of the file, twice those of the screen
LETTERS, TITLE = 10, 11  # pt


def half_width(height: float) -> Figure:
    """An empty figure for half the width of a page.

    Args:
        height: In inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(HALF_WIDTH, height), dpi=DPI, layout="constrained", facecolor=PAPER)


def plain_axis(axis: Any, title: str = "", x: str = "", y: str = "") -> None:
    """A light grid, no box, letters that can be read at half width.

    Args:
        axis: Of matplotlib.
        title: Above it.
        x: Label below.
        y: Label at the side.
    """
    axis.set_title(title, fontsize=TITLE, color=INK, loc="left")
    axis.set_xlabel(x, fontsize=LETTERS, color=INK)
    axis.set_ylabel(y, fontsize=LETTERS, color=INK)
    axis.tick_params(labelsize=LETTERS, colors=INK)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
