"""`sfa analyze`: every command writes its table and figure; mistakes end in one line and exit code 2."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from sfa_adapters.cli.main import main
from sfa_adapters.hosts.recipe import Family
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(["analyze", *arguments])
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


def left(out: Path, name: str) -> None:
    assert json.loads((out / f"{name}.json").read_text())
    with (out / f"{name}.csv").open() as file:
        assert list(csv.DictReader(file))
    assert (out / f"{name}.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("entropy", ["--charts", "2"]),
        ("dominance", ["--charts", "2", "--layers", "thirds"]),
        ("map", ["--chart", "1"]),
        ("map", ["--patch", "3,4", "--rollout"]),
    ],
)
def test_the_nano_host_is_measured(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name, *arguments, "--out", str(tmp_path)) == 0
    left(tmp_path, name)
    assert f"{name}.json, .csv and .png are in" in " ".join(capsys.readouterr().out.split())


def test_answers_of_a_file_are_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "said.jsonl"
    rows = [("25", ["1,234"], ["1,234", "25%"]), ("7", ["8"], ["8"]), ("x", [], ["8"])]
    file.write_text(
        "".join(json.dumps(dict(zip(("prediction", "answers", "printed"), r, strict=True))) + "\n" for r in rows)
    )
    assert run("hallucination", str(file), "--out", str(tmp_path)) == 0
    left(tmp_path, "hallucination")
    assert "skipped: 1 no true answer" in capsys.readouterr().out


def test_a_tower_of_the_user_on_pages_of_the_user(tmp_path: Path) -> None:
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    SiglipVisionModel(config).save_pretrained(tmp_path / "tower")
    SiglipImageProcessor(size={"height": 112, "width": 112}).save_pretrained(tmp_path / "tower")
    from sfa_adapters.recipes.synthetic.pages import render_page

    page = render_page("sparse", 1, "test").image
    Image.fromarray(np.asarray(page)).save(tmp_path / "page.png")
    arguments = [str(tmp_path / "page.png"), "--model", str(tmp_path / "tower"), "--threshold", "0.02"]
    assert run("entropy", *arguments, "--out", str(tmp_path)) == 0
    left(tmp_path, "entropy")


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_a_host_of_the_user_is_asked_a_question_of_the_user(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = nano_checkpoint(family, tmp_path / "host")
    Image.fromarray(chart_samples("test", 1)[0].image).save(tmp_path / "page.png")
    arguments = [str(tmp_path / "page.png"), "--model", str(host), "--question", "What is the value of WY?"]
    assert run("dominance", *arguments, "--layers", "thirds", "--out", str(tmp_path)) == 0
    left(tmp_path, "dominance")
    assert run("map", *arguments, "--out", str(tmp_path)) == 0
    left(tmp_path, "map")
    assert "What is the value of WY?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hallucination", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["hallucination", "nowhere.jsonl", "--mode", "x"], "--mode x must be one of reference, strict"),
        (["map", "--patch", "44"], "--patch 44 must be a row and a column"),
        (["map", "--patch", "40,5"], "12 rows and 12 columns"),
        (["map", "--chart", "-1"], "--chart -1"),
        (["entropy", "--charts", "0"], "--charts 0"),
        (["entropy", "page.png"], "Give images together with --model"),
        (["entropy", "page.png", "--model", "./nowhere"], "--model ./nowhere cannot be loaded"),
        (["dominance", "--queries", "all"], "queries='all'"),
        (["dominance", "page.png"], "Give --model, --question and an image together"),
        (["map", "page.png", "--model", "x"], "Give --model, --question and an image together"),
        (["map", "page.png", "--model", "./no", "--question", "?"], "--model ./no cannot be loaded"),
        (["study", "--pages", "0"], "--pages 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--out", str(tmp_path)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sfa: ")
    assert message in error
