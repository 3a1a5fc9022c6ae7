"""Answers, scores and tables: against slow references, after kills, and with broken rows."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from rich.table import Table as RichTable
from torch.multiprocessing.spawn import start_processes

from sfa_adapters import inject_sfa
from sfa_adapters.bias import TERMS
from sfa_adapters.cli.main import main
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import DataError, RecipeError, SFAError
from sfa_adapters.evaluation import predictions as predictions_file
from sfa_adapters.evaluation.ablation import Variant, part_variants, run_ablation, term_variants
from sfa_adapters.evaluation.answers import answer_rows, fingerprint, generate
from sfa_adapters.evaluation.open_host import family_of, find_run, open_host
from sfa_adapters.evaluation.predictions import Prediction, PredictionFile, read_answers
from sfa_adapters.evaluation.scores import compare, metric_for, row_scores, score
from sfa_adapters.evaluation.tables import ablation_table, hallucination_of, hallucination_table, score_table
from sfa_adapters.evaluation.terminal import terminal_table
from sfa_adapters.hosts.load import Host
from sfa_adapters.hosts.recipe import Family, Recipe
from sfa_adapters.hosts.spec import families
from sfa_adapters.inject import save_sfa
from sfa_adapters.recipes.analyze.predictions import read_predictions
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples
from sfa_adapters.training.checkpoints import save_trained
from tests.support.nightly_hosts import families_of

FAMILIES: tuple[str, ...] = families()
SETTINGS: dict[str, Any] = {
    "plan": "bf16", "dtype": "float32", "max_tiles": 2, "max_pixels": 140 * 140, "num_workers": 0,
    "max_new_tokens": 6, "prompt": "{question}", "eval_batch": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    folder = tmp_path_factory.mktemp("hosts")
    return lambda family: nano_checkpoint(family, folder / family)


@pytest.fixture(scope="module")
def reader(checkpoints: Callable[[Family], Path]) -> Host:
    """The nano host that can read charts."""
    return open_host(checkpoints("llava_onevision"), **SETTINGS)


def chart_rows(count: int) -> list[Row]:
    return [
        Row(s.id, s.image, s.question, s.answers, s.type, tuple(t.text for t in s.texts))
        for s in chart_samples("test", count)
    ]


def predictions_of(*pairs: tuple[str, str], **fields: Any) -> list[Prediction]:
    """Predictions from pairs of a predicted and a true answer."""
    return [Prediction(i, f"r{i}", f"q{i}?", (true,), text, **fields) for i, (text, true) in enumerate(pairs)]


# -- the file ---------------------------------------------------------------------------------------------------------


def test_half_a_line_is_dropped_and_the_rest_goes_on(tmp_path: Path) -> None:
    made = predictions_of(("1", "1"), ("2\n\u2028 x", "2"), ("3", "3"))
    file = PredictionFile(tmp_path / "p.jsonl")
    file.start({"weights": "a"})
    file.append(made[:2])
    with file.path.open("a") as torn:
        torn.write('{"index": 2, "id": "r2", "predic')
    again = PredictionFile(tmp_path / "p.jsonl")
    again.start({"weights": "a"})
    assert again.read() == {0: made[0], 1: made[1]}
    again.append(made[2:])
    assert read_answers(file.path) == made
    assert again.merge() == made


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "p.jsonl")
    file.start({"weights": "a", "prompt": "x", "layers": (1, 2)})
    file.start({"weights": "b", "prompt": "x"})  # no answers yet: nothing to mix
    file.append(predictions_of(("1", "1")))
    file.start({"weights": "b", "prompt": "x"})
    with pytest.raises(RecipeError, match=r"prompt: 'x' there, 'y' now, weights: 'b' there, 'c' now"):
        file.start({"weights": "c", "prompt": "y"})
    file.settings.unlink()
    with pytest.raises(RecipeError, match="settings are not known"):
        file.start({"weights": "b", "prompt": "x"})
    with pytest.raises(RecipeError, match="must end in"):
        PredictionFile(tmp_path / "p.json")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PredictionFile(tmp_path / "p.jsonl")
    file.start({"weights": "a"})
    file.append(predictions_of(("1", "1")))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predictions_file.os, "fsync", full)
    with pytest.raises(RecipeError, match="No space left"):
        file.append(predictions_of(("1", "1"), ("2", "2"))[1:])
    (tmp_path / "table.md").write_text("old")
    with pytest.raises(RecipeError, match="No space left"):
        predictions_file.write_atomically(tmp_path / "table.md", "new")
    assert (tmp_path / "table.md").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl", "p.settings.json", "table.md"]


def test_parts_of_several_processes_become_one_file(tmp_path: Path) -> None:
    made = predictions_of(*((str(i), "1") for i in range(12)))
    (tmp_path / "p.settings.jsonl").write_text("not a part\n")
    for rank in range(3):
        PredictionFile(tmp_path / "p.jsonl", rank).append(made[rank::3])
    file = PredictionFile(tmp_path / "p.jsonl")
    assert len(file.parts()) == 3
    assert file.merge() == made
    assert file.parts() == [file.path]
    assert read_answers(file.path) == made


def test_the_file_is_one_for_the_hallucination_report(tmp_path: Path) -> None:
    image = tmp_path / "charts" / "a.png"
    image.parent.mkdir()
    Image.new("RGB", (8, 8)).save(image)
    file = PredictionFile(tmp_path / "out" / "p.jsonl")
    file.start({})
    made = [
        replace(predictions_of(("12", "12"))[0], printed=("12", "3")),
        replace(predictions_of(("", "5"))[0], index=1, failed="broken"),
    ]
    made.append(Prediction(2, "c", "q", (), "7", image=os.path.relpath(image, file.path.parent)))
    file.append(made)
    predictions = read_predictions(file.path)
    assert predictions.predictions == ("12", "", "7")
    assert predictions.answers == (("12",), ("5",), ())
    assert predictions.printed == (("12", "3"), (), ())
    assert predictions.images[2] is not None
    assert predictions.images[2].samefile(image)


def test_files_that_are_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        read_answers(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text('{"index": 0, "id": "a", "answers": [], "prediction": "x"}\n{"prediction": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        read_answers(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(DataError, match="no answers"):
        read_answers(tmp_path / "p.jsonl")


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "text", "answers", "split", "expected"),
    [
        ("relaxed", "104", ("100",), "", 1.0),
        ("relaxed", "1,000", ("1000",), "", 0.0),
        ("relaxed_strict", "1,000", ("1000",), "", 1.0),
        ("relaxed", "b", ("a", "b"), "", 1.0),
        ("anls", "Jon Smith", ("John Smith", "J. Smith"), "", 0.9),
        ("vqa", "stop", ("stop", "Stop!", "the stop", *["go"] * 7), "", 0.9),
        ("vqa", "stop", ("stop", "stop", "stop", ""), "", 0.75),  # a blank answer is one of the people's
        ("ocrbench", "It says STOP.", ("stop",), "Regular Text Recognition", 1.0),
        ("ocrbench", "X ^ 2", ("x^2",), "Handwritten Mathematical Expression Recognition", 0.0),
        ("ocrbench", "x ^ 2", ("x^2",), "Handwritten Mathematical Expression Recognition", 1.0),
        ("exact", " New  York", ("new york",), "", 1.0),
    ],
)
def test_metrics(metric: Any, text: str, answers: tuple[str, ...], split: str, expected: float) -> None:
    assert row_scores([Prediction(0, "a", "q", answers, text, split)], metric)[0] == pytest.approx(expected)


def test_failed_rows_are_wrong_and_rows_without_an_answer_in_no_mean() -> None:
    rows = [
        *predictions_of(("1", "1"), ("2", "1"), ("3", "3")),
        Prediction(3, "n", "q", (), "x"),
        Prediction(4, "m", "q", (" ",), "x"),
    ]
    rows[2] = replace(rows[2], failed="broken image")
    rows[1] = replace(rows[1], truncated=True)
    values = row_scores(rows, "exact")
    assert values[:3].tolist() == [1.0, 0.0, 0.0]
    assert np.isnan(values[3:]).all()
    table = score(rows, "exact")
    assert (table.rows, table.failed, table.truncated, table.unscored) == (5, 1, 1, 2)
    assert (table["all"].of, table["all"].mean.value) == (3, pytest.approx(1 / 3))
    with pytest.raises(DataError, match="nothing to score"):
        score(rows[3:], "exact")
    with pytest.raises(DataError, match=r"Row r0: .*at least 4 people"):
        score(rows, "vqa")
    with pytest.raises(DataError, match="Unknown metric 'bleu'"):
        score(rows, "bleu")  # pyright: ignore[reportArgumentType]


def test_the_average_of_the_two_splits() -> None:
    rows = [replace(p, split="human") for p in predictions_of(("1", "1"), ("2", "1"))]
    rows += [replace(p, split="augmented") for p in predictions_of(("1", "1"), ("1", "1"), ("1", "1"), ("0", "1"))]
    table = score(rows, "exact")
    assert [s.group for s in table.scores] == ["all", "human", "augmented", "average of splits"]
    assert (table["all"].mean.value, table["human"].mean.value) == (pytest.approx(4 / 6), 0.5)
    assert table.mean.value == pytest.approx((0.5 + 0.75) / 2)
    # Slowly: each split resampled by itself.
    rng, means = np.random.default_rng(1), []
    for _ in range(4000):
        means.append((rng.choice([1, 0], 2).mean() + rng.choice([1, 1, 1, 0], 4).mean()) / 2)
    low, high = np.quantile(means, (0.025, 0.975))
    assert (table.mean.low, table.mean.high) == (pytest.approx(low, abs=0.13), pytest.approx(high, abs=0.13))
    assert json.loads(json.dumps(table.to_dict()))["scores"][3]["mean"] == pytest.approx(0.625)
    one = score(rows[:2], "exact")
    assert [s.group for s in one.scores] == ["all", "human"]
    with pytest.raises(KeyError, match="all, human"):
        one["augmented"]


def test_comparisons_are_paired() -> None:
    first = predictions_of(("1", "1"), ("0", "1"), ("0", "1"), ("1", "1"), ("0", "1"))
    second = predictions_of(("1", "1"), ("1", "1"), ("1", "1"), ("0", "1"), ("0", "1"))
    comparison = compare(first, second, "exact")
    assert (comparison.of, comparison.better, comparison.worse, comparison.p_value) == (5, 2, 1, 1.0)
    assert comparison.difference.value == pytest.approx(0.2)
    assert comparison.difference.low <= 0.2 <= comparison.difference.high
    same = compare(first, first, "exact")
    assert (same.difference.low, same.difference.high, same.p_value) == (0.0, 0.0, 1.0)
    for other in (second[:4], [replace(p, answers=("2",)) for p in second], list(reversed(second))):
        with pytest.raises(DataError, match="same rows in the same order"):
            compare(first, other, "exact")


def test_the_metric_of_a_dataset() -> None:
    assert [metric_for(*names) for names in (("lmms-lab/DocVQA", "InfographicVQA"), ("echo840/OCRBench",))] == [
        "anls",
        "ocrbench",
    ]
    named = {"lmms-lab/textvqa": "vqa", "HuggingFaceM4/ChartQA": "relaxed", "local/DVQA": "exact", "charts": "relaxed"}
    assert {name: metric_for(name) for name in named} == named


# -- tables -----------------------------------------------------------------------------------------------------------


def test_table_1() -> None:
    kinds = ("value", "change", "change", "value")  # a split with the name of a column
    first = [
        replace(p, split=k)
        for p, k in zip(predictions_of(("1", "1"), ("0", "1"), ("0", "1"), ("1", "1")), kinds, strict=True)
    ]
    second = [replace(p, prediction="1") for p in first]
    table = score_table({"base|line": first, "+SFA": second}, "exact", "T")
    assert len(set(table.columns)) == len(table.columns)
    assert {"value", "change (split)", "change", "p"} <= set(table.columns)
    assert table.rows[1]["change (split)"].value == 1.0
    assert table.rows[1]["change"].value == 0.5
    assert table.rows[1]["better / worse"] == "2 / 0"
    text = table.to_markdown()
    assert "base\\|line" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "100.0 [100.0, 100.0]" in lines[3]
    assert json.loads(json.dumps(table.to_dict()))["rows"][1]["change"]["value"] == 0.5
    turned = score_table({"base|line": first, "+SFA": second}, "exact", baseline="+SFA")
    assert turned.rows[0]["change"].value == -0.5
    with pytest.raises(DataError, match="no run 'x'"):
        score_table({"a": first}, "exact", baseline="x")
    assert "points" in score_table({"a": first}, "ocrbench").columns


def test_table_2_says_what_was_skipped() -> None:
    first = [*predictions_of(("12", "10"), ("7", "10"), ("10", "10")), *predictions_of(("1", "10"))]
    first = [replace(p, index=i, id=f"r{i}", printed=("10", "12") if i < 3 else ()) for i, p in enumerate(first)]
    second = [replace(p, prediction="10") for p in first]
    table = hallucination_table({"a": first, "b": second})
    assert [table.rows[0][kind].value for kind in ("correct", "misread", "fabricated")] == [pytest.approx(1 / 3)] * 3
    assert (table.rows[0]["judged"], table.rows[0]["skipped"]) == (3, 1)
    assert table.rows[1]["change"].value == pytest.approx(-2 / 3)
    assert any("Skipped: neither printed texts nor an image (1)" in note for note in table.notes)
    with pytest.raises(DataError, match="--ocr"):
        hallucination_of(first[3:])
    with pytest.raises(DataError, match="other questions"):
        hallucination_table({"a": first, "b": second[:3]})


def test_table_3_is_about_all_seeds() -> None:
    right, wrong = predictions_of(("1", "1"), ("1", "1")), predictions_of(("1", "1"), ("0", "1"))
    runs = {v.name: [wrong, wrong] for v in term_variants()} | {"all terms": [right, wrong]}
    table = ablation_table(runs, {v.name: v.terms for v in term_variants()}, "exact")
    assert len(table.rows) == 10
    whole, control = table.rows[0], table.rows[-1]
    assert (whole["score"].value, whole["seeds"], whole["seeds from / to"]) == (0.75, 2, "50.0 / 100.0")
    assert (whole["to control"].value, control["to all terms"].value) == (0.25, -0.25)
    assert [control[t] for t in TERMS] == [""] * 4
    assert [table.rows[1][t] for t in TERMS] == ["", "x", "x", "x"]
    with pytest.raises(DataError, match="other questions"):
        ablation_table({"a": [right], "b": [right[:1]]}, {"a": (), "b": ()}, "exact")


def test_tables_are_written_and_fit_a_terminal(tmp_path: Path) -> None:
    table = score_table({"a[b]": predictions_of(("1", "1")), "c": predictions_of(("0", "1"))}, "exact")
    assert [p.name for p in table.write(tmp_path / "new", "t")] == ["t.md", "t.json"]
    (shown,) = table.to_terminal(100).renderables
    assert isinstance(shown, RichTable)
    assert len(shown.columns) == 3  # two runs beside each other
    assert shown.row_count == len(table.columns) - 1


@pytest.mark.parametrize(("runs", "width"), [(2, 80), (4, 80), (9, 80), (3, 60)])
def test_names_and_intervals_stay_whole_where_a_table_is_wide(runs: int, width: int) -> None:
    names = [f"run-{number}-with-a-name" for number in range(runs)]
    label = ["numeric hallucination", "all"]
    interval = "56.4 [51.8, 60.9]"
    console = Console(width=width, record=True, file=StringIO())
    console.print(terminal_table([["run", *names], *([row, *[interval] * runs] for row in label)], "a title", width))
    shown = console.export_text()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    assert all(name in shown for name in (*names, *label))
    assert shown.count("[51.8, 60.9]") == 2 * runs
    assert shown.count("56.4") == 2 * runs


# -- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families_of(FAMILIES, core=True))
def test_a_batch_answers_as_single_rows_do(family: Family, checkpoints: Callable[[Family], Path]) -> None:
    host = open_host(checkpoints(family), **SETTINGS)
    rows = chart_rows(4)
    rows[1] = replace(rows[1], image=rows[1].image[:, :80], question=rows[1].question * 2)
    together = answer_rows(host, rows, progress=False)
    host.recipe = host.recipe.replace(eval_batch=1)
    assert answer_rows(host, rows, progress=False) == together
    assert [p.index for p in together] == [0, 1, 2, 3]
    assert len({p.prediction for p in together}) > 1 or family == "qwen3_5"  # random bytes, which are no text
    assert not host.model.training


def test_answers_are_those_of_the_plain_processor(reader: Host) -> None:
    rows = chart_rows(5)
    predictions = answer_rows(reader, rows, progress=False)
    processor: Any = reader.processor
    for row, prediction in zip(rows, predictions, strict=True):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor(images=[Image.fromarray(row.image)], text=[text], return_tensors="pt")
        model: Any = reader.model
        out = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert prediction.prediction == processor.tokenizer.decode(out, skip_special_tokens=True).strip()
        assert prediction.truncated == (reader.model.generation_config.eos_token_id not in out.tolist())  # pyright: ignore[reportOptionalMemberAccess]
    assert score(predictions, "relaxed")["all"].mean.value > 0.3  # this one has learnt to read


def test_sampling_that_comes_with_a_model_is_not_used(reader: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = chart_rows(3)
    plain = answer_rows(reader, rows, progress=False)
    for name, value in {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(reader.model.generation_config, name, value)
    assert answer_rows(reader, rows, progress=False) == plain


def test_a_kill_costs_one_batch(reader: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, out = chart_rows(8), tmp_path / "p.jsonl"
    whole = answer_rows(reader, rows, progress=False)
    batch_sizes: list[int] = []

    def counted(host: Host, batch: dict[str, Any], **options: Any) -> tuple[list[str], list[bool]]:
        if sum(batch_sizes) >= 6 and not out.with_suffix(".again").exists():
            raise KeyboardInterrupt
        batch_sizes.append(len(batch["input_ids"]))
        return generate(host, batch, **options)

    monkeypatch.setattr("sfa_adapters.evaluation.answers.generate", counted)
    with pytest.raises(KeyboardInterrupt):
        answer_rows(reader, rows, out, progress=False)
    with out.open("r+") as file:  # the kill came in the middle of a line
        file.truncate(out.stat().st_size - 5)
    out.with_suffix(".again").touch()
    assert answer_rows(reader, rows, out, progress=False) == whole
    assert batch_sizes == [3, 3, 3]
    assert answer_rows(reader, rows, out, progress=False) == whole
    assert batch_sizes == [3, 3, 3]
    reader.recipe = reader.recipe.replace(eval_batch=4)  # only speed
    assert answer_rows(reader, rows, out, progress=False) == whole
    reader.recipe = reader.recipe.replace(eval_batch=3)


def test_another_model_or_other_rows_are_refused(reader: Host, tmp_path: Path) -> None:
    rows, out = chart_rows(3), tmp_path / "p.jsonl"
    answer_rows(reader, rows, out, progress=False)
    with pytest.raises(RecipeError, match="questions:"):
        answer_rows(reader, [rows[1], rows[0], rows[2]], out, progress=False)
    weight = next(reader.model.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1e-3)
    try:
        with pytest.raises(RecipeError, match="weights:"):
            answer_rows(reader, rows, out, progress=False)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert len(answer_rows(reader, rows, out, progress=False)) == 3
    with pytest.raises(DataError, match="no rows"):
        answer_rows(reader, [], out, progress=False)


class Records(list[Row]):
    """Rows of which one cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == 2:
            raise DataError("record 2: no question")
        return super().__getitem__(index)


def test_broken_rows_stay_in_the_list(reader: Host, tmp_path: Path) -> None:
    rows = Records(chart_rows(5))
    good = answer_rows(reader, list(rows), progress=False)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    rows[1] = replace(rows[1], image=tmp_path / "torn.png")
    rows[4] = replace(rows[4], image=np.zeros((0, 4, 3), np.uint8))
    predictions = answer_rows(reader, rows, tmp_path / "p.jsonl", progress=False)
    assert [bool(p.failed) for p in predictions] == [False, True, True, False, True]
    assert [predictions[i] for i in (0, 3)] == [good[i] for i in (0, 3)]
    assert "record 2: no question" in predictions[2].failed
    assert predictions[1].image is None  # the report could not open it
    table = score(predictions, "relaxed")
    assert (table.rows, table.failed, table["all"].of) == (5, 3, 5)
    assert answer_rows(reader, rows, tmp_path / "p.jsonl", progress=False) == predictions
    assert len(read_predictions(tmp_path / "p.jsonl").predictions) == 5


def test_a_row_that_cannot_be_encoded_does_not_take_its_batch_with_it(reader: Host) -> None:
    rows = chart_rows(3)
    good = answer_rows(reader, rows, progress=False)
    rows[1] = replace(rows[1], image=np.zeros((1, 30_000, 3), np.uint8))
    predictions = answer_rows(reader, rows, progress=False)
    assert predictions[0] == good[0]
    assert predictions[2] == good[2]
    assert predictions[1].failed or predictions[1].prediction is not None


def test_texts_on_images_are_read_where_they_are_not_known(
    reader: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chart_rows(2)
    Image.fromarray(rows[1].image).save(tmp_path / "b.png")
    rows[1] = replace(rows[1], image=tmp_path / "b.png", printed=())
    plain = answer_rows(reader, rows, tmp_path / "p.jsonl", progress=False)
    assert plain[1].image == "b.png"
    monkeypatch.setattr("sfa_adapters.ocr.ocr_texts", lambda image: (f"{image.shape}",))
    predictions = answer_rows(reader, rows, progress=False, ocr=True)
    assert predictions[0].printed == rows[0].printed
    assert predictions[1].printed == (f"{chart_rows(2)[1].image.shape}",)
    with pytest.raises(RecipeError, match="ocr: False there, True now"):
        answer_rows(reader, rows, tmp_path / "p.jsonl", progress=False, ocr=True)


def work(rank: int, port: int, folder: str) -> None:
    """One of two processes that share the rows."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        host = open_host(nano_checkpoint("llava", Path(folder) / "host"), **SETTINGS)
        predictions = answer_rows(host, chart_rows(5), Path(folder) / "p.jsonl", progress=False)
        torch.save([p.index for p in predictions], Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_answer_what_one_does(tmp_path: Path) -> None:
    host = open_host(nano_checkpoint("llava", tmp_path / "host"), **SETTINGS)
    alone = answer_rows(host, chart_rows(5), tmp_path / "alone.jsonl", progress=False)
    # One answer is there already: the two share the other four.
    (tmp_path / "p.settings.json").write_text((tmp_path / "alone.settings.json").read_text())
    PredictionFile(tmp_path / "p.jsonl").append(alone[:1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(work, (port, str(tmp_path)), nprocs=2, start_method="fork")  # nothing is imported again
    assert read_answers(tmp_path / "p.jsonl") == alone
    assert PredictionFile(tmp_path / "p.jsonl").parts() == [tmp_path / "p.jsonl"]
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [[0, 1, 2, 3, 4]] * 2


# -- which host -------------------------------------------------------------------------------------------------------


def test_a_run_a_checkpoint_and_an_adapter(checkpoints: Callable[[Family], Path], tmp_path: Path) -> None:
    base = checkpoints("llava_onevision")
    recipe = Recipe(name="r", model=str(base), family="llava_onevision", **SETTINGS)
    trained = open_host(recipe)  # the recipe of a run says sfa=True, that of a bare host is taken as it is
    assert not trained.recipe.sfa
    host = open_host(base, **SETTINGS)
    host.recipe = recipe
    inject_sfa(host.model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # so that the answers differ in every order of the tests
        for name, parameter in host.model.named_parameters():
            trains = host.places.part_of(name) in ("sfa", "projector", "vision")
            parameter.requires_grad_(trains)
            if trains:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if host.places.part_of(name) == "sfa" else 0.01)
    host.model.requires_grad_(False)
    for name, parameter in host.model.named_parameters():
        parameter.requires_grad_(host.places.part_of(name) in ("projector", "vision"))
    save_trained(host, tmp_path / "run" / "final")
    save_trained(host, tmp_path / "other" / "checkpoint-20")
    (tmp_path / "other" / "checkpoint-100").mkdir()  # a kill left it empty
    save_sfa(host.model, tmp_path / "sfa")
    assert find_run(tmp_path / "run") == tmp_path / "run" / "final"
    assert find_run(tmp_path / "other") == tmp_path / "other" / "checkpoint-20"
    assert find_run(tmp_path) is None

    rows = chart_rows(4)
    wanted = [p.prediction for p in answer_rows(host, rows, progress=False)]
    assert wanted != [p.prediction for p in answer_rows(trained, rows, progress=False)]
    for loaded in (
        open_host(tmp_path / "run"),
        open_host(base, tmp_path / "other"),
        open_host(tmp_path / "run" / "final"),
    ):
        assert fingerprint(loaded.model) == fingerprint(host.model)
        assert [p.prediction for p in answer_rows(loaded, rows, progress=False)] == wanted
        assert not any(p.requires_grad for p in loaded.model.parameters())
    alone = open_host(base, tmp_path / "sfa", **SETTINGS)
    names = [name for name, _ in host.model.named_parameters() if host.places.part_of(name) == "sfa"]
    assert names
    for name in names:
        assert torch.equal(alone.model.get_parameter(name), host.model.get_parameter(name))
    with pytest.raises(RecipeError, match="--model BASE"):
        open_host(tmp_path / "sfa")
    with pytest.raises(RecipeError, match="already"):
        open_host(tmp_path / "run", tmp_path / "sfa")
    with pytest.raises(RecipeError, match="neither"):
        open_host(base, tmp_path)
    with pytest.raises(RecipeError, match="another host"):
        open_host(checkpoints("llava"), tmp_path / "run")


def test_models_that_are_no_hosts(tmp_path: Path, checkpoints: Callable[[Family], Path]) -> None:
    assert [family_of(str(checkpoints(family))) for family in FAMILIES] == list(FAMILIES)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(RecipeError, match=r"'bert' model.*InternVLForConditionalGeneration"):
        family_of(str(tmp_path))
    with pytest.raises(RecipeError, match="no model that can be read"):
        family_of(str(tmp_path / "nothing"))


# -- many runs --------------------------------------------------------------------------------------------------------

BASE = Recipe(name="base", model="m", family="llava")


class Runs:
    """A fake of training: writes answers, records recipes, and fails at a given one."""

    def __init__(self) -> None:
        self.seen: list[Recipe] = []
        self.broken: set[str] = set()

    def __call__(self, recipe: Recipe, **options: Any) -> Any:
        self.seen.append(recipe)
        if recipe.name in self.broken:
            raise SFAError("the loss is NaN")
        return type("Result", (), {"predictions": self.untrained(recipe, False)})

    def untrained(self, recipe: Recipe, nano: bool) -> Path:
        path = Path(recipe.folder) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        PredictionFile(path).append(predictions_of(("1" if recipe.sfa else "0", "1"), (str(recipe.seed), "1")))
        return path


def test_the_rows_of_table_3() -> None:
    variants = term_variants()
    assert len({v.name for v in variants}) == len({v.folder for v in variants}) == 10
    assert [len(v.terms) for v in variants] == [4, 3, 3, 3, 3, 1, 1, 1, 1, 0]
    assert {v.terms for v in variants[5:9]} == {(term,) for term in TERMS}
    recipes = [BASE.replace(**v.changes) for v in variants]
    assert [r.sfa for r in recipes] == [True] * 9 + [False]


def test_the_rows_of_table_1_are_what_they_say() -> None:
    made = {v.name: BASE.replace(**v.changes) for v in part_variants(BASE)}
    assert [v.trains for v in part_variants(BASE)] == [False, True, True, True, True]
    assert (made["baseline"].sfa, made["+SFA"].sfa, made["+SFA"].adat, made["+SFA+ADAT"].adat) == (
        False,
        True,
        None,
        0.5,
    )
    assert made["+SFA+ADAT"].scr_grounding == 0
    assert made["full"].scr_grounding == 0.03
    recipe = BASE.replace(adat=0.7, scr_stability=0.2)
    made = {v.name: recipe.replace(**v.changes) for v in part_variants(recipe)}
    assert (made["baseline"].adat, made["baseline"].scr_stability) == (None, 0)
    assert (made["full"].adat, made["full"].scr_stability, made["full"].scr_grounding) == (0.7, 0.2, 0)


def test_an_ablation_goes_on_where_it_was(tmp_path: Path) -> None:
    runs, lines = Runs(), list[str]()
    runs.broken = {"base-only-col-1"}
    done = run_ablation(BASE, term_variants(), runs, runs.untrained, tmp_path, (0, 1), report=lines.append)
    assert len(runs.seen) == 20
    assert {r.seed for r in runs.seen} == {0, 1}
    assert len({r.folder for r in runs.seen}) == 20
    assert list(done.failed) == ["only col, seed 1"]
    assert "NaN" in done.failed["only col, seed 1"]
    assert [len(done.runs[name]) for name in ("all terms", "only col")] == [2, 1]
    assert done.first_seed()["no bias (control)"][0].prediction == "0"
    runs.broken.clear()
    again = run_ablation(BASE, term_variants(), runs, runs.untrained, tmp_path, (0, 1), report=lines.append)
    assert [r.name for r in runs.seen[20:]] == ["base-only-col-1"]
    assert not again.failed
    assert sum("done before" in line for line in lines) == 19
    third = run_ablation(BASE, term_variants()[:1], runs, runs.untrained, tmp_path, (0, 2))
    assert len(runs.seen) == 22
    assert len(third.runs["all terms"]) == 2
    with pytest.raises(RecipeError, match=r"lr: 2e-05 there, 0\.1 now"):
        run_ablation(BASE.replace(lr=0.1), term_variants(), runs, runs.untrained, tmp_path)
    (tmp_path / "all" / "seed-0" / "row.json").write_text("{")
    with pytest.raises(RecipeError, match="Delete the folder"):
        run_ablation(BASE, term_variants(), runs, runs.untrained, tmp_path)
    with pytest.raises(RecipeError, match="each once"):
        run_ablation(BASE, term_variants(), runs, runs.untrained, tmp_path, (1, 1))


def test_a_row_that_trains_nothing_is_asked_as_it_is(tmp_path: Path) -> None:
    frozen = BASE.replace(freeze_vision=True, freeze_projector=True)
    runs = Runs()
    host = Variant("host", "host", {"sfa": False}, trains=False)
    done = run_ablation(frozen, (*term_variants()[-2:], host), runs, runs.untrained, tmp_path, (0, 1))
    assert [r.sfa for r in runs.seen] == [True, True]
    assert [len(sets) for sets in done.runs.values()] == [2, 2, 1]


# -- the command line -------------------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_sfa_eval(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("eval", "llava_onevision_7b", "--nano", "--limit", "4", "--out", "a") == 0
    shown = capsys.readouterr().out
    assert "relaxed, 4 questions" in shown
    assert json.loads((tmp_path / "a" / "scores.json").read_text())["rows"][0]["run"] == "llava_onevision_7b"
    assert (tmp_path / "a" / "hallucination.md").is_file()
    other = ("--limit", "4", "--max-new-tokens", "1", "--out", "b", "--against", "a/predictions.jsonl")
    assert call("eval", "llava_onevision_7b", "--nano", *other) == 0
    table = json.loads((tmp_path / "b" / "scores.json").read_text())
    assert [row["run"] for row in table["rows"]] == ["a", "llava_onevision_7b"]
    assert table["rows"][1]["truncated"] > 0
    capsys.readouterr()
    assert call("eval", "llava_onevision_7b", "--nano", "--limit", "3", "--out", "a") == 2
    assert "rows: 4 there, 3 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "internvl3_5_8"), "internvl3_5_8b"),
        (("eval", "llava_1_5_7b", "--metric", "bleu"), "--metric bleu"),
        (("eval", "llava_1_5_7b", "--against", "nothing.jsonl"), "nothing.jsonl"),
        (("eval", "some/model", "--nano"), "--nano is for the name of a recipe"),
        (("ablate", "llava_1_5_7b", "--seeds", "one"), "--seeds one"),
        (("ablate", "llava_1_5_7b", "--rows", "all"), "--rows all"),
        (("ablate", "llava_1_5_7b", "learning=1"), "learning"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(("rows", "files"), [("terms", ["table3"]), ("parts", ["table1"])])
def test_sfa_ablate(
    rows: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs()
    monkeypatch.setattr("sfa_adapters.recipes.run.run", runs)
    monkeypatch.setattr("sfa_adapters.cli.evaluate._untrained", runs.untrained)
    monkeypatch.chdir(tmp_path)
    assert call("ablate", "llava_1_5_7b", "lr=0.5", "--rows", rows, "--seeds", "3,4", "--out", "o") == 0
    assert {r.lr for r in runs.seen} == {0.5}
    assert sorted(p.stem for p in (tmp_path / "o").glob("*.json")) == files
    runs.broken = {"llava_1_5_7b-all-9", "llava_1_5_7b-sfa-9"}
    capsys.readouterr()
    assert call("ablate", "llava_1_5_7b", "lr=0.5", "--rows", rows, "--seeds", "9", "--out", "o") == 2
    assert "1 rows failed" in capsys.readouterr().err
