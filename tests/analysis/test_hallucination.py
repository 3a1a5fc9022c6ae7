"""Hallucination report: classes, skipped samples, exports, figures, and files of predictions."""

import csv
import io
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfa_adapters import ocr
from sfa_adapters.analysis import hallucination, hallucination_report
from sfa_adapters.analysis.hallucination_compare import compare, paired_change
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.analyze.predictions import read_predictions

PRINTED = ("Tea", "1,234", "Coffee", "25%", "-7")


def _report(answer, true, printed=PRINTED, **options):
    return hallucination_report([answer], [true], printed=[printed], **options)


@pytest.mark.parametrize(
    ("answer", "true", "kind"),
    [
        ("1234", "1234", "correct"),
        ("9999", ["3", "9,999", "9999"], "correct"),  # any of the answers, printed or not
        ("1200", "1234", "correct"),  # 5% off is right, though it is not printed
        ("25", "1234", "misread"),
        ("25 %, 7", "1234", "misread"),
        ("1,310", "1234", "fabricated"),
        ("25 or 26", "1234", "fabricated"),  # one number that is nowhere is enough
        ("Tea", "Coffee", "other"),
        ("", "Coffee", "other"),
        ("COVID19", "Coffee", "other"),  # digits in a word are no number
        ("약25", "1234", "misread"),
        ("총26명", "1234", "fabricated"),  # hidden behind a letter it was no number
        ("0.25", "1234", "misread"),  # 25% as a fraction
        ("0.26", "1234", "fabricated"),
        ("1.234K", "7", "misread"),
        ("One thousand", "7", "fabricated"),
        ("1 234", "7", "misread"),
        ("1 235", "7", "fabricated"),
    ],
)
def test_classes(answer, true, kind):
    report = _report(answer, true)
    assert [j.kind for j in report.judged] == [kind]
    assert report.counts[kind] == 1
    assert sum(report.counts.values()) == 1


def test_a_text_alone_is_one_text():
    assert _report("3", "9", printed="1 2").judged[0].kind == "fabricated"
    assert _report("1", "12", printed="12").judged[0].kind == "fabricated"  # not its letters


def test_modes_and_what_only_the_strict_mode_accepts():
    reference, strict = _report("1,234", "1234"), _report("1,234", "1234", mode="strict")
    assert reference.counts["misread"] == strict.counts["correct"] == 1
    name = "numeric hallucination, but right in strict mode"
    assert [r["count"] for report in (reference, strict) for r in report.table() if r["quantity"] == name] == [1, 0]
    with pytest.raises(ValueError, match="lenient"):
        _report("1", "1", mode="lenient")


# -- skipped samples --------------------------------------------------------------------------------------------------


def test_skipped_samples_are_counted_and_listed(monkeypatch, tmp_path):
    read = []

    def fake(image):
        read.append(image.shape)
        return () if image[0, 0, 0] == 255 else ("12",)

    monkeypatch.setattr(hallucination, "ocr_texts", fake)
    text, blank = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    report = hallucination_report(
        ["12", "12", "12", "12", "12", "13", "12"],
        ["12", [], " ", "12", "12", "99", "99"],
        images=[text, text, text, blank, broken, text.copy(), None],
        printed=[None, None, None, (), None, None, None],
    )
    assert [j.kind for j in report.judged] == ["correct", "fabricated"]
    assert [j.index for j in report.judged] == [0, 5]
    assert [s.index for s in report.skipped] == [1, 2, 3, 4, 6]
    assert report.skip_reasons == {
        "no true answer": 2,
        "OCR found no text": 1,  # a right answer: skipping wrong ones only would flatter the model
        "the image cannot be used": 1,
        "neither printed texts nor an image": 1,
    }
    assert "broken.png" in report.skipped[3].detail
    assert len(read) == 2  # the same image is read once
    rows = {row["quantity"]: row for row in report.table()}
    assert rows["correct"]["of"] == 2
    assert rows["skipped: no true answer"]["count"] == 2
    assert rows["skipped: no true answer"]["of"] == 7


def test_known_texts_win_over_the_image(monkeypatch):
    monkeypatch.setattr(hallucination, "ocr_texts", lambda image: pytest.fail("must not be read"))
    image = np.zeros((4, 4, 3), np.uint8)
    assert _report("25", "9", images=[image]).counts["misread"] == 1


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((["1"], ["1"]), {}, "printed="),
        ((["1"], ["1", "2"]), {"printed": [["1"]]}, r"'answers': 2"),
        ((["1"], ["1"]), {"printed": [["1"], ["2"]]}, r"'printed': 2"),
        (([], []), {"printed": []}, "at least one"),
        ((["1"], [""]), {"printed": [["1"]]}, r"no true answer \(1\)"),
        (([None], ["1"]), {"printed": [["1"]]}, "Sample 0: the prediction is None"),
        ((["1"], [3]), {"printed": [["1"]]}, "Sample 0: the answer is 3"),
        ((["1"], ["3"]), {"printed": [[3]]}, "Sample 0: printed"),
    ],
)
def test_mistakes_are_named(arguments, options, match):
    with pytest.raises(DataError, match=match):
        hallucination_report(*arguments, **options)


def test_a_missing_ocr_engine_names_its_extra(monkeypatch):
    ocr.ocr_engine.cache_clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[ocr\]"):
        hallucination_report(["1"], ["1"], images=[np.zeros((9, 9, 3), np.uint8)])
    ocr.ocr_engine.cache_clear()


def test_ocr_reads_a_chart_with_upright_labels():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.bar(["2019", "2020", "2068"], [935.0, 315.4, 671.2]))
    axes.set_yticks([])
    axes.set_ylabel("Share 1961-1999")  # read upside down without angle correction
    axes.tick_params(axis="x", rotation=90)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]
    answers, true = ["2068", "1961", "315.4", "316", "671.2"], ["935", "935", "935", "935", "671.2"]
    report = hallucination_report(answers, true, images=[image] * 5)
    assert [j.kind for j in report.judged] == ["misread", "misread", "misread", "fabricated", "correct"]
    assert ocr.ocr_texts(np.full((64, 64, 3), 255, np.uint8)) == ()


# -- numbers, files, figures ------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["1234", "25", "26", "Tea", "1,234", "-7"]), min_size=1, max_size=30))
def test_shares_add_up_to_one_and_lie_in_their_intervals(answers):
    report = hallucination_report(answers, ["1234"] * len(answers), printed=[PRINTED] * len(answers))
    shares = report.shares
    assert sum(s.value for s in shares.values()) == pytest.approx(1)
    rows = {row["quantity"]: row for row in report.table()}
    assert rows["numeric hallucination"]["share"] == pytest.approx(shares["misread"].value + shares["fabricated"].value)
    for row in rows.values():
        if row["of"]:
            assert row["share"] == pytest.approx(row["count"] / row["of"])
            assert 0 <= row["low"] <= row["share"] + 1e-12 <= row["high"] + 2e-12 <= 1 + 3e-12


def _example():
    answers, true = ["1234", "25", "1,310", "Tea", "1200", "1"], ["1234", "1234", "1234", "Coffee", "1234", ""]
    return hallucination_report(answers, true, printed=[PRINTED] * 6)


def test_variants():
    rows = {row["quantity"]: (row["count"], row["of"]) for row in _example().table()}
    assert rows["numeric hallucination"] == (2, 5)
    assert rows["numeric hallucination, of answers with a number"] == (2, 4)
    assert rows["number not on the image, of answers with a number"] == (2, 4)  # 1,310, and 1200 that counts as right


def test_exports(tmp_path):
    report = _example()
    with report.to_csv(tmp_path / "table.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["quantity"] for r in rows] == [r["quantity"] for r in report.table()]
    assert float(rows[0]["share"]) == report.shares["correct"].value == 0.4
    exported = json.loads(report.to_json())
    assert exported["table"][0]["count"] == 2
    assert exported["table"][-1]["low"] is None
    assert exported["judged"][2] == {"index": 2, "kind": "fabricated", "unprinted": ["1310"], "strict": False}
    assert exported["skipped"] == [{"index": 5, "reason": "no true answer", "detail": ""}]


def test_json_stays_valid_without_numbers_and_with_endless_ones():
    exported = json.loads(_report("Tea", "Coffee").to_json(), parse_constant=pytest.fail)
    assert [row["share"] for row in exported["table"] if row["of"] == 0] == [None, None]
    endless = _report("1" * 400, "3")
    assert math.isinf(endless.judged[0].unprinted[0])
    json.loads(endless.to_json(), parse_constant=pytest.fail)


@pytest.mark.parametrize("names", [[""], ["before", "after"], ["InternVL3.5-8B", "with SFA", "and entropy", "all"]])
def test_figures_have_room_for_their_labels(names):
    report = _example()
    figure = report.figure() if names == [""] else compare(dict.fromkeys(names, report))
    figure.savefig(io.BytesIO())
    axes = figure.axes[0]
    written = [*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels(), axes.xaxis.label, axes.title]
    written += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [t.get_window_extent() for t in written if t.get_text()]
    assert len(axes.texts) == 4 * len(names)
    assert "40.0%" in [t.get_text() for t in axes.texts]
    assert all(float(t.get_fontsize()) >= 15 for t in written if t.get_text())
    assert not [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes) if i < j and a.overlaps(b)]
    page = figure.bbox
    assert all(b.x0 >= page.x0 and b.x1 <= page.x1 and b.y0 >= page.y0 and b.y1 <= page.y1 for b in boxes)


def test_no_tick_stands_beyond_all_answers():
    assert max(_report("1234", "1234").figure().axes[0].get_xticks()) == 100


def test_nothing_to_draw():
    with pytest.raises(DataError, match="no report"):
        compare({})


def test_paired_change():
    before = _example()
    true = ["1234", "1234", "1234", "Coffee", "1234", ""]
    after = hallucination_report(["1234"] * 4 + ["25", "25"], true, printed=[PRINTED] * 6)
    rows = {row["quantity"]: row for row in paired_change(before, after)}
    assert rows["correct"]["change"] == pytest.approx(0.2)
    assert rows["fabricated"]["change"] == pytest.approx(-0.2)
    assert rows["numeric hallucination"]["change"] == pytest.approx(0.0)
    assert rows["correct"]["of"] == 5
    assert rows["correct"]["low"] <= 0.2 <= rows["correct"]["high"]
    assert all(row["low"] == row["high"] == 0 for row in paired_change(before, before))
    with pytest.raises(DataError, match="no pairs"):
        paired_change(before, _report("1", "1"))


# -- files of predictions ---------------------------------------------------------------------------------------------


def test_json_lines_and_csv_say_the_same(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "said.jsonl").write_text(
        '\ufeff{"prediction": 12.0, "answers": ["12", "twelve"], "image": "a.png"}\n\n'
        '{"prediction": "a, \u2028b", "label": 7, "printed": ["7", "8"]}\n'
        '{"prediction": "", "answer": []}\n',
        encoding="utf-8",
    )
    (tmp_path / "said.csv").write_text(
        'prediction,answers,image,printed\n12.0,"[""12"", ""twelve""]",a.png,\n'
        '"a, \u2028b",7,,"[""7"", ""8""]"\n,[],,\n',
        encoding="utf-8",
    )
    predictions = read_predictions(tmp_path / "said.jsonl")
    assert predictions == read_predictions(tmp_path / "said.csv")
    assert predictions.predictions == ("12.0", "a, \u2028b", "")
    assert predictions.answers == (("12", "twelve"), ("7",), ())
    assert predictions.images == (tmp_path / "a.png", None, None)
    assert predictions.printed == ((), ("7", "8"), ())


def test_a_csv_cell_may_begin_with_a_bracket(tmp_path):
    (tmp_path / "said.csv").write_text('prediction,answer\n[1,x\n"[1, 2]",y\n".\nz",w\n'.replace("[1,x", '"[1",x'))
    assert read_predictions(tmp_path / "said.csv").predictions == ("[1", "[1, 2]", ".\nz")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.jsonl", "", "no rows"),
        ("a.csv", "prediction,answer\n", "no rows"),
        ("a.jsonl", '{"prediction": "1", "answer": "1"}\n{oops\n', "line 2: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", '{"said": "1", "answer": "1"}\n', r"line 1: columns said, answer; expected prediction"),
        ("a.jsonl", '{"prediction": "1"}\n', "expected prediction and answers"),
        ("a.jsonl", '{"prediction": null, "answer": "1"}\n', "the prediction is None"),
        ("a.jsonl", '{"prediction": "1", "answer": true}\n', "answer is True"),
        ("a.jsonl", '{"prediction": "1", "answer": "1", "printed": [["1"]]}\n', "printed is"),
        ("a.jsonl", '{"prediction": "1", "answer": "1", "image": "gone.png"}\n', r"no image file 'gone.png'"),
        ("a.csv", "prediction,answer\n1,2,3\n", "line 2: the row has another number of cells"),
        ("a.csv", "prediction,answer\n1\n", "line 2: the row has another number of cells"),
        ("a.csv", 'prediction,answer\n"1,2\n', "not CSV"),
        ("a.csv", "prediction,image\n1,2\n", "expected prediction and answers"),
        ("a.xlsx", "", r"\.jsonl or \.csv"),
        ("a.csv", "prediction,answer\n\udcff,1\n", "UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, match):
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(DataError, match=match):
        read_predictions(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.csv"):
        read_predictions(tmp_path / "gone.csv")
