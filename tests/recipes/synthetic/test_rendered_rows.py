"""Rendered charts and pages as rows, in English and Korean."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic import fonts, korean
from sfa_adapters.recipes.synthetic.chart_questions import load_charts
from sfa_adapters.recipes.synthetic.korean import in_korean, korean_question
from sfa_adapters.recipes.synthetic.questions import questions_for
from sfa_adapters.recipes.synthetic.real_tables import load_tables
from sfa_adapters.recipes.synthetic.rendered_rows import RENDERED, rendered_rows

# Every syllable that Korean rows are written with.
LETTERS = {c for c in Path(korean.__file__).read_text("utf-8") if "가" <= c <= "힣"} | {fonts.SYLLABLE}


@pytest.fixture(scope="module")
def font(tmp_path_factory):
    """A font file whose letters are boxes, one width for all: enough to lay text out."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 700), (800, 700), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    box, blank = pen.glyph(), TTGlyphPen(None).glyph()
    codes = {code: f"g{code}" for code in (*range(33, 127), *map(ord, LETTERS))}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "space", *codes.values()])
    builder.setupCharacterMap({32: "space", **codes})
    builder.setupGlyf({".notdef": box, "space": blank} | dict.fromkeys(codes.values(), box))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", "space", *codes.values()], (900, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    builder.setupPost()
    path = tmp_path_factory.mktemp("font") / "boxes.ttf"
    builder.save(str(path))
    return path


@pytest.fixture(autouse=True)
def _no_stale_search():
    fonts._of_system.cache_clear()


def _ink(image, box):
    left, top, right, bottom = (round(v) for v in box)
    return int(255 - image[max(top, 0) : bottom, max(left, 0) : right].min())


@pytest.mark.parametrize("source", ["charts", "pages"])
def test_rows_say_what_is_printed_and_where(source):
    rows = rendered_rows(source, "test", limit=30, seed=2)
    assert [row.split for row in rows[:3]] == ["value", "difference", "largest"]
    assert len({row.id for row in rows}) == 30
    for row in rows:
        assert row.page_size == (row.image.shape[1], row.image.shape[0])
        assert len(row.boxes) == (2 if row.split == "difference" else 1)
        assert all(_ink(row.image, box) > 100 for box in row.boxes)
        if row.split == "value":
            assert row.target in row.printed
        if row.split == "difference":
            values = [float(text) for text in row.printed]
            gaps = np.abs(np.subtract.outer(values, values))
            assert np.isclose(gaps, float(row.target)).any()


def test_charts_are_those_of_load_charts():
    samples, rows = load_charts("rendered", "val", limit=9, seed=4), rendered_rows("charts", "validation", 9, seed=4)
    for sample, row in zip(samples, rows, strict=True):
        assert (sample.question, sample.answers, sample.type) == (row.question, row.answers, row.split)
        assert np.array_equal(sample.image, row.image)
        assert tuple(box.text for box in sample.boxes) == row.printed


def test_a_row_is_the_same_every_time_and_in_every_slice():
    rows = rendered_rows("pages", "train", limit=6)
    part = pickle.loads(pickle.dumps(rows))[2:5]
    assert [row.id for row in part] == ["pages-train-2", "pages-train-3", "pages-train-4"]
    assert part[0] == rows[2] == rows[-4]
    assert np.array_equal(part[0].image, rows[2].image)
    assert rendered_rows("pages", "train", limit=6, seed=1)[0] != rows[0]
    with pytest.raises(IndexError):
        rows[6]


def test_all_numbers_of_a_page_are_told():
    rows = rendered_rows("pages", "train", limit=40)
    titles = [question.table.title for _, question in rows.questions]
    assert any(any(c.isdigit() for c in title) for title in titles)
    for row, title in zip(rows, titles, strict=True):
        assert {word for word in title.replace(",", " ").split() if word.isdigit()} <= set(row.printed)


@pytest.mark.parametrize("kind", ["charts", "pages"])
def test_korean_rows_ask_about_the_same_numbers(kind, font, monkeypatch):
    monkeypatch.setenv(fonts.VARIABLE, str(font))
    english, spoken = rendered_rows(kind, "test", 12), rendered_rows(kind, "test", 12, language="ko")
    assert [row.id for row in rendered_rows(f"{kind}-ko", "test", 12)] == [row.id for row in spoken]
    for one, two in zip(english, spoken, strict=True):
        assert two.question.endswith("입니까?")
        assert all(_ink(two.image, box) > 100 for box in two.boxes)
        assert {text for text in one.printed if "." in text} <= set(two.printed)
        if one.split != "largest":
            assert one.answers == two.answers
    assert not np.array_equal(english[0].image, spoken[0].image)


def test_korean_questions_are_about_the_same_marks():
    spoken = {
        "value": "의 값은 얼마입니까?",
        "difference": "의 차이는 얼마입니까?",
        "largest": "값이 가장 큰 것은 무엇입니까?",
    }
    particles = set()
    for number, table in enumerate(load_tables("train")[:60]):
        told_in = in_korean(table, number)
        assert len(set(told_in.rows)) == len(told_in.rows)
        assert told_in.values == table.values
        for question in questions_for(table)[:6]:
            korean_form = korean_question(question, told_in)
            assert korean_form.text.endswith(spoken[question.type])
            names = [told_in.rows[row] for _, row in question.marks]
            assert question.type == "largest" or all(name in korean_form.text for name in names)
            if question.type == "difference":
                particles.add(
                    korean_form.text[korean_form.text.index(names[0]) :].removeprefix(names[0]).lstrip("년")[0]
                )
            if question.type == "largest":
                assert korean_form.answer == told_in.rows[table.rows.index(question.answer)]
    assert particles == {"과", "와"}


def test_without_a_font_it_says_what_to_install(monkeypatch, tmp_path, font):
    from matplotlib import font_manager

    plain = str(Path(font_manager.findfont("DejaVu Sans")))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.delenv(fonts.VARIABLE, raising=False)
    font_files = [plain, str(tmp_path / "broken.ttf")]
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: font_files)
    with pytest.raises(DataError, match=r"fonts-nanum.*fonts-noto-cjk.*SFA_HANGUL_FONT"):
        rendered_rows("charts-ko", "test")
    fonts._of_system.cache_clear()
    font_files.append(str(font))
    assert fonts.hangul_font() == font
    for wrong, reason in ((tmp_path / "gone.ttf", "is not there"), (plain, "cannot write Korean")):
        monkeypatch.setenv(fonts.VARIABLE, str(wrong))
        with pytest.raises(DataError, match=f"{reason}.*fonts-nanum"):
            fonts.hangul_font()


def test_unknown_names_are_refused():
    with pytest.raises(DataError, match=f"'slides' in 'en'. Use one of {', '.join(RENDERED)}"):
        rendered_rows("slides", "test")
    with pytest.raises(DataError, match="'charts' in 'fr'"):
        rendered_rows("charts", "test", language="fr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="charts have no split 'dev'"):
        rendered_rows("charts", "dev")
