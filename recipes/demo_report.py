"""What the demo tells: one table, the same as JSON and Markdown, and a page of test charts with the answers."""

from __future__ import annotations

import json
import math
import os
import platform
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sfa_adapters.recipes.evaluate import Evaluation, Interval

__all__ = ["Arm", "Report", "draw_answers", "percent", "results_table", "write_results"]

COLUMNS = ("model", "relaxed accuracy %", "not on the chart %", "trained", "ms/image")
PAGE = (4, 3)  # rows and columns of the page of test charts


@dataclass(frozen=True)
class Arm:
    """One compared model.

    Attributes:
        name: What it is called in the table.
        evaluation: Its answers to the test questions.
        trainable: Parameters that were fine-tuned.
        seconds: Time that fine-tuning took.
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


def percent(interval: Interval) -> str:
    """`62.3 [58.1, 66.4]`, or a dash where there was nothing to measure."""
    if math.isnan(interval.value):
        return "-"
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


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
    table = Table(*COLUMNS, title=f"{count} questions about charts of tables never trained on, 95% intervals")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in _rows(report):
        table.add_row(*row)
    return table


def hardware() -> str:
    """Processor and threads, or the graphics card."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():  # Linux leaves platform.processor() empty
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def write_results(report: Report, folder: Path, command: str, settings: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`."""
    packages = ("sfa-adapters", "torch", "transformers", "peft")
    facts = {
        "command": command,
        **settings,
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "seconds": round(report.seconds, 1),
    }
    arms = {arm.name: _numbers(arm) for arm in report.arms}
    record = {**facts, "models": arms, "sfa_minus_control": _plain(report.difference)}
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = ["# sfa demo", "", f"`{command}`", ""]
    lines += _markdown(COLUMNS, _rows(report))
    lines += ["", f"SFA minus control: {percent(report.difference)} points of relaxed accuracy (paired bootstrap).", ""]
    types = list(report.arms[0].evaluation.by_type())
    by_type = [(arm.name, *(percent(value) for value in arm.evaluation.by_type().values())) for arm in report.arms]
    lines += ["Relaxed accuracy by type of question:", "", *_markdown(("model", *types), by_type), ""]
    count = len(report.arms[0].evaluation.samples)
    lines += [
        f"{count} questions; in brackets 95% bootstrap intervals. *Not on the chart*: share of the numeric answers to "
        "questions about one mark whose number is printed nowhere on the chart. *Trained*: parameters.",
        "",
    ]
    told = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines += [
        f"Seed {settings['seed']}, {settings['steps']} steps. {facts['hardware']}. {told}. {report.seconds:.0f} s."
    ]
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
    """JSON knows no NaN."""
    return None if math.isnan(interval.value) else asdict(interval)


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]


def draw_answers(report: Report, path: Path) -> None:
    """Draws the first test charts, as they come, with the question, the true answer and what each model said."""
    from matplotlib.figure import Figure

    rows, columns = PAGE
    samples = report.arms[0].evaluation.samples[: rows * columns]
    figure = Figure(figsize=(3.9 * columns, 5.9 * rows), dpi=110, layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for number, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[])
        if number >= len(samples):
            axis.set_axis_off()
            continue
        axis.imshow(samples[number].image, interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(samples[number].question, 34)), fontsize=13)
        lines = [("true", " or ".join(samples[number].answers), "black")]
        for arm in report.arms:
            right = bool(arm.evaluation.correct[number])
            said = f"{arm.evaluation.answers[number] or '(nothing)'}  {'right' if right else 'wrong'}"
            lines.append((arm.name, said, "#1a7f37" if right else "#b3261e"))
        for line, (name, said, color) in enumerate(lines):
            text = f"{name}: {said}"
            axis.text(0.02, -0.07 - 0.085 * line, text, color=color, fontsize=13, transform=axis.transAxes)
    figure.suptitle("Test charts, the first of the list, and the answers", fontsize=17)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)
