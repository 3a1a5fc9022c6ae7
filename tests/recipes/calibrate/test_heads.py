"""`sfa calibrate heads`: good runs, and mistakes that end in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from sfa_adapters.cli.main import main
from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.plan import plan_heads
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.pruned_files import save_pruned
from sfa_adapters.heads.scores import HeadScores
from sfa_adapters.recipes.calibrate.heads import _print_scores, run_calibrate_heads
from sfa_adapters.recipes.nano.checkpoint import nano_checkpoint
from sfa_adapters.recipes.synthetic.chart_questions import chart_samples

QUESTION = ["--question", "What is the value of WY?"]


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as exit_info:
        main(["calibrate", "heads", *map(str, arguments)])
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.png"
    Image.fromarray(chart_samples("test", 1)[0].image).save(path)
    return path


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nano_checkpoint("llava", tmp_path_factory.mktemp("nano") / "host")


def test_the_nano_host_is_scored_and_a_plan_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--charts", 4, "--rate", 0.3, "--out", out) == 0
    scores = HeadScores.load(out / "head_scores.json")
    assert scores.data["samples"] == 4
    plan = HeadPlan.from_json((out / "head_plan.json").read_text())
    assert [len(heads) for heads in plan.removed.values()] == [1] * 4
    assert "4 of 16 heads go (25.0%)" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["s4", "gate", "flap", "random"])
def test_a_host_of_the_user_is_scored_on_pages_of_the_user(
    method: str, tmp_path: Path, page: Path, host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--model", host, *QUESTION, "--method", method, "--rate", 0.5, "--out", out]
    assert run(page, page, *options) == 0
    output = capsys.readouterr().out
    assert f"{method} scores of {0 if method == 'random' else 2} samples are in" in output
    assert len(re.findall(r"^ +\d .* 2 of 4 ", output, re.MULTILINE)) == 3  # layers
    model = AutoModelForImageTextToText.from_pretrained(host)
    scores = HeadScores.load(out / "head_scores.json")
    scores.check(model)
    assert scores.model["name"] == "host"
    plan = HeadPlan.from_json((out / "head_plan.json").read_text())
    assert plan == plan_heads(scores, 0.5)
    prune_heads(model, plan)


def test_scores_stay_when_the_plan_cannot_be_made(
    tmp_path: Path, page: Path, host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(page, "--model", host, *QUESTION, "--rate", 0.25, "--out", out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has 4 heads in 2 key/value groups" in error
    assert str(out / "head_scores.json") in error
    assert HeadScores.load(out / "head_scores.json").data["samples"] == 1

    again, saved = tmp_path / "again", HeadScores.load(out / "head_scores.json")
    assert run("--scores", out / "head_scores.json", "--rate", 0.5, "--out", again) == 0
    assert HeadPlan.from_json((again / "head_plan.json").read_text()) == plan_heads(saved, 0.5)
    assert HeadScores.load(again / "head_scores.json") == saved


def test_thirty_two_heads_fit_eighty_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    values = {
        f"layers.{n}": tuple(((n + 3) * (h + 5) * 7919 % 10007) * -1.2345e-7 for h in range(32)) for n in range(32)
    }
    scores = HeadScores(values, dict.fromkeys(values, 32), "s4", data={"samples": 100})
    plan = plan_heads(scores, 0.3)
    _print_scores(scores, plan, tmp_path / "head_scores.json")
    output = capsys.readouterr().out
    assert all(word in output for word in ("removed", "which"))
    for removed in plan.removed.values():
        line = f"{len(removed)} of 32 {' '.join(map(str, removed)) or '-'} "
        assert line in f"{' '.join(output.split())} ", "how many and which, in one line, nothing cut"
    assert max(map(len, output.splitlines()[:36])) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "best"], "method='best' must be one of s4, gate, flap, random"),
        (["--gamma", "-1"], "gamma=-1.0"),
        (["--gamma", "nan"], "gamma=nan"),
        (["--rate", "0"], "rate=0.0 must be between 0 and 1"),
        (["--rate", "1"], "rate=1.0 must be between 0 and 1"),
        (["--rate", "2"], "rate=2.0 must be between 0 and 1"),
        (["--rate", "-1"], "rate=-1.0 must be between 0 and 1"),
        (["--rate", "x"], "'--rate'"),
        (["--kind", "best", "--rate", "0.3"], "kind='best' must be one of"),
        (["--kind", "global"], "kind='global' needs a rate"),
        (["--charts", "0"], "--charts 0"),
        (["--scores", "TEXT"], "--scores needs --rate"),
        (["--scores", "TEXT", "--rate", "0.3"], "no head scores"),
        (["--scores", "nowhere.json", "--rate", "0.3"], "nowhere.json cannot be read"),
        (["--scores", "TEXT", "--rate", "0.3", "PAGE", "--model", "HOST", *QUESTION], "leave out --model"),
        (["PAGE"], "Give --model, --question and images together"),
        (["--model", "x"], "Give --model, --question and images together"),
        (["--question", "?"], "Give --model, --question and images together"),
        (["PAGE", "--model", "x"], "Give --model, --question and images together"),
        (["nowhere.png", "--model", "HOST", *QUESTION], "nowhere.png"),
        (["TEXT", "--model", "HOST", *QUESTION], "text.png"),
        (["PAGE", "--model", "./nowhere", *QUESTION], "--model ./nowhere cannot be loaded"),
        (["PAGE", "--model", "TOWER", *QUESTION], "tower"),
        (["--charts", "1", "--out", "PAGE"], "must be a folder"),
        (["--charts", "1", "--out", "PAGE/deeper"], "must be a folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, page: Path, host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.png").write_text("no image")
    places = {"PAGE": page, "PAGE/deeper": page / "deeper", "TEXT": tmp_path / "text.png", "HOST": host}
    if "TOWER" in arguments:
        places["TOWER"] = tmp_path / "tower"
        config = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        SiglipVisionModel(config).save_pretrained(places["TOWER"])
        SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(places["TOWER"])
        capsys.readouterr()
    given = [str(places.get(argument, argument)) for argument in arguments]
    out = tmp_path / "out"
    assert run(*(given if "--out" in given else [*given, "--out", out])) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sfa: ")
    assert message in error
    assert not out.exists(), "told before anything is measured"


def test_a_folder_of_a_pruned_model_is_refused_in_one_line(
    tmp_path: Path, page: Path, host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(host)
    path = "model.language_model.layers.0.self_attn"
    prune_heads(model, HeadPlan({path: (0, 1)}, {path: 4}, {path: 2}))
    save_pruned(model, tmp_path / "pruned")
    assert run(page, "--model", tmp_path / "pruned", *QUESTION, "--out", tmp_path / "out") == 2
    assert "lost attention heads" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_plan_of_a_pruned_model_is_not_overwritten(tmp_path: Path) -> None:
    plan = tmp_path / "head_plan.json"
    plan.write_text(json.dumps({"version": 1, "model": "Llava", "compensation": "none", "biases": [], "plan": {}}))
    with pytest.raises(RecipeError, match="no head plan of this command"):
        run_calibrate_heads(tmp_path, charts=1, rate=0.3)
    assert "Llava" in plan.read_text()
