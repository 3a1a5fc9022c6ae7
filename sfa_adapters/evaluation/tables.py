"""The tables of a paper, as Markdown and JSON: scores, hallucinations, and the ablation of the bias terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sfa_adapters.analysis.hallucination import HallucinationReport, hallucination_report
from sfa_adapters.analysis.hallucination_compare import paired_change
from sfa_adapters.bias import TERMS
from sfa_adapters.errors import DataError
from sfa_adapters.evaluation.predictions import Prediction, same_questions, write_atomically
from sfa_adapters.evaluation.scores import Metric, compare, compare_scores, row_scores, score
from sfa_adapters.statistics import Interval, bootstrap

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Table", "ablation_table", "hallucination_of", "hallucination_table", "score_table"]

NONE = "-"
OTHER_COLUMNS = ("run", "points", "change", "better / worse", "p", "truncated", "failed")
PERCENT = "Percent, with 95% intervals (bootstrap over questions)."


@dataclass(frozen=True)
class Table:
    """A table of results, which can be written as Markdown and JSON or shown in a terminal.

    Attributes:
        title: Its title.
        columns: Names of the columns, in order.
        rows: One mapping each; an `Interval` is a share, written as percent, a missing value as a dash.
        notes: Sentences below the table.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """The rows as formatted texts."""
        return [[_cell(row.get(name)) for name in self.columns] for row in self.rows]

    def to_markdown(self) -> str:
        """Title, table and notes as Markdown."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.cells()]
        return "\n".join([*lines, "", *self.notes]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; an interval has `value`, `low` and `high`, as shares."""
        rows = [{name: _plain(row.get(name)) for name in self.columns} for row in self.rows]
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "notes": list(self.notes)}

    def to_terminal(self, width: int | None = None) -> Group:
        """Formats the table for a terminal; with fewer rows than value columns it is transposed to fit.

        Args:
            width: In characters; that of the terminal by default.
        """
        from sfa_adapters.evaluation.terminal import terminal_table

        lines = [list(self.columns), *self.cells()]
        if len(self.rows) < len(self.columns) - 1:
            lines = [list(cells) for cells in zip(*lines, strict=True)]
        return terminal_table(lines, self.title, width)

    def write(self, folder: str | Path, name: str) -> list[Path]:
        """Writes `<name>.md` and `<name>.json`.

        Raises:
            RecipeError: The folder cannot be written.
        """
        files = {".md": self.to_markdown(), ".json": json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"}
        paths = [Path(folder) / f"{name}{ending}" for ending in files]
        for path in paths:
            write_atomically(path, files[path.suffix])
        return paths


def _cell(value: Any) -> str:
    if isinstance(value, Interval):
        if np.isnan(value.value):
            return NONE
        return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    if isinstance(value, float):
        return NONE if np.isnan(value) else f"{value:.2g}"
    return NONE if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {name: _plain(getattr(value, name)) for name in ("value", "low", "high")}
    return None if isinstance(value, float) and np.isnan(value) else value


def _baseline(runs: Mapping[str, Any], name: str | None) -> str:
    if not runs or (name is not None and name not in runs):
        raise DataError(f"There is no run {name!r} to compare with. There are: {', '.join(runs) or 'none'}.")
    return next(iter(runs)) if name is None else name


def _column(group: str) -> str:
    """The column of a split, renamed if it has the name of another column."""
    return f"{group} (split)" if group in OTHER_COLUMNS else group


def score_table(
    runs: Mapping[str, Sequence[Prediction]], metric: Metric, title: str = "Scores", baseline: str | None = None
) -> Table:
    """Table 1: scores, one row per run, one column per split, and the change from the baseline.

    Args:
        runs: Answers of each run, to the same questions.
        metric: The metric.
        title: Title of the table.
        baseline: Run that the others are compared with; the first one by default.

    Returns:
        The table.

    Raises:
        DataError: There is no run or no such baseline, or the runs answer different questions.
    """
    first = _baseline(runs, baseline)
    scores = {name: score(predictions, metric) for name, predictions in runs.items()}
    groups = [s.group for s in scores[first].scores]
    rows = []
    for name, predictions in runs.items():
        scores_of_run = scores[name]
        row: dict[str, Any] = {"run": name, **{_column(s.group): s.mean for s in scores_of_run.scores}}
        if metric == "ocrbench":
            row["points"] = f"{scores_of_run['all'].points:.0f} of {scores_of_run['all'].of}"
        if name != first:
            change = compare(runs[first], predictions, metric)
            row |= {"change": change.difference, "better / worse": f"{change.better} / {change.worse}"}
            row["p"] = change.p_value
        rows.append(row | {"truncated": scores_of_run.truncated, "failed": scores_of_run.failed})
    points = ["points"] if metric == "ocrbench" else []
    differences = ["change", "better / worse", "p"] if len(runs) > 1 else []
    base = scores[first]
    notes = [f"{metric}, {base['all'].of} questions. {PERCENT}"]
    if differences:
        notes.append(
            f"Changes are from {first!r}, question by question; p of the exact two-sided sign test (McNemar's, where "
            "answers are right or wrong), without a correction for several comparisons."
        )
    notes.append("Truncated answers are scored as they are; failed rows (broken images) count as wrong.")
    if base.unscored:
        notes.append(f"{base.unscored} of {base.rows} rows have no true answer and are in no mean.")
    return Table(
        title, ("run", *map(_column, groups), *points, *differences, "truncated", "failed"), tuple(rows), tuple(notes)
    )


def hallucination_of(predictions: Sequence[Prediction]) -> HallucinationReport:
    """Classifies wrong answers as misread or fabricated, from the texts known to be printed on the images.

    Raises:
        DataError: The printed texts of no image are known; evaluate with `ocr`.
    """
    if not any(p.printed for p in predictions):
        raise DataError(
            "The texts on the images are not known, so misread numbers look like fabricated ones. Evaluate with --ocr."
        )
    texts, answers = [p.prediction for p in predictions], [p.answers for p in predictions]
    return hallucination_report(texts, answers, printed=[p.printed or None for p in predictions])


def hallucination_table(
    runs: Mapping[str, Sequence[Prediction]], title: str = "Numeric hallucination", baseline: str | None = None
) -> Table:
    """Table 2: classes of wrong answers, one row per run, and the change from the baseline.

    Args:
        runs: Answers of each run, to the same questions.
        title: Title of the table.
        baseline: Run that the others are compared with; the first one by default.

    Returns:
        The table.

    Raises:
        DataError: As `hallucination_of`; or the runs answer different questions.
    """
    base = _baseline(runs, baseline)
    if any(not same_questions(runs[base], predictions) for predictions in runs.values()):
        raise DataError("The runs answer other questions. Evaluate all on the same data, split and limit.")
    reports = {name: hallucination_of(predictions) for name, predictions in runs.items()}
    first, whole = reports[base], "numeric hallucination"
    kinds = [*first.counts, whole]
    rows = []
    for name, report in reports.items():
        shares = {r["quantity"]: Interval(r["share"], r["low"], r["high"]) for r in report.table()}
        row: dict[str, Any] = {"run": name, **{kind: shares[kind] for kind in kinds}}
        if report is not first:
            change = next(r for r in paired_change(first, report) if r["quantity"] == whole)
            row["change"] = Interval(change["change"], change["low"], change["high"])
        rows.append(row | {"judged": len(report.judged), "skipped": len(report.skipped)})
    difference = ["change"] if len(rows) > 1 else []
    notes = [f"{PERCENT} Numeric hallucination is misread and fabricated together."]
    if difference:
        notes.append(f"Changes of it are from {base!r}, question by question.")
    notes += [f"Skipped: {reason} ({count})." for reason, count in first.skip_reasons.items()]
    return Table(title, ("run", *kinds, *difference, "judged", "skipped"), tuple(rows), tuple(notes))


def ablation_table(
    runs: Mapping[str, Sequence[Sequence[Prediction]]],
    terms: Mapping[str, Sequence[str]],
    metric: Metric,
    title: str = "Ablation of the terms of the bias",
) -> Table:
    """Table 3: scores of the ablation of the bias, one row per set of terms, over one or several seeds.

    Args:
        runs: For each row of the table the answers of every seed, all to the same questions.
        terms: For each row its terms; empty for the control.
        metric: The metric.
        title: Title of the table.

    Returns:
        The table: mean over seeds, range over seeds, difference to the control and to the row with all terms.

    Raises:
        DataError: There is no run, or the runs answer different questions.
    """
    if not runs:
        raise DataError("There are no answers to make a table of.")
    sets = [predictions for each in runs.values() for predictions in each]
    if any(not same_questions(sets[0], predictions) for predictions in sets[1:]):
        raise DataError("The runs answer other questions. Evaluate all on the same data, split and limit.")
    values = {name: np.stack([row_scores(predictions, metric) for predictions in each]) for name, each in runs.items()}
    control = next((name for name in runs if not terms[name]), None)
    full = next((name for name in runs if set(terms[name]) == set(TERMS)), None)
    rows = []
    for name, seeds in values.items():
        means = np.nanmean(seeds, axis=1)
        mean = seeds.mean(0)
        row: dict[str, Any] = {"run": name} | {term: "x" if term in terms[name] else "" for term in TERMS}
        row |= {"score": bootstrap(mean[~np.isnan(mean)]), "seeds": len(seeds)}
        row["seeds from / to"] = f"{100 * means.min():.1f} / {100 * means.max():.1f}" if len(seeds) > 1 else None
        for label, other in (("to control", control), ("to all terms", full)):
            if other is not None and other != name:
                row[label] = compare_scores(values[other].mean(0), mean, metric).difference
        rows.append(row)
    count = int((~np.isnan(next(iter(values.values()))[0])).sum())
    notes = (
        f"{metric}, {count} questions. {PERCENT} Scores are means over the "
        "seeds; intervals are about the questions, the range beside them about the seeds.",
        "A seed changes the new weights and the order of the data. The control trains the same parts without a bias.",
    )
    columns = ("run", *TERMS, "score", "seeds", "seeds from / to", "to control", "to all terms")
    return Table(title, columns, tuple(rows), notes)
