"""Figures of attention over a page: one map, or before, after and difference (Figure 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sfa_adapters.analysis.report import LABEL, new_figure, plain
from sfa_adapters.errors import DataError
from sfa_adapters.figure_style import GRAY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_map", "plot_maps"]

# Colour maps without their dark ends, on which print cannot be read.
HEAT, CHANGE = ("OrRd", 0.0, 0.7), ("PuOr_r", 0.2, 0.8)
INK = 0.75  # darkness of black print, so that the colours below it can be seen
UNIT = "attention on a patch, %"


class _Map(Protocol):
    """The parts of an `AttentionMap` that are drawn; the class imports this module, so it cannot be imported here."""

    @property
    def values(self) -> np.ndarray: ...
    @property
    def elsewhere(self) -> float: ...
    @property
    def patch(self) -> tuple[int, int] | None: ...
    @property
    def how(self) -> dict[str, Any]: ...


def plot_map(heat_map: _Map, image: np.ndarray | None = None) -> Figure:
    """Draws one attention map over its page.

    Args:
        heat_map: The map, an `AttentionMap`.
        image: The page below it, uint8 `[H, W, 3]`.
    """
    figure = new_figure(6.6, 6.9)
    axis = figure.subplots()
    highest = 100 * float(heat_map.values.max())
    shown = _draw(
        axis, _page(image, heat_map.values.shape), 100 * heat_map.values, HEAT, (0.0, highest), heat_map.patch
    )
    plain_page(axis, f"{_name(heat_map)}; {100 * heat_map.elsewhere:.0f}% elsewhere")
    _bar(figure, shown, axis, UNIT)
    return figure


def plot_maps(image: np.ndarray | None, before: _Map, after: _Map) -> Figure:
    """Draws two attention maps of one page on a common scale, and their difference.

    Args:
        image: The page below them, uint8 `[H, W, 3]`, or None.
        before: `AttentionMap` of the first model.
        after: `AttentionMap` of the second model, for the same query.

    Returns:
        Three panels; shares in percent, the difference in percentage points.

    Raises:
        DataError: The maps have different grids or queries.
    """
    if before.values.shape != after.values.shape or before.patch != after.patch:
        raise DataError(
            f"Two maps of one query are needed; got grids {before.values.shape} and {after.values.shape}, patches "
            f"{before.patch} and {after.patch}."
        )
    page = _page(image, before.values.shape)
    figure = new_figure(12.0, 3.9 * page.shape[0] / page.shape[1] + 1.6)
    axes: Any = figure.subplots(1, 3)
    highest = 100 * max(float(before.values.max()), float(after.values.max()))
    shown: Any = None
    for axis, heat_map, title in zip(axes, (before, after), ("before", "after"), strict=False):
        shown = _draw(axis, page, 100 * heat_map.values, HEAT, (0.0, highest), heat_map.patch)
        plain_page(axis, title)
    _bar(figure, shown, list(axes[:2]), UNIT)
    change = 100 * (after.values - before.values)
    most = float(np.abs(change).max()) or 1.0
    shown = _draw(axes[2], page, change, CHANGE, (-most, most), after.patch)
    plain_page(axes[2], "after - before")
    _bar(figure, shown, axes[2], "percentage points")
    return figure


def _name(heat_map: _Map) -> str:
    how = heat_map.how
    if how["query"] == "answer token":
        return f"answer token {how['answer_token']}"
    place = "all patches" if heat_map.patch is None else f"row {heat_map.patch[0]}, column {heat_map.patch[1]}"
    return f"rollout, {place}" if how["query"] == "rollout" else place


def _page(image: np.ndarray | None, grid: tuple[int, ...]) -> np.ndarray:
    if image is None:
        return np.full((grid[0] * 16, grid[1] * 16, 3), 255, np.uint8)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"The page must be uint8 [H, W, 3]; got {image.dtype} {image.shape}.")
    return image


def plain_page(axis: Any, title: str) -> None:
    """Formats an axis that shows a page: a title, a frame, no ticks."""
    plain(axis, title)
    axis.grid(visible=False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.spines[:].set(color=GRAY, linewidth=1.0)


def _draw(
    axis: Any,
    page: np.ndarray,
    values: np.ndarray,
    colours: tuple[str, float, float],
    limits: tuple[float, float],
    patch: Any,
) -> Any:
    """Draws a map with the print of the page over it (bright print if the page is dark), and frames the query patch."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    height, width = page.shape[:2]
    name, first, last = colours
    part = ListedColormap(colormaps[name](np.linspace(first, last, 256)))
    extent = (0, width, height, 0)
    shown = axis.imshow(values, cmap=part, vmin=limits[0], vmax=limits[1], interpolation="nearest", extent=extent)
    # Print is drawn over the colours as ink, so that on blank paper they are those of the colour bar.
    gray = page.mean(-1) / 255
    ink = np.zeros((height, width, 4))
    ink[..., 3] = INK * (gray if gray.mean() < 0.5 else 1 - gray)
    axis.imshow(ink, interpolation="antialiased", extent=extent)
    if patch is not None:
        tall, wide = height / values.shape[0], width / values.shape[1]
        for line, colour in ((5.0, "white"), (2.5, "black")):
            corner = (patch[1] * wide, patch[0] * tall)
            axis.add_patch(Rectangle(corner, wide, tall, fill=False, edgecolor=colour, linewidth=line))
    return shown


def _bar(figure: Figure, shown: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(
        shown, ax=axes, orientation="horizontal", shrink=0.85, aspect=25 if isinstance(axes, list) else 14
    )
    bar.set_label(label, fontsize=LABEL)
    bar.ax.tick_params(labelsize=LABEL - 1)
    bar.ax.locator_params(nbins=5)
