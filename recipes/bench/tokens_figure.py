"""The figure of `sfa bench tokens`: accuracy and time to the first token over the share of kept image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sfa_adapters.figure_style import COLOURS, GRID, MARKERS

__all__ = ["plot_bench"]

LABEL, TITLE = 13, 14
LINES = tuple(zip(COLOURS, MARKERS, strict=True))


class Measured(Protocol):
    """What the figure needs of an `Arm`."""

    @property
    def selector(self) -> str:
        """Name of the line."""
        ...

    @property
    def keep(self) -> float:
        """Share of image tokens kept."""
        ...

    @property
    def first_ratio(self) -> float:
        """Time to first token over that of the untouched host."""
        ...

    @property
    def quality(self) -> Any:
        """Quality of the answers, with `accuracy`; or None."""
        ...


def plot_bench(arms: Sequence[Measured], path: Path) -> Path:
    """Draws one line per selector; the first arm is the untouched host.

    Args:
        arms: As `run_bench` returns them.
        path: The file to write; its ending chooses the format.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure

    untouched, names = arms[0], list(dict.fromkeys(arm.selector for arm in arms[1:]))
    has_quality = untouched.quality is not None
    figure = Figure(figsize=(13 if has_quality else 7, 5.6), dpi=120, layout="constrained")
    axes: Any = figure.subplots(1, 2 if has_quality else 1, squeeze=False)[0]
    for number, name in enumerate(names):
        of_selector = sorted((arm for arm in arms if arm.selector == name), key=lambda arm: arm.keep)
        colour, marker = LINES[number % len(LINES)]
        style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": 2.2, "markersize": 8, "label": name}
        axes[-1].plot([100 * arm.keep for arm in of_selector], [100 * arm.first_ratio for arm in of_selector], **style)
        if has_quality:
            accuracies = [arm.quality.accuracy for arm in of_selector]
            error = [[100 * (a.value - a.low) for a in accuracies], [100 * (a.high - a.value) for a in accuracies]]
            # Points at one share are shifted sideways, so that their intervals do not overlap.
            places = [100 * arm.keep + 1.1 * (number - (len(names) - 1) / 2) for arm in of_selector]
            axes[0].errorbar(
                places, [100 * a.value for a in accuracies], yerr=error, capsize=4, elinewidth=1.4, **style
            )
    if has_quality:
        base = untouched.quality.accuracy
        axes[0].axhline(100 * base.value, color="black", linestyle="--", linewidth=1.4, label="untouched")
        axes[0].set_title("relaxed accuracy, % (95% interval)", fontsize=TITLE)
        axes[0].set_ylim(bottom=0)
    axes[-1].axhline(100, color="black", linestyle="--", linewidth=1.4)
    axes[-1].set_title("time to first token, % of the untouched host", fontsize=TITLE)
    axes[-1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("image tokens kept, %", fontsize=LABEL)
        axis.tick_params(labelsize=LABEL - 1)
        axis.grid(color=GRID, linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=LABEL - 2, frameon=False)
    figure.savefig(path)
    return path
