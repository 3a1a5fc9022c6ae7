"""Further measures of study c beside exact match: kinds of wrong answers, and the attention of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sfa_adapters.analysis import attention_entropy, hallucination_report, modality_dominance
from sfa_adapters.analysis.hallucination import Judgement
from sfa_adapters.recipes.analyze.attention_study import STATISTICS
from sfa_adapters.recipes.nano.encode import encode, pixel_values
from sfa_adapters.recipes.nano.evaluate import generate_answers
from sfa_adapters.recipes.nano.models import PATCH, PIXELS, NanoHost
from sfa_adapters.recipes.synthetic.charts import Chart
from sfa_adapters.recipes.synthetic.questions import Question
from sfa_adapters.recipes.synthetic.table_pictures import TablePicture
from sfa_adapters.scr.targets import boxes_to_tokens

__all__ = ["answer_measures", "attention_measures", "text_regions"]

DENSE = 0.3  # share of a patch under text, the default of `attention_entropy`
Pictures = Sequence[TablePicture | Chart]
Questions = Sequence[Sequence[Question]]


def answer_measures(
    host: NanoHost, pictures: Pictures, questions: Questions, each: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Generates answers and judges them.

    Args:
        host: The model.
        pictures: Pictures.
        questions: Questions about each picture.
        each: Number of questions about a picture that are answered, the first ones.

    Returns:
        Per picture, the share of its answers that are right by relaxed accuracy (`relaxed`), and that are wrong with a
        number that is printed nowhere on the picture (`fabricated`); and over all pictures `fabricated_of_wrong`, the
        share of such numbers among the wrong numeric answers.
    """
    pairs = [(p, q) for p, about in zip(pictures, questions, strict=True) for q in about[:each]]
    answers, _ = generate_answers(
        host, [picture.image for picture, _ in pairs], [question.text for _, question in pairs]
    )
    printed = [[text.text for text in picture.texts] for picture, _ in pairs]
    judged = hallucination_report(answers, [question.answer for _, question in pairs], printed=printed).judged
    owners = np.repeat(np.arange(len(pictures)), [min(each, len(about)) for about in questions])

    def by_picture(kind: str) -> np.ndarray:
        values = np.array([judgement.kind == kind for judgement in judged], dtype=np.float64)
        return np.array([values[owners == number].mean() for number in range(len(pictures))])

    measures = {"relaxed": by_picture("correct"), "fabricated": by_picture("fabricated")}
    return measures, {"fabricated_of_wrong": _share(judged)}


def _share(judged: Sequence[Judgement]) -> float:
    """Share of fabricated numbers among wrong numeric answers; 0 where there are none."""
    kinds = [judgement.kind for judgement in judged]
    wrong = kinds.count("fabricated") + kinds.count("misread")
    return round(kinds.count("fabricated") / max(wrong, 1), 4)


def attention_measures(
    host: NanoHost, pictures: Pictures, questions: Questions, count: int, adaptive: bool = False
) -> dict[str, Any]:
    """Ratio of the entropies of the tower's attention on dense and sparse text, and modality dominance.

    Args:
        host: The model.
        pictures: Pictures; the first `count` are read.
        questions: Questions about each picture.
        count: Number of pictures.
        adaptive: Whether the tower's tokens are not its patches (ADAT), so that entropy is left out.

    Returns:
        `entropy_ratio` (of H / log n), and the MDI of the first and of the last layer of the language model.
    """
    numbers: dict[str, Any] = {}
    pages = [pixel_values([picture.image], PIXELS) for picture in pictures[:count]]
    if not adaptive:
        regions = [text_regions(picture) for picture in pictures[:count]]
        report = attention_entropy(host.model, pages, regions, normalize=True, **STATISTICS)
        numbers["entropy_ratio"] = round(report.ratio().value, 4)
    prompts = [encode(host, [p.image], [q[0].text]) for p, q in zip(pictures[:count], questions, strict=False)]
    dominance = modality_dominance(host.model, prompts, layers={"first": [0], "last": [3]}, max_new_tokens=8)
    for stage in dominance.stages:
        numbers[f"mdi_{stage}"] = round(float(np.mean(dominance.per_sample(stage)["mdi"])), 4)
    return numbers


def text_regions(picture: TablePicture | Chart) -> np.ndarray:
    """1 where text covers more than `DENSE` of a patch, 0 where there is none, -1 in between, `[12, 12]`.

    Args:
        picture: The picture.
    """
    side = PIXELS // PATCH
    covered = boxes_to_tokens([text.box for text in picture.texts], (PIXELS, PIXELS), (side, side)).numpy()
    return np.where(covered > DENSE, 1, np.where(covered == 0, 0, -1)).reshape(side, side)
