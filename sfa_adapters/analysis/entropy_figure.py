"""Figure 5: violin plots of the entropy in dense and in sparse regions, and its means by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sfa_adapters.analysis.report import COLOURS, LABEL, MARKERS, TITLE, around, new_figure, plain, spaced
from sfa_adapters.figure_style import GRAY
from sfa_adapters.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_entropy"]

REGIONS = ("dense text", "sparse")  # as in `EntropyReport.values`
MOST_LAYERS = 6  # violins; more cannot be distinguished at half the width


class _Report(Protocol):
    """The parts of an `EntropyReport` that are drawn; the class imports this module, so it cannot be imported here."""

    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def images(self) -> tuple[int, ...]: ...
    @property
    def values(self) -> np.ndarray: ...
    @property
    def unit(self) -> str: ...
    def mean(self, region: int, layer: int | None = None) -> Interval: ...
    def ratio(self, layer: int | None = None) -> Interval: ...


def plot_entropy(reports: Mapping[str, _Report]) -> Figure:
    """Draws one entropy report, or several with common scales.

    Args:
        reports: `EntropyReport`s by name, at least one.

    Returns:
        A panel of violins for each report, over all images and heads, with the mean as a line; and one panel of layer
        means with 95% intervals: both regions of a single report, else the ratios of all.
    """
    single = len(reports) == 1
    unit = next(iter(reports.values())).unit
    figure = new_figure(12.0, 6.2 if single else 5.4 * (-(-len(reports) // 2) + 1))
    panels, axis = _panels(figure, len(reports))
    for panel, (name, report) in zip(panels, reports.items(), strict=True):
        _violins(panel, report)
        plain(panel, name or "images and heads", "layer", f"entropy, {unit}")
        panel.sharey(panels[0])
    if single:
        report = next(iter(reports.values()))
        for region, name in enumerate(REGIONS):
            _course(axis, [report.mean(region, k) for k in range(len(report.layers))], region, name)
        plain(axis, "mean, 95% interval", "layer", f"entropy, {unit}")
        figure.suptitle(f"dense / sparse = {report.ratio()}, {len(report.images)} images", fontsize=TITLE)
    else:
        axis.axhline(1.0, color=GRAY, linewidth=1.6, linestyle="--")
        for number, (name, report) in enumerate(reports.items()):
            shift = 0.06 * (number - (len(reports) - 1) / 2)
            ratios = [report.ratio(k) for k in range(len(report.layers))]
            _course(axis, ratios, number + len(REGIONS), f"ratio {name}", shift)
        plain(axis, "dense / sparse, 95% interval", "layer", "ratio of the means")
    axis.locator_params(axis="x", integer=True)
    entries: dict[str, Any] = {}
    for panel in (*panels, axis):
        entries |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=4, fontsize=LABEL, frameon=False
    )
    return figure


def _panels(figure: Figure, count: int) -> tuple[list[Any], Any]:
    """Panels for violins, two in a row, and one for the layer means: beside a single one, else below all."""
    if count == 1:
        first, last = figure.subplots(1, 2, sharey=True)
        last.tick_params(labelleft=True)
        return [first], last
    cells = figure.add_gridspec(-(-count // 2) + 1, 2)
    return [figure.add_subplot(cells[n // 2, n % 2]) for n in range(count)], figure.add_subplot(cells[-1, :])


def _violins(axis: Any, report: _Report) -> None:
    layers = spaced(report.values.shape[2], MOST_LAYERS)
    for region, side in enumerate(("low", "high")):
        values = [report.values[:, region, layer].ravel() for layer in layers]
        parts = axis.violinplot(values, range(len(layers)), widths=0.85, showextrema=False, showmeans=True, side=side)
        for body in parts["bodies"]:
            body.set(facecolor=COLOURS[region], edgecolor=COLOURS[region], alpha=0.55)
        parts["cmeans"].set(color=COLOURS[region], linewidth=3)
        parts["bodies"][0].set_label(REGIONS[region])
    axis.set_xticks(range(len(layers)), layers)


def _course(axis: Any, course: Any, number: int, label: str, shift: float = 0.0) -> None:
    axis.errorbar(
        np.arange(len(course)) + shift, [i.value for i in course], around(course), label=label,
        color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
        markersize=9 if len(course) <= 12 else 5, linewidth=2.4, capsize=4, elinewidth=1.8,
    )  # fmt: skip
