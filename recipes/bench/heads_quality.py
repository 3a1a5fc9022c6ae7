"""Quality of the answers of a nano host with pruned heads, on the pruned object itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sfa_adapters.analysis.dominance import modality_dominance
from sfa_adapters.recipes.nano.encode import encode
from sfa_adapters.recipes.nano.evaluate import Evaluation, evaluate
from sfa_adapters.recipes.nano.models import NanoHost
from sfa_adapters.recipes.synthetic.chart_questions import ChartSample, chart_samples
from sfa_adapters.statistics import Interval, bootstrap

__all__ = ["Asked", "HeadQuality", "ask", "chart_batches", "quality_of"]

LOOKED_AT = 24  # questions whose attention is read
_TOGETHER = 10  # charts in one forward


@dataclass(frozen=True, eq=False)
class Asked:
    """Answers of one host, and the modality dominance of each of the first questions, `[LOOKED_AT]`."""

    evaluation: Evaluation
    mdi: np.ndarray


@dataclass(frozen=True)
class HeadQuality:
    """Quality of the answers, with 95% intervals over questions.

    Attributes:
        accuracy: Relaxed accuracy.
        change: Accuracy minus that of the whole host on the same questions, paired bootstrap.
        invented: Share of readable numeric answers with a number that is printed nowhere on the chart.
        mdi: Modality dominance (arXiv 2508.10552) of the question's tokens over all layers: above 1, a text token
            gets more attention than an image token.
        by_seed: Accuracy of each draw of random heads; one number for other methods.
    """

    accuracy: Interval
    change: Interval
    invented: Interval
    mdi: Interval
    by_seed: tuple[float, ...]


def chart_batches(host: NanoHost, charts: int, labelled: bool) -> list[dict[str, Any]]:
    """Training charts with a question each, to calibrate a nano host on.

    Args:
        host: The host.
        charts: How many.
        labelled: Whether the answers follow the questions, with labels.
    """
    samples = chart_samples("train", charts)
    batches = []
    for start in range(0, len(samples), _TOGETHER):
        part = samples[start : start + _TOGETHER]
        answers = [sample.answer for sample in part] if labelled else None
        batches.append(encode(host, [s.image for s in part], [s.question for s in part], answers))
    return batches


def ask(host: NanoHost, model: Any, samples: Sequence[ChartSample]) -> Asked:
    """Lets a model answer every question once.

    Args:
        host: Gives tokenizer and sizes.
        model: The model that answers, pruned or not.
        samples: The questions.
    """
    evaluation = evaluate(replace(host, model=model), samples)
    first = samples[:LOOKED_AT]
    prompt = encode(host, [s.image for s in first], [s.question for s in first])
    layers = {"all": range(len(model.model.language_model.layers))}
    # Of the tokens of the question: an answer of one token or none has no query tokens.
    report = modality_dominance(model, [prompt], layers=layers, queries="text")
    return Asked(evaluation, report.per_sample("all")["mdi"])


def quality_of(runs: Sequence[Asked], whole: Asked) -> HeadQuality:
    """Quality of one arm from its runs: one, or one for each draw of random heads.

    Args:
        runs: Answers to the same questions.
        whole: Answers of the host with all its heads.
    """
    correct = np.mean([run.evaluation.correct for run in runs], 0)
    invented = np.concatenate([run.evaluation.fabricated[run.evaluation.readable] for run in runs])
    return HeadQuality(
        bootstrap(correct),
        bootstrap(correct - whole.evaluation.correct),
        bootstrap(invented),
        bootstrap(np.mean([run.mdi for run in runs], 0)),
        tuple(float(run.evaluation.correct.mean()) for run in runs),
    )
