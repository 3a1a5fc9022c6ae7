"""Parts of live models: without PEFT wrappers, the language model, image tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from sfa_adapters.errors import InjectionError
from sfa_adapters.vlm.parts import (
    find_decoder,
    forward_names,
    image_token_ids,
    image_token_side,
    plain_model,
    still_image_id,
)
from tests.support.hosts import HOSTS, IMAGE, HostCase, every_host


def _wrapped(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"]))


@every_host
def test_a_host_and_the_same_host_in_peft(host: HostCase) -> None:
    model: Any = host.build()
    layers = [id(layer) for layer in find_decoder(model).layers]
    ids, names = image_token_ids(model), forward_names(model)
    assert IMAGE in ids
    assert "pixel_values" in names
    wrapped = _wrapped(model)
    assert plain_model(wrapped) is model
    decoder = find_decoder(wrapped)
    assert [id(layer) for layer in decoder.layers] == layers
    assert decoder.host is model
    assert decoder.outer[0] is wrapped
    assert model in decoder.outer
    assert all(decoder.module in module.modules() for module in decoder.outer)
    assert decoder.module not in decoder.outer
    assert image_token_ids(wrapped) == ids
    assert forward_names(wrapped) == names


def test_no_language_model_and_no_image_token_are_errors() -> None:
    with pytest.raises(InjectionError, match="Linear has no language model with decoder layers"):
        find_decoder(nn.Linear(2, 2))
    with pytest.raises(InjectionError, match=r"The config of Linear names no image token \(image_token_id, "):
        image_token_ids(nn.Linear(2, 2))


def test_all_placeholders_of_images_and_videos_are_named_in_order() -> None:
    model: Any = nn.Linear(2, 2)
    model.config = SimpleNamespace(image_token_id=[9, 4], image_token_index=9, video_token_id=7, video_token_index=0)
    assert image_token_ids(model) == (0, 4, 7, 9)


def test_names_of_the_image_token() -> None:
    assert still_image_id(SimpleNamespace(image_token_id=[5], image_token_index=7)) == 7
    assert still_image_id(SimpleNamespace(image_token_index=7)) == 7
    assert still_image_id(SimpleNamespace(image_token_id=5, image_token_index=7)) == 5
    assert still_image_id(SimpleNamespace(video_token_id=5)) is None
    assert still_image_id(None) is None


@pytest.mark.parametrize(
    ("config", "side"),
    [({"downsample_ratio": 0.5}, 2), ({"mm_tokens_per_image": 4}, 4), ({"scale_factor": 3}, 3), ({}, 1)],
)
def test_patches_along_a_side_of_an_image_token(config: dict[str, Any], side: int) -> None:
    assert image_token_side(SimpleNamespace(**config), (8, 8)) == side


def test_a_host_without_decoder_layers_is_named() -> None:
    model: Any = next(case for case in HOSTS if case.name == "llava").build()
    with pytest.raises(InjectionError, match="LlamaModel has no language model with decoder layers"):
        find_decoder(model.model.language_model)
    model.model.language_model.layers = nn.ModuleList()
    with pytest.raises(InjectionError, match="LlavaForConditionalGeneration has no language model"):
        find_decoder(model)
