"""Summary of the runs of a study: one line per arm and budget, with paired differences from the control."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sfa_adapters.recipes.studies.results_file import Outcome, Row
from sfa_adapters.recipes.studies.settings import StudySettings
from sfa_adapters.statistics import Interval, seeds_bootstrap, sign_test

__all__ = ["ArmLine", "PicturesLine", "TuningLine", "by_pictures", "steps_to", "summarize", "tuning_lines"]


@dataclass(frozen=True)
class ArmLine:
    """Summary of one arm under one budget.

    Attributes:
        arm: The arm.
        budget: The budget.
        seeds: Seeds with a finished run.
        tests: Score on each test set and value of each measure, over seeds and pictures, in [0, 1].
        gain: Score on the first test set minus that of the control, paired by seed and picture; None for the control.
        gains: The same for every test set and measure.
        sign: p value of the sign test over seeds, on the first test set.
        steps: Threshold to (median step at which it was passed or None, how many seeds passed it).
        scalars: Largest scalar of each structural term, mean over seeds, logits.
        seconds: CPU time of a run, mean over seeds.
        numbers: Other measurements, mean over seeds.
    """

    arm: str
    budget: Mapping[str, Any]
    seeds: tuple[int, ...]
    tests: Mapping[str, Interval]
    gain: Interval | None
    gains: Mapping[str, Interval]
    sign: float | None
    steps: Mapping[float, tuple[float | None, int]]
    scalars: Mapping[str, float]
    seconds: float
    numbers: Mapping[str, float]


def summarize(settings: StudySettings, rows: Sequence[Row]) -> list[ArmLine]:
    """Summaries of all arms under all budgets with a finished run, in the order of the settings.

    Args:
        settings: The study.
        rows: Its finished runs.
    """
    lines = []
    for budget in settings.budgets:
        control = _runs(rows, settings.control, budget)
        for arm in settings.arms:
            runs = _runs(rows, arm, budget)
            if runs:
                lines.append(_line(settings, arm, budget, runs, {} if arm == settings.control else control))
    return lines


@dataclass(frozen=True)
class TuningLine:
    """Summary of one setting of the tuning.

    Attributes:
        name: The arm and its setting.
        seeds: Number of runs.
        score: On the validation pictures at the end, mean over seeds, in [0, 1].
        steps: Median step from which on the highest threshold of the study is passed; None where it is not.
    """

    name: str
    seeds: int
    score: float
    steps: float | None


def tuning_lines(settings: StudySettings, rows: Sequence[Row]) -> list[TuningLine]:
    """Summaries of all settings of the tuning with a finished run.

    Args:
        settings: The study.
        rows: Its finished tuning runs.
    """
    outcomes: dict[str, list[Outcome]] = {}
    for job in settings.tuning_jobs():
        for row in rows:
            if row.key == job.key:
                outcomes.setdefault(job.arm, []).append(row.outcome)
    highest = max(settings.thresholds)
    return [
        TuningLine(arm, len(runs), statistics.mean(run.curve[-1][1] for run in runs), _median_step(runs, highest)[0])
        for arm, runs in outcomes.items()
    ]


@dataclass(frozen=True)
class PicturesLine:
    """Scores of an arm by number of training pictures, with everything else equal.

    Attributes:
        arm: The arm.
        rest: The budget without `pictures`.
        scores: Number of training pictures to the score on the first test set.
        fewest: Threshold to the fewest pictures whose mean score passes it; None where none does.
    """

    arm: str
    rest: Mapping[str, Any]
    scores: Mapping[int, Interval]
    fewest: Mapping[float, int | None]


def by_pictures(settings: StudySettings, lines: Sequence[ArmLine]) -> list[PicturesLine]:
    """Arms that ran with several numbers of pictures and otherwise equal budgets; empty where there are none.

    Args:
        settings: The study.
        lines: From `summarize`.
    """
    groups: dict[str, tuple[str, dict[str, Any], dict[int, Interval]]] = {}
    for line in lines:
        if "pictures" in line.budget:
            rest = {name: value for name, value in line.budget.items() if name != "pictures"}
            group = groups.setdefault(f"{line.arm} {rest}", (line.arm, rest, {}))
            group[2][line.budget["pictures"]] = line.tests[settings.tests[0]]
    table_lines = []
    for arm, rest, scores in groups.values():
        if len(scores) > 1:
            ordered = dict(sorted(scores.items()))
            fewest = {
                t: next((n for n, score in ordered.items() if score.value >= t), None) for t in settings.thresholds
            }
            table_lines.append(PicturesLine(arm, rest, ordered, fewest))
    return table_lines


def steps_to(curve: Sequence[tuple[int, float]], threshold: float) -> int | None:
    """The first measured step from which on the score stays at or above a threshold; None where it does not.

    Args:
        curve: (step, score), in order of steps.
        threshold: The threshold.
    """
    passed = None
    for step, score in curve:
        if score < threshold:
            passed = None
        elif passed is None:
            passed = step
    return passed


def _runs(rows: Sequence[Row], arm: str, budget: Mapping[str, Any]) -> dict[int, Row]:
    return {row.seed: row for row in sorted(rows, key=lambda row: row.seed) if (row.arm, row.budget) == (arm, budget)}


def _line(
    settings: StudySettings, arm: str, budget: Mapping[str, Any], runs: dict[int, Row], control: dict[int, Row]
) -> ArmLine:
    outcomes = [row.outcome for row in runs.values()]
    both = [seed for seed in runs if seed in control]
    measured = [*settings.tests, *settings.measures]
    pairs = {
        test: [runs[seed].outcome.tests[test] - control[seed].outcome.tests[test] for seed in both] for test in measured
    }
    gains = {test: seeds_bootstrap(values) for test, values in pairs.items() if values}
    main = settings.tests[0]
    means = [float(np.mean(values)) for values in pairs[main]]
    return ArmLine(
        arm=arm,
        budget=budget,
        seeds=tuple(runs),
        tests={test: seeds_bootstrap([outcome.tests[test] for outcome in outcomes]) for test in measured},
        gain=gains.get(main),
        gains=gains,
        sign=sign_test(sum(mean > 0 for mean in means), sum(mean < 0 for mean in means)) if both else None,
        steps={threshold: _median_step(outcomes, threshold) for threshold in settings.thresholds},
        scalars=_means([outcome.scalars for outcome in outcomes]),
        seconds=statistics.mean(outcome.seconds for outcome in outcomes),
        numbers=_means([outcome.numbers for outcome in outcomes]),
    )


def _median_step(outcomes: Sequence[Outcome], threshold: float) -> tuple[float | None, int]:
    """Median step at which runs pass a threshold, and how many pass it.

    Runs that never pass count as infinitely slow, so the median is None where half of them or more never do.
    """
    steps = [steps_to(outcome.curve, threshold) for outcome in outcomes]
    median = statistics.median(float("inf") if step is None else step for step in steps)
    return None if median == float("inf") else median, sum(step is not None for step in steps)


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [name for name, value in records[0].items() if isinstance(value, int | float)] if records else []
    return {name: statistics.mean(float(record[name]) for record in records if name in record) for name in names}
