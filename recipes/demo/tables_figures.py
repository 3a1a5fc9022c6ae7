"""The two figures of `sfa demo` on tables: right answers over steps, and test tables with the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfa_adapters.figure_style import BLUE, GRAY, ORANGE
from sfa_adapters.recipes.demo.answer_page import AnsweredPicture, draw_answer_page
from sfa_adapters.recipes.demo.tables_report import TablesReport
from sfa_adapters.recipes.synthetic.questions import Question
from sfa_adapters.recipes.synthetic.table_pictures import TablePicture

__all__ = ["draw_curve", "draw_tables"]

LINES = ((GRAY, "--"), (BLUE, "-"), (ORANGE, ":"))


def draw_curve(report: TablesReport, path: Path) -> None:
    """Draws right answers about validation tables over steps, one line per model.

    Args:
        report: The numbers.
        path: The file to write.
    """
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
    """Draws test tables, each with a question, the true answer and the answer of each model.

    Args:
        report: The numbers, with the answers to these questions in order.
        pictures: At most twelve tables.
        questions: One question about each.
        path: The file to write.
    """
    answered = [
        AnsweredPicture(
            picture.image,
            question.text,
            question.answer,
            [(arm.name, arm.answers[number], arm.answers[number] == question.answer) for arm in report.arms],
        )
        for number, (picture, question) in enumerate(zip(pictures, questions, strict=True))
    ]
    draw_answer_page(answered, "Test tables, the first ones as they come, and the answers", path)
