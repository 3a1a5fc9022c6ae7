"""The report of a study: tables for the terminal and as Markdown, and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sfa_adapters.recipes.report_parts import markdown_table, percent
from sfa_adapters.recipes.studies.figures import draw_curves, draw_tests
from sfa_adapters.recipes.studies.results_file import Row
from sfa_adapters.recipes.studies.settings import StudySettings
from sfa_adapters.recipes.studies.summary import ArmLine, PicturesLine, by_pictures, summarize, tuning_lines

__all__ = ["print_report", "print_tuning", "verdict", "write_report"]


def print_report(settings: StudySettings, rows: Sequence[Row], console: Console) -> None:
    """Prints one table per budget: score, gain over the control, steps.

    Args:
        settings: The study.
        rows: Its finished runs.
        console: Where they are printed.
    """
    lines = summarize(settings, rows)
    for budget in settings.budgets:
        here = [line for line in lines if line.budget == budget]
        if not here:
            continue
        table = Table(title=f"{settings.name}, {_budget(budget)}: {settings.tests[0]}", box=box.SIMPLE_HEAD)
        columns = ("arm", "seeds", "score %", f"minus {settings.control}", *map(_threshold, settings.thresholds))
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for line in here:
            steps = [_steps(line, threshold) for threshold in settings.thresholds]
            main = line.tests[settings.tests[0]]
            table.add_row(line.arm, str(len(line.seeds)), percent(main), percent(line.gain), *steps)
        console.print(table)
    console.print(verdict(settings, lines))


def print_tuning(settings: StudySettings, rows: Sequence[Row], console: Console) -> None:
    """Prints the scores of the tuning; the chosen values are written into the settings by hand.

    Args:
        settings: The study.
        rows: Its finished tuning runs.
        console: Where they are printed.
    """
    table = Table(title=f"{settings.name}: tuning, score on validation pictures", box=box.SIMPLE_HEAD)
    for number, column in enumerate(_tuning_head(settings)):
        table.add_column(column, justify="right" if number else "left")
    for row in _tuning_rows(settings, rows):
        table.add_row(*row)
    console.print(table)


def write_report(
    settings: StudySettings, rows: Sequence[Row], folder: Path, tuning: Sequence[Row] = ()
) -> list[ArmLine]:
    """Writes `table.md`, `table.json`, `curves.png` and `tests.png`.

    Args:
        settings: The study.
        rows: Its finished runs.
        folder: The folder to write.
        tuning: Runs of its tuning, for the table.

    Returns:
        The lines of the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = summarize(settings, rows)
    (folder / "table.md").write_text(_page(settings, lines, tuning), encoding="utf-8")
    records = [_record(line) for line in lines]
    (folder / "table.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    draw_curves(settings, rows, folder / "curves.png")
    if len(settings.tests) > 1:
        draw_tests(settings, lines, folder / "tests.png")
    return lines


def verdict(settings: StudySettings, lines: Sequence[ArmLine]) -> str:
    """The result of the primary comparison in one sentence.

    Args:
        settings: The study.
        lines: From `summarize`.
    """
    primary = settings.primary
    line = next((ln for ln in lines if (ln.arm, ln.budget) == (primary.arm, primary.budget)), None)
    gain = line.gains.get(primary.test) if line is not None else None
    if line is None or gain is None:
        return "The primary comparison has no runs yet."
    clear = "clear of zero" if gain.low > 0 or gain.high < 0 else "not clear of zero"
    return (
        f"Primary: {primary.arm} minus {settings.control}, {_budget(primary.budget)}, {primary.test}: {percent(gain)} "
        f"points, {len(line.seeds)} of {len(settings.seeds)} seeds, sign test p = {line.sign:.3g}; {clear}."
    )


def _page(settings: StudySettings, lines: Sequence[ArmLine], tuning: Sequence[Row]) -> str:
    text = [
        f"# {settings.title}",
        "",
        f"Made by `sfa study {settings.name}`. Score: {settings.metric}. In brackets 95%",
    ]
    text[-1] += " intervals over seeds and pictures; differences are paired by seed and picture."
    text += ["", verdict(settings, lines), ""]
    for budget in settings.budgets:
        here = [line for line in lines if line.budget == budget]
        if here:
            text += [f"## {_budget(budget)}", "", *_main_table(settings, here), ""]
            for title, names in (("Other test sets", settings.tests[1:]), ("Other measures, %", settings.measures)):
                if names:
                    text += [f"{title}, and minus {settings.control}:", "", *_tests_table(settings, here, names), ""]
            text += ["Largest scalars (logits) and other numbers, means over seeds:", "", *_scalars_table(here), ""]
    fewest = by_pictures(settings, lines)
    if fewest:
        text += ["## Few and many pictures", "", *_pictures_table(settings, fewest), ""]
    if tuning:
        text += ["## Tuning", "", "On seeds and pictures that are not reported, score on validation pictures:", ""]
        text += markdown_table(_tuning_head(settings), _tuning_rows(settings, tuning))
    return "\n".join(text).rstrip() + "\n"


def _main_table(settings: StudySettings, lines: Sequence[ArmLine]) -> list[str]:
    head = ("arm", "seeds", f"{settings.tests[0]} %", f"minus {settings.control}", "sign test p")
    rows = [
        (
            line.arm,
            str(len(line.seeds)),
            percent(line.tests[settings.tests[0]]),
            percent(line.gain),
            "" if line.sign is None else f"{line.sign:.3g}",
            *(_steps(line, threshold) for threshold in settings.thresholds),
        )
        for line in lines
    ]
    return markdown_table((*head, *map(_threshold, settings.thresholds)), rows)


def _tests_table(settings: StudySettings, lines: Sequence[ArmLine], names: Sequence[str]) -> list[str]:
    head = ["arm", *(column for name in names for column in (name, f"minus {settings.control}"))]
    rows = [
        (line.arm, *(percent(value) for name in names for value in (line.tests[name], line.gains.get(name))))
        for line in lines
    ]
    return markdown_table(head, rows)


def _pictures_table(settings: StudySettings, lines: Sequence[PicturesLine]) -> list[str]:
    counts = sorted({count for line in lines for count in line.scores})
    columns = [f"{count} pictures" for count in counts]
    rows = [
        (
            line.arm,
            _budget(line.rest),
            *(percent(line.scores.get(count)) for count in counts),
            *("more" if line.fewest[t] is None else str(line.fewest[t]) for t in settings.thresholds),
        )
        for line in lines
    ]
    return markdown_table(
        ("arm", "budget", *columns, *(f"pictures to {100 * t:.0f}%" for t in settings.thresholds)), rows
    )


def _tuning_head(settings: StudySettings) -> tuple[str, ...]:
    return "arm and setting", "seeds", "score %", _threshold(max(settings.thresholds))


def _tuning_rows(settings: StudySettings, rows: Sequence[Row]) -> list[tuple[str, ...]]:
    return [
        (line.name, str(line.seeds), f"{100 * line.score:.1f}", "never" if line.steps is None else f"{line.steps:g}")
        for line in tuning_lines(settings, rows)
    ]


def _scalars_table(lines: Sequence[ArmLine]) -> list[str]:
    terms = list(dict.fromkeys(term for line in lines for term in line.scalars))
    numbers = list(dict.fromkeys(name for line in lines for name in line.numbers))
    rows = []
    for line in lines:
        scalars = [f"{line.scalars[term]:.2f}" if term in line.scalars else "" for term in terms]
        others = [f"{line.numbers[name]:.4g}" if name in line.numbers else "" for name in numbers]
        rows.append((line.arm, *scalars, *others, f"{line.seconds:.0f}"))
    return markdown_table(("arm", *terms, *(name.replace("_", " ") for name in numbers), "CPU s per run"), rows)


def _record(line: ArmLine) -> dict[str, Any]:
    intervals = {
        name: {test: vars(interval) for test, interval in getattr(line, name).items()} for name in ("tests", "gains")
    }
    steps = {f"{threshold:g}": {"median": median, "seeds": seeds} for threshold, (median, seeds) in line.steps.items()}
    rest = {"sign_test": line.sign, "scalars": line.scalars, "numbers": line.numbers, "seconds": line.seconds}
    return {
        "arm": line.arm,
        "budget": dict(line.budget),
        "seeds": list(line.seeds),
        **intervals,
        "steps": steps,
        **rest,
    }


def _budget(budget: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {name}" for name, value in budget.items())


def _threshold(value: float) -> str:
    return f"steps to {100 * value:.0f}%"


def _steps(line: ArmLine, threshold: float) -> str:
    median, count = line.steps[threshold]
    return f"{'never' if median is None else f'{median:.0f}'} ({count} of {len(line.seeds)})"
