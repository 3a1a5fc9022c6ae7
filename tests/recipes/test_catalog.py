"""The recipes: hosts at full size, counted without memory, and the nano hosts that replace them on a CPU."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, InternVLConfig

from sfa_adapters import SFAConfig, describe, eject_sfa, inject_sfa
from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.load import HOSTS, prepare, set_trainable
from sfa_adapters.hosts.recipe import Family, Recipe
from sfa_adapters.hosts.spec import families
from sfa_adapters.memory.predict import predict_memory
from sfa_adapters.rates import DEFAULT_SFA_LR
from sfa_adapters.recipes import internvl3_5_8b
from sfa_adapters.recipes.catalog import RECIPES, architecture, find_recipe, training_rows
from sfa_adapters.recipes.nano.checkpoint import MARK, nano, nano_checkpoint, nano_settings
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.recipes.nano.models import load_nano
from sfa_adapters.training.optimizer import total_steps
from tests.support.nightly_hosts import families_of

FAMILIES = families_of(families())
HOST_RECIPES = (
    "internvl3_5_8b",
    "llava_onevision_7b",
    "llava_1_5_7b",
    "qwen2_5_vl_7b",
    "smolvlm2_2_2b",
    "smolvlm2_500m",
    "granite_docling_258m",
    "gemma3_4b",
    "gemma4_e2b",
    "lighton_ocr_1b",
)


def count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


# -- the catalog ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_size() -> dict[str, Any]:
    with torch.device("meta"):
        return {n: AutoModelForImageTextToText.from_config(architecture(find_recipe(n))) for n in HOST_RECIPES}


@pytest.mark.parametrize(
    ("name", "total", "tower", "layers"),
    [
        ("internvl3_5_8b", 8_528_318_464, 304_012_288, (24, 24)),
        ("llava_onevision_7b", 8_030_348_832, 397_747_744, (26, 26)),
        ("llava_1_5_7b", 7_063_427_072, 303_507_456, (23, 24)),
        ("qwen2_5_vl_7b", 8_292_166_656, 676_550_144, (32, 32)),
        ("smolvlm2_2_2b", 2_246_784_880, 412_987_248, (27, 27)),
        ("smolvlm2_500m", 507_482_304, 86_433_024, (12, 12)),
        ("granite_docling_258m", 257_517_120, 86_433_024, (12, 12)),
        ("gemma3_4b", 4_300_079_472, 416_866_032, (27, 27)),
        ("gemma4_e2b", 5_104_297_504, 167_364_608, (16, 16)),
        ("lighton_ocr_1b", 1_005_647_872, 403_305_472, (24, 24)),
    ],
)
def test_hosts_have_their_published_size(
    full_size: dict[str, Any], name: str, total: int, tower: int, layers: tuple[int, int]
):
    model, recipe = full_size[name], find_recipe(name)
    spec = HOSTS[recipe.family]
    assert type(model).__name__ == spec.model_class
    assert count(model) == total
    assert count(model.get_submodule(spec.places(model).tower)) == tower
    inject_sfa(model)
    info = describe(model)
    assert (info.num_layers, info.tower_layers) == layers
    assert info.num_parameters == layers[0] * info.num_heads * 2
    eject_sfa(model)


def test_the_published_run_trains_what_was_published(full_size: dict[str, Any]):
    model, recipe = full_size["internvl3_5_8b"], find_recipe("internvl3_5_8b_published")
    inject_sfa(model, SFAConfig(terms=list(recipe.sfa_terms)))
    set_trainable(model, HOSTS["internvl"], recipe)
    assert count(model, trainable=True) == 337_590_400
    assert count(model) == 8_528_325_760
    eject_sfa(model)


def test_the_published_run_has_the_published_settings():
    recipe = find_recipe("internvl3_5_8b_published")
    assert recipe == internvl3_5_8b.published()
    assert (recipe.lr, recipe.sfa_lr, recipe.batch_size, recipe.epochs, recipe.warmup_steps) == (2e-5, 2e-5, 32, 3, 100)
    assert {recipe.vision_lr, recipe.projector_lr, recipe.llm_lr} == {None}
    assert training_rows(recipe) == 28_299
    assert total_steps(recipe, 28_299) == 2_652


@pytest.mark.parametrize("name", HOST_RECIPES)
def test_every_recipe_has_the_settings_of_the_published_run_but_faster_scalars(name: str):
    recipe = find_recipe(name)
    assert recipe.name == name
    assert (recipe.lr, recipe.batch_size, recipe.epochs, recipe.warmup_steps) == (2e-5, 32, 3, 100)
    assert (recipe.plan, recipe.dtype, recipe.gradient_checkpointing) == ("nf4", "bfloat16", True)
    assert (recipe.freeze_vision, recipe.freeze_projector, recipe.freeze_llm) == (False, False, True)
    assert (recipe.sfa_lr, recipe.init) == (DEFAULT_SFA_LR, "normal")
    assert recipe == importlib.import_module(f"sfa_adapters.recipes.{name}").recipe()


def test_names_are_found_as_people_write_them():
    assert find_recipe("InternVL3.5-8B") is RECIPES["internvl3_5_8b"]
    assert find_recipe("llava-1.5-7b") is RECIPES["llava_1_5_7b"]
    with pytest.raises(RecipeError, match=r"No recipe 'qwen2_5_vl'[.] Did you mean qwen2_5_vl_7b[?] There are: intern"):
        find_recipe("qwen2_5_vl")
    with pytest.raises(RecipeError, match=r"No recipe 'gpt'[.] There are: internvl3_5_8b, "):
        find_recipe("gpt")


def test_architecture_of_a_folder_of_a_nano_host_and_of_nothing(tmp_path: Path):
    recipe = find_recipe("internvl3_5_8b")
    InternVLConfig(architectures=["InternVLForConditionalGeneration"], image_seq_length=64).save_pretrained(tmp_path)
    assert architecture(recipe.replace(model=str(tmp_path))).to_dict()["image_seq_length"] == 64
    assert architecture(nano_settings(recipe)).to_dict()["image_seq_length"] == 16
    with pytest.raises(RecipeError, match="nowhere"):
        architecture(recipe.replace(model=str(tmp_path / "nowhere")))
    with pytest.raises(RecipeError, match="is a 'internvl' checkpoint; family='llava' needs 'llava'"):
        architecture(recipe.replace(model=str(tmp_path), family="llava"))


def test_rows_that_are_known_beforehand():
    recipe = find_recipe("internvl3_5_8b")
    assert training_rows(recipe.replace(limit=100)) == 100
    assert training_rows(recipe.replace(limit=10**6)) == 28_299
    assert training_rows(recipe.replace(data="charts", limit=64)) == 64
    assert training_rows(recipe.replace(data="my.jsonl", limit=64)) is None


@pytest.mark.parametrize("name", HOST_RECIPES)
def test_the_memory_in_the_head_of_a_file_is_what_is_predicted(name: str):
    module = importlib.import_module(f"sfa_adapters.recipes.{name}")
    stated = re.search(r"`sfa plan` predicts ([\d.]+) GB", module.__doc__ or "")
    assert stated is not None
    recipe = find_recipe(name)
    assert f"{predict_memory(recipe, architecture(recipe)).peak / 1e9:.1f}" == stated[1]


@pytest.mark.parametrize("name", HOST_RECIPES)
def test_the_file_of_a_host_runs_its_recipe(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", [name, "--no-such-flag"])
    monkeypatch.delitem(sys.modules, f"sfa_adapters.recipes.{name}")  # runpy warns of a module that is imported already
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"sfa_adapters.recipes.{name}", run_name="__main__")
    assert left.value.code == 2
    assert sys.argv == [name, "train", name, "--no-such-flag"]
    assert "No such option: --no-such-flag" in capsys.readouterr().err


# -- nano hosts -------------------------------------------------------------------------------------------------------

CLASSES = {
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessor"),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor"),
    "llava": ("LlavaProcessor", "CLIPImageProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor"),
    "qwen3_5": ("Qwen3VLProcessor", "Qwen2VLImageProcessor"),
    "glm_ocr": ("Glm46VProcessor", "Glm46VImageProcessor"),
    "paddleocr_vl": ("PaddleOCRVLProcessor", "PaddleOCRVLImageProcessor"),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessor"),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessor"),
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessor"),
    "gemma4": ("Gemma4Processor", "Gemma4ImageProcessor"),
    "lighton_ocr": ("LightOnOcrProcessor", "PixtralImageProcessor"),
}
KOREAN = "제품별 매출은 얼마인가요? 뷁 é 😀 <x> {y}\n2020: 3.5%"


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Any, Any]:
    family = request.param
    folder = nano_checkpoint(family, tmp_path_factory.mktemp("nano") / family)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return family, model.eval(), AutoProcessor.from_pretrained(folder)


def test_a_folder_loads_as_the_hosts_own_classes(loaded: tuple[Family, Any, Any]):
    family, model, processor = loaded
    assert type(model).__name__ == HOSTS[family].model_class
    # Some releases name the class without torchvision differently.
    image_processor = type(processor.image_processor).__name__.removesuffix("Pil")
    assert (type(processor).__name__, image_processor) == CLASSES[family]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert count(model) < 2_000_000
    want = dict(build_host(family)[0].state_dict())
    loaded_state = model.state_dict()
    assert loaded_state.keys() == want.keys()
    assert all(torch.equal(loaded_state[name], want[name]) for name in want)


def test_any_text_comes_back_from_its_tokens(loaded: tuple[Family, Any, Any]):
    _, model, processor = loaded
    tokenizer = processor.tokenizer
    ids = tokenizer(KOREAN, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == KOREAN
    assert tokenizer.unk_token_id not in ids
    assert max(ids) < len(tokenizer) == model.get_input_embeddings().num_embeddings
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_images_of_several_shapes_go_through_processor_model_and_generate(loaded: tuple[Family, Any, Any]):
    family, model, processor = loaded
    rng = np.random.default_rng(0)
    shapes = [(144, 144, 3), (100, 300, 3), (260, 90, 3)]
    images = [Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes]
    content = [{"type": "image"}, {"type": "text", "text": "어느 것이 가장 큰가요?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert "어느 것이 가장 큰가요?" in text
    apart: Any = [[image] for image in images] if family in ("smolvlm", "idefics3", "gemma3", "gemma4") else images
    batch = processor(images=apart, text=[text] * 3, padding=True, padding_side="left", return_tensors="pt")
    tokens = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    wanted = {
        "internvl": [16, 48, 48],  # one tile; two and a thumbnail
        "llava_onevision": [144 + 156, 144 + 8 * 25, 144 + 24 * 9],  # the picture, and lines of crops with a newline
        "llava": [64, 64, 64],
        "qwen2_5_vl": [25, 2 * 8, 8 * 2],  # of 28 pixels, at most 140 * 140 in all
        "glm_ocr": [25, 2 * 8, 8 * 2],
        "paddleocr_vl": [25, 2 * 8, 8 * 2],
        "qwen3_vl": [4 * 4, 2 * 8, 8 * 3],  # of 32 pixels, at most 160 * 160 in all
        "qwen3_5": [4 * 4, 2 * 8, 8 * 3],
        "smolvlm": [5 * 4, 3 * 4, 3 * 4],  # two tiles along the longer side, and the whole page
        "idefics3": [5 * 4, 3 * 4, 3 * 4],
        "gemma3": [16, 16, 16],  # without pan and scan
        "gemma4": [8 * 8, 4 * 14, 14 * 4],  # of 12 pixels, at most 70
        "lighton_ocr": [6 * 6, 4 * 10, 10 * 4],  # of 28 pixels, rounded up; at most 280 along a side
    }
    assert tokens == wanted[family]
    with torch.no_grad():
        logits = model(**batch).logits
        generated = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert logits.isfinite().all()
    assert generated.shape[0] == 3
    changed = dict(batch) | {"pixel_values": batch["pixel_values"].flip(-1)}
    with torch.no_grad():
        assert (model(**changed).logits - logits).abs().max() > 1e-4


def test_llava_onevision_keeps_the_trained_weights_of_the_package():
    trained = load_nano().model.state_dict()
    for name, value in build_host("llava_onevision", seed=5)[0].state_dict().items():
        rows = trained[name].shape[0]
        assert torch.equal(value[:rows] if value.ndim else value, trained[name])


def test_seeds_decide_and_the_global_random_state_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, other = build_host("internvl", 0)[0], build_host("internvl", 1)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_folder_is_written_once_and_not_mixed_with_others(tmp_path: Path):
    folder = nano_checkpoint("llava", tmp_path / "deep" / "host")
    stamp = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert nano_checkpoint("llava", folder) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamp
    assert [path.name for path in folder.parent.iterdir()] == ["host"]
    with pytest.raises(RecipeError, match="holds another nano host"):
        nano_checkpoint("qwen2_5_vl", folder)
    (folder / MARK).unlink()
    with pytest.raises(RecipeError, match="holds something else"):
        nano_checkpoint("llava", folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        nano_checkpoint("llava", tmp_path / "file" / "host")
    with pytest.raises(RecipeError, match=r"No nano host of the family 'bert'[.] Known: .*internvl, "):
        nano_checkpoint("bert", tmp_path / "bert")  # pyright: ignore[reportArgumentType]


def test_nano_keeps_what_is_tried_out_and_makes_the_rest_small(tmp_path: Path):
    changes: dict[str, Any] = {"sfa_terms": ("row",), "adat": 0.5, "scr_entropy": 0.1, "lora_llm": 4, "seed": 3}
    recipe = nano(find_recipe("internvl3_5_8b").replace(**changes, freeze_vision=True), tmp_path / "host")
    assert {name: getattr(recipe, name) for name in changes} == changes
    assert recipe.freeze_vision
    assert (recipe.plan, recipe.dtype, recipe.data, recipe.folder) == (
        "bf16",
        "float32",
        "charts",
        "runs/internvl3_5_8b-nano",
    )
    assert json.loads((Path(recipe.model) / MARK).read_text())["family"] == "internvl"
    assert nano(recipe.replace(lr=7.0), tmp_path / "elsewhere") == recipe.replace(lr=7.0)
    assert not (tmp_path / "elsewhere").exists()
    planned = nano_settings(find_recipe("qwen2_5_vl_7b")).replace(plan="nf4")
    assert planned.model == "nano:qwen2_5_vl"
    assert nano(planned, tmp_path / "qwen").plan == "nf4"


def test_a_nano_host_can_be_prepared_for_training(loaded: tuple[Family, Any, Any]):
    family, _, processor = loaded
    recipe = Recipe(name="nano", model="nano", family=family, plan="bf16", dtype="float32")
    host = prepare(build_host(family)[0], processor, recipe)
    parts = {host.places.part_of(name) for name, p in host.model.named_parameters() if p.requires_grad}
    assert parts == {"sfa", "vision", "projector"}
    assert describe(host.model).num_layers == {"llava_onevision": 4, "llava": 2}.get(family, 3)
