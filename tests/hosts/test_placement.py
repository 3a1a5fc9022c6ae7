"""Placement: device maps that cover a host, splits over two devices, a 4-bit language model, shards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from sfa_adapters.data.collator import Collator
from sfa_adapters.data.rows import Row
from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.load import HOSTS, Host, load_host, module_table, prepare
from sfa_adapters.hosts.placement import (
    accelerate_config,
    check_covered,
    layer_classes,
    placement,
    shard,
    skeleton,
    split_map,
)
from sfa_adapters.hosts.quantization import check_loaded, four_bit_modules
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.install import install_command
from sfa_adapters.recipes.catalog import RECIPES, architecture
from tests.support.hosts import HOSTS as CASES
from tests.support.nightly_hosts import NanoFolders, families_of

every_family = pytest.mark.parametrize("family", families_of(HOSTS, core=True))
ONE_OF_EACH = list({recipe.family: name for name, recipe in RECIPES.items()}.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> NanoFolders:
    return NanoFolders(tmp_path_factory.mktemp("hosts"))


def recipe(family: Any, folder: Path | str = "x", **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"name": "t", "model": str(folder), "family": family, "dtype": "float32"}
    settings |= {"prompt": "{question}", "max_tiles": 2, "max_pixels": 140 * 140}
    return Recipe(**{**settings, **changes})


def batch(host: Host, train: bool = True) -> dict[str, Tensor]:
    """Two questions about two images of noise."""
    examples = []
    for number in range(2):
        image = np.random.default_rng(number).integers(0, 255, (112, 150, 3), dtype=np.uint8)
        row = Row(id=str(number), image=None, question="What?", answers=("7",))
        examples.append({"row": row, "image": image, "skipped": ()})
    collated = Collator(host.processor, host.spec, host.recipe, train=train)(examples)
    return {name: value for name, value in collated.items() if isinstance(value, Tensor)}


def step(host: Host) -> tuple[float, dict[str, Tensor]]:
    """Loss, and the gradient of everything that trains."""
    host.model.zero_grad(set_to_none=True)
    with host.autocast():
        loss = host.model(**batch(host), use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in host.model.named_parameters() if p.requires_grad}  # pyright: ignore[reportReturnType]


def generate(host: Host) -> Tensor:
    model: Any = host.model.eval()
    return model.generate(**batch(host, train=False), max_new_tokens=3, do_sample=False)


# -- where ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_split_covers_every_full_size_host_exactly_once(name: str):
    recipe = RECIPES[name]
    spec = HOSTS[recipe.family]
    model = skeleton(architecture(recipe), spec)
    places = spec.places(model)
    device_map = split_map(places, 0, 1)
    check_covered(model, device_map)
    where = {
        tensor: [device for entry, device in device_map.items() if f"{tensor}.".startswith(f"{entry}.")]
        for tensor, _ in model.named_parameters()
    }
    assert all(len(devices) == 1 for devices in where.values())
    front = sum(p.numel() for n, p in model.named_parameters() if where[n] == [0])
    assert front == sum(p.numel() for n, p in model.named_parameters() if places.part_of(n) in ("vision", "projector"))


def test_a_map_that_does_not_cover_is_refused():
    model = CASES[1].build()  # LLaVA-OneVision, with its bare parameter
    good = split_map(HOSTS["llava_onevision"].places(model), 0, 1)
    with pytest.raises(RecipeError, match=r"model\.image_newline in no entry"):
        check_covered(model, {name: device for name, device in good.items() if "newline" not in name})
    with pytest.raises(RecipeError, match=r"and \d+ more in several entries"):
        check_covered(model, {**good, "model.vision_tower.encoder": 1})
    with pytest.raises(RecipeError, match=r"model\.visual nowhere in the model"):
        check_covered(model, {**good, "model.visual": 0})
    check_covered(model, {"": 0})


def test_plans_that_do_not_go_with_these_gpus_and_processes(monkeypatch: pytest.MonkeyPatch):
    spec, model = HOSTS["llava"], CASES[2].build()
    split, shards = recipe("llava", plan="split"), recipe("llava", plan="fsdp2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert set(placement(split, spec, model).values()) == {0, 1}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match=r"plan=split needs two GPUs, and 1 is visible .* Use plan=nf4"):
        placement(split, spec, model)
    assert set(placement(split, spec, model, "cuda:0").values()) == {"cuda:0"}  # asked for
    with pytest.raises(
        RecipeError, match=r"plan=fsdp2 .* Start it with: accelerate launch --config_file .*fsdp2\.yaml"
    ):
        placement(shards, spec, model)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert placement(shards, spec, model) == {"": "cpu"}
    with pytest.raises(RecipeError, match="plan=split is one process that uses two GPUs, but 2 processes were started"):
        placement(split, spec, model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert placement(recipe("llava"), spec, model) == {"": "cuda:1"}  # one copy per process


@every_family
def test_a_split_on_a_cpu_is_the_unsplit_host(family: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture):
    """Both halves go through the hooks that move tensors between GPUs."""
    whole = load_host(recipe(family, folders[family], plan="bf16"))
    halves = load_host(recipe(family, folders[family], plan="split"))
    assert "is rehearsed with both halves on the CPU" in caplog.text
    places = whole.places
    assert halves.model.hf_device_map == split_map(places, "cpu", "cpu")
    for place in (places.tower, places.language_model, places.lm_head):
        assert hasattr(halves.model.get_submodule(place), "_hf_hook")
    assert not any(hasattr(module, "_hf_hook") for module in whole.model.modules())
    loss, gradients = step(whole)
    split_loss, split_gradients = step(halves)
    assert split_loss == loss
    assert split_gradients.keys() == gradients.keys()
    assert all(torch.equal(split_gradients[name], gradient) for name, gradient in gradients.items())
    assert torch.equal(generate(halves), generate(whole))


# -- 4-bit ------------------------------------------------------------------------------------------------------------


@every_family
def test_only_the_language_model_is_in_4_bit(family: str, folders: dict[str, Path]):
    host = load_host(recipe(family, folders[family], plan="nf4", dtype="bfloat16", freeze_vision=True, lora_llm=2))
    quantized = four_bit_modules(host.model)
    assert {host.places.part_of(name) for name in quantized} == {"llm"}
    assert host.places.lm_head not in quantized
    decoder = [n for n, m in host.model.named_modules() if type(m).__name__ == "Linear4bit"]
    assert {name.removesuffix(".base_layer") for name in decoder} == quantized
    plain = AutoModelForImageTextToText.from_pretrained(folders[family])
    plain = plain.get_submodule(host.spec.places(plain).language_model)
    assert len(quantized) == sum(isinstance(module, torch.nn.Linear) for module in plain.modules())
    # `prepare_model_for_kbit_training` would have made all of these float32.
    frozen = [p for n, p in host.model.named_parameters() if host.places.part_of(n) in ("vision", "llm")]
    assert {p.dtype for p in frozen} == {torch.bfloat16, torch.uint8}
    rows = list(zip(*(list(column.cells) for column in module_table(host).columns), strict=False))
    trained = {row[0]: row[3] for row in rows if row[4] == "-"}
    assert trained[host.places.tower].startswith("0 of ")
    assert trained[host.places.language_model] == f"{len(quantized)} of {len(quantized)}"


@every_family
def test_gradients_go_through_4_bit_as_through_the_same_weights_in_full(family: str, folders: dict[str, Path]):
    """The reference has the rounded weights in float32: same loss, same gradients in tower, projector and bias."""
    from bitsandbytes.functional import dequantize_4bit

    host = load_host(recipe(family, folders[family], plan="nf4"))
    reference = load_host(recipe(family, folders[family], plan="bf16"))
    with torch.no_grad():
        for name in four_bit_modules(host.model):
            packed: Any = host.model.get_submodule(name).weight
            full = dequantize_4bit(packed.data, packed.quant_state)
            original: Any = reference.model.get_submodule(name).weight
            assert not torch.equal(full, original)  # it is rounded
            original.copy_(full)
    loss, gradients = step(host)
    expected_loss, expected = step(reference)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    assert {host.places.part_of(name) for name in gradients} == {"vision", "projector", "sfa"}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)


def test_answers_in_between_leave_training_as_it_was(folders: dict[str, Path]):
    """bitsandbytes would repack the weights for generation on some CPUs, permanently, and fails on odd sizes."""
    host = load_host(recipe("internvl", folders["internvl"], plan="nf4"))
    loss, gradients = step(host)
    assert generate(host).shape[0] == 2
    host.model.train()
    after, again = step(host)
    assert after == loss
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def load_4_bit(folder: Path, skip: list[str]) -> nn.Module:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=settings, device_map={"": "cpu"})


def test_the_usual_skip_list_quantises_the_tower(folders: dict[str, Path]):
    """Why full names are resolved: the bare name of the tower keeps nothing in current transformers."""
    model = load_4_bit(folders["internvl"], ["vision_tower", "multi_modal_projector", "lm_head"])
    inside = [name for name in four_bit_modules(model) if name.startswith("model.vision_tower.")]
    assert len(inside) == 18
    with pytest.raises(RecipeError, match=r"20 layers are in 4-bit and must not be: model\.multi_modal_projector"):
        check_loaded(model, HOSTS["internvl"], "nf4")
    with pytest.raises(RecipeError, match="plan=bf16: 41 layers are in 4-bit"):
        check_loaded(model, HOSTS["internvl"], "bf16")


def test_a_language_model_that_was_left_out_is_refused(folders: dict[str, Path]):
    model = load_4_bit(folders["llava"], ["model.vision_tower", "model.multi_modal_projector", "lm_head", "up_proj"])
    with pytest.raises(
        RecipeError, match=r"3 layers of the language model are not in 4-bit: .*layers\.0\.mlp\.up_proj"
    ):
        check_loaded(model, HOSTS["llava"], "nf4")


def test_the_usual_preparation_is_not_called(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("prepare_model_for_kbit_training upcasts the tower")

    monkeypatch.setattr(peft, "prepare_model_for_kbit_training", refuse)
    monkeypatch.setattr(peft.utils.other, "prepare_model_for_kbit_training", refuse)
    load_host(recipe("llava", folders["llava"], plan="nf4", lora_llm=2))


def test_4_bit_without_bitsandbytes_names_what_to_install(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    with pytest.raises(RecipeError, match=re.escape(f"plan=nf4 needs bitsandbytes: {install_command('recipes')}")):
        load_host(recipe("llava", folders["llava"], plan="nf4"))


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# Newer hosts return the features of their images beside the loss, as views of one tensor. torch 2.15 warns
# of in-place operations on outputs that are views; nobody does any here.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16", "freeze_vision": True, "lora_llm": 2}], ids=["all", "mixed"]
)
def test_a_sharded_host_gives_the_same_gradients(changes: dict[str, Any]):
    """Every parameter is sharded, the scalars of SFA among them. Two processes: tests/training/test_ddp.py."""
    case = next(case for case in CASES if case.name == "llava")
    wanted = recipe("llava", plan="fsdp2", **changes)
    inputs = case.inputs()

    def gradients(host: Host) -> dict[str, Tensor]:
        with host.autocast():
            host.model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad for n, p in host.model.named_parameters() if p.requires_grad}  # pyright: ignore[reportReturnType]

    dtype = getattr(torch, wanted.dtype)
    expected = gradients(prepare(case.build().to(dtype), None, wanted))
    host = prepare(case.build().to(dtype), None, wanted)
    shard(host.model, host.spec, init_device_mesh("cpu", (1,)))
    assert all(isinstance(parameter, DTensor) for parameter in host.model.parameters())
    grads = gradients(host)
    assert grads.keys() == expected.keys()
    for name, gradient in grads.items():
        whole: Any = gradient
        torch.testing.assert_close(whole.full_tensor(), expected[name], msg=name)


def test_what_cannot_be_sharded(folders: dict[str, Path]):
    host = load_host(recipe("llava", folders["llava"], plan="nf4"))
    with pytest.raises(RecipeError, match="4-bit weights cannot be sharded"):
        shard(host.model, host.spec)
    with pytest.raises(RecipeError, match="is LlavaForConditionalGeneration, but the model is a Linear"):
        shard(nn.Linear(2, 2), host.spec)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_layers_of_the_full_size_hosts_are_wrapped(name: str):
    """accelerate takes the classes from `_no_split_modules` where its configuration names none."""
    recipe = RECIPES[name]
    spec = HOSTS[recipe.family]
    model: Any = skeleton(architecture(recipe), spec)
    layers = {type(module).__name__ for module in model.modules()} & layer_classes(model, spec)
    classes = set(spec.places(model).layer_classes)
    assert layers >= classes
    if recipe.family == "paddleocr_vl":  # transformers lists no layer of its tower: the tower is one unit
        classes -= {"PaddleOCRVisionEncoderLayer"}
    classes -= {"Idefics3EncoderLayer", "SmolVLMEncoderLayer"}  # it lists their attention
    assert classes <= set(model._no_split_modules)


@pytest.mark.parametrize("plan", ["ddp", "fsdp2"])
def test_the_configurations_of_accelerate_are_read_by_accelerate(plan: Any):
    from accelerate.commands.config.config_args import load_config_from_file

    path = accelerate_config(plan)
    settings: Any = load_config_from_file(str(path))
    assert (settings.num_processes, settings.mixed_precision) == (2, "bf16")
    assert settings.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[plan]
    given = yaml.safe_load(path.read_text())
    if plan == "fsdp2":
        assert settings.fsdp_config == given["fsdp_config"]
        assert given["fsdp_config"]["fsdp_version"] == 2
