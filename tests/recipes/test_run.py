"""A recipe from beginning to end on every family: it trains, is interrupted, resumes, is evaluated and is shared."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from sfa_adapters.errors import DataError, RecipeError, TrainingError
from sfa_adapters.evaluation.open_host import open_host
from sfa_adapters.evaluation.predictions import read_answers
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.settings import load_recipe
from sfa_adapters.recipes import run as module
from sfa_adapters.recipes.catalog import RECIPES, find_recipe
from sfa_adapters.recipes.nano.checkpoint import nano_settings
from sfa_adapters.recipes.run import run
from tests.support.nightly_hosts import CORE

NAMES = [
    "internvl3_5_8b",
    "llava_onevision_7b",
    "llava_1_5_7b",
    "qwen2_5_vl_7b",
    "qwen3_vl_2b",
    "qwen3_5_0_8b",
    "glm_ocr",
    "paddleocr_vl",
    "smolvlm2_500m",
    "granite_docling_258m",
    "gemma3_4b",
    "gemma4_e2b",
    "lighton_ocr_1b",
]


def small(name: str, folder: Path, **changes: Any) -> Recipe:
    short = {"max_steps": 4, "limit": 16, "eval_limit": 6, "save_steps": 2, "warmup_steps": 1, "eval_batch": 6}
    settings = {"batch_size": 4, "micro_batch": 2, "output": str(folder), **short, **changes}
    return nano_settings(find_recipe(name)).replace(**settings)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def test_every_recipe_of_the_catalog_has_a_nano_run() -> None:
    assert {find_recipe(name).family for name in NAMES} == {recipe.family for recipe in RECIPES.values()}


@pytest.mark.parametrize(
    "name",
    [n if find_recipe(n).family in CORE else pytest.param(n, marks=pytest.mark.nightly) for n in NAMES],
)
def test_a_recipe_runs_from_beginning_to_end(name: str, tmp_path: Path) -> None:
    console = quiet()
    recipe = small(name, tmp_path / "run")
    result = run(recipe, nano=True, console=console)
    folder = result.folder
    for left in ("recipe.yaml", "log.csv", "training.png", "results.md", "results.json", "results.png", "bias.png"):
        assert (folder / left).stat().st_size > 100, left
    assert (folder / "checkpoint-4").is_dir()
    card = (result.trained / "README.md").read_text()
    assert "structural-attention-bias" in card
    assert result.predictions is not None
    assert result.baseline is not None
    assert result.scores is not None
    assert f"{100 * result.scores.mean.value:.1f}" in card
    answers, before = read_answers(result.predictions), read_answers(result.baseline)
    assert [p.id for p in answers] == [p.id for p in before]
    assert len(answers) == 6
    assert result.scores.rows == 6
    metadata = json.loads((result.trained / "run.json").read_text())
    assert metadata["steps"] == 4
    assert metadata["scores"][0]["rows"] == 6
    # What was trained moved, and is what is loaded again.
    host = open_host(result.trained)
    start = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
    end = load_file(result.trained / "adapter_model.safetensors")
    assert any(not torch.equal(start[key], end[key]) for key in end)
    loaded = {n: p for n, p in host.model.named_parameters() if host.places.part_of(n) == "sfa"}
    assert sum(p.numel() for p in loaded.values()) == sum(t.numel() for t in end.values())
    written = load_recipe(RECIPES[name], folder / "recipe.yaml", [])
    assert dataclasses.replace(written, model=recipe.model) == recipe
    again = run(recipe, nano=True, resume=True, console=console)  # trained already: nothing is done twice
    assert again.scores == result.scores
    with pytest.raises(RecipeError, match="checkpoint-4"):
        run(recipe, nano=True, console=console)


def test_a_trained_run_is_not_trained_again_and_is_asked_as_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small("llava_1_5_7b", tmp_path / "run")
    run(recipe, nano=True, evaluate=False, console=quiet())
    opened: list[Any] = []

    def seen(model: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(model)
        return open_host(model, *args, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a trained run was trained again")

    monkeypatch.setattr(module, "open_host", seen)
    monkeypatch.setattr(module, "train", again)
    with pytest.raises(RecipeError, match="NOSUCH"):
        run(recipe, nano=True, resume="NOSUCH", console=quiet())
    result = run(recipe, nano=True, resume=True, console=quiet())
    assert isinstance(opened[0], Recipe), "the untrained host"
    assert opened[1:] == [result.trained]


class Killed(Exception):
    """Simulates a power cut."""


def test_a_run_that_was_cut_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(small("internvl3_5_8b", tmp_path / "whole"), nano=True, evaluate=False, console=quiet())
    recipe = small("internvl3_5_8b", tmp_path / "cut")
    real = module.train

    def cut(host: Any, *args: Any, **kwargs: Any) -> Any:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 3:
                    raise Killed

        return real(host, *args, callbacks=[Stop()], **kwargs)

    monkeypatch.setattr(module, "train", cut)
    with pytest.raises(Killed):
        run(recipe, nano=True, evaluate=False, console=quiet())
    monkeypatch.setattr(module, "train", real)
    result = run(recipe, nano=True, resume=True, evaluate=False, console=quiet())
    for file in ("adapter_model.safetensors", "tuned.safetensors"):
        wanted, resumed = load_file(whole.trained / file), load_file(result.trained / file)
        assert wanted.keys() == resumed.keys()
        assert all(torch.equal(wanted[key], resumed[key]) for key in wanted), file


def test_wrong_recipes_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    nothing = small("llava_1_5_7b", tmp_path, freeze_vision=True, freeze_projector=True, sfa=False)
    with pytest.raises(RecipeError, match="nothing to train"):
        run(nothing, nano=True, console=quiet())
    with pytest.raises(DataError, match="split"):
        run(small("llava_1_5_7b", tmp_path / "b", train_split="dev"), nano=True, console=quiet())


@pytest.mark.parametrize("changes", [{"freeze_vision": True, "freeze_projector": True, "sfa": False}, {"log": "wandb"}])
def test_a_refused_run_leaves_nothing_and_asks_nobody(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the untrained host was asked")

    monkeypatch.setattr(module, "open_host", ask)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match=r"nothing to train|log='wandb'"):
        run(small("llava_1_5_7b", tmp_path / "run", **changes), nano=True, console=quiet())
    with pytest.raises(RecipeError, match="no checkpoint to resume from"):
        run(small("llava_1_5_7b", tmp_path / "run"), nano=True, resume=True, console=quiet())
    with pytest.raises(DataError, match="split"):
        run(small("llava_1_5_7b", tmp_path / "run", train_split="dev"), nano=True, console=quiet())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/none/run", "/dev/full/run"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(folder: str) -> None:
    with pytest.raises(RecipeError, match=f"output='{folder}' cannot be written"):
        run(small("llava_1_5_7b", Path(folder)), nano=True, console=quiet())


def test_a_full_disk_is_named_when_the_nano_host_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(RecipeError, match=r"nano host cannot be written .*No space left"):
        run(small("llava_1_5_7b", tmp_path / "run"), nano=True, console=quiet())


def test_a_learning_rate_that_explodes_stops_the_run(tmp_path: Path) -> None:
    recipe = small("llava_1_5_7b", tmp_path, lr=1e30, sfa_lr=1e30, warmup_steps=0, max_grad_norm=1e30, max_steps=8)
    with pytest.raises(TrainingError, match=r"loss|gradient"):
        run(recipe, nano=True, evaluate=False, console=quiet())
    assert list(tmp_path.glob("failed_batch*"))
