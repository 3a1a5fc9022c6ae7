"""Questions about one table, of the kind of ChartQA, with their true answers.

Answers follow from the numbers as the chart prints them, so a reader who reads every mark correctly is always right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np

from sfa_adapters.recipes.synthetic.tables import Table

__all__ = ["PHRASES", "QUESTION_TYPES", "Question", "QuestionType", "pick_questions", "questions_for"]

QuestionType = Literal["value", "difference", "largest"]
QUESTION_TYPES: tuple[QuestionType, ...] = get_args(QuestionType)
# The fixed parts of all questions; the tokenizers of nano hosts have a token for each.
PHRASES = (
    "What is the value of ",
    "What is the difference between ",
    "Which has the largest value",
    " and ",
    " in ",
    "?",
)


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: the question.
        answer: its answer.
        type: one of the three types.
        marks: (series, row) of each mark that the answer depends on; for the largest value of that mark only.
    """

    text: str
    answer: str
    type: QuestionType
    marks: tuple[tuple[int, int], ...]


def questions_for(table: Table) -> list[Question]:
    """Every question that has one clear answer.

    Args:
        table: the table of the chart.

    Returns:
        For each series: the value of each mark, the largest mark where it is unique, the difference of each pair of
        marks that differ, larger minus smaller.
    """
    value, difference, largest, among, inside, end = PHRASES
    questions: list[Question] = []
    for s, name in enumerate(table.series):
        where = f"{inside}{name}{end}" if name else end
        values, rows = table.values[s], table.rows
        questions += [
            Question(f"{value}{row}{where}", table.text(s, i), "value", ((s, i),)) for i, row in enumerate(rows)
        ]
        if values.count(max(values)) == 1:
            top = values.index(max(values))
            questions.append(Question(f"{largest}{where}", rows[top], "largest", ((s, top),)))
        for i, j in combinations(range(len(rows)), 2):
            gap = f"{abs(values[i] - values[j]):.{table.decimals}f}"
            if float(gap) > 0:
                questions.append(
                    Question(f"{difference}{rows[i]}{among}{rows[j]}{where}", gap, "difference", ((s, i), (s, j)))
                )
    return questions


def pick_questions(table: Table, means: Sequence[float], rng: np.random.Generator) -> list[Question]:
    """Some questions about one table, for packing.

    Args:
        table: the table.
        means: mean number of value, difference and largest questions.
        rng: random generator.

    Returns:
        Questions without repeats; at least one.
    """
    candidates = questions_for(table)
    picked: list[Question] = []
    for kind, mean in zip(QUESTION_TYPES, means, strict=True):
        pool = [q for q in candidates if q.type == kind]
        count = int(mean + rng.random())
        picked += [pool[i] for i in rng.permutation(len(pool))[:count]]
    return picked or candidates[:1]
