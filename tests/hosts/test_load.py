"""Hosts from checkpoint folders and from memory: parts, adapters, what trains, precision, checkpointing, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

from sfa_adapters.adat import eject_adat
from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.load import HOSTS, Host, load_host, module_table, prepare
from sfa_adapters.hosts.placement import skeleton
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.recipes.catalog import architecture, find_recipe
from tests.support.compare import structural
from tests.support.hosts import HOSTS as CASES
from tests.support.nightly_hosts import NanoFolders, families_of

TINY = {case.name: case for case in CASES if case.name in HOSTS}
TASK = "ForConditionalGeneration"
every_family = pytest.mark.parametrize("family", families_of(TINY))


def recipe(family: Any, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"name": "t", "model": "in memory", "family": family, "plan": "bf16", "dtype": "float32"}
    return Recipe(**{**settings, **changes})


def tiny(family: str, train: bool = True, **changes: Any) -> Host:
    """A host of three tower layers, prepared."""
    wanted = recipe(family, **changes)
    model = TINY[family].build().to(getattr(torch, wanted.dtype))
    return prepare(model, None, wanted, train=train)


def backward(host: Host) -> None:
    inputs = TINY[host.spec.family].inputs()
    with host.autocast():
        loss = host.model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()


def parts_that_train(host: Host) -> set[str]:
    return {host.places.part_of(name) for name, p in host.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> NanoFolders:
    return NanoFolders(tmp_path_factory.mktemp("hosts"))


# -- parts ------------------------------------------------------------------------------------------------------------


@every_family
def test_every_name_has_its_part(family: str):
    host = tiny(family, lora_llm=2)
    names_by_part: dict[str, set[str]] = {}
    for name, _ in host.model.named_parameters():
        names_by_part.setdefault(host.places.part_of(name), set()).add(name)
    assert set(names_by_part) == {"sfa", "lora", "vision", "projector", "llm"}
    assert names_by_part["sfa"] == set(structural(host.model))
    assert all(host.places.language_model.rpartition(".")[2] in name for name in names_by_part["lora"])
    tower = set(dict(host.model.get_submodule(host.places.tower).named_parameters(prefix=host.places.tower)))
    assert names_by_part["vision"] <= tower
    assert (names_by_part["projector"] <= tower) == (family == "qwen2_5_vl")  # its merger is a child of the tower
    for name, _ in host.model.named_modules():
        if name in ("", "model"):  # these hold several parts
            with pytest.raises(RecipeError, match="is in no part of"):
                host.places.part_of(name)
        else:
            assert host.places.part_of(name)
    assert host.places.part_of("module.lm_head.weight") == "llm"  # as distributed data parallel names it
    classes = {type(module).__name__ for module in host.model.modules()}
    assert host.places.layer_classes[0] in classes


def test_a_host_of_another_family_is_refused():
    with pytest.raises(RecipeError, match="is InternVLForConditionalGeneration, but the model is a LlavaForCond"):
        prepare(TINY["llava"].build(), None, recipe("internvl"))


def test_a_host_that_lacks_a_part_is_refused():
    model: Any = TINY["llava"].build()
    del model.model.multi_modal_projector
    with pytest.raises(RecipeError, match=r"has no model\.multi_modal_projector; it has model, "):
        prepare(model, None, recipe("llava"))


def test_published_counts():
    """337,590,400 of 8,528,325,760 train, with nothing but the recipe."""
    published = find_recipe("internvl3_5_8b_published")
    host = prepare(skeleton(architecture(published), HOSTS["internvl"]), None, published.replace(plan="bf16"))
    everything = list(host.model.parameters())
    assert all(p.is_meta for p in everything)
    assert sum(p.numel() for p in everything if p.requires_grad) == 337_590_400
    assert sum(p.numel() for p in everything) == 8_528_325_760


# -- what trains ------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {"sfa", "vision", "projector"}),
        ({"freeze_vision": True}, {"sfa", "projector"}),
        ({"freeze_vision": True, "freeze_projector": True}, {"sfa"}),
        ({"freeze_vision": True, "freeze_projector": True, "sfa": False, "lora_llm": 2}, {"lora"}),
        ({"freeze_llm": False, "sfa": False}, {"vision", "projector", "llm"}),
    ],
)
def test_settings_say_what_trains(family: str, changes: dict[str, Any], wanted: set[str]):
    assert parts_that_train(tiny(family, **changes)) == wanted


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_that_trains_gets_a_gradient(family: str, dtype: str):
    """Also in mixed precision, through checkpointed layers, and in the first step of a LoRA, whose A waits for B."""
    host = tiny(family, dtype=dtype, lora_llm=2)
    backward(host)
    trained = {name: p for name, p in host.model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    dead = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert all(".lora_A." in name for name in dead)
    assert all(p.grad is None for p in host.model.parameters() if not p.requires_grad)


def test_layers_that_the_host_never_reads_stay_frozen():
    """LLaVA-1.5 reads layer -2: gradients of the last layer and of the norm behind it would be missing."""
    host = tiny("llava")
    frozen = {n for n, p in host.model.named_parameters() if not p.requires_grad and host.places.part_of(n) == "vision"}
    tower = [n for n, _ in host.model.named_parameters() if n.startswith("model.vision_tower.")]
    assert frozen == {n for n in tower if ".layers.2." in n or ".post_layernorm." in n}
    assert len(frozen) == 18


def test_settings_of_the_bias():
    host = tiny("internvl", sfa_terms=("row", "dist"), sfa_layers=(0, 2))
    names = set(structural(host.model))
    assert {name.rpartition(".sfa.")[2] for name in names} == {"sfa_row.default", "sfa_dist.default"}
    assert {name.split(".")[4] for name in names} == {"0", "2"}
    assert not structural(tiny("internvl", sfa=False).model)


def test_new_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    following = torch.randn(1)
    torch.manual_seed(5)
    model = TINY["internvl"].build()
    torch.manual_seed(5)
    first = structural(prepare(model, None, recipe("internvl", seed=1, lora_llm=2)).model)
    assert torch.equal(torch.randn(1), following)  # the global random state stayed as it was
    second = structural(tiny("internvl", seed=1, lora_llm=2).model)
    third = structural(tiny("internvl", seed=2, lora_llm=2).model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)


def test_adaptive_tokens():
    eject_adat(tiny("internvl", adat=0.9).model)
    with pytest.raises(RecipeError, match=r"adat=0\.5 cannot be used with family='qwen2_5_vl'"):
        tiny("qwen2_5_vl", adat=0.5)


# -- precision and checkpointing --------------------------------------------------------------------------------------


def test_what_trains_is_float32_and_the_rest_is_not():
    host = tiny("internvl", dtype="bfloat16")
    kinds = {host.places.part_of(n): p.dtype for n, p in host.model.named_parameters()}
    assert kinds == dict.fromkeys(("vision", "projector", "sfa"), torch.float32) | {"llm": torch.bfloat16}
    frozen = tiny("internvl", dtype="bfloat16", freeze_vision=True, freeze_projector=True)
    kinds = {frozen.places.part_of(n): p.dtype for n, p in frozen.model.named_parameters()}
    assert kinds == {"vision": torch.bfloat16, "projector": torch.bfloat16, "sfa": torch.float32, "llm": torch.bfloat16}


@every_family
def test_a_host_for_answers(family: str):
    """Nothing trains, and it runs in bfloat16 without autocast."""
    host = tiny(family, train=False, dtype="bfloat16", lora_llm=2)
    assert not host.model.training
    assert not any(p.requires_grad for p in host.model.parameters())
    assert not host.model.is_gradient_checkpointing
    base = [p for n, p in host.model.named_parameters() if host.places.part_of(n) not in ("sfa", "lora")]
    assert {p.dtype for p in base} == {torch.bfloat16}
    with torch.no_grad():
        assert host.model(**TINY[family].inputs()).logits.dtype == torch.bfloat16


@every_family
def test_checkpointing_changes_no_gradient(family: str):
    grads = []
    for on in (False, True):
        host = tiny(family, gradient_checkpointing=on, lora_llm=2)
        assert host.model.training
        assert host.model.is_gradient_checkpointing is on
        backward(host)
        grads.append({n: p.grad for n, p in host.model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_checkpointing_keeps_no_graph_of_a_frozen_tower():
    """`transformers` makes embeddings require gradients when it switches checkpointing on, in the tower as well."""
    host = tiny("llava", freeze_vision=True, freeze_projector=True, sfa=False, lora_llm=2)
    seen: list[bool] = []
    tower = host.model.get_submodule(host.places.tower)
    tower.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state.requires_grad))
    embeddings: Any = host.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, output: seen.append(output.requires_grad))
    backward(host)
    assert seen == [False, False]


# -- from folders -----------------------------------------------------------------------------------------------------


@every_family
def test_loading_a_folder(family: Any, folders: dict[str, Path]):
    host = load_host(recipe(family, model=str(folders[family]), dtype="bfloat16", gradient_checkpointing=False))
    assert (type(host.model).__name__, str(host.device)) == (host.spec.model_class, "cpu")
    assert type(host.processor).__name__.lower() == f"{host.spec.model_class.removesuffix(TASK)}Processor".lower()
    saved = AutoModelForImageTextToText.from_pretrained(folders[family]).state_dict()
    loaded = {k: v for k, v in host.model.state_dict().items() if ".sfa." not in k}
    assert loaded.keys() == saved.keys()  # stock resume finds none of them under these names
    for name, tensor in saved.items():
        assert torch.equal(loaded[name].bfloat16(), tensor.bfloat16()), name


def test_a_folder_that_cannot_be_used(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(RecipeError, match="has no readable configuration"):
        load_host(recipe("internvl", model=str(tmp_path / "nothing")))
    with pytest.raises(RecipeError, match="is a 'llava' checkpoint; family='internvl' needs 'internvl'"):
        load_host(recipe("internvl", model=str(folders["llava"])))
    remote_code = {
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    }
    (tmp_path / "config.json").write_text(json.dumps(remote_code))
    with pytest.raises(RecipeError, match="brings code of its own, which is not run"):
        load_host(recipe("internvl", model=str(tmp_path)))
    config = json.loads((folders["internvl"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"cannot be loaded: .*safetensors"):  # and no pickle in its place
        load_host(recipe("internvl", model=str(tmp_path)))


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_table_says_what_trains_where():
    host = tiny("internvl", dtype="bfloat16", lora_llm=2, adat=0.5)
    table = module_table(host)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert list(columns) == ["module", "trainable", "dtype", "4-bit", "adapter", "device"]
    rows: list[tuple[Any, ...]] = list(zip(*columns.values(), strict=True))
    by_adapter = {(row[0], row[4]): row for row in rows}
    sfa = by_adapter["model.vision_tower", "SFA row + col, 3 layers"]
    assert sfa[1:3] == ("24\nof 24", "float32")
    tower = by_adapter["model.vision_tower", "ADAT 0.5"]
    lora = by_adapter["model.language_model", "LoRA r=2"]
    assert (tower[2], tower[3], tower[5]) == ("float32", "0 of 18", "cpu")
    assert lora[3] == "-"
    model = by_adapter["model.language_model", "-"]
    assert model[1].startswith("0\nof ")
    assert (model[2], model[3]) == ("bfloat16", "0 of 14")
    trained = sum(p.numel() for p in host.model.parameters() if p.requires_grad)
    assert rows[-1][:2] == ("all", f"{trained:,}\nof {sum(p.numel() for p in host.model.parameters()):,}")
    console = Console(width=80, record=True)
    console.print(table)
    shown = console.export_text()
    assert all(f" {name} " in f" {shown.replace(chr(10), ' ')} " for name in columns["module"])
    assert "…" not in shown
