"""Chart questions: about rendered charts, or from ChartQA on the hub or in a local folder.

Columns, files and images are read by `sfa_adapters.data.open_rows`; here all of them are opened at once, for sets that
fit into memory, and a row that cannot be used is an error. Images are only decoded after the size in their header was
checked, and no code that comes with data is run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfa_adapters.data.open_rows import open_rows
from sfa_adapters.errors import DataError
from sfa_adapters.images import MAX_BYTES, MAX_PIXELS, as_image, read_image
from sfa_adapters.recipes.synthetic.charts import Kind, TextBox, draw, kinds_for
from sfa_adapters.recipes.synthetic.questions import QUESTION_TYPES, Question, QuestionType, questions_for
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.recipes.synthetic.tables import SPLITS, Split, Table

__all__ = ["MAX_BYTES", "MAX_PIXELS", "Asked", "ChartSample", "ask", "chart_samples", "load_charts", "read_image"]


@dataclass(frozen=True)
class ChartSample:
    """One question about one chart.

    Attributes:
        image: uint8 [H, W, 3].
        question: the question.
        answers: every answer that counts as right; at least one.
        texts: texts that are printed on the chart, with boxes; empty where it is not known (ChartQA).
        type: "value", "difference" or "largest"; ChartQA's own "human" or "augmented" where given; else empty.
        kind: kind of chart, or empty.
        id: table and kind of a rendered chart, or file and row.
    """

    image: np.ndarray
    question: str
    answers: tuple[str, ...]
    texts: tuple[TextBox, ...]
    type: str
    kind: str
    id: str

    @property
    def answer(self) -> str:
        """The first right answer."""
        return self.answers[0]

    @property
    def boxes(self) -> tuple[TextBox, ...]:
        """The printed numbers with their pixel boxes."""
        return tuple(t for t in self.texts if t.is_number)


def load_charts(source: str | Path, split: str, limit: int | None = None, seed: int = 0) -> list[ChartSample]:
    """Loads chart questions.

    Args:
        source: "rendered" for charts drawn from real tables; a hub id such as "HuggingFaceM4/ChartQA"; or a local
            folder with parquet files, JSON lines beside their images, or an imagefolder with metadata.
        split: "train", "val" or "test"; for a hub id, the name of the split there.
        limit: largest number of questions; 200 by default for "rendered".
        seed: of the questions about rendered charts; a real dataset is read in its order.

    Returns:
        The samples, in a fixed order.

    Raises:
        DataError: unknown split or schema, empty split, a row without an answer, an unreadable or oversized image.
    """
    if source == "rendered":
        if split not in SPLITS:
            raise DataError(f"Rendered charts have no split {split!r}. Use one of {', '.join(SPLITS)}.")
        return chart_samples(split, 200 if limit is None else limit, seed)  # pyright: ignore[reportArgumentType]
    return [
        ChartSample(as_image(row.image, row.where), row.question, row.answers, (), row.kind, "", row.where)
        for row in open_rows(source, split, limit=limit, streaming=True)
    ]


def chart_samples(
    split: Split, limit: int, seed: int = 0, types: Sequence[QuestionType] = QUESTION_TYPES
) -> list[ChartSample]:
    """Draws questions about charts of the real tables of one split, question types in turn, one chart each.

    Args:
        split: split of the tables.
        limit: number of questions.
        seed: of the questions.
        types: question types, in turn.

    Returns:
        `limit` samples.
    """
    samples: list[ChartSample] = []
    for one_question in ask(split, limit, seed, types):
        chart = draw(one_question.table, one_question.kind)
        answers = (one_question.question.answer,)
        kind, text = one_question.question.type, one_question.question.text
        samples.append(ChartSample(chart.image, text, answers, chart.texts, kind, chart.kind, one_question.id))
    return samples


@dataclass(frozen=True)
class Asked:
    """A question about a table, and the kind of chart that shows it."""

    table: Table
    question: Question
    kind: Kind

    @property
    def id(self) -> str:
        """Table and kind of chart."""
        return f"{self.table.id} ({self.kind})"


def ask(split: Split, limit: int, seed: int = 0, types: Sequence[QuestionType] = QUESTION_TYPES) -> list[Asked]:
    """The questions of `chart_samples` without drawing the charts; arguments as there."""
    rng = np.random.default_rng(seed)
    tables = load_tables(split)
    questions: list[Asked] = []
    order: list[int] = []
    while len(questions) < limit:
        order = order or rng.permutation(len(tables)).tolist()
        table = tables[order.pop()]
        wanted = types[len(questions) % len(types)]
        fitting = [q for q in questions_for(table) if q.type == wanted]
        if fitting:
            question = fitting[int(rng.integers(len(fitting)))]
            kinds = kinds_for(table)
            questions.append(Asked(table, question, kinds[int(rng.integers(len(kinds)))]))
    return questions
