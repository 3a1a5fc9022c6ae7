"""Figures of adaptive tokens: the patch plan of a page, a gallery of density maps, and accuracy and time by budget.

All are drawn for half the width of a printed page or a screen: 12 inches with 17 pt letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sfa_adapters.adat.plan import PatchPlan
from sfa_adapters.errors import DataError
from sfa_adapters.figure_style import BLUE, GRAY, GREEN, GRID, MARKERS, ORANGE, PINK, YELLOW
from sfa_adapters.recipes.nano.evaluate import Interval

__all__ = ["Measured", "ScoredPage", "plot_efficiency", "plot_gallery", "plot_plan"]

# Finest first, distinguishable for colour-blind people; the coarsest level is always gray.
LEVEL_COLOURS = (ORANGE, BLUE, GREEN, PINK, YELLOW)
COARSEST_COLOUR = "#8a8a8a"
LINES = tuple(zip((ORANGE, BLUE, GREEN, PINK, GRAY), MARKERS, ("-", "--", "-.", ":", "-"), strict=False))
HEAT = "magma_r"  # blank paper is light
TITLE, LABEL = 19, 17  # pt


@dataclass(frozen=True, eq=False)
class ScoredPage:
    """A page and its density map.

    Attributes:
        name: Title of the page.
        image: Pixels, uint8 `[H, W, 3]`.
        density: Densities in [0, 1] of any resolution, `[h, w]`.
    """

    name: str
    image: np.ndarray
    density: Tensor | np.ndarray


@dataclass(frozen=True)
class Measured:
    """One measured run.

    Attributes:
        method: How tokens were saved: "ADAT", "down-sampling", ...
        ratio: Tokens over the tower's own number of tokens.
        tokens: Mean number of tokens of an image.
        ms: Encoder time of an image in milliseconds, scores and plans included.
        accuracy: Share of right answers with its interval; None where only time was measured.
    """

    method: str
    ratio: float
    tokens: float
    ms: float
    accuracy: Interval | None = None


def _new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout=layout)


def _show(axis: Any, image: np.ndarray, title: str, fade: bool = False) -> None:
    # Lines and colours over a dark page would not be visible.
    axis.imshow(image, interpolation="antialiased", alpha=0.45 if fade and image.mean() < 128 else 1.0)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=TITLE, pad=8)
    for spine in axis.spines.values():
        spine.set(color=GRAY, linewidth=1.0)


def _heat(axis: Any, density: Tensor | np.ndarray, size: tuple[int, int]) -> Any:
    """Draws the map over a page of `size` pixels; a colour means the same density in all figures."""
    values = torch.as_tensor(density).detach().float().cpu().numpy()
    if values.ndim != 2 or not np.isfinite(values).all():
        raise DataError(f"A density map must be finite and [rows, columns]; got {values.shape}.")
    extent = (0, size[1], size[0], 0)
    image = axis.imshow(values, cmap=HEAT, vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    return image


def level_colours(count: int) -> list[str]:
    """A colour for each level, finest first; gray for the coarsest."""
    if count == 1:
        return [LEVEL_COLOURS[0]]
    return [*(LEVEL_COLOURS[k % len(LEVEL_COLOURS)] for k in range(count - 1)), COARSEST_COLOUR]


def _draw_tokens(axis: Any, plan: PatchPlan) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    top, left, height, width = plan.boxes.numpy().T
    corners = np.stack(((left, top), (left + width, top), (left + width, top + height), (left, top + height)), 0)
    colours = level_colours(len(plan.sides))
    # Coarse first: where a large token meets a small one, the line of the small one is on top.
    for level in range(len(plan.sides) - 1, -1, -1):
        of_level = plan.token_level.numpy() == level
        coarsest = level == len(plan.sides) - 1 and level > 0
        axis.add_collection(
            PolyCollection(
                list(corners[:, :, of_level].transpose(2, 0, 1)),
                facecolors=to_rgba(colours[level], 0.10 if coarsest else 0.30),
                edgecolors=to_rgba(colours[level], 0.9),
                linewidths=0.6,
            )
        )


def plot_plan(page: ScoredPage, plan: PatchPlan, path: Path) -> Path:
    """Draws one page three times: with the tower's own grid, its density, and with the tokens of a patch plan.

    Args:
        page: The page as the tower sees it, `plan.image_size` pixels, and its map.
        plan: The patch plan.
        path: The file to write; its ending chooses the format.

    Returns:
        The file.

    Raises:
        DataError: The image has another size than the plan's page, or the map cannot be drawn.
    """
    from matplotlib.patches import Patch

    if page.image.shape[:2] != plan.image_size:
        raise DataError(f"The page is {page.image.shape[:2]} px, but the plan was made for {plan.image_size} px.")
    height, width = plan.image_size
    # Three panels of one size, placed in inches: the colour bar and the keys hang below them.
    panel, gap, above, below = 4.85, 0.15, 0.5, 0.85
    panel_height = panel * height / width
    full = (15.0, panel_height + above + below)
    figure = _new_figure(*full, layout=None)
    axes = [
        figure.add_axes(
            ((gap / 2 + k * (panel + gap)) / full[0], below / full[1], panel / full[0], panel_height / full[1])
        )
        for k in range(3)
    ]
    _show(axes[0], page.image, f"uniform: {plan.uniform_tokens:,} tokens", fade=True)
    axes[0].hlines(np.arange(plan.patch, height, plan.patch), 0, width, color=BLUE, linewidth=0.6, alpha=0.7)
    axes[0].vlines(np.arange(plan.patch, width, plan.patch), 0, height, color=BLUE, linewidth=0.6, alpha=0.7)
    _show(axes[1], page.image, "text density")
    heat = _heat(axes[1], page.density, plan.image_size)
    _show(axes[2], page.image, f"adaptive: {plan.num_tokens:,} tokens ({100 * plan.ratio:.0f}%)", fade=True)
    _draw_tokens(axes[2], plan)
    for axis in axes:
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes[0].set_xlabel(f"every patch {plan.patch} px", fontsize=LABEL, labelpad=10)
    scale = figure.add_axes(
        (0.5 - 0.36 * panel / full[0], (below - 0.4) / full[1], 0.72 * panel / full[0], 0.2 / full[1])
    )
    bar = figure.colorbar(heat, cax=scale, orientation="horizontal", ticks=[0, 0.5, 1])
    bar.ax.set_xticklabels(["0 blank", "0.5", "1 dense"], fontsize=LABEL)
    colours = level_colours(len(plan.sides))
    present = plan.token_level.bincount(minlength=len(plan.sides)).tolist()
    keys = [
        Patch(facecolor=(colour, 0.4), edgecolor=colour, label=f"{plan.cell / side:.3g} px")
        for colour, side, count in zip(colours, plan.sides, present, strict=True)
        if count
    ]
    axes[2].legend(
        handles=keys,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1 / panel_height),
        ncols=len(keys),
        fontsize=LABEL,
        frameon=False,
        handlelength=1.2,
        handletextpad=0.5,
        columnspacing=1.2,
    )
    figure.savefig(path)
    return path


def plot_gallery(pages: Sequence[ScoredPage], path: Path, columns: int = 4) -> Path:
    """Draws pages, each above its density map and the mean of that map.

    Args:
        pages: The pages; small ones look best.
        path: The file to write; its ending chooses the format.
        columns: Largest number of pages side by side.

    Returns:
        The file.

    Raises:
        DataError: There is no page, or a map cannot be drawn.
    """
    if not pages or columns < 1:
        raise DataError(f"A gallery needs pages and at least one column; got {len(pages)} pages, {columns} columns.")
    across = min(columns, len(pages))
    bands = -(-len(pages) // across)
    figure = _new_figure(3.6 * across + 1.4, 7.75 * bands)
    axes = figure.subplots(2 * bands, across, squeeze=False)
    heat = None
    for number in range(bands * across):
        above, below = axes[2 * (number // across)][number % across], axes[2 * (number // across) + 1][number % across]
        if number >= len(pages):
            above.set_axis_off()
            below.set_axis_off()
            continue
        page = pages[number]
        _show(above, page.image, page.name)
        heat = _heat(below, page.density, page.image.shape[:2])  # pyright: ignore[reportArgumentType]
        below.set_xlabel(f"mean {torch.as_tensor(page.density).float().mean().item():.3f}", fontsize=LABEL)
    bar = figure.colorbar(heat, ax=axes, shrink=0.9 / bands, aspect=30, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 blank", "0.5", "1 dense"], fontsize=LABEL)
    bar.set_label("text density", fontsize=LABEL)
    figure.savefig(path)
    return path


def plot_efficiency(rows: Sequence[Measured], path: Path, title: str = "") -> Path:
    """Draws accuracy and encoder time over the share of tokens that is left, one line per method.

    A panel without values is left out; rows without an accuracy are only in the panel of times.

    Args:
        rows: Measured runs, in any order; methods keep the order in which they first appear.
        path: The file to write; its ending chooses the format.
        title: Title of the figure.

    Returns:
        The file.

    Raises:
        DataError: There is no row, or a ratio or time is not a number above 0.
    """
    wrong = [row for row in rows if not (0 < row.ratio < float("inf") and 0 < row.ms < float("inf"))]
    if not rows or wrong:
        raise DataError(f"A curve needs rows with a ratio and a time above 0; got {wrong[0] if wrong else 'no row'}.")
    methods = list(dict.fromkeys(row.method for row in rows))
    panels = ["accuracy", "ms"] if any(row.accuracy is not None for row in rows) else ["ms"]
    figure = _new_figure(6.6 * len(panels) + 0.4, 6.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for number, method in enumerate(methods):
            of_method = sorted((row for row in rows if row.method == method), key=lambda row: row.ratio)
            colour, marker, line = LINES[number % len(LINES)]
            style: dict[str, Any] = {
                "color": colour, "marker": marker, "linestyle": line, "linewidth": 2.4, "markersize": 9, "label": method
            }  # fmt: skip
            if panel == "ms":
                axis.plot([100 * row.ratio for row in of_method], [row.ms for row in of_method], **style)
                continue
            known = [(100 * row.ratio, row.accuracy) for row in of_method if row.accuracy is not None]
            if not known:
                continue
            values = np.array([(a.value, a.value - a.low, a.high - a.value) for _, a in known]).T * 100
            # Points at one budget are shifted sideways, so that their intervals do not overlap.
            places = [x + 0.8 * (number - (len(methods) - 1) / 2) for x, _ in known]
            axis.errorbar(places, values[0], yerr=values[1:].clip(min=0), capsize=4, elinewidth=1.6, **style)
        axis.set_xlabel("tokens left, % of uniform", fontsize=LABEL)
        axis_labels = {"accuracy": "accuracy, % (95% interval)", "ms": "encoder, ms per image"}
        axis.set_title(axis_labels[panel], fontsize=TITLE, pad=10)
        axis.tick_params(labelsize=LABEL - 1)
        axis.grid(color=GRID, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set(xlim=(0, max(105.0, 100 * max(row.ratio for row in rows) * 1.05)))
        axis.locator_params(axis="x", steps=[2.5, 5])
    axes[-1].set_ylim(bottom=0)  # times are compared as lengths
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(methods), 4), fontsize=LABEL, frameon=False
    )
    if title:
        figure.suptitle(title, fontsize=TITLE)
    figure.savefig(path)
    return path
