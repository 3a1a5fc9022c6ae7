"""Bar, grouped bar, line and pie charts of 144 x 144 pixels, with the box of every text that is printed on them.

Every mark carries its number (a data label), as in most charts of ChartQA, and a name of three letters or a year, so
that a tower with 144 patches of 12 pixels can read them. Everything is placed in pixels on one axes that spans the
figure: a fixed layout needs no layout engine, and one figure serves every chart of a process.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from sfa_adapters.recipes.synthetic.tables import Table

__all__ = ["SIZE", "Canvas", "Chart", "Kind", "TextBox", "draw", "kinds_for", "measure", "shared_canvas"]

SIZE = 144
Kind = Literal["bar", "hbar", "grouped", "line", "pie"]
PALETTES = (
    ("#8ecae6", "#ffb703", "#b7e4c7", "#f4a6a6", "#cdb4db"),
    ("#a8dadc", "#f6bd60", "#f5cac3", "#84a98c", "#bdb2ff"),
    ("#9ad1d4", "#ffd6a5", "#caffbf", "#ffadad", "#a0c4ff"),
)


@dataclass(frozen=True)
class TextBox:
    """One printed text and its place.

    Attributes:
        text: the text.
        role: a number at a mark, the name of a row, or the name of a series in the legend.
        series: index of its series; 0 for the name of a row.
        row: index of its row; 0 for the name of a series.
        box: (left, top, right, bottom) in pixels, from the top left corner of the image.
    """

    text: str
    role: Literal["value", "row", "series"]
    series: int
    row: int
    box: tuple[float, float, float, float]

    @property
    def is_number(self) -> bool:
        """Whether it is a number: a value, or a name that is a year."""
        return self.role == "value" or self.text.isdigit()


@dataclass(frozen=True)
class Chart:
    """One drawn chart; `image` is uint8 [144, 144, 3], `texts` are all printed texts."""

    table: Table
    kind: Kind
    image: np.ndarray
    texts: tuple[TextBox, ...]

    @property
    def numbers(self) -> tuple[TextBox, ...]:
        """The printed numbers with their boxes."""
        return tuple(t for t in self.texts if t.is_number)


class Canvas:
    """The figure that charts and tables are drawn on; reused, because making one takes longer than drawing a chart."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(SIZE / 72, SIZE / 72), dpi=72)  # 72 dpi: one point is one pixel
        self.canvas = FigureCanvasAgg(figure)
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.reset()

    def reset(self) -> None:
        """Removes everything from the canvas."""
        for artist in (*self.axes.patches, *self.axes.lines, *self.axes.texts):
            artist.remove()
        self.tags: list[tuple[Literal["value", "row", "series"], int, int]] = []
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, SIZE), ylim=(0, SIZE))

    def name(
        self, table: Table, row: int, x: float, y: float, size: float, ha: str = "center", va: str = "baseline"
    ) -> None:
        """Writes the name of a row at (x, y) in pixels from the bottom left corner, with its tag."""
        self._write(x, y, table.rows[row], size, ha, va)
        self.tags.append(("row", 0, row))

    def value(
        self,
        table: Table,
        at: tuple[int, int],
        x: float,
        y: float,
        size: float,
        ha: str = "center",
        va: str = "baseline",
    ) -> None:
        """Writes the number at (series, row), with its tag."""
        self._write(x, y, table.text(*at), size, ha, va)
        self.tags.append(("value", *at))

    def legend(
        self, table: Table, series: int, x: float, y: float, size: float, ha: str = "left", va: str = "baseline"
    ) -> None:
        """Writes the name of a series, with its tag."""
        self._write(x, y, table.series[series], size, ha, va)
        self.tags.append(("series", series, 0))

    def _write(self, x: float, y: float, text: str, size: float, ha: str, va: str) -> None:
        self.axes.text(x, y, text, fontsize=size, ha=ha, va=va, parse_math=False)

    def rectangle(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Fills a rectangle with its lower left corner at (x, y)."""
        from matplotlib.patches import Rectangle

        self.axes.add_artist(Rectangle((x, y), width, height, facecolor=color, edgecolor="#555555", linewidth=0.6))

    def rule(self, xs: list[float], ys: list[float], color: str, width: float, marker: str = "") -> None:
        """Draws a line from point to point."""
        from matplotlib.lines import Line2D

        self.axes.add_artist(Line2D(xs, ys, color=color, linewidth=width, marker=marker, markersize=4))

    def texts(self) -> tuple[TextBox, ...]:
        """All that was written, with boxes in pixels from the top left corner."""
        renderer = self.canvas.get_renderer()
        drawn_texts = []
        for artist, tag in zip(self.axes.texts, self.tags, strict=True):
            b = artist.get_window_extent(renderer)
            drawn_texts.append(TextBox(artist.get_text(), *tag, (b.x0, SIZE - b.y1, b.x1, SIZE - b.y0)))
        return tuple(drawn_texts)

    def image(self) -> np.ndarray:
        """The picture, uint8 [144, 144, 3]."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


@cache
def shared_canvas() -> Canvas:
    """The canvas of this process; `reset` it before drawing."""
    return Canvas()


def kinds_for(table: Table) -> tuple[Kind, ...]:
    """The chart kinds that suit a table: lines only over time, pies only of one series without thin slices."""
    if len(table.series) > 1:
        return ("grouped",)
    values = table.values[0]
    kinds: list[Kind] = ["line", "bar", "hbar"] if table.ordered else ["bar", "hbar"]
    if not table.ordered and min(values) >= 0.1 * sum(values):
        kinds.append("pie")
    return tuple(kinds)


def _bars(c: Canvas, table: Table, colors: tuple[str, ...], size: float, rng: np.random.Generator) -> None:
    n, top = len(table.rows), max(map(max, table.values))
    many = len(table.series)
    ceiling = SIZE - (28 if many > 1 else 14)
    slot = (SIZE - 4) / n
    width = slot * (0.9 if many > 1 else rng.uniform(0.5, 0.8)) / many
    for i in range(len(table.rows)):
        middle = 2 + slot * (i + 0.5)
        c.name(table, i, middle, 4, size)
        for s, column in enumerate(table.values):
            height = column[i] / top * (ceiling - 15)
            left = middle + (s - many / 2) * width
            c.rectangle(left, 14, width, height, colors[s])
            c.value(table, (s, i), left + width / 2, 16 + height, size)
    c.rule([2, SIZE - 2], [14, 14], "#333333", 1)
    _legend(c, table, colors, size)


def _bars_across(c: Canvas, table: Table, colors: tuple[str, ...], size: float, rng: np.random.Generator) -> None:
    n, top = len(table.rows), max(map(max, table.values))
    many = len(table.series)
    slot = (SIZE - (16 if many > 1 else 2)) / n
    width = slot * (0.85 if many > 1 else rng.uniform(0.5, 0.8)) / many
    for i in range(len(table.rows)):
        middle = slot * (n - i - 0.5) + 1
        c.name(table, i, 30, middle, size, "right", "center_baseline")
        for s, column in enumerate(table.values):
            length = column[i] / top * (SIZE - 33 - 28)
            low = middle + (many / 2 - s - 1) * width
            c.rectangle(33, low, length, width, colors[s])
            c.value(table, (s, i), 35 + length, low + width / 2, size, "left", "center_baseline")
    c.rule([33, 33], [1, slot * n], "#333333", 1)
    _legend(c, table, colors, size)


def _legend(c: Canvas, table: Table, colors: tuple[str, ...], size: float) -> None:
    if len(table.series) > 1:
        for s in range(len(table.series)):
            c.rectangle(26 + 58 * s, SIZE - 11, 8, 8, colors[s])
            c.legend(table, s, 38 + 58 * s, SIZE - 10, size)


def _line(c: Canvas, table: Table, colors: tuple[str, ...], size: float) -> None:
    values = table.values[0]
    low, high = min(values), max(values)
    slot = (SIZE - 4) / len(values)
    xs = [2 + slot * (i + 0.5) for i in range(len(values))]
    ys = [36 + (v - low) / (high - low) * (SIZE - 56) for v in values]
    c.rule([2, SIZE - 2], [14, 14], "#333333", 1)
    c.rule(xs, ys, colors[0], 1.5, "o")
    for i in range(len(table.rows)):
        c.name(table, i, xs[i], 4, size)
        dip = all(values[j] > values[i] for j in (i - 1, i + 1) if 0 <= j < len(values))  # the line leaves upwards
        c.value(table, (0, i), xs[i], ys[i] + (-4 if dip else 4), size, va="top" if dip else "bottom")


def _pie(c: Canvas, table: Table, colors: tuple[str, ...], size: float, rng: np.random.Generator) -> None:
    from matplotlib.patches import Wedge

    values, centre, radius = table.values[0], SIZE / 2, 45
    start = float(rng.uniform(0, 360))
    for i in range(len(table.rows)):
        stop = start + 360 * values[i] / sum(values)
        c.axes.add_artist(Wedge((centre, centre), radius, start, stop, facecolor=colors[i], edgecolor="white"))
        angle = math.radians((start + stop) / 2)
        x, y = math.cos(angle), math.sin(angle)
        side = "left" if x > 0.35 else "right" if x < -0.35 else "center"
        c.value(table, (0, i), centre + 29 * x, centre + 29 * y, size, va="center_baseline")
        c.name(table, i, centre + (radius + 3) * x, centre + (radius + 8) * y, size, side, "center_baseline")
        start = stop


def draw(table: Table, kind: Kind, seed: int | None = None) -> Chart:
    """Draws one chart.

    Args:
        table: the table.
        kind: one of `kinds_for(table)`.
        seed: of colours, widths and letter size; by default it follows from the table, so that the same table always
            gives the same picture.

    Returns:
        The chart, with the boxes of all texts that are printed on it.

    Raises:
        ValueError: `kind` does not fit the table.
    """
    canvas = _compose(table, kind, seed)
    return Chart(table, kind, canvas.image(), canvas.texts())


def measure(table: Table, kind: Kind, seed: int | None = None) -> tuple[TextBox, ...]:
    """The texts of the chart that `draw` would draw, without drawing it; arguments as there."""
    return _compose(table, kind, seed).texts()


def _compose(table: Table, kind: Kind, seed: int | None) -> Canvas:
    if kind not in kinds_for(table):
        raise ValueError(f"A {kind} chart cannot show table {table.id!r}. Use one of {', '.join(kinds_for(table))}.")
    if seed is None:
        seed = int.from_bytes(hashlib.sha256(f"{table.id}{kind}".encode()).digest()[:4])
    rng = np.random.default_rng(seed)
    palette = PALETTES[int(rng.integers(len(PALETTES)))]
    turn = int(rng.integers(len(palette)))
    colors = palette[turn:] + palette[:turn]
    canvas = shared_canvas()
    canvas.reset()
    size = float(rng.uniform(8.4, 9.2))
    if kind == "line":
        _line(canvas, table, colors, size)
    elif kind == "pie":
        _pie(canvas, table, colors, size, rng)
    elif kind == "hbar":
        _bars_across(canvas, table, colors, size, rng)
    elif kind == "grouped":
        widest = max(len(table.text(s, i)) for s in range(len(table.series)) for i in range(len(table.rows)))
        upright = len(table.rows) * widest <= 8  # four digits over six upright bars would run into each other
        (_bars if upright else _bars_across)(canvas, table, colors, size, rng)
    else:
        _bars(canvas, table, colors, size, rng)
    return canvas
