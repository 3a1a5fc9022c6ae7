"""Tables and questions in Korean: the numbers stay, names and questions are translated."""

from dataclasses import replace

import numpy as np

from sfa_adapters.recipes.synthetic.questions import Question
from sfa_adapters.recipes.synthetic.real_tables import MONTHS
from sfa_adapters.recipes.synthetic.tables import Table

__all__ = ["WORDS", "in_korean", "korean_question"]

REGIONS = (
    "서울", "부산", "대구", "인천", "광주", "대전", "울산", "세종", "경기", "강원", "충북", "충남", "전북", "전남",
    "경북", "경남", "제주",
)  # fmt: skip
KINDS = ("수출", "수입", "생산", "소비", "판매", "구매", "고용", "예산")
# For lines of text around a table.
WORDS = (
    "이", "표는", "지역별", "통계를", "나타낸다", "자료의", "출처는", "조사", "결과이며", "단위는", "다음과", "같다",
    "변화가", "뚜렷하게", "보이는", "시기와", "추세를", "함께", "살펴본다", "전체", "평균은", "따로", "적는다",
)  # fmt: skip


def in_korean(table: Table, seed: int) -> Table:
    """The same numbers under Korean names; years stay, months get their Korean names.

    Args:
        table: A table.
        seed: Of the names.

    Returns:
        A table whose row names are unique, as before.
    """
    rng = np.random.default_rng(seed)
    rows = _named(table.rows, REGIONS, rng)
    series = tuple(
        "" if not name else new for name, new in zip(table.series, _named(table.series, KINDS, rng), strict=True)
    )
    return replace(table, rows=rows, series=series, title="통계")


def korean_question(question: Question, table: Table) -> Question:
    """The question about a Korean table, with the answer as the chart prints it.

    Args:
        question: A question about the table with its original names.
        table: The table from `in_korean`.
    """
    series = table.series[question.marks[0][0]]
    inside = f"{_spoken(series)}에서 " if series else ""
    names = [_spoken(table.rows[row]) for _, row in question.marks]
    if question.type == "value":
        text, answer = f"{inside}{names[0]}의 값은 얼마입니까?", question.answer
    elif question.type == "difference":
        text, answer = f"{inside}{names[0]}{_and(names[0])} {names[1]}의 차이는 얼마입니까?", question.answer
    else:
        text, answer = f"{inside}값이 가장 큰 것은 무엇입니까?", table.rows[question.marks[0][1]]
    return replace(question, text=text, answer=answer)


def _named(names: tuple[str, ...], pool: tuple[str, ...], rng: np.random.Generator) -> tuple[str, ...]:
    fresh = [pool[i] for i in rng.permutation(len(pool))]
    return tuple(
        name if name.isdigit() else f"{MONTHS.index(name) + 1}월" if name in MONTHS else fresh.pop() for name in names
    )


def _spoken(name: str) -> str:
    return f"{name}년" if name.isdigit() else name


def _and(name: str) -> str:
    """The particle for "and", which depends on whether the last syllable ends in a consonant."""
    return "과" if (ord(name[-1]) - 0xAC00) % 28 else "와"
