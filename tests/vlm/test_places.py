"""Places of the parts of a model: read from it, or named by the record and checked."""

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from sfa_adapters import inject_sfa
from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.places import read_places
from sfa_adapters.vlm.records import vlm_spec
from tests.support.hosts import HOSTS, HostCase, every_host

CASES = {case.name: case for case in HOSTS}
SPLIT = ("internvl", "llava", "llava_next", "llava_onevision")


@pytest.mark.parametrize("name", SPLIT)
def test_what_is_read_is_what_the_records_name(name: str) -> None:
    model = CASES[name].build()
    named, read = vlm_spec(name).places(model), read_places(model, {"unread": vlm_spec(name).unread})
    assert set(read.projector) == set(named.projector)
    assert replace(read, projector=named.projector) == named


@every_host
def test_every_parameter_of_any_host_is_in_a_part(host: HostCase) -> None:
    model = inject_sfa(host.build())
    places = read_places(model, {})
    parts = {places.part_of(name) for name, _ in model.named_parameters()}
    assert {"sfa", "vision", "llm"} <= parts <= {"sfa", "vision", "llm", "projector"}
    assert places.part_of("module.lm_head.weight") == "llm"  # as distributed data parallel names it


def test_a_place_that_is_not_there_is_named() -> None:
    model = CASES["llava"].build()
    with pytest.raises(RecipeError, match=r"has no model\.bridge; it has model, model\.vision_tower, "):
        read_places(model, {"projector": ("model.bridge",)})
    with pytest.raises(RecipeError, match="is no vision-language model that this library can take apart"):
        read_places(nn.Linear(2, 2), {})
    places = read_places(model, {})
    with pytest.raises(RecipeError, match=r"'model' is in no part of LlavaForConditionalGeneration: model\.vision"):
        places.part_of("model")


def test_a_parameter_outside_of_the_named_parts_is_an_error() -> None:
    model: Any = CASES["llava_onevision"].build()
    with pytest.raises(RecipeError, match=r"'model\.image_newline' is in no part"):
        read_places(model, {"projector": ("model.multi_modal_projector",)})
