"""The figures of a study: score over steps, and score on every test set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfa_adapters import figure_style
from sfa_adapters.recipes.studies.results_file import Row
from sfa_adapters.recipes.studies.settings import StudySettings
from sfa_adapters.recipes.studies.summary import ArmLine

__all__ = ["draw_curves", "draw_tests"]

# Okabe and Ito's palette, distinguishable for colour-blind people.
COLOURS = (*figure_style.COLOURS, figure_style.GRAY, "#000000")
STYLES = ("-", "--", ":", "-.")
PANELS = 2  # side by side, so that a figure is legible at half its width


def draw_curves(settings: StudySettings, rows: Sequence[Row], path: Path) -> None:
    """Draws the mean score on validation pictures over steps, one panel per budget.

    Bands go from the worst to the best seed. Arms with `figure: false` in their settings are left out; the table has
    them.

    Args:
        settings: The study.
        rows: Its finished runs.
        path: The file to write.
    """
    from matplotlib.figure import Figure

    budgets = [budget for budget in settings.budgets if any(row.budget == budget for row in rows)]
    columns = min(len(budgets), PANELS)
    lines = -(-len(budgets) // columns)
    figure = Figure(figsize=(5.2 * columns + 1.8, 4.0 * lines + 0.4), dpi=130, layout="constrained")
    grid: Any = figure.subplots(lines, columns, squeeze=False, sharey=True)
    axes: Any = grid.flatten()
    for empty in axes[len(budgets) :]:
        empty.set_axis_off()
    for axis, budget in zip(axes, budgets, strict=False):
        for number, arm in enumerate(_shown(settings)):
            curves = [row.outcome.curve for row in rows if (row.arm, row.budget) == (arm, budget)]
            if not curves:
                continue
            steps = [step for step, _ in curves[0]]
            scores = 100 * np.array([[score for _, score in curve] for curve in curves])
            colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS)]
            axis.plot(steps, scores.mean(0), style, color=colour, label=arm, linewidth=2.2)
            if number < 3:
                axis.fill_between(steps, scores.min(0), scores.max(0), color=colour, alpha=0.12, linewidth=0)
        axis.set_title(", ".join(f"{value} {name}" for name, value in budget.items()), fontsize=14)
        axis.set_xlabel("steps", fontsize=14)
        axis.tick_params(labelsize=12)
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 101)
    for axis in grid[:, 0]:
        axis.set_ylabel("right answers, %", fontsize=14)
    ends = legend_lines(axes)
    figure.legend(ends.values(), ends.keys(), loc="outside right center", fontsize=14, frameon=False)
    figure.savefig(path)


def legend_lines(axes: Iterable[Any]) -> dict[str, Any]:
    """One line of each arm, by name: in the order of their last points in the fullest panel, then those of others."""
    ends: dict[str, Any] = {}
    for axis in sorted(axes, key=lambda axis: -len(axis.get_lines())):
        for line in sorted(axis.get_lines(), key=lambda line: -line.get_ydata()[-1]):
            ends.setdefault(line.get_label(), line)
    return ends


def draw_tests(settings: StudySettings, lines: Sequence[ArmLine], path: Path) -> None:
    """Draws bars with 95% intervals: each arm on each test set under the primary budget.

    Args:
        settings: The study.
        lines: From `summarize`.
        path: The file to write.
    """
    from matplotlib.figure import Figure

    shown = _shown(settings)
    here = [line for line in lines if line.budget == settings.primary.budget and line.arm in shown]
    if not here:
        return
    figure = Figure(figsize=(1.8 * len(settings.tests) + 2.4, 4.4), dpi=130, layout="constrained")
    axis: Any = figure.subplots()
    width = 0.84 / len(here)
    for number, line in enumerate(here):
        position = shown.index(line.arm)
        places = np.arange(len(settings.tests)) + (number - (len(here) - 1) / 2) * width
        intervals = [line.tests[test] for test in settings.tests]
        heights = np.array([100 * interval.value for interval in intervals])
        ends = np.array([[100 * i.value - 100 * i.low, 100 * i.high - 100 * i.value] for i in intervals]).T.clip(0)
        hatch = "//" if position >= len(COLOURS) else None
        colour = COLOURS[position % len(COLOURS)]
        axis.bar(places, heights, width, yerr=ends, color=colour, label=line.arm, hatch=hatch, ecolor="#444444")
    axis.set_xticks(range(len(settings.tests)), settings.tests, fontsize=14)
    axis.set_ylabel("right answers, %", fontsize=14)
    axis.tick_params(axis="y", labelsize=12)
    axis.set_ylim(0, 101)
    figure.legend(loc="outside right center", fontsize=13, frameon=False)
    figure.savefig(path)


def _shown(settings: StudySettings) -> list[str]:
    return [arm for arm, options in settings.arms.items() if options.get("figure", True)]
