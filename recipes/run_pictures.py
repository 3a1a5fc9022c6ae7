"""The figures of a run: scores before and after training, and the learned bias."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sfa_adapters import figure_style
from sfa_adapters.evaluation.scores import ScoreTable
from sfa_adapters.figures import plot_bias, write_bias_table
from sfa_adapters.inject import describe

__all__ = ["draw_bias", "draw_scores"]

COLOURS = ("#9aa5b1", *figure_style.COLOURS[:3])  # the host as it was is gray
ANY_SIZE = (16, 16)  # rows and columns that are drawn for a tower without a fixed grid


def draw_scores(runs: Mapping[str, ScoreTable], path: Path, title: str = "") -> Path:
    """Draws scores as bars with 95% intervals, one group of bars for each group of questions.

    Args:
        runs: Scores of each run, on the same data.
        path: The file to write.
        title: Title of the figure.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure

    first = next(iter(runs.values()))
    groups = [score.group for score in first.scores]
    width = 0.8 / len(runs)
    figure = Figure(figsize=(2.4 + 1.6 * len(groups), 3.6), dpi=160, layout="constrained")
    axis: Any = figure.subplots()
    for number, (name, table) in enumerate(runs.items()):
        places = [place + (number - (len(runs) - 1) / 2) * width for place in range(len(groups))]
        means = [table[group].mean for group in groups]
        low = [100 * max(0.0, m.value - m.low) for m in means]
        high = [100 * max(0.0, m.high - m.value) for m in means]
        heights = [100 * m.value for m in means]
        axis.bar(places, heights, width * 0.92, color=COLOURS[number % len(COLOURS)], label=name)
        axis.errorbar(places, heights, yerr=(low, high), fmt="none", ecolor="black", capsize=4, linewidth=1.2)
        for place, height, more in zip(places, heights, high, strict=True):
            axis.text(place, height + more + 1.5, f"{height:.1f}", ha="center", va="bottom", fontsize=11)
    axis.set_xticks(range(len(groups)), [f"{g}\n{first[g].of:,} questions" for g in groups], fontsize=11)
    axis.set_ylabel(f"{first.metric} score, %", fontsize=12)
    axis.set_ylim(0, min(118.0, max(100 * t[g].mean.high for t in runs.values() for g in groups) * 1.25 + 8))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=11, ncols=len(runs), loc="outside upper right")
    if title:
        figure.suptitle(title, fontsize=12, x=0.02, ha="left")
    figure.savefig(path)
    return path


def draw_bias(model: nn.Module, folder: Path, title: str = "") -> Path:
    """Draws the learned bias as kernels, `bias.png`, and writes its scalars, `bias.csv`.

    Args:
        model: A host with SFA.
        folder: Folder for both files.
        title: Title of the figure.

    Returns:
        The figure's file.
    """
    write_bias_table(model, folder / "bias.csv")
    return plot_bias(model, folder / "bias.png", grid=describe(model).grid or ANY_SIZE, title=title)
