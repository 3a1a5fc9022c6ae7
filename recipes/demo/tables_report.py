"""Report of `sfa demo` on tables: the effect in one sentence, a table, and both as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sfa_adapters.recipes.report_parts import markdown_table, metadata_line, percent, run_metadata, terminal_table
from sfa_adapters.statistics import Interval, bootstrap

__all__ = ["TablesArm", "TablesReport", "effect", "results_table", "write_results"]

COLUMNS = ("model", "right answers %", "minus without SFA", "trained", "largest w")


@dataclass(frozen=True, eq=False)
class TablesArm:
    """One of the three models.

    Attributes:
        name: Its name.
        curve: (step, share of right answers about validation tables).
        scores: Share of right answers about each test table.
        answers: Its answers to one question about each of the first test tables.
        scalars: Largest scalar of each structural term, logits; empty without SFA.
        trainable: Number of trained parameters.
        seconds: Time of the training, the points of the curve included.
    """

    name: str
    curve: Sequence[tuple[int, float]]
    scores: np.ndarray
    answers: tuple[str, ...]
    scalars: Mapping[str, float]
    trainable: int
    seconds: float

    @property
    def accuracy(self) -> Interval:
        """Share of right answers, with an interval over tables."""
        return bootstrap(self.scores)

    def minus(self, other: TablesArm) -> Interval:
        """Difference in the share of right answers, paired by table.

        Args:
            other: The model that is subtracted.
        """
        return bootstrap(self.scores - other.scores)


@dataclass(frozen=True, eq=False)
class TablesReport:
    """All numbers of a run.

    Attributes:
        arms: Without SFA, SFA, placebo.
        before: Share of right answers about each test table before fine-tuning.
        each: Questions about a table.
        steps: Fine-tuning steps.
        seconds: Wall-clock time so far.
    """

    arms: tuple[TablesArm, ...]
    before: np.ndarray
    each: int
    steps: int
    seconds: float

    @property
    def gain(self) -> Interval:
        """Share of right answers with SFA minus without."""
        return self.arms[1].minus(self.arms[0])


def effect(report: TablesReport) -> str:
    """A sentence with the effect and its interval, or that there is no effect."""
    gain, tables = report.gain, len(report.before)
    numbers = f"SFA minus without SFA is {percent(gain)} points of right answers after {report.steps} steps"
    basis = f"(95%, paired over {tables} tables of unseen countries)."
    if gain.low > 0:
        return f"SFA learns to read tables faster: {numbers} {basis}"
    if gain.high < 0:
        return f"SFA is worse than nothing here: {numbers} {basis}"
    return f"No effect of SFA can be seen: {numbers} {basis}"


def _rows(report: TablesReport) -> list[tuple[str, ...]]:
    rows = [("before training", percent(bootstrap(report.before)), "", "0", "")]
    for arm in report.arms:
        gain = "" if arm is report.arms[0] else percent(arm.minus(report.arms[0]))
        largest = f"{max(arm.scalars.values()):.1f}" if arm.scalars else ""
        rows.append((arm.name, percent(arm.accuracy), gain, f"{arm.trainable:,}", largest))
    return rows


def results_table(report: TablesReport) -> Table:
    """The table for the terminal."""
    count = report.each * len(report.before)
    title = f"{count} questions about tables of unseen countries, 95% intervals"
    return terminal_table(COLUMNS, _rows(report), title)


def write_results(report: TablesReport, folder: Path, command: str, settings: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`.

    Args:
        report: The numbers.
        folder: An existing folder.
        command: Command line of the run.
        settings: Settings of the run, for the record.
    """
    record: dict[str, Any] = {
        **run_metadata(command, {**settings, "steps": report.steps}, report.seconds),
        "questions": report.each * len(report.before),
        "before_training": asdict(bootstrap(report.before)),
        "models": {arm.name: _numbers(arm, report.arms[0]) for arm in report.arms},
        "sfa_minus_without": asdict(report.gain),
        "effect": effect(report),
    }
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    lines = ["# sfa demo", "", f"`{command}`", "", effect(report), ""]
    lines += markdown_table(COLUMNS, _rows(report))
    steps = [str(step) for step, _ in report.arms[0].curve]
    lines += ["", "Right answers about validation tables, %, by step:", ""]
    curves = [(arm.name, *(f"{100 * score:.1f}" for _, score in arm.curve)) for arm in report.arms]
    lines += markdown_table(("model", *steps), curves)
    lines += [
        "",
        f"{record['questions']} questions, {report.each} about each table; an answer is right when it is the true "
        "number to the letter. In brackets 95% bootstrap intervals over tables, differences paired. *placebo*: SFA "
        "whose places are shuffled. *trained*: parameters. *largest w*: the largest structural scalar, logits.",
        "",
    ]
    lines += [metadata_line(record)]
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _numbers(arm: TablesArm, control: TablesArm) -> dict[str, Any]:
    return {
        "right": asdict(arm.accuracy),
        "minus_without_sfa": None if arm is control else asdict(arm.minus(control)),
        "curve": [[step, round(score, 4)] for step, score in arm.curve],
        "largest_scalars": {term: round(size, 3) for term, size in arm.scalars.items()},
        "trainable_parameters": arm.trainable,
        "finetuning_seconds": round(arm.seconds, 1),
    }
