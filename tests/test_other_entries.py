"""Entry points of a tower other than its forward, and adapters that are removed while others stay."""

from typing import Any

import pytest
import timm
import torch
from peft import TaskType, get_peft_model
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from sfa_adapters import describe, eject_sfa, inject_sfa
from sfa_adapters.errors import LayoutError
from sfa_adapters.hooks import attachment_of
from sfa_adapters.tower_input import TowerInput
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.towers import CASES, SMALL, TowerCase, images, lively

RESIZED = [case for case in CASES if case.resized is not None]


def test_timm_forward_features_sees_the_grid_of_its_image():
    """A transposed grid has the same number of tokens, so only the image can tell."""
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=96, dynamic_img_size=True, num_classes=0)
    model.eval()
    inject_sfa(model, compare.strong_config())
    images = [torch.randn(1, 3, 64, 96), torch.randn(1, 3, 96, 64)]
    with torch.no_grad():
        expected = []
        for image in images:
            model(image)
            expected.append(model.forward_features(image))
        features = [model.forward_features(image) for image in images]
        intermediate = model.forward_intermediates(images[0], intermediates_only=True, norm=True, output_fmt="NLC")[-1]
    for mine, reference in zip(features, expected, strict=True):
        assert torch.equal(mine, reference)
    compare.assert_close(intermediate, expected[0][:, 1:])


def test_ejecting_the_active_adapter_activates_what_is_left():
    """Warnings are errors here: PEFT would warn once per layer."""
    case = next(case for case in CASES if case.name == "clip")
    model, inputs = case.fresh()
    inject_sfa(model, compare.strong_config(), adapter_name="first")
    expected = compare.read(case, model, inputs)
    inject_sfa(model, compare.strong_config(), adapter_name="second")
    assert compare.difference(compare.read(case, model, inputs), expected) > 1e-3
    eject_sfa(model, "second")
    assert describe(model).active == ("first",)
    assert torch.equal(compare.read(case, model, inputs), expected)


# -- images that reach the layers on other ways than the tower's call --------------------------------------------------


def six_by_six() -> Any:
    """A tower of 6x6 patches; images of 9x4 and 4x9 have as many."""
    config = SiglipVisionConfig(**SMALL, image_size=84, patch_size=14, vision_use_head=False)
    torch.manual_seed(3)
    return inject_sfa(lively(lambda: SiglipVisionModel(config))(), compare.strong_config())


def strip(seed: int = 0, height: int = 126, width: int = 56) -> Tensor:
    return images(height, width)(seed)["pixel_values"]


def test_embedding_then_encoder_take_the_grid_of_the_embedded_image():
    tower = six_by_six()
    with torch.no_grad():
        tower(images(84, 84)(0)["pixel_values"])
        expected = tower(strip(), interpolate_pos_encoding=True).last_hidden_state
        for _ in range(2):
            hidden = tower.embeddings(strip(), interpolate_pos_encoding=True)
            out = tower.encoder(inputs_embeds=hidden).last_hidden_state
            assert torch.equal(tower.post_layernorm(out), expected)
        calls = tower.forward(strip(), interpolate_pos_encoding=True)
    assert torch.equal(calls.last_hidden_state, expected)


def test_tokens_of_no_image_never_take_the_grid_of_another_one():
    """36 tokens may be 6x6, 9x4, ...: nobody said."""
    tower = six_by_six()
    tokens = torch.randn(1, 36, 32)
    attention: Any = injected_layers(tower)[0][1]
    text = r"got 36 tokens; the tower's grids have 6x6\+0=36, and the layer ran outside of a call of the tower"
    with torch.no_grad():
        for _ in range(2):
            for act in (lambda: tower.encoder(inputs_embeds=tokens), lambda: attention(tokens)):
                with pytest.raises(LayoutError, match=text):
                    act()
            tower(images(84, 84)(0)["pixel_values"])  # a call before does not make it say so
        tower.embeddings(images(84, 84)(0)["pixel_values"])
        tower.encoder(inputs_embeds=tokens)
        with pytest.raises(LayoutError, match=r"36 tokens; .*outside of a call"):
            tower.encoder(inputs_embeds=tokens)  # the one image that was embedded has passed


def test_two_embedded_images_that_cannot_be_told_apart():
    tower = six_by_six()
    with torch.no_grad():
        first = tower.embeddings(strip(), interpolate_pos_encoding=True)
        second = tower.embeddings(strip(1, 56, 126), interpolate_pos_encoding=True)
        for hidden in (first, second):
            with pytest.raises(LayoutError, match=r"36 tokens outside of a call .* lie differently.*once per input"):
                tower.encoder(inputs_embeds=hidden)
        out = tower(strip(), interpolate_pos_encoding=True).last_hidden_state  # a call of the tower is no riddle
        assert torch.equal(out, tower(strip(), interpolate_pos_encoding=True).last_hidden_state)


def test_a_call_that_fails_leaves_no_forward_behind():
    tower = six_by_six()
    handle = tower.encoder.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        tower(strip(), interpolate_pos_encoding=True)
    handle.remove()
    with pytest.raises(LayoutError, match="outside of a call"), torch.no_grad():
        tower.encoder(inputs_embeds=torch.randn(1, 36, 32))


def fail(*_: Any) -> None:
    raise ValueError("broken")


@pytest.mark.parametrize("case", [case for case in RESIZED if case.backbone != "qwen2_5_vit"], ids=str)
def test_a_peft_model_that_calls_forward_past_the_hooks_of_the_tower(case: TowerCase):
    """PEFT does so for some task types."""
    tower, _ = compare.injected(case)
    assert case.resized is not None
    inputs = case.resized(0)
    expected = compare.read(case, tower, inputs)
    scalars = list(compare.structural(tower).values())
    wrapped: Any = get_peft_model(case.build(), compare.strong_config(task_type=TaskType.FEATURE_EXTRACTION))  # pyright: ignore[reportArgumentType]
    for parameter, values in zip(compare.structural(wrapped).values(), scalars, strict=True):
        parameter.data.copy_(values.data)
    assert torch.equal(compare.read(case, wrapped.base_model, inputs), expected)


def test_waiting_forwards_do_not_pile_up():
    """A tower whose adapter is switched off, or whose embedding alone is used, keeps nothing."""
    model: Any = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=96, dynamic_img_size=True, num_classes=0)
    wrapped: Any = get_peft_model(model.eval(), compare.strong_config())
    log = injected_layers(wrapped)[0][2].state.log
    with torch.no_grad():
        for height, width in ((64, 96), (96, 64)) * 10:
            model.patch_embed(torch.randn(1, 3, height, width))
        assert len(log._thread.waiting) <= 8
        model(torch.randn(1, 3, 64, 96))
        with wrapped.disable_adapter():
            for height, width in ((64, 96), (96, 64)) * 10:
                model.forward_features(torch.randn(1, 3, height, width))
        assert log._thread.waiting == []
        model.forward_features(torch.randn(1, 3, 64, 96))


# -- segmented towers --------------------------------------------------------------------------------------------------


def qwen() -> tuple[nn.Module, Any]:
    return compare.injected(next(case for case in CASES if case.backbone == "qwen2_5_vit"))


def test_a_segmented_layer_without_its_segments_is_an_error_that_names_them():
    tower, _ = qwen()
    name, attention, layer = injected_layers(tower)[1]
    text = (
        rf"{name} \(Qwen2_5_VLVisionAttention\) was called without 'cu_seqlens', .*backbone 'qwen2_5_vit'.*"
        r"segment_argument\); it got 1 positional arguments and \['position_embeddings'\]\. Call the tower itself"
    )
    with pytest.raises(LayoutError, match=text):
        attention(torch.randn(12, 32), position_embeddings=None)
    layer.set_adapter([])  # without an active adapter the module says itself what it lacks
    with pytest.raises(TypeError, match="cu_seqlens"):
        attention(torch.randn(12, 32), position_embeddings=None)


def test_segments_may_be_positional():
    tower, inputs = qwen()
    calls: list[tuple[Any, Any]] = []
    attention: Any = injected_layers(tower)[0][1]
    handle = attention.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        tower(**inputs)
        handle.remove()
        (args, kwargs), state = calls[0], injected_layers(tower)[0][2].state
        bounds = kwargs.pop("cu_seqlens")
        kwargs.pop("position_bias", None)
        for given, named in (((*args, bounds), {}), ((), {"hidden_states": args[0], "cu_seqlens": bounds})):
            state.log.enter(tower)
            state.record_input(TowerInput(attachment_of(tower, "sfa").place, tower, (), inputs))
            out = attention(*given, **named, **kwargs)
            state.log.leave()
            assert out.shape == args[0].shape
