"""Questions about rendered charts and pages, in English or Korean, as rows with all printed texts and boxes.

The numbers are real ones (`recipes/synthetic/real_tables.py`), and a table of the test split shares no country, stock
or site with one of the training split.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args, overload

import numpy as np

from sfa_adapters.data.open_rows import Row
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic.chart_questions import Asked, ask
from sfa_adapters.recipes.synthetic.charts import SIZE as CHART
from sfa_adapters.recipes.synthetic.charts import TextBox, draw
from sfa_adapters.recipes.synthetic.fonts import hangul_font
from sfa_adapters.recipes.synthetic.korean import WORDS, in_korean, korean_question
from sfa_adapters.recipes.synthetic.table_pages import SIZE as PAGE
from sfa_adapters.recipes.synthetic.table_pages import draw_page
from sfa_adapters.recipes.synthetic.tables import SPLITS, Split

__all__ = ["RENDERED", "Language", "RenderedRows", "rendered_rows"]

Language = Literal["en", "ko"]
# Values of `Recipe.data` for rendered data: kind of picture, and its language where it is not English.
RENDERED = ("charts", "pages", "charts-ko", "pages-ko")
DEFAULT = 300


def rendered_rows(
    source: str, split: str, limit: int | None = None, seed: int = 0, language: Language = "en"
) -> "RenderedRows":
    """Questions about charts or about pages with a table; a picture is drawn when its row is read.

    Args:
        source: `charts` (144 x 144) or `pages` (448 x 448); `charts-ko` and `pages-ko` are the Korean ones.
        split: `train`, `val` (or `validation`) or `test`.
        limit: Number of questions; 300 by default.
        seed: Of the questions.
        language: `en` or `ko`.

    Returns:
        The rows: `split` is the question's type, `printed` has all numbers, `boxes` those of the marks that the answer
        depends on.

    Raises:
        DataError: Unknown source, split or language, or no font with Hangul.
    """
    kind, _, short = source.partition("-")
    language = short or language  # pyright: ignore[reportAssignmentType]
    name = "val" if split == "validation" else split
    if source not in RENDERED or language not in get_args(Language):
        raise DataError(f"Nothing is rendered under {source!r} in {language!r}. Use one of {', '.join(RENDERED)}.")
    if name not in SPLITS:
        raise DataError(f"Rendered {kind} have no split {split!r}. Use one of {', '.join(SPLITS)}.")
    font = hangul_font() if language == "ko" else None
    questions = tuple(enumerate(ask(name, DEFAULT if limit is None else limit, seed)))  # pyright: ignore[reportArgumentType]
    return RenderedRows(kind == "charts", name, questions, font)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class RenderedRows(Sequence[Row]):
    """Rows whose pictures are drawn when they are read, the same every time.

    Attributes:
        charts: Whether they are charts; if not, pages.
        split: Split of the tables.
        questions: The questions with their numbers.
        font: Font file for Korean; None for English.
    """

    charts: bool
    split: Split
    questions: tuple[tuple[int, Asked], ...]
    font: Path | None = None

    def __len__(self) -> int:
        return len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "RenderedRows": ...
    def __getitem__(self, index: "int | slice") -> "Row | RenderedRows":
        if isinstance(index, slice):
            return replace(self, questions=self.questions[index])
        number, numbered_question = self.questions[index]
        table, question = numbered_question.table, numbered_question.question
        if self.font is not None:
            table = in_korean(table, number)
            question = korean_question(question, table)
        if self.charts:
            image, texts, size, title = *_chart(replace(numbered_question, table=table), self.font), CHART, ""
        else:
            face = _face() if self.font is None else self.font
            page = draw_page(table, face, number, *(() if self.font is None else (WORDS,)))
            image, texts, size, title = page.image, page.texts, PAGE, table.title
        marks = {(t.series, t.row): t.box for t in texts if t.role == "value"}
        source = ("charts" if self.charts else "pages") + ("" if self.font is None else "-ko")
        return Row(
            id=f"{source}-{self.split}-{number}",
            image=image,
            question=question.text,
            answers=(question.answer,),
            split=question.type,
            printed=(*(t.text for t in texts if t.is_number), *re.findall(r"\d+(?:[.,]\d+)*", title)),
            boxes=tuple(marks[mark] for mark in question.marks),
            page_size=(size, size),
            kind=question.type,
            where=f"{source} ({self.split}), {numbered_question.id}",
        )


def _chart(question: Asked, font: Path | None) -> tuple[np.ndarray, tuple[TextBox, ...]]:
    if font is None:
        chart = draw(question.table, question.kind)
    else:
        import matplotlib

        with matplotlib.rc_context({"font.family": [_family(font), "DejaVu Sans"]}):
            chart = draw(question.table, question.kind)
    return chart.image, chart.texts


@cache
def _family(font: Path) -> str:
    """Adds a font to matplotlib, and gives its family name."""
    from matplotlib import font_manager

    font_manager.fontManager.addfont(font)
    return font_manager.FontProperties(fname=font).get_name()


@cache
def _face() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
