"""Pictures of tables: nothing overlaps, every box is where its text is, and no entity is in two splits."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic.charts import SIZE
from sfa_adapters.recipes.synthetic.real_tables import load_sheets
from sfa_adapters.recipes.synthetic.table_pictures import (
    TableSize,
    ask_all,
    cut_tables,
    draw_table,
    larger_charts,
    table_pictures,
)
from sfa_adapters.recipes.synthetic.tables import SPLITS, split_of

SMALL, LARGE = TableSize((3, 5), (2, 3)), TableSize((6, 8), (4, 4))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([SMALL, LARGE, TableSize((2, 9), (1, 4))]))
def test_texts_are_inside_and_apart_and_say_the_table(seed: int, size: TableSize) -> None:
    (table,) = cut_tables("test", 1, seed, size)
    picture = draw_table(table, seed)
    assert picture.image.shape == (SIZE, SIZE, 3)
    names = len(table.rows) + sum(map(bool, table.series))
    assert len(picture.texts) == names + len(table.rows) * len(table.series)
    for text in picture.texts:
        left, top, right, bottom = text.box
        assert 0 <= left < right <= SIZE
        assert 0 <= top < bottom <= SIZE
        ink = picture.image[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
        assert ink.min() < 128  # something dark is printed there
        if text.role == "value":
            assert text.text == table.text(text.series, text.row)
    for a, b in combinations([text.box for text in picture.texts], 2):
        apart = max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3])
        assert max(apart) > -2.0  # boxes have empty rims; letters never touch


def test_a_value_stands_below_its_column_and_beside_its_row() -> None:
    for picture in table_pictures("test", 10, 3, SMALL):
        place = {(t.role, t.series, t.row): t.box for t in picture.texts}
        for text in (t for t in picture.texts if t.role == "value"):
            row, column = place["row", 0, text.row], place["series", text.series, 0]
            assert abs((row[1] + row[3]) - (text.box[1] + text.box[3])) < 4
            assert text.box[0] < column[2]
            assert column[0] < text.box[2]


def test_no_entity_is_in_two_splits() -> None:
    for split in SPLITS:
        tables = cut_tables(split, 40, 5, SMALL)
        assert {split_of(entity) for table in tables for entity in table.entities} == {split}
        for table in tables:
            named = table.rows if table.entities[0].partition(":")[2][:2].upper() == table.rows[0][:2] else table.series
            assert len(named) == len(table.entities)
    rows = [set(sheet.cells) for split in SPLITS for sheet in load_sheets(split) if sheet.title == "Population"]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 142


def test_tables_lie_either_way_round_and_have_the_numbers_of_the_sheet() -> None:
    sheet = next(sheet for sheet in load_sheets("train") if sheet.title == "Life expectancy in years")
    tables = [t for t in cut_tables("train", 60, 1, SMALL) if t.title == "Life expectancy in years"]
    upright = [table for table in tables if table.series[0].isdigit()]
    assert 0 < len(upright) < len(tables)
    for table in tables:
        countries = [entity.partition(":")[2] for entity in table.entities]
        for i, country in enumerate(countries):
            for j, year in enumerate(table.series if table in upright else table.rows):
                shown = table.values[j][i] if table in upright else table.values[i][j]
                assert shown == round(sheet.cells[country][year], table.decimals)


def test_the_seed_decides() -> None:
    first, again, other = (table_pictures("val", 4, seed, SMALL) for seed in (1, 1, 2))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert [a.table for a in first] != [b.table for b in other]
    assert ask_all(first, 3, 0) == ask_all(again, 3, 0)


def test_questions_are_about_values_without_repeats() -> None:
    pictures = table_pictures("val", 6, 1, SMALL)
    for picture, questions in zip(pictures, ask_all(pictures, 8, 0), strict=True):
        cells = len(picture.table.rows) * len(picture.table.series)
        assert len({question.text for question in questions}) == len(questions) == min(8, cells)
        for question in questions:
            ((series, row),) = question.marks
            assert question.type == "value"
            assert question.answer == picture.table.text(series, row)


def test_larger_charts_are_larger_than_those_of_the_pretraining() -> None:
    charts = larger_charts("test", 5, 8)
    assert [chart.kind for chart in charts] == ["hbar", "grouped", "hbar", "grouped", "hbar"]
    for chart in charts:
        assert len(chart.table.rows) > (5 if chart.kind == "hbar" else 3)
        assert {split_of(entity) for entity in chart.table.entities} == {"test"}
        assert all(t.box[0] >= 0 and t.box[2] <= SIZE and t.box[1] >= 0 and t.box[3] <= SIZE for t in chart.texts)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(DataError, match=r"rows=\(3, 12\)"):
        TableSize((3, 12), (2, 3))
    with pytest.raises(DataError, match="columns"):
        TableSize((3, 4), (3, 2))
    with pytest.raises(DataError, match="Unknown split"):
        load_sheets("dev")  # pyright: ignore[reportArgumentType]
