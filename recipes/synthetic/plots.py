"""Random matplotlib charts with axes, ticks, grid lines, legends and hatching, and the box of every text."""

import numpy as np

__all__ = ["plot"]

X_HEIGHT = 0.547  # of DejaVu Sans, over its size
STYLES = ("bar", "line", "scatter", "area", "pie", "histogram")


def _name(rng: np.random.Generator, words: int = 1) -> str:
    def one() -> str:
        return "".join(
            "bdfglmnprstv"[int(rng.integers(12))] + "aeiou"[int(rng.integers(5))] for _ in range(rng.integers(1, 4))
        )

    return " ".join(one() for _ in range(words)).capitalize()


def plot(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one figure of random data.

    Args:
        rng: random generator.
        width: px.
        height: px.

    Returns:
        uint8 `[height, width, 3]`; boxes `[texts, 4]` of left, top, right, bottom in px; x-heights `[texts]` in px.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    size = float(rng.uniform(7, 13))
    small = dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), size * 0.9)
    with mpl.rc_context({"font.size": size, "hatch.linewidth": float(rng.uniform(0.5, 1.5)), **small}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)  # 72 dpi: one point is one pixel
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0.16, 0.17, 0.8, 0.7))
        style = str(rng.choice(STYLES))
        _data(rng, axes, style)
        if rng.random() < 0.7:
            axes.set_title(_name(rng, 3))
        if style != "pie":
            axes.set_xlabel(_name(rng, 2))
            axes.set_ylabel(_name(rng, 2))
            if rng.random() < 0.5:
                axes.grid(
                    visible=True, linewidth=float(rng.uniform(0.4, 1)), linestyle=str(rng.choice(["-", "--", ":"]))
                )
            if style != "histogram" and rng.random() < 0.5:
                axes.legend(loc="best" if rng.random() < 0.5 else "upper right")
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes, x_heights = [], []
        for artist in figure.findobj(Text):
            if isinstance(artist, Text) and artist.get_visible() and artist.get_text().strip():
                b = artist.get_window_extent(renderer)
                if b.x1 > 0 and b.y1 > 0 and b.x0 < width and b.y0 < height and _drawn(axes, artist):
                    boxes.append((b.x0, height - b.y1, b.x1, height - b.y0))
                    x_heights.append(float(artist.get_fontsize()) * X_HEIGHT)
        image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return image, np.array(boxes).reshape(-1, 4), np.array(x_heights)


def _drawn(axes: object, artist: object) -> bool:
    """Whether a text is drawn: ticks beyond the limits keep their labels, but these are not drawn."""
    for axis in (axes.xaxis, axes.yaxis):  # pyright: ignore[reportAttributeAccessIssue]
        labels = {t for tick in (*axis.majorTicks, *axis.minorTicks) for t in (tick.label1, tick.label2)}
        if artist in labels:
            return axes.axison and artist in {t for tick in axis._update_ticks() for t in (tick.label1, tick.label2)}  # pyright: ignore[reportAttributeAccessIssue]
    return True


def _data(rng: np.random.Generator, axes: object, style: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    n, series = int(rng.integers(3, 9)), int(rng.integers(1, 4))
    names = [_name(rng) for _ in range(n)]
    scale = 10 ** float(rng.uniform(0, 4))
    if style == "pie":
        hatches = ["//", "xx", "..", "||"] if rng.random() < 0.3 else None
        axes.pie(rng.uniform(0.2, 1, n), labels=names, autopct="%1.0f%%" if rng.random() < 0.6 else None, hatch=hatches)
        return
    if style == "histogram":
        axes.hist(
            rng.normal(size=300) * scale, bins=int(rng.integers(8, 40)), hatch="///" if rng.random() < 0.4 else None
        )
        return
    for s in range(series):
        label, y = _name(rng), rng.uniform(0.1, 1, n) * scale
        if style == "bar":
            hatch = str(rng.choice(["//", "\\\\", "xx", "||", "--", "++", ".."])) if rng.random() < 0.4 else None
            bars = axes.bar(
                np.arange(n) + s * 0.8 / series, y, 0.8 / series, label=label, hatch=hatch, edgecolor="black"
            )
            if rng.random() < 0.4:
                axes.bar_label(bars, fmt="%.3g", fontsize=7)
        elif style == "scatter":
            axes.scatter(rng.normal(size=60), rng.normal(size=60), s=float(rng.uniform(4, 40)), label=label)
        elif style == "area":
            axes.fill_between(np.arange(n), y * (s + 1), alpha=0.5, label=label)
        else:
            axes.plot(
                np.arange(n),
                y,
                label=label,
                marker=str(rng.choice(["", "o", "s", "x"])),
                linewidth=float(rng.uniform(0.7, 3)),
            )
    if style == "bar" and n < 6:
        axes.set_xticks(np.arange(n), names, rotation=0 if rng.random() < 0.6 else 90)
