"""The two figures of `sfa demo` about tables: right answers over steps, and a page of test tables with the answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfa_adapters.recipes.demo_tables_report import TablesReport
from sfa_adapters.recipes.questions import Question
from sfa_adapters.recipes.table_pictures import TablePicture

__all__ = ["draw_curve", "draw_tables"]

# Okabe and Ito's palette: told apart by people who do not see all colours.
LINES = (("#7F7F7F", "--"), ("#0072B2", "-"), ("#D55E00", ":"))
RIGHT, WRONG = "#1a7f37", "#b3261e"
PAGE = (3, 4)  # rows and columns of the page of tables


def draw_curve(report: TablesReport, path: Path) -> None:
    """Right answers about validation tables over steps, one line per model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    axis: Any = figure.subplots()
    for arm, (colour, style) in zip(report.arms, LINES, strict=True):
        steps, scores = zip(*arm.curve, strict=True)
        axis.plot(steps, [100 * score for score in scores], style, color=colour, linewidth=2.6, label=arm.name)
        axis.plot(steps, [100 * score for score in scores], "o", color=colour, markersize=5)
    axis.set_xlabel("steps", fontsize=14)
    axis.set_ylabel("right answers, %", fontsize=14)
    axis.set_title("Tables of countries that training does not show", fontsize=14)
    axis.tick_params(labelsize=12)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=13, frameon=False)
    figure.savefig(path)


def draw_tables(
    report: TablesReport, pictures: Sequence[TablePicture], questions: Sequence[Question], path: Path
) -> None:
    """Test tables as they come, each with a question, the true answer, and what each model says.

    Args:
        report: Whose arms have answered the questions, in this order.
        pictures: At most twelve.
        questions: One about each.
        path: Where to.
    """
    from matplotlib.figure import Figure

    rows, columns = PAGE
    figure = Figure(figsize=(3.9 * columns, 5.9 * rows), dpi=110, layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        if number >= len(pictures):
            axis.set_axis_off()
            continue
        axis.imshow(pictures[number].image, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(questions[number].text, 30)), fontsize=14)
        true = questions[number].answer
        lines = [("true", true, "black")]
        for arm in report.arms:
            answer = arm.answers[number]
            lines.append((arm.name, answer or "(nothing)", RIGHT if answer == true else WRONG))
        for line, (name, text, colour) in enumerate(lines):
            mark = "" if colour == "black" else "  right" if colour == RIGHT else "  wrong"
            place = (0.02, -0.08 - 0.09 * line)
            axis.text(*place, f"{name}: {text}{mark}", color=colour, fontsize=14, transform=axis.transAxes)
    figure.suptitle("Test tables, the first ones as they come, and the answers", fontsize=18)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
