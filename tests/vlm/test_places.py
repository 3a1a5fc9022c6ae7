"""Places of the parts of a model: read from it, or named by the record and checked."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import nn

from sfa_adapters import inject_sfa
from sfa_adapters.errors import RecipeError
from sfa_adapters.layer import CHILD_NAME
from sfa_adapters.vlm.places import Places, read_places
from sfa_adapters.vlm.records import vlm_spec
from tests.support.hosts import HOSTS, HostCase, every_host

CASES = {case.name: case for case in HOSTS}
SPLIT = {
    "internvl": ("InternVLVisionLayer", "Qwen2DecoderLayer"),
    "llava": ("CLIPEncoderLayer", "LlamaDecoderLayer"),
    "llava_next": ("CLIPEncoderLayer", "LlamaDecoderLayer"),
    "llava_onevision": ("SiglipEncoderLayer", "Qwen2DecoderLayer"),
}
PLACES = Places(
    model_class="Mine",
    tower="model.eye",
    projector=("model.eye.merger", "model.newline"),
    language_model="model.words",
    lm_head="head",
    layer_classes=(),
)


@cache
def _llava() -> nn.Module:
    return CASES["llava"].build()


@pytest.mark.parametrize("name", SPLIT)
def test_what_is_read_is_what_the_records_name(name: str) -> None:
    model = CASES[name].build()
    named, read = vlm_spec(name).places(model), read_places(model, {"unread": vlm_spec(name).unread})
    assert set(read.projector) == set(named.projector)
    assert replace(read, projector=named.projector) == named
    assert read.layer_classes == SPLIT[name]
    assert read.unread == vlm_spec(name).unread


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.eye.blocks.0.weight", "vision"),
        ("model.eye.merger.weight", "projector"),
        ("model.newline", "projector"),
        ("module.model.words.weight", "llm"),  # as distributed data parallel names it
        ("head.weight", "llm"),
        ("model.eye.blocks.0.query.lora_A.default.weight", "lora"),
        (f"model.eye.blocks.0.{CHILD_NAME}.lora_like.row", "sfa"),  # an adapter may be called so
    ],
)
def test_which_part_a_name_is_in(name: str, part: str) -> None:
    assert PLACES.part_of(name) == part


@pytest.mark.parametrize("name", ["model", "model.eyes.weight", "heads.weight", "model.newlines", "words.weight"])
def test_a_name_in_no_part_is_an_error(name: str) -> None:
    with pytest.raises(RecipeError) as error:
        PLACES.part_of(name)
    parts = "model.eye, model.eye.merger, model.newline, model.words, head"
    assert str(error.value) == f"{name!r} is in no part of Mine: {parts}."


@every_host
def test_every_parameter_of_any_host_is_in_a_part(host: HostCase) -> None:
    model = inject_sfa(host.build())
    places = read_places(model, {})
    parts = {places.part_of(name) for name, _ in model.named_parameters()}
    assert {"sfa", "vision", "llm"} <= parts <= {"sfa", "vision", "llm", "projector"}


@pytest.mark.parametrize("part", ["tower", "projector", "language_model", "lm_head"])
@pytest.mark.parametrize("place", ["model.bridge", "bridge.inner", "model.config"])
def test_a_place_that_is_not_there_is_named(part: str, place: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_places(_llava(), {part: (place,) if part == "projector" else place})
    children = "model, model.vision_tower, model.multi_modal_projector, model.language_model, lm_head"
    assert str(error.value) == f"LlavaForConditionalGeneration has no {place}; it has {children}."


def test_what_a_record_names_is_taken() -> None:
    known: dict[str, Any] = {
        "language_model": "model.language_model.layers",
        "lm_head": "model.language_model.norm",
        "layer_classes": ("Layer",),
        "unread": ("head",),
    }
    read = read_places(_llava(), known)
    assert {name: getattr(read, name) for name in known} == known
    assert set(read.projector) == {"model.multi_modal_projector", "model.language_model.embed_tokens", "lm_head"}


def test_a_record_says_which_of_two_towers_it_is() -> None:
    model: Any = CASES["llava"].build()
    model.model.second_tower = CASES["llava_onevision"].build().get_submodule("model.vision_tower")
    with pytest.raises(
        RecipeError, match=r"several vision towers: model\.vision_tower \(clip\), model\.second_tower \(siglip\)"
    ):
        read_places(model, {})
    read = read_places(model, {"tower": "model.second_tower"})
    assert read.tower == "model.second_tower"
    assert read.layer_classes == ("SiglipEncoderLayer", "LlamaDecoderLayer")
    assert set(read.projector) == {"model.vision_tower", "model.multi_modal_projector"}


def test_a_model_that_cannot_be_taken_apart_is_named() -> None:
    with pytest.raises(RecipeError, match="is no vision-language model that this library can take apart"):
        read_places(nn.Linear(2, 2), {})
    model: Any = CASES["llava"].build()
    model.lm_head = None
    with pytest.raises(RecipeError, match="LlavaForConditionalGeneration has no head for words"):
        read_places(model, {})


def test_the_merger_of_qwen_is_the_projector_though_it_lies_in_the_tower() -> None:
    model = CASES["qwen2_5_vl"].build()
    places = vlm_spec("qwen2_5_vl").places(model)
    assert places.layer_classes == ("Qwen2_5_VLVisionBlock", "Qwen2_5_VLDecoderLayer")
    for name, _ in model.get_submodule("model.visual").named_parameters(prefix="model.visual"):
        assert places.part_of(name) == ("projector" if ".merger." in name else "vision")


def test_a_parameter_outside_of_the_named_parts_is_an_error() -> None:
    model: Any = CASES["llava_onevision"].build()
    with pytest.raises(RecipeError, match=r"'model\.image_newline' is in no part"):
        read_places(model, {"projector": ("model.multi_modal_projector",)})
