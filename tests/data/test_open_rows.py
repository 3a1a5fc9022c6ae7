"""`open_rows`: every column schema, local files of every kind, what is refused, and what is skipped and reported."""

import io
import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sfa_adapters.data import open_rows as module
from sfa_adapters.data.datasets import Questions, StreamedQuestions
from sfa_adapters.data.local_files import find_split
from sfa_adapters.data.open_rows import open_rows
from sfa_adapters.data.rows import Columns, Row
from sfa_adapters.errors import DataError
from sfa_adapters.images import as_image

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # `datasets` waits five seconds after every shuffled pass, for threads that large files need.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def _png(number=0, width=20, height=10):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (number % 256, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def _bomb():
    """A header that claims 60,000 x 60,000 pixels, with no pixels behind it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 100) + b"IDAT"


def _same(example):
    return example


def _cell(raw):
    return {"bytes": raw, "path": None}


def _parquet(path, records, **features):
    table = datasets.Dataset.from_list(records)
    for column, feature in features.items():
        table = table.cast_column(column, feature)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))


def _lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")


IMAGE = datasets.Image()
LABEL = datasets.ClassLabel(names=["human", "machine"])
# Columns of a data set, features that are not plain, and the row that they make.
SCHEMAS = {
    "HuggingFaceM4/ChartQA": (
        {"image": _cell(_png()), "query": " How many? ", "label": [" 12 "], "human_or_machine": 1},
        {"image": IMAGE, "human_or_machine": LABEL},
        {"id": "test-0", "question": "How many?", "answers": ("12",), "split": "augmented", "kind": "augmented"},
    ),
    "ahmed-masry/ChartQA": (
        {"imgname": "a.png", "query": "How many?", "label": "12", "type": "human", "image": _png()},
        {},
        {"id": "test-0", "question": "How many?", "answers": ("12",), "split": "human", "kind": "human"},
    ),
    "lmms-lab/ChartQA": (
        {"type": "human_test", "question": "How many?", "answer": "12", "image": _cell(_png())},
        {"image": IMAGE},
        {"id": "test-0", "question": "How many?", "answers": ("12",), "split": "human", "kind": "human_test"},
    ),
    "lmms-lab/DocVQA": (
        {
            "questionId": "337", "question": "What is it?", "question_types": ["form", "table/list"],
            "image": _cell(_png()), "docId": 279, "ucsf_document_id": "x", "ucsf_document_page_no": "1",
            "answers": ["a memo", "memo"], "data_split": "test",
        },
        {"image": IMAGE},
        {"id": "337", "answers": ("a memo", "memo"), "split": "form, table/list"},
    ),
    "InfographicVQA": (
        {
            "questionId": "1", "question": "Which?", "answers": ["blue"], "answer_type": ["single span"],
            "image": _cell(_png()), "image_url": "u", "operation/reasoning": [], "ocr": "[]", "data_split": "test",
        },
        {"image": IMAGE},
        {"id": "1", "answers": ("blue",), "split": "single span"},
    ),
    "lmms-lab/textvqa": (
        {
            "image_id": "f00", "question_id": 34602, "question": "what brand?", "question_tokens": ["what", "brand"],
            "image": _cell(_png()), "image_width": 20, "image_height": 10, "answers": ["nokia"] * 7 + ["lumia"] * 3,
            "image_classes": ["Phone"], "set_name": "test", "ocr_tokens": ["NOKIA"],
        },
        {"image": IMAGE},
        {"id": "34602", "answers": ("nokia",) * 7 + ("lumia",) * 3, "split": ""},
    ),
    "echo840/OCRBench": (
        {
            "dataset": "IIIT5K", "question": "what is written?", "question_type": "Regular Text Recognition",
            "answer": ["CENTRE"], "image": _cell(_png()),
        },
        {"image": IMAGE},
        {"id": "test-0", "answers": ("CENTRE",), "split": "Regular Text Recognition"},
    ),
    "the_cauldron": (
        {"images": [_cell(_png())], "texts": [{"user": "How many?\n", "assistant": "12", "source": "DVQA"}]},
        {"images": datasets.List(IMAGE)},
        {"id": "test-0.0", "question": "How many?", "answers": ("12",), "split": ""},
    ),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_becomes_the_same_rows(tmp_path, name, streaming):
    record, features, expected = SCHEMAS[name]
    _parquet(tmp_path / "test-00000.parquet", [record], **features)
    (row,) = open_rows(tmp_path, "test", streaming=streaming)
    assert isinstance(row.image, bytes)  # undecoded
    assert as_image(row.image).shape == (10, 20, 3)
    assert {field: getattr(row, field) for field in expected} == expected
    assert "row 0" in row.where


def test_dvqa_as_it_is_published(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bar_1.png").write_bytes(_png())
    record = {
        "image": "bar_1.png", "question": "What is the value?", "answer": 7, "question_id": 5,
        "template_id": "data", "answer_bbox": [10.0, 20.0, 30.0, 40.0],
    }  # fmt: skip
    _lines(tmp_path / "train_qa.json", [{**record, "answer": 1}])
    (tmp_path / "val_easy_qa.json").write_text(json.dumps([record, {**record, "answer_bbox": [], "question_id": 6}]))
    rows = open_rows(tmp_path, "val_easy")
    assert [row.boxes for row in rows] == [((10.0, 20.0, 40.0, 60.0),), ()]
    assert (rows[0].id, rows[0].answers, rows[0].split) == ("5", ("7",), "data")
    assert rows[0].image == tmp_path / "images" / "bar_1.png"


@pytest.mark.parametrize("indent", [None, 1])
def test_docvqa_as_its_challenge_publishes_it(tmp_path, indent):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.png").write_bytes(_png())
    record = {"questionId": 3, "question": "Who?", "image": "documents/a.png", "answers": ["me"]}
    published = {"dataset_name": "docvqa", "dataset_split": "val", "data": [record]}
    (tmp_path / "val_v1.0.json").write_text(json.dumps(published, indent=indent))
    (row,) = open_rows(tmp_path, "validation")
    assert (row.id, row.answers, Path(row.image).name) == ("3", ("me",), "a.png")


def test_chartqa_as_it_is_published(tmp_path):
    (tmp_path / "test" / "png").mkdir(parents=True)
    (tmp_path / "test" / "png" / "7.png").write_bytes(_png())
    _lines(tmp_path / "test" / "annotations" / "test_7.json", [{"models": []}])
    for kind, label in (("human", "1"), ("augmented", "2")):
        records = [{"imgname": "7.png", "query": "q", "label": label}]
        (tmp_path / "test" / f"test_{kind}.json").write_text(json.dumps(records))
    rows = open_rows(tmp_path, "test")
    assert [(row.id, row.split, row.target) for row in rows] == [
        ("test_augmented-0", "augmented", "2"),
        ("test_human-0", "human", "1"),
    ]


def test_a_folder_of_images_with_a_table(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(_png())
    (tmp_path / "train" / "metadata.csv").write_text("file_name,question,answer\na.png,Which code?,007\na.png,q2,\n")
    rows = open_rows(tmp_path, "train")
    assert rows[0].answers == ("007",)
    with pytest.raises(DataError, match=r"metadata\.csv, row 1: no answer in column 'answer'"):
        rows[1]


def test_what_save_to_disk_wrote(tmp_path):
    table = datasets.Dataset.from_list([{"image": _png(), "question": "q", "answer": "a"}])
    datasets.DatasetDict({"dev": table}).save_to_disk(str(tmp_path / "both"))
    assert open_rows(tmp_path / "both", "dev")[0].target == "a"
    assert next(iter(open_rows(tmp_path / "both", "dev", streaming=True))).target == "a"
    with pytest.raises(DataError, match=r"no split 'test'\. Found: dev"):
        open_rows(tmp_path / "both", "test")


def test_a_folder_as_the_hub_has_it(tmp_path):
    _parquet(tmp_path / "DocVQA" / "validation-00000-of-00001.parquet", [SCHEMAS["lmms-lab/DocVQA"][0]], image=IMAGE)
    _parquet(tmp_path / "InfographicVQA" / "validation.parquet", [SCHEMAS["InfographicVQA"][0]], image=IMAGE)
    assert open_rows(tmp_path, "validation", "DocVQA")[0].id == "337"
    assert open_rows(tmp_path, "val", "InfographicVQA")[0].id == "1"
    with pytest.raises(DataError, match=r"several|DocVQA, InfographicVQA.*config="):
        open_rows(tmp_path, "validation")


def test_hub_ids_go_through_datasets(tmp_path, monkeypatch):
    _parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [SCHEMAS["HuggingFaceM4/ChartQA"][0]], image=IMAGE)
    (part,) = module._from_hub(str(tmp_path), "test", None, False, None)
    assert part.rows(part.data[0], 0)[0].answers == ("12",)
    for place in (datasets.config, __import__("huggingface_hub").constants):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nobody/nothing \(test\) cannot be opened.*network"):
        open_rows("nobody/nothing", "test")


# -- columns ----------------------------------------------------------------------------------------------------------


def test_a_missing_column_lists_what_is_there_and_what_is_known(tmp_path):
    _parquet(tmp_path / "test.parquet", [{"picture": _png(), "q": "How many?", "a": "12"}])
    with pytest.raises(DataError, match=r"no column for image, question, answers\. There are: picture, q, a\. Known"):
        open_rows(tmp_path, "test")
    columns = {"image": "picture", "question": "q", "answers": "a"}
    assert open_rows(tmp_path, "test", columns=columns)[0].answers == ("12",)
    with pytest.raises(DataError, match=r"question \('w'\).*There are: picture, q, a"):
        open_rows(tmp_path, "test", columns=columns | {"question": "w"})
    with pytest.raises(DataError, match=r"a field 'questions'\. Fields are image, question"):
        open_rows(tmp_path, "test", columns=columns | {"questions": "q"})


def test_a_named_column_wins_over_a_known_one():
    columns = Columns.of(["image", "query", "question", "label"], "here", {"question": "query"})
    record = {"image": b"x", "query": "this", "question": "that", "label": 3.5}
    (row,) = columns.rows(record, "here", "n", lambda name, where: name)
    assert (row.question, row.answers, row.id) == ("this", ("3.5",), "n")


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("a ", ("a",)),
        (["a", "", None, " b"], ("a", "b")),
        (3, ("3",)),
        (3.0, ("3",)),
        (float("nan"), ()),
        (None, ()),
        (np.array(["x", "y"]), ("x", "y")),
        (["a", "a"], ("a", "a")),
    ],
)
def test_answers_of_every_form(label, expected):
    columns = Columns.of(["image", "question", "answer"], "here")
    (row,) = columns.rows({"image": b"", "question": "q", "answer": label}, "here", "n", lambda name, where: name)
    assert row.answers == expected


@pytest.mark.parametrize("label", [True, {"text": "a"}, [["a"]]])
def test_an_answer_that_is_no_text_is_an_error(label):
    columns = Columns.of(["image", "question", "answer"], "here")
    with pytest.raises(DataError, match="here, column 'answer': found"):
        list(columns.rows({"image": b"", "question": "q", "answer": label}, "here", "n", lambda name, where: name))


def test_the_target_is_the_most_common_answer():
    assert Row("a", None, "q", ("x", "Nokia", "lumia", "nokia", "lumia")).target == "Nokia"  # two each: the first
    assert Row("a", None, "q", ("x", "lumia", "y", "Lumia")).target == "lumia"
    with pytest.raises(DataError, match="no answer to train on"):
        _ = Row("a", None, "q", ()).target


def test_many_questions_to_a_record_are_rows_of_their_own(tmp_path):
    texts = [[("a", "1"), ("b", "2")], [], [("c", "3")]]
    records = [
        {"images": [_cell(_png(n))], "texts": [{"user": u, "assistant": a, "source": "x"} for u, a in pairs]}
        for n, pairs in enumerate(texts)
    ]
    _parquet(tmp_path / "train.parquet", records, images=datasets.List(IMAGE))
    rows = open_rows(tmp_path, "train")
    assert len(rows) == 3
    assert [(row.id, row.question, row.target) for row in rows] == [
        ("train-0.0", "a", "1"), ("train-0.1", "b", "2"), ("train-2.0", "c", "3"),
    ]  # fmt: skip
    assert as_image(rows[2].image)[0, 0, 0] == 2
    assert [row.id for row in open_rows(tmp_path, "train", streaming=True)] == [row.id for row in rows]
    assert [row.question for row in open_rows(tmp_path, "train", limit=2)] == ["a", "b"]


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_split_is_a_word_of_the_name(tmp_path):
    for name in ("latest.parquet", "contest/a.parquet", "train.parquet", "docs_test-0.parquet", "test/b.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (split,) = find_split(tmp_path, "test")
    assert [path.relative_to(tmp_path).as_posix() for path in split.files] == ["docs_test-0.parquet", "test/b.parquet"]


def test_one_file_must_say_which_split_it_is(tmp_path):
    record = {"image": "a.png", "question": "q", "answer": "1"}
    (tmp_path / "a.png").write_bytes(_png())
    _lines(tmp_path / "mine.jsonl", [record])
    _lines(tmp_path / "mine_train.jsonl", [record])
    assert len(open_rows(tmp_path / "mine_train.jsonl", "train")) == 1
    assert len(open_rows(tmp_path / "mine.jsonl", "")) == 1
    for name in ("mine.jsonl", "mine_train.jsonl"):
        with pytest.raises(DataError, match="does not say that it holds the split 'test'"):
            open_rows(tmp_path / name, "test")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"notes\.txt is no \.parquet"):
        open_rows(tmp_path / "notes.txt", "train")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"test\.parquet cannot be opened"):
        open_rows(tmp_path, "test")


def test_a_split_without_rows_or_answers_is_refused(tmp_path):
    datasets.Dataset.from_dict({"question": [], "answer": [], "image": []}).to_parquet(str(tmp_path / "val.parquet"))
    record = {**SCHEMAS["lmms-lab/DocVQA"][0], "answers": None}
    _parquet(tmp_path / "test.parquet", [record, record], image=IMAGE)
    for streaming in (False, True):
        with pytest.raises(DataError, match="no rows"):
            open_rows(tmp_path, "val", streaming=streaming)
        with pytest.raises(DataError, match=r"no answers in its first 2 rows.*validation split"):
            open_rows(tmp_path, "test", streaming=streaming)
    rows = open_rows(tmp_path, "test", answered=False)
    assert [row.answers for row in rows] == [(), ()]
    assert Questions(rows, answered=False)[0]["image"].shape == (10, 20, 3)


# -- what cannot be used ----------------------------------------------------------------------------------------------


def _records(count=12):
    return [{"question_id": f"q{n}", "image": _cell(_png(n)), "question": "q", "answer": str(n)} for n in range(count)]


@pytest.fixture
def damaged(tmp_path):
    """Twelve questions, of which 2 and 3 follow each other, 7 and the last cannot be used."""
    records = _records()
    records[2]["image"] = _cell(_bomb())
    records[3]["image"] = _cell(_png(3, 200, 200)[:-60])
    records[7]["answer"] = None
    records[11]["image"] = _cell(_png(11, 1000, 2))
    _parquet(tmp_path / "train.parquet", records, image=IMAGE)
    return open_rows(tmp_path, "train")


def test_what_cannot_be_used_is_replaced_and_told(damaged):
    examples = list(DataLoader(Questions(damaged), batch_size=None, collate_fn=_same))
    assert [example["row"].id for example in examples] == [
        f"q{n}" for n in (0, 1, 4, 4, 4, 5, 6, 8, 8, 9, 10, 0)
    ]  # batches keep their size
    reasons = {skipped.id: skipped.reason for example in examples for skipped in example["skipped"]}
    assert list(reasons) == ["q2", "q3", "row 7", "q11"]
    assert "row 2: the image is too large" in reasons["q2"]
    assert "row 3: the image cannot be read" in reasons["q3"]
    assert "row 7: no answer in column 'answer' (found None)" in reasons["row 7"]
    assert "1000 x 2 pixels" in reasons["q11"]
    assert [len(example["skipped"]) for example in examples] == [0, 0, 2, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_workers_give_the_same_examples_and_tell_the_same(damaged):
    def read(workers):
        loader = DataLoader(Questions(damaged), batch_size=4, collate_fn=list, num_workers=workers)
        return [(e["row"].id, e["image"].tolist(), e["skipped"]) for batch in loader for e in batch]

    assert read(2) == read(0)
    assert pickle.loads(pickle.dumps(damaged))[5] == damaged[5]


def test_without_any_usable_row_it_stops(tmp_path, monkeypatch):
    records = [{**record, "image": _cell(b"nothing")} for record in _records(5)]
    _parquet(tmp_path / "train.parquet", records, image=IMAGE)
    questions = Questions(open_rows(tmp_path, "train"))
    with pytest.raises(DataError, match="5 rows in succession cannot be used; the first is q3"):
        questions[3]
    monkeypatch.setattr("sfa_adapters.data.datasets.MOST_SKIPPED", 2)
    for source in (questions, StreamedQuestions(open_rows(tmp_path, "train", streaming=True))):
        with pytest.raises(DataError, match="2 rows in succession"):
            next(iter(source)) if source is not questions else questions[0]
    with pytest.raises(DataError, match="There are no rows"):
        Questions([])


@pytest.mark.parametrize("name", ["../secret.png", "gone.png", "/etc/hostname", ""])
def test_images_outside_the_folder_are_not_read(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(_png())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(_png())
    records = [{"imgname": i, "query": "q", "label": "1"} for i in ("a.png", name)]
    _lines(tmp_path / "data" / "test.jsonl", records)
    (example, _) = DataLoader(Questions(open_rows(tmp_path / "data", "test")), batch_size=None, collate_fn=_same)
    with pytest.raises(DataError, match="row 1: no image file"):
        open_rows(tmp_path / "data", "test")[1]
    assert example["skipped"] == ()


# -- streams ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(tmp_path):
    for shard in range(3):
        _parquet(tmp_path / f"train-{shard}.parquet", _records(24)[8 * shard : 8 * shard + 8], image=IMAGE)
    return open_rows(tmp_path, "train", streaming=True)


def _ids(questions, epoch=0, workers=0):
    questions.set_epoch(epoch)
    return [e["row"].id for e in DataLoader(questions, batch_size=None, collate_fn=_same, num_workers=workers)]


def test_a_stream_has_an_order_of_its_seed_and_epoch(stream):
    plain = [f"q{n}" for n in range(24)]
    assert _ids(StreamedQuestions(stream, buffer=0)) == plain
    one = _ids(StreamedQuestions(stream, seed=5, buffer=8))
    assert one != plain
    assert sorted(one) == sorted(plain)
    assert _ids(StreamedQuestions(stream, seed=5, buffer=8)) == one
    assert _ids(StreamedQuestions(stream, seed=6, buffer=8)) != one
    assert _ids(StreamedQuestions(stream, seed=5, buffer=8), epoch=1) != one


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_stopped(stream, workers):
    whole = _ids(StreamedQuestions(stream, seed=5, buffer=8), workers=workers)
    assert sorted(whole) == sorted(f"q{n}" for n in range(24))  # workers share the rows
    assert _ids(StreamedQuestions(stream, seed=5, buffer=8, skip=10), workers=workers) == whole[10:]


def test_a_stream_of_plain_rows_is_shared_too():
    rows = [Row(f"r{n}", np.zeros((4, 4, 3), np.uint8), "q", ("a",)) for n in range(7)]
    for workers in (0, 2):
        assert sorted(_ids(StreamedQuestions(rows), workers=workers)) == [f"r{n}" for n in range(7)]


def test_a_stream_tells_what_it_left_out(damaged, tmp_path):
    streamed = StreamedQuestions(open_rows(tmp_path, "train", streaming=True), buffer=0)
    examples = list(streamed)
    assert [e["row"].id for e in examples] == [f"q{n}" for n in (0, 1, 4, 5, 6, 8, 9, 10)]
    assert [s.id for e in examples for s in e["skipped"]] == ["q2", "q3", "train-7"]
    with pytest.raises(DataError, match="row 7: no answer"):
        list(open_rows(tmp_path, "train", streaming=True))


def test_a_limit_is_the_first_rows(stream, tmp_path):
    first = ["q0", "q1", "q2"]
    assert [row.id for row in open_rows(tmp_path, "train", limit=3)] == first
    assert [row.id for row in open_rows(tmp_path, "train", limit=3, streaming=True)] == first
    rows = open_rows(tmp_path, "train")
    assert [row.id for row in rows[-2:]] == ["q22", "q23"]
    assert rows[-1] == rows[23]
    with pytest.raises(IndexError):
        rows[24]


def test_the_sampler_alone_decides_the_order(stream, tmp_path):
    questions = Questions(open_rows(tmp_path, "train"))

    def order(seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            e["row"].id
            for e in DataLoader(questions, batch_size=None, collate_fn=_same, shuffle=True, generator=generator)
        ]

    assert order(1) == order(1) != order(2)
