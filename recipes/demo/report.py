"""Report of the demo on charts: a table, as JSON and Markdown too, and a figure of test charts with answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sfa_adapters.recipes.demo.answer_page import AnsweredPicture, draw_answer_page
from sfa_adapters.recipes.nano.evaluate import Evaluation, Interval
from sfa_adapters.recipes.report_parts import markdown_table, metadata_line, percent, run_metadata, terminal_table

__all__ = ["Arm", "Report", "draw_answers", "results_table", "write_results"]

COLUMNS = ("model", "relaxed accuracy %", "not on the chart %", "trained", "ms/image")
SHOWN = 12  # test charts on the page of answers


@dataclass(frozen=True)
class Arm:
    """One compared model.

    Attributes:
        name: Its name in the table.
        evaluation: Its answers to the test questions.
        trainable: Parameters that were fine-tuned.
        seconds: Time of the fine-tuning.
    """

    name: str
    evaluation: Evaluation
    trainable: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """All numbers of a run.

    Attributes:
        arms: Before fine-tuning, with SFA, control.
        difference: Relaxed accuracy of SFA minus control, resampled in pairs.
        seconds: Wall-clock time so far.
    """

    arms: tuple[Arm, ...]
    difference: Interval
    seconds: float


def _rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            arm.name,
            percent(arm.evaluation.accuracy),
            percent(arm.evaluation.fabricated_share),
            f"{arm.trainable:,}",
            f"{arm.evaluation.ms_per_image:.1f}",
        )
        for arm in report.arms
    ]


def results_table(report: Report) -> Table:
    """The table for the terminal."""
    count = len(report.arms[0].evaluation.samples)
    title = f"{count} questions about charts of tables never trained on, 95% intervals"
    return terminal_table(COLUMNS, _rows(report), title)


def write_results(report: Report, folder: Path, command: str, settings: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`.

    Args:
        report: The numbers.
        folder: An existing folder.
        command: Command line of the run.
        settings: Settings of the run, for the record.
    """
    metadata = run_metadata(command, settings, report.seconds)
    arms = {arm.name: _numbers(arm) for arm in report.arms}
    record = {**metadata, "models": arms, "sfa_minus_control": _plain(report.difference)}
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = ["# sfa demo", "", f"`{command}`", ""]
    lines += markdown_table(COLUMNS, _rows(report))
    lines += ["", f"SFA minus control: {percent(report.difference)} points of relaxed accuracy (paired bootstrap).", ""]
    types = list(report.arms[0].evaluation.by_type())
    by_type = [(arm.name, *(percent(value) for value in arm.evaluation.by_type().values())) for arm in report.arms]
    lines += ["Relaxed accuracy by type of question:", "", *markdown_table(("model", *types), by_type), ""]
    count = len(report.arms[0].evaluation.samples)
    lines += [
        f"{count} questions; in brackets 95% bootstrap intervals. *Not on the chart*: share of the numeric answers to "
        "questions about one mark whose number is printed nowhere on the chart. *Trained*: parameters.",
        "",
    ]
    lines += [metadata_line(metadata)]
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _numbers(arm: Arm) -> dict[str, Any]:
    evaluation = arm.evaluation
    return {
        "relaxed_accuracy": _plain(evaluation.accuracy),
        "number_not_on_the_chart": _plain(evaluation.fabricated_share),
        "relaxed_accuracy_by_type": {name: _plain(value) for name, value in evaluation.by_type().items()},
        "relaxed_accuracy_by_kind": {name: _plain(value) for name, value in evaluation.by_kind().items()},
        "trainable_parameters": arm.trainable,
        "ms_per_image": round(evaluation.ms_per_image, 2),
        "finetuning_seconds": round(arm.seconds, 1),
    }


def _plain(interval: Interval) -> dict[str, float] | None:
    """An interval for JSON, which has no NaN."""
    return None if math.isnan(interval.value) else asdict(interval)


def draw_answers(report: Report, path: Path) -> None:
    """Draws the first test charts with question, true answer and the answer of each model.

    Args:
        report: The numbers.
        path: The file to write.
    """
    pictures = [
        AnsweredPicture(
            np.asarray(sample.image),
            sample.question,
            " or ".join(sample.answers),
            [(a.name, a.evaluation.answers[number], bool(a.evaluation.correct[number])) for a in report.arms],
        )
        for number, sample in enumerate(report.arms[0].evaluation.samples[:SHOWN])
    ]
    draw_answer_page(pictures, "Test charts, the first of the list, and the answers", path)
