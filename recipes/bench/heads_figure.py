"""The figure of `sfa bench heads`: accuracy over the share of pruned heads, and measured and expected speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sfa_adapters.figure_style import COLOURS, MARKERS
from sfa_adapters.recipes.bench.heads_report import HeadBench
from sfa_adapters.statistics import Interval, bootstrap

__all__ = ["plot_bench_heads"]

LABEL, TITLE = 13, 14
STYLES = ("-", "--", ":", "-.")


def plot_bench_heads(bench: HeadBench, path: Path) -> Path:
    """Draws accuracy over the share of pruned heads, one panel per head plan, and measured and expected speed.

    Args:
        bench: As `run_bench_heads` returns it.
        path: The file to write; its ending chooses the format.

    Returns:
        The file.
    """
    from matplotlib.figure import Figure

    plans = list(dict.fromkeys(arm.plan for arm in bench.arms)) if bench.whole is not None else []
    count = len(plans) + 1
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns, 4.6 * rows + 0.6), dpi=120, layout="constrained")
    axes: list[Any] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for plan, axis in zip(plans, axes, strict=False):
        _accuracy(bench, plan, axis)
    _speed(bench, axes[len(plans)])
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.set_xlabel("heads gone, %", fontsize=LABEL)
        axis.tick_params(labelsize=LABEL - 1)
        axis.grid(color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return path


def _accuracy(bench: HeadBench, plan: str, axis: Any) -> None:
    assert bench.whole is not None
    of_plan = [arm for arm in bench.arms if arm.plan == plan]
    methods = list(dict.fromkeys(arm.method for arm in bench.arms))
    kinds = list(dict.fromkeys(arm.compensation for arm in bench.arms))
    lines = list(dict.fromkeys((arm.method, arm.compensation) for arm in of_plan))
    # Colour shows what varies; where both vary, colour is the method and line style the compensation.
    for number, (method, kind) in enumerate(lines):
        place = methods.index(method) if len(methods) > 1 else kinds.index(kind)
        style = STYLES[kinds.index(kind) % 4] if len(methods) > 1 else "-"
        label = method if len(kinds) == 1 else kind if len(methods) == 1 else f"{method}, {kind}"
        arms = sorted((a for a in of_plan if (a.method, a.compensation) == (method, kind)), key=lambda a: a.removed)
        accuracies = [a.quality.accuracy for a in arms if a.quality is not None]
        # Points at one share are shifted sideways, so that their intervals do not overlap.
        places = [100 * a.removed / a.total + 0.35 * (number - (len(lines) - 1) / 2) for a in arms]
        error = [[100 * (t.value - t.low) for t in accuracies], [100 * (t.high - t.value) for t in accuracies]]
        axis.errorbar(
            places, [100 * t.value for t in accuracies], yerr=error, label=label, color=COLOURS[place % 4],
            marker=MARKERS[place % 4], linestyle=style, linewidth=2, markersize=7, capsize=3, elinewidth=1.2,
        )  # fmt: skip
    axis.axhline(100 * bench.whole.accuracy.value, color="black", linestyle="--", linewidth=1.4, label="all heads")
    axis.set_title(f"{plan}: accuracy, % (95% interval)", fontsize=TITLE)
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.legend(fontsize=LABEL - 2, frameon=False, loc="lower left")


def _speed(bench: HeadBench, axis: Any) -> None:
    """Draws speed; arms with equally many pruned heads are equally fast, so one point is their geometric mean."""
    for name, colour, marker in (("prefill", COLOURS[0], "o"), ("decode", COLOURS[1], "s")):
        by_share: dict[float, list[tuple[Interval, float]]] = {}
        for arm in bench.arms:
            speed = arm.receipt.speed
            ratio = None if speed is None else getattr(speed, f"{name}_ratio")
            if ratio is not None:
                of_share = by_share.setdefault(100 * arm.removed / arm.total, [])
                of_share.append((ratio, getattr(speed, f"expected_{name}")))
        if not by_share:
            continue
        places = sorted(by_share)
        measured = [_pooled([ratio for ratio, _ in by_share[place]]) for place in places]
        error = [[m.value - m.low for m in measured], [m.high - m.value for m in measured]]
        shift = -0.25 if name == "prefill" else 0.25
        axis.errorbar(
            [place + shift for place in places], [m.value for m in measured], yerr=error, fmt=marker, color=colour,
            markersize=7, capsize=3, elinewidth=1.2, label=f"{name}, measured",
        )  # fmt: skip
        expected = [np.mean([of_share for _, of_share in by_share[place]]) for place in places]
        axis.plot(places, expected, color=colour, linewidth=2, label=f"{name}, expected")
    axis.axhline(1, color="black", linestyle="--", linewidth=1.4)
    axis.set_xlim(left=0)
    axis.set_title("times faster (95% interval)", fontsize=TITLE)
    axis.legend(fontsize=LABEL - 2, frameon=False, loc="best")


def _pooled(ratios: Sequence[Interval]) -> Interval:
    if len(ratios) == 1:
        return ratios[0]
    interval = bootstrap(np.log([ratio.value for ratio in ratios]))
    return Interval(*np.exp([interval.value, interval.low, interval.high]).tolist())
