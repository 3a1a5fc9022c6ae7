"""`sfa train`, `sfa plan` and `sfa recipes`: settings from files, flags and `key=value`, one line for a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from sfa_adapters.cli.main import main
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes import run as run_module
from sfa_adapters.recipes.catalog import RECIPES, find_recipe
from sfa_adapters.recipes.nano.checkpoint import nano_settings

INTERNVL = "internvl3_5_8b"


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def _mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, _, err = _run(capsys, *arguments)
    assert code == 2
    assert err.startswith("sfa: ")
    assert len(err.splitlines()) == 1
    return err


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, dict[str, Any]]]:
    """What `sfa train` hands to `run`; the run itself is tested elsewhere."""
    calls: list[tuple[Recipe, dict[str, Any]]] = []
    monkeypatch.setattr(run_module, "run", lambda recipe, **options: calls.append((recipe, options)))
    return calls


def test_every_flag_sets_its_field(runs: list[Any], capsys: pytest.CaptureFixture[str]):
    arguments = (
        "--plan bf16 --freeze-vision --freeze-projector --train-llm --lora-llm 8 --sfa-terms row,col --adat 0.5 "
        "--init axial --init-strength 2 --init-warmup-steps 50 "
        "--scr-entropy 0.1 --scr-grounding 0.2 --scr-stability 0.3 --lr 1e-4 --vision-lr 1e-5 --projector-lr 2e-4 "
        "--llm-lr 3e-4 --sfa-lr 0.02 --epochs 2 --max-steps 7 --batch-size 16 --micro-batch 4 --data my.jsonl "
        "--limit 10 --output out --seed 5"
    )
    assert _run(capsys, "train", INTERNVL, *arguments.split())[0] == 0
    wanted = find_recipe(INTERNVL).replace(
        plan="bf16", freeze_vision=True, freeze_projector=True, freeze_llm=False, lora_llm=8, sfa_terms=("row", "col"),
        init="axial", init_strength=2.0, init_warmup_steps=50,
        adat=0.5, scr_entropy=0.1, scr_grounding=0.2, scr_stability=0.3, lr=1e-4, vision_lr=1e-5, projector_lr=2e-4,
        llm_lr=3e-4, sfa_lr=0.02, epochs=2.0, max_steps=7, batch_size=16, micro_batch=4, data="my.jsonl", limit=10,
        output="out", seed=5,
    )  # fmt: skip
    assert runs == [(wanted, {"nano": False, "resume": False})]


def test_without_flags_the_recipe_stays_as_it_is(runs: list[Any], capsys: pytest.CaptureFixture[str]):
    assert _run(capsys, "train", "InternVL3.5-8B", "--resume")[0] == 0
    assert _run(capsys, "train", INTERNVL, "--no-sfa", "--train-vision", "--resume-from", "runs/x/checkpoint-8")[0] == 0
    assert runs == [
        (find_recipe(INTERNVL), {"nano": False, "resume": True}),
        (find_recipe(INTERNVL).replace(sfa=False), {"nano": False, "resume": "runs/x/checkpoint-8"}),
    ]


def test_file_then_flags_then_key_value(runs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.yaml").write_text("lr: 1e-3\nseed: 1\nlimit: 1\n")
    options = ("--config", str(tmp_path / "run.yaml"), "--seed", "2", "--limit", "2")
    assert _run(capsys, "train", INTERNVL, *options, "limit=3", "weight-decay=0")[0] == 0
    assert runs[0][0] == find_recipe(INTERNVL).replace(lr=1e-3, seed=2, limit=3, weight_decay=0.0)


def test_what_is_said_wins_over_nano(runs: list[Any], capsys: pytest.CaptureFixture[str]):
    assert _run(capsys, "train", INTERNVL, "--nano", "--plan", "nf4", "max_steps=3")[0] == 0
    recipe = nano_settings(find_recipe(INTERNVL)).replace(plan="nf4", max_steps=3)
    assert runs == [(recipe, {"nano": True, "resume": False})]
    assert nano_settings(recipe) == recipe  # what `run` makes of it


def test_dry_run_shows_settings_memory_and_steps_and_writes_nothing(
    runs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = _run(capsys, "train", INTERNVL, "--dry-run", "--lr", "1e-5")
    assert code == 0
    assert any("lr" in line and "1e-05" in line and "2e-05" in line for line in out.splitlines())
    assert "2,652 optimizer steps of 32 questions: 3 passes over 28,299." in out
    assert "internvl3_5_8b fits with plan=nf4" in " ".join(out.split())
    assert "Nothing was loaded or written." in out
    assert "1,234 optimizer steps" in _run(capsys, "train", INTERNVL, "--dry-run", "--max-steps", "1234")[1]
    assert "shows when my.jsonl is read" in _run(capsys, "train", INTERNVL, "--dry-run", "--data", "my.jsonl")[1]
    assert _run(capsys, "train", INTERNVL, "--dry-run", "--nano")[0] == 0
    assert runs == []
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(runs: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.yaml").write_text("sfa_term: row\n")
    config = ("--config", str(tmp_path / "run.yaml"))
    assert "Did you mean sfa_terms?" in _mistake(capsys, "train", INTERNVL, *config)
    assert "Did you mean lr?" in _mistake(capsys, "train", INTERNVL, "learning_rate=1e-5")
    assert "Did you mean internvl3_5_8b?" in _mistake(capsys, "train", "internvl3_8b")
    assert "sfa_terms=('diagonal',) must be some of row" in _mistake(capsys, "train", INTERNVL, "sfa_terms=diagonal")
    assert "a multiple of micro_batch=5" in _mistake(capsys, "train", INTERNVL, "--micro-batch", "5")
    assert "4-bit weights cannot train" in _mistake(capsys, "train", INTERNVL, "--train-llm")
    assert "Invalid value for '--limit'" in _mistake(capsys, "train", INTERNVL, "--limit", "many")
    assert runs == []


def test_plan_says_whether_it_fits_and_what_saves_it(capsys: pytest.CaptureFixture[str]):
    code, out, err = _run(capsys, "plan", INTERNVL, "--json", "--memory", "40GB", "--tiles", "1")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["fits"]
    assert report["memory"] == 40e9
    assert len(report["devices"]) == 2
    code, out, err = _run(capsys, "plan", INTERNVL, "--json", "--memory", "16GiB", "--gpus", "1", "--batch", "4")
    report = json.loads(out)
    assert code == 2
    assert (report["fits"], report["memory"], report["micro_batch"]) == (False, 16 * 2**30, 4)
    assert len(report["devices"]) == 1
    assert err.startswith("sfa: internvl3_5_8b does not fit with plan=nf4: GPU 0 needs ")
    assert " GB too much. What saves it: " in err
    assert "max_tiles=1 (" in err
    assert len(err.splitlines()) == 1
    code, out, err = _run(capsys, "plan", INTERNVL, "--json", "--answer-tokens", "1000")
    long = json.loads(out)
    assert (code, long["lengths"]["answer"], long["lengths"]["text"]) == (0, 1000, 1096)
    code, out, err = _run(capsys, "plan", INTERNVL, "--json", "answer_logits=false")
    every = json.loads(out)
    assert (code, every["answer_logits"]) == (0, False)
    assert every["devices"][0]["activations"] > long["devices"][0]["activations"]
    code, out, err = _run(capsys, "plan", "llava_1_5_7b", "--plan", "bf16", "max_steps=1")
    assert (code, err) == (0, "")
    assert "plan bf16" in out


@pytest.mark.parametrize("size", ["lots", "0GB", "-4GB", "40TB"])
def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], size: str):
    assert f"--memory '{size}' is no size of memory" in _mistake(capsys, "plan", INTERNVL, f"--memory={size}")


def test_recipes_lists_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = _run(capsys, "recipes")
    assert code == 0
    for recipe in RECIPES.values():
        assert recipe.name in out
        assert recipe.model in out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]):
    for command in ("train", "plan", "recipes"):
        code, out, _ = _run(capsys, command, "--help")
        assert code == 0
        assert f"Example:  sfa {command}" in out
