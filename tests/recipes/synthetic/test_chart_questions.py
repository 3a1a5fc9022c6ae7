"""Rows of chart questions: rendered charts, the three column schemas of ChartQA, and named errors for bad rows."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sfa_adapters import images
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.synthetic import real_tables
from sfa_adapters.recipes.synthetic.chart_questions import load_charts, read_image

datasets = pytest.importorskip("datasets")


def _png(width=20, height=10, color=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(path, rows, image=True):
    table = datasets.Dataset.from_list(rows)
    if image:
        table = table.cast_column("image", datasets.Image())
    table.to_parquet(str(path))


def test_rendered_charts_take_turns_and_stay_in_their_split():
    samples = load_charts("rendered", "test", limit=30, seed=3)
    assert [s.type for s in samples[:6]] == ["value", "difference", "largest"] * 2
    ids = {t.id for t in real_tables.load_tables("test")}
    for s in samples:
        assert s.id.removesuffix(f" ({s.kind})") in ids
        assert s.image.shape == (144, 144, 3)
        assert s.answer
        assert s.boxes
        if s.type == "value":
            assert s.answer in {b.text for b in s.boxes}
    again = load_charts("rendered", "test", limit=30, seed=3)
    assert [(s.id, s.question) for s in again] == [(s.id, s.question) for s in samples]
    assert [s.id for s in load_charts("rendered", "test", limit=30, seed=4)] != [s.id for s in samples]


def test_unknown_rendered_split():
    with pytest.raises(DataError, match="validation"):
        load_charts("rendered", "validation")


def test_m4_schema_with_list_labels(tmp_path):
    rows = [{"image": {"bytes": _png(), "path": None}, "query": "How many?", "label": ["12", "twelve"]}]
    _parquet(tmp_path / "test-00000.parquet", rows)
    (sample,) = load_charts(tmp_path, "test")
    assert sample.answers == ("12", "twelve")
    assert sample.question == "How many?"
    assert sample.image.shape == (10, 20, 3)
    assert sample.image[0, 0].tolist() == [200, 30, 30]


def test_masry_schema_with_encoded_bytes(tmp_path):
    _parquet(
        tmp_path / "test.parquet", [{"imgname": "a.png", "query": "q", "label": "3", "image": _png()}], image=False
    )
    (sample,) = load_charts(tmp_path, "test")
    assert sample.answers == ("3",)


def test_lmms_schema(tmp_path):
    rows = [{"type": "human_test", "question": "q?", "answer": "yes", "image": {"bytes": _png(), "path": None}}]
    _parquet(tmp_path / "data-test.parquet", rows)
    (sample,) = load_charts(tmp_path, "test")
    assert (sample.answer, sample.type) == ("yes", "human_test")


def test_json_lines_beside_their_images(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.png").write_bytes(_png())
    rows = [{"imgname": "a.png", "query": "q1", "label": "1"}, {"imgname": "a.png", "query": "q2", "label": "2"}]
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    assert [s.answer for s in load_charts(tmp_path, "test")] == ["1", "2"]
    assert len(load_charts(tmp_path, "test", limit=1)) == 1


def test_imagefolder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(_png())
    row = {"file_name": "a.png", "question": "q", "answer": "5"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    assert load_charts(tmp_path, "train")[0].answer == "5"


@pytest.mark.parametrize("label", [[], None, "", [""], "   "])
def test_a_row_without_an_answer_is_named(tmp_path, label):
    (tmp_path / "a.png").write_bytes(_png())
    rows = [{"imgname": "a.png", "query": "q", "label": ["1"] if isinstance(label, list) else "1"}]
    rows.append({"imgname": "a.png", "query": "q", "label": label})
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    with pytest.raises(DataError, match=r"test\.jsonl, row 1: no answer in column 'label'"):
        load_charts(tmp_path, "test")


def test_unknown_columns_are_listed(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"picture": "a.png", "prompt": "q"}))
    with pytest.raises(DataError, match="picture, prompt"):
        load_charts(tmp_path, "test")


def test_a_missing_split_lists_what_is_there(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no split 'test'.*train\.jsonl"):
        load_charts(tmp_path, "test")


def test_an_empty_split_is_an_error(tmp_path):
    empty = datasets.Dataset.from_dict({"query": [], "label": [], "imgname": []})
    empty.to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(DataError, match="no rows"):
        load_charts(tmp_path, "test")


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        load_charts(str(tmp_path / "nowhere"), "test")


@pytest.mark.parametrize("name", ["../secret.png", "gone.png"])
def test_images_outside_the_folder_are_not_read(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(_png())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "test.jsonl").write_text(json.dumps({"imgname": name, "query": "q", "label": "1"}))
    with pytest.raises(DataError, match="no image file"):
        load_charts(folder, "test")


def test_a_truncated_image_is_named():
    with pytest.raises(DataError, match="row 4: the image cannot be read"):
        read_image(_png(200, 200)[:-60], "row 4")
    with pytest.raises(DataError, match="cannot be read"):
        read_image(b"not an image", "row 4")


def test_an_oversized_image_is_refused_before_it_is_decoded(monkeypatch):
    # A header that claims 60,000 x 60,000 pixels; there are no pixels behind it.
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    small = _png()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="row 2"):
        read_image(bomb, "row 2")
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(DataError, match="20 x 10 pixels"):
        read_image(small, "row 2")


def test_an_oversized_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="bytes"):
        read_image(_png(), "row 2")
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "test.jsonl").write_text(json.dumps({"imgname": "a.png", "query": "q", "label": "1"}))
    with pytest.raises(DataError, match=r"a\.png has"):
        load_charts(tmp_path, "test")


def test_every_picture_mode_becomes_rgb():
    for mode in ("L", "P", "RGBA", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (3, 2)).save(buffer, "PNG")
        assert read_image(buffer.getvalue(), "x").shape == (2, 3, 3)
    assert read_image(_png(), "x").dtype == np.uint8
