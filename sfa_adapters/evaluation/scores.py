"""Scores of answers: means with intervals, by split, and paired comparisons of two sets of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from sfa_adapters.errors import DataError
from sfa_adapters.evaluation.predictions import Prediction, same_questions
from sfa_adapters.metrics import anls, exact_match, ocrbench, relaxed_accuracy, vqa_accuracy
from sfa_adapters.statistics import Interval, bootstrap, sign_test

__all__ = [
    "Comparison",
    "Metric",
    "Score",
    "ScoreTable",
    "compare",
    "compare_scores",
    "metric_for",
    "row_scores",
    "score",
]

Metric = Literal["relaxed", "relaxed_strict", "anls", "vqa", "ocrbench", "exact"]
ALL, AVERAGE = "all", "average of splits"
CHARTQA = ("human", "augmented")
MATHS = "Handwritten Mathematical Expression Recognition"  # type of question in OCRBench; the HME100k part


def _relaxed(prediction: str, true: Sequence[str], _: str) -> float:
    return float(any(relaxed_accuracy(prediction, text) for text in true))


def _strict(prediction: str, true: Sequence[str], _: str) -> float:
    return float(any(relaxed_accuracy(prediction, text, "strict") for text in true))


def _ocrbench(prediction: str, true: Sequence[str], split: str) -> float:
    return float(ocrbench(prediction, true, "handwritten_maths" if split == MATHS else "text"))


METRICS: Mapping[Metric, Callable[[str, Sequence[str], str], float]] = {
    "relaxed": _relaxed,
    "relaxed_strict": _strict,
    "anls": lambda prediction, true, _: anls(prediction, true),
    "vqa": lambda prediction, true, _: vqa_accuracy(prediction, true),
    "ocrbench": _ocrbench,
    "exact": lambda prediction, true, _: float(exact_match(prediction, true)),
}
BY_NAME: Mapping[str, Metric] = {
    "docvqa": "anls",
    "infographic": "anls",
    "infovqa": "anls",
    "textvqa": "vqa",
    "ocrbench": "ocrbench",
    "dvqa": "exact",
}


@dataclass(frozen=True)
class Score:
    """Mean score over the rows of one group.

    Attributes:
        group: A split, "all", or "average of splits".
        of: Number of rows in it.
        points: Sum of their scores, which OCRBench reports, out of 1,000.
        mean: Mean in [0, 1] with its 95% interval.
    """

    group: str
    of: int
    points: float
    mean: Interval


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one set of answers.

    Attributes:
        metric: The metric.
        scores: One for all rows, then one per split, then the average of ChartQA's two.
        rows: Number of rows.
        truncated: Answers cut at the largest length; they are scored as they are.
        failed: Rows that could not be answered, e.g. broken images; they count as wrong.
        unscored: Rows without a true answer; they count in no mean.
    """

    metric: Metric
    scores: tuple[Score, ...]
    rows: int
    truncated: int
    failed: int
    unscored: int

    def __getitem__(self, group: str) -> Score:
        for score in self.scores:
            if score.group == group:
                return score
        raise KeyError(f"{group!r}; there are {', '.join(s.group for s in self.scores)}")

    @property
    def mean(self) -> Interval:
        """The score to quote: the average of ChartQA's two splits if it has both, else the mean of all rows."""
        return self.scores[-1].mean if self.scores[-1].group == AVERAGE else self.scores[0].mean

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: `metric`, four counts, and `scores` with `group`, `of`, `points`, `mean`, `low`, `high`."""
        record = [
            {"group": s.group, "of": s.of, "points": s.points, "mean": s.mean.value}
            | {"low": s.mean.low, "high": s.mean.high}
            for s in self.scores
        ]
        counts = {name: getattr(self, name) for name in ("rows", "truncated", "failed", "unscored")}
        return {"metric": self.metric, **counts, "scores": record}


def row_scores(predictions: Sequence[Prediction], metric: Metric) -> np.ndarray:
    """Score of every row.

    Args:
        predictions: N answers.
        metric: The metric; the best score over the true answers counts.

    Returns:
        float64 [N], in [0, 1]; NaN for rows without a true answer, 0 for rows that could not be answered.

    Raises:
        DataError: Unknown metric, or one that does not fit the answers; names the row.
    """
    if metric not in METRICS:
        raise DataError(f"Unknown metric {metric!r}. Use one of {', '.join(get_args(Metric))}.")
    scores = np.full(len(predictions), np.nan)
    for i, row in enumerate(predictions):
        # In TextVQA a blank answer is that of one of ten people; elsewhere it is no answer.
        true = row.answers if metric == "vqa" else [text for text in row.answers if text.strip()]
        if row.failed:
            scores[i] = 0.0
            continue
        if not any(text.strip() for text in true):
            continue
        try:
            scores[i] = METRICS[metric](row.prediction.strip(), true, row.split)
        except DataError as error:
            raise DataError(f"Row {row.id or row.index}: {error}") from error
    return scores


def score(predictions: Sequence[Prediction], metric: Metric, seed: int = 0) -> ScoreTable:
    """Means with 95% intervals (bootstrap over rows, 2,000 rounds).

    Args:
        predictions: All answers.
        metric: "relaxed" for ChartQA, "anls" for DocVQA and InfographicVQA, "vqa" for TextVQA, "ocrbench", "exact".
        seed: Seed of the bootstrap.

    Returns:
        The scores; failed rows count as wrong, and rows without a true answer are left out and counted separately.

    Raises:
        DataError: No row has a true answer, or as `row_scores`.
    """
    values = row_scores(predictions, metric)
    scored = ~np.isnan(values)
    if not any(text.strip() for p in predictions for text in p.answers):
        raise DataError(f"None of the {len(predictions)} rows has a true answer: there is nothing to score.")
    splits = np.array([p.split for p in predictions], dtype=object)
    groups = {ALL: values[scored]}
    named = [name for name in dict.fromkeys(splits[scored].tolist()) if name]
    groups |= {name: values[scored & (splits == name)] for name in named}
    scores = [Score(name, len(part), float(part.sum()), bootstrap(part, seed)) for name, part in groups.items()]
    if set(CHARTQA) == set(named):
        total = sum(groups[name].sum() for name in CHARTQA)
        mean = _average([groups[name] for name in CHARTQA], seed)
        scores.append(Score(AVERAGE, int(scored.sum()), float(total), mean))
    return ScoreTable(
        metric,
        tuple(scores),
        rows=len(predictions),
        truncated=sum(p.truncated for p in predictions),
        failed=sum(bool(p.failed) for p in predictions),
        unscored=int((~scored).sum()),
    )


def _average(parts: Sequence[np.ndarray], seed: int, rounds: int = 2000) -> Interval:
    """Mean of the means of several groups, each of which is resampled separately (stratified bootstrap)."""
    rng = np.random.default_rng(seed)
    drawn = [part[rng.integers(0, len(part), (rounds, len(part)))].mean(1) for part in parts]
    low, high = np.quantile(np.mean(drawn, axis=0), (0.025, 0.975))
    return Interval(float(np.mean([part.mean() for part in parts])), float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two sets of answers to the same rows.

    Attributes:
        metric: The metric.
        of: Rows that were scored.
        difference: Mean of the second minus mean of the first, with its 95% interval (paired bootstrap over rows).
        better: Rows on which the second scores higher.
        worse: Rows on which it scores lower.
        p_value: p value of the exact two-sided sign test on these rows; for right or wrong it is McNemar's exact test.
    """

    metric: Metric
    of: int
    difference: Interval
    better: int
    worse: int
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON: `difference` with `low` and `high`, the counts and `p_value`."""
        record = {"metric": self.metric, "of": self.of, "difference": self.difference.value}
        record |= {"low": self.difference.low, "high": self.difference.high}
        return record | {"better": self.better, "worse": self.worse, "p_value": self.p_value}


def compare(first: Sequence[Prediction], second: Sequence[Prediction], metric: Metric, seed: int = 0) -> Comparison:
    """Compares two sets of answers to the same rows, with a paired bootstrap and a sign test.

    Args:
        first: Answers of one model, the baseline.
        second: Answers of the other model.
        metric: The metric.
        seed: Seed of the bootstrap.

    Returns:
        Difference, counts and p value.

    Raises:
        DataError: They answer different questions, or in another order; says how many questions are the same.
    """
    if not same_questions(first, second):
        both = {(p.id, p.question) for p in first} & {(p.id, p.question) for p in second}
        raise DataError(
            f"{len(first)} and {len(second)} answers, {len(both)} of them to the same questions: a paired test needs "
            "the same rows in the same order. Evaluate both on the same data, split and limit."
        )
    return compare_scores(row_scores(first, metric), row_scores(second, metric), metric, seed)


def compare_scores(first: np.ndarray, second: np.ndarray, metric: Metric, seed: int = 0) -> Comparison:
    """As `compare`, from the scores of the same rows, [N] each; NaN for rows without a true answer.

    Raises:
        DataError: No row was scored in both.
    """
    change = (second - first)[~np.isnan(first + second)]
    if not len(change):
        raise DataError(f"None of the {len(first)} rows has a true answer: there is nothing to compare.")
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return Comparison(metric, len(change), bootstrap(change, seed), better, worse, sign_test(better, worse))


def metric_for(data: str, config: str | None = None) -> Metric:
    """The usual metric of a dataset, by its name; relaxed accuracy for unknown ones."""
    name = f"{data} {config or ''}".lower()
    fitting: list[Metric] = [metric for word, metric in BY_NAME.items() if word in name]
    return fitting[0] if fitting else "relaxed"
