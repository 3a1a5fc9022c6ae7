"""Recipes of hosts that take images of any size: their published sizes, and the memory that their pages state."""

from __future__ import annotations

import runpy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from sfa_adapters import describe, inject_sfa
from sfa_adapters.data.chat_template import Prompt
from sfa_adapters.data.collator import Collator
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import DataError, RecipeError
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.predict import predict_memory
from sfa_adapters.rates import DEFAULT_SFA_LR
from sfa_adapters.recipes.catalog import architecture, find_recipe
from sfa_adapters.recipes.nano.checkpoint import nano_settings
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.vlm.records import vlm_spec
from sfa_adapters.vlm.thinking import without_thinking
from tests.support.paths import ROOT

# Parameters of the host and of its tower; layers and heads of the tower.
SIZES = {
    "qwen3_vl_2b": (2_127_532_032, 406_957_056, 24, 16),
    "qwen3_vl_4b": (4_437_815_808, 415_347_712, 24, 16),
    "qwen3_vl_8b": (8_767_123_696, 576_388_336, 27, 16),
    "qwen3_5_0_8b": (852_985_920, 100_592_896, 12, 12),
    "qwen3_5_2b": (2_213_241_664, 331_416_576, 24, 16),
    "qwen3_5_4b": (4_539_265_536, 333_514_240, 24, 16),
    "glm_ocr": (1_107_405_824, 434_120_192, 24, 16),
    "paddleocr_vl": (905_601_648, 412_987_248, 27, 16),
}


@pytest.mark.parametrize("name", SIZES)
def test_hosts_have_their_published_size(name: str) -> None:
    total, tower, layers, heads = SIZES[name]
    recipe = find_recipe(name)
    spec = vlm_spec(recipe.family)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(architecture(recipe))
    assert type(model).__name__ == spec.model_class
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.get_submodule(spec.places(model).tower).parameters()) == tower
    info = describe(inject_sfa(model))
    assert (info.num_layers, info.tower_layers, info.num_heads) == (layers, layers, heads)
    assert info.num_parameters == layers * heads * 2
    row = next(line for line in _page("recipes") if line.startswith(f"| `{name}`"))
    assert f" {total:,} |" in row
    assert f" {layers} of {layers} |" in row


@pytest.mark.parametrize(
    "name", [n if n in ("qwen3_vl_2b", "paddleocr_vl") else pytest.param(n, marks=pytest.mark.nightly) for n in SIZES]
)
def test_memory_of_a_page_is_what_is_predicted(name: str) -> None:
    """The table has the predicted memory for two cards, for one, and what makes it fit where it does not."""
    recipe = find_recipe(name)
    config = architecture(recipe)
    row = next(line for line in _page("device_plans") if line.startswith(f"| `{name}`"))
    _, _, plan, tokens, two, one, *_ = (cell.strip() for cell in row.split("|"))
    both, alone = (predict_memory(recipe, config, gpus=gpus, memory=80e9) for gpus in (2, 1))
    assert (plan, tokens) == (recipe.plan, f"1 x {both.lengths.sequence:,}")
    assert two == f"{both.peak / 1e9:.1f}"
    assert float(one.split()[0]) == round(alone.peak / 1e9, 1)
    assert both.peak <= 40e9
    assert ("24" in one.partition(" ")[2]) == (alone.peak > 24e9)


@pytest.mark.parametrize("name", SIZES)
def test_every_recipe_has_the_settings_of_the_published_run_but_faster_scalars(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.name == name
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.warmup_steps) == (2e-5, 32, 3, 100)
    assert (recipe.dtype, recipe.gradient_checkpointing, recipe.sfa_lr) == ("bfloat16", True, DEFAULT_SFA_LR)
    assert (recipe.freeze_vision, recipe.freeze_projector, recipe.freeze_llm) == (False, False, True)


@pytest.mark.parametrize(
    ("file", "name"),
    [("qwen3_vl", "qwen3_vl_2b"), ("qwen3_5", "qwen3_5_0_8b"), ("glm_ocr",) * 2, ("paddleocr_vl",) * 2],
)
def test_the_file_of_a_host_runs_its_recipe(
    file: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [file, "--no-such-flag"])
    monkeypatch.delitem(sys.modules, f"sfa_adapters.recipes.{file}")  # runpy warns of a module that is imported already
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"sfa_adapters.recipes.{file}", run_name="__main__")
    assert left.value.code == 2
    assert sys.argv == [file, "train", name, "--no-such-flag"]
    assert "No such option: --no-such-flag" in capsys.readouterr().err


def _page(name: str) -> list[str]:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_an_answer_follows_an_empty_thought() -> None:
    """Qwen3.5's template opens a thought; an answer that is learned inside it would be learned as a thought."""
    processor: Any = build_host("qwen3_5")[1]
    turn = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    thinking = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert thinking.endswith("<|im_start|>assistant\n<think>\n")
    assert Prompt(processor, "{question}").tail.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert without_thinking(processor) == {"enable_thinking": False}
    assert without_thinking(build_host("qwen3_vl")[1]) == {}


@pytest.mark.parametrize(
    ("family", "start", "end"),
    [
        ("glm_ocr", "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>", "<|assistant|>\n"),
        (
            "paddleocr_vl",
            "<|begin_of_sentence|>User: <|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
            "\nAssistant:\n",
        ),
    ],
)
def test_prompts_have_the_turns_of_the_full_size_hosts(family: str, start: str, end: str) -> None:
    prompt = Prompt(build_host(family)[1], "{question}")
    assert (prompt.head, prompt.tail) == (start, end)


# -- pixels -----------------------------------------------------------------------------------------------------------


def test_a_limit_of_pixels_counts_each_pixel_once() -> None:
    """GLM's processor counts those of both frames."""
    for family in ("qwen3_vl", "glm_ocr", "paddleocr_vl"):
        processor: Any = build_host(family)[1].image_processor
        rules = vlm_spec(family).images
        assert rules is not None
        picture = torch.zeros(3, 448, 448, dtype=torch.uint8)
        (grid,) = processor(picture, return_tensors="pt", **rules.options(processor, 224 * 224))["image_grid_thw"]
        side = processor.patch_size * processor.merge_size
        assert grid.tolist() == [1, *[224 // side * processor.merge_size] * 2], family
        with pytest.raises(RecipeError, match=rf"max_pixels=500 must be at least {side**2}, one image token"):
            rules.options(processor, 500)


@pytest.mark.parametrize("family", ["qwen3_vl", "glm_ocr", "paddleocr_vl"])
def test_a_page_that_no_processor_takes_is_named(family: str) -> None:
    host = build_host(family)
    recipe = nano_settings(Recipe(name="t", model="m", family=family))
    collator: Any = Collator(host[1], vlm_spec(family), recipe)
    thin = np.zeros((2, 1000, 3), np.uint8)
    row = Row("r7", None, "How many?", ("1",))
    if family == "paddleocr_vl":  # it widens a thin page to one token first
        thin = np.zeros((28, 28 * 250, 3), np.uint8)
    with pytest.raises(DataError, match=r"r7: the processor cannot take the image, \d+ x \d+ \(absolute aspect ratio"):
        collator([{"row": row, "image": thin, "skipped": ()}])
