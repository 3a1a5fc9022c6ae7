"""Models with pruned heads, saved and loaded, with LoRA and SFA around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.pruned_files import load_pruned, pruned_of, save_pruned
from sfa_adapters.observe import attention_modules
from tests.support.compare import Snapshot, read
from tests.support.hosts import HOSTS, logits_of
from tests.support.pruning import (
    BY_NAME,
    LAYER,
    greedy,
    language_model,
    plan_for,
    text_inputs,
    text_plan,
    tower_plan,
    with_lora,
)


@pytest.mark.parametrize("compensation", ["none", "absorb", "bias", "residual"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_pruned_model_comes_back_bit_for_bit(family: str, compensation: Any, tmp_path: Any) -> None:
    model = language_model(family, 2, tie_word_embeddings=family == "qwen3")
    batches = [text_inputs()] if compensation == "bias" else None
    prune_heads(model, text_plan(model, 2), compensation, batches)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(RuntimeError):  # as documented
        type(model).from_pretrained(tmp_path / "plain")
    folder = save_pruned(model, tmp_path / "pruned")
    again = load_pruned(type(model)(type(model.config).from_pretrained(folder)).eval(), folder)
    assert torch.equal(logits_of(again, text_inputs()), logits_of(model, text_inputs()))
    assert torch.equal(greedy(again, "static"), greedy(model, "dynamic"))
    save_pruned(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "head_plan.json").read_text() == (folder / "head_plan.json").read_text()


@pytest.mark.parametrize("name", ["timm_cls", "qwen2_5"])
def test_a_pruned_tower_comes_back(name: str, tmp_path: Any) -> None:
    case = BY_NAME[name]
    model, inputs = case.fresh()
    folder = save_pruned(prune_heads(model, tower_plan(model)), tmp_path / "tower")
    torch.manual_seed(99)
    assert torch.equal(read(case, load_pruned(case.build(), folder), inputs), read(case, model, inputs))


def test_bfloat16_stays(tmp_path: Any) -> None:
    model = language_model(kv=2).to(torch.bfloat16)
    prune_heads(model, text_plan(model, 2), "bias", [text_inputs()])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again = load_pruned(language_model(kv=2).to(torch.bfloat16), save_pruned(model, tmp_path / "pruned"))
    assert torch.equal(logits_of(again, text_inputs()), logits_of(model, text_inputs()))


def test_a_part_of_a_model_pruned_by_itself_is_saved_with_the_whole(tmp_path: Any) -> None:
    case = next(host for host in HOSTS if host.name == "llava")
    model: Any = case.build()
    tower = model.model.vision_tower
    prune_heads(tower, tower_plan(tower), "absorb")
    prune_heads(model, plan_for(model, {next(iter(attention_modules(model, "language"))): (0, 1)}))
    folder = save_pruned(model, tmp_path / "host")
    assert pruned_of(load_pruned(case.build(), folder)) == pruned_of(model)
    assert pruned_of(model).compensation == "absorb+none"
    assert torch.equal(logits_of(load_pruned(case.build(), folder), case.inputs()), logits_of(model, case.inputs()))


def test_weights_that_to_empty_untied_are_tied_again(tmp_path: Any) -> None:
    model = language_model("qwen3", 2, tie_word_embeddings=True)
    folder = save_pruned(prune_heads(model, text_plan(model, 2)), tmp_path / "tied")
    base = language_model("qwen3", 2, tie_word_embeddings=True)
    base.lm_head.weight = nn.Parameter(torch.zeros_like(base.lm_head.weight))
    again = load_pruned(base, folder)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again, text_inputs()), logits_of(model, text_inputs()))


def test_names_of_files_never_lead_out_of_the_folder(tmp_path: Any) -> None:
    model = language_model(kv=2)
    folder = save_pruned(prune_heads(model, text_plan(model, 2)), tmp_path / "one")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_pruned(language_model(kv=2), folder)


def test_sharded_files(tmp_path: Any) -> None:
    model = language_model(kv=2)
    folder = save_pruned(prune_heads(model, text_plan(model, 2)), tmp_path / "one")
    model.save_pretrained(folder, max_shard_size="20KB", save_original_format=False)
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = load_pruned(language_model(kv=2), folder)
    assert torch.equal(logits_of(again, text_inputs()), logits_of(model, text_inputs()))


def _break_plan(folder: Any, **change: Any) -> None:
    path = folder / "head_plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def _add_tensor(folder: Any) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.extra": torch.zeros(1)}, path)


BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no plan": (lambda folder: (folder / "head_plan.json").unlink(), "has no head_plan.json"),
    "no json": (lambda folder: (folder / "head_plan.json").write_text("{"), "cannot be read"),
    "no plan inside": (lambda folder: _break_plan(folder, plan={}), "no head plan"),
    "newer": (lambda folder: _break_plan(folder, version=2), "version 2"),
    "another class": (lambda folder: _break_plan(folder, model="Other"), "pruned Other"),
    "a bias that is not there": (lambda folder: _break_plan(folder, biases=[LAYER.format(0)]), "o_proj.bias"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
    "torn weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "cannot be read"),
    "a tensor too many": (_add_tensor, r"not in the model: \['model.extra'\]"),
    "weights of the unpruned": (
        lambda folder: language_model(kv=2).save_pretrained(folder, save_original_format=False),
        r"\[32, 32\] in the file",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_named_and_the_model_is_untouched(how: str, tmp_path: Any) -> None:
    break_it, words = BROKEN[how]
    model = language_model(kv=2)
    folder = save_pruned(prune_heads(model, text_plan(model, 2)), tmp_path / "pruned")
    break_it(folder)
    base = language_model(kv=2)
    snapshot = Snapshot(base)
    with pytest.raises(RecipeError, match=words):
        load_pruned(base, folder)
    snapshot.assert_unchanged(base)


def test_saving_what_was_not_pruned_or_twice_into_one_folder(tmp_path: Any) -> None:
    model = language_model()
    with pytest.raises(InjectionError, match="lost no heads"):
        save_pruned(model, tmp_path / "a")
    prune_heads(model, text_plan(model, 4))
    save_pruned(model, tmp_path / "a")
    with pytest.raises(RecipeError, match="already"):
        save_pruned(model, tmp_path / "a")
    lora = with_lora(model)
    lora.merge_adapter()
    with pytest.raises(InjectionError, match="Unmerge"):
        save_pruned(lora, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_save_that_breaks_off_leaves_no_plan(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    model = language_model(kv=2)
    prune_heads(model, text_plan(model, 2))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "save_pretrained", full)
        with pytest.raises(OSError, match="no space"):
            save_pruned(model, tmp_path / "pruned")
    with pytest.raises(RecipeError, match="the save did not finish"):
        load_pruned(language_model(kv=2), tmp_path / "pruned")
    load_pruned(language_model(kv=2), save_pruned(model, tmp_path / "pruned"))
