"""Compares hallucination reports: one figure for several, and the paired change from one to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.figure_style import BLUE, COLOURS, GRAY, ORANGE, YELLOW
from sfa_adapters.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compare", "paired_change"]

CLASS_COLORS = (BLUE, YELLOW, ORANGE, GRAY)  # correct, misread, fabricated, other


class _Judgement(Protocol):
    @property
    def index(self) -> int: ...
    @property
    def kind(self) -> str: ...


class _Report(Protocol):
    """The parts of a `HallucinationReport` used here; it imports this module, so it cannot be imported here."""

    @property
    def judged(self) -> Sequence[_Judgement]: ...
    @property
    def skipped(self) -> Sequence[object]: ...
    @property
    def counts(self) -> Mapping[Any, int]: ...
    @property
    def shares(self) -> Mapping[Any, Interval]: ...


def compare(reports: Mapping[str, _Report]) -> Figure:
    """Draws hallucination reports side by side, for instance before and after training.

    Args:
        reports: `HallucinationReport`s by their name in the legend.

    Returns:
        A figure with one bar per class and report: the share in percent with its 95% interval.

    Raises:
        DataError: there is no report.
    """
    from matplotlib.figure import Figure

    if not reports:
        raise DataError("There is no report to draw.")
    figure = Figure(figsize=(8, 3.0 + 1.2 * len(reports)), dpi=150, layout="constrained")
    axes = figure.subplots()
    classes = list(next(iter(reports.values())).counts)
    thick, most, labels = 0.8 / len(reports), 0.0, []
    for number, (name, report) in enumerate(reports.items()):
        shares = report.shares.values()
        values, lows, highs = (100 * np.array([getattr(s, end) for s in shares]) for end in ("value", "low", "high"))
        places = np.arange(len(classes)) + (number - (len(reports) - 1) / 2) * thick
        note = f"n = {len(report.judged)}" + (f", {len(report.skipped)} skipped" if report.skipped else "")
        labels.append(f"{name} ({note})" if name else note)
        color = CLASS_COLORS if len(reports) == 1 else COLOURS[number % len(COLOURS)]
        axes.barh(places, values, 0.9 * thick, color=color, label=labels[-1])
        around = np.maximum((values - lows, highs - values), 0.0)  # rounding may put the mean outside by an ulp
        axes.errorbar(values, places, xerr=around, fmt="none", ecolor="black", capsize=4, linewidth=1.5)
        for value, high, place in zip(values, highs, places, strict=True):
            axes.annotate(f"{value:.1f}%", (high, place), (8, 0), textcoords="offset points", va="center", fontsize=16)
        most = max(most, float(highs.max()))
    axes.set_yticks(range(len(classes)), classes, fontsize=17)
    axes.set_xlim(0, 1.25 * most)  # room for the percentages, but no ticks beyond 100%
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= min(100, 1.25 * most)])
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=15)
    axes.set_xlabel("share of judged answers (%), 95% interval", fontsize=16)
    axes.spines[["top", "right"]].set_visible(False)
    if len(reports) == 1:
        axes.set_title(labels[0], fontsize=16)
    else:
        figure.legend(loc="outside upper center", ncols=1, fontsize=16, frameon=False)
    return figure


def paired_change(before: _Report, after: _Report) -> list[dict[str, Any]]:
    """Change of the shares on the same samples, with a paired bootstrap over samples.

    Args:
        before: first `HallucinationReport`.
        after: second report, of the same samples in the same order.

    Returns:
        One row per class, and one for `numeric hallucination`: `quantity`, `of` (samples judged in both reports),
        `change` (share after minus share before) and the ends of its 95% interval, `low` and `high`.

    Raises:
        DataError: the reports have different numbers of samples, or no sample was judged in both.
    """
    sizes = [len(report.judged) + len(report.skipped) for report in (before, after)]
    first, second = ({j.index: j.kind for j in report.judged} for report in (before, after))
    both = sorted(first.keys() & second.keys())
    if sizes[0] != sizes[1] or not both:
        raise DataError(f"Reports about {sizes[0]} and {sizes[1]} samples, {len(both)} judged in both, are no pairs.")
    groups = {kind: {kind} for kind in before.counts} | {"numeric hallucination": {"misread", "fabricated"}}
    rows: list[dict[str, Any]] = []
    for quantity, kinds in groups.items():
        change = bootstrap(np.array([float(second[i] in kinds) - float(first[i] in kinds) for i in both]))
        rows.append({"quantity": quantity, "of": len(both), "change": change.value})
        rows[-1] |= {"low": change.low, "high": change.high}
    return rows
