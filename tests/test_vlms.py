"""SFA in whole vision-language models: the right tower, an untouched text model, gradients, and generation."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from sfa_adapters import describe, eject_sfa, inject_sfa
from sfa_adapters.errors import InjectionError
from tests.support import compare
from tests.support.hosts import HOSTS, TEXT, VISION, HostCase, every_host, lm_loss, logits_of
from tests.support.towers import lively


@every_host
def test_finds_the_tower_and_leaves_the_rest_alone(host: HostCase):
    model = host.build()
    before = {name: (id(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()}
    inject_sfa(model)
    info = describe(model)
    assert (info.backbone, info.num_layers, info.tower_layers) == (host.backbone, host.layers, 3)
    tower = model.get_submodule(info.tower)
    outside = {name for name in before if not name.startswith(info.tower)}
    assert any("language_model" in name or "text_model" in name for name in outside)
    for name, module in model.named_modules():
        if name in outside:
            assert before[name] == (id(module), len(module._forward_pre_hooks)), name
    assert set(compare.structural(model)) == {f"{info.tower}.{name}" for name in compare.structural(tower)}


@every_host
def test_the_image_reaches_the_logits_through_the_bias(host: HostCase):
    model = host.build()
    inputs = host.inputs()
    plain = logits_of(model, inputs)
    inject_sfa(model, compare.strong_config())
    biased = logits_of(model, inputs)
    after_image = slice(2 + host.image_tokens, None)
    for image in range(2):
        assert compare.difference(biased[image, after_image], plain[image, after_image]) > 1e-3
    eject_sfa(model)
    assert torch.equal(logits_of(model, inputs), plain)


@every_host
def test_language_loss_reaches_every_scalar(host: HostCase):
    """A parameter without a gradient would stop distributed data parallel."""
    model = inject_sfa(host.build(), compare.strong_config())
    compare.freeze_base(model.train())
    lm_loss(model, host.inputs()).backward()
    ours = compare.structural(model)
    assert len(ours) == 4 * host.layers
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every_host
def test_generation_with_a_cache_is_the_same_as_without(host: HostCase):
    model: Any = inject_sfa(host.build(), compare.strong_config())
    inputs = host.inputs()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(**inputs, **options, use_cache=True)
        slow = model.generate(**inputs, **options, use_cache=False)
    assert cached.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(cached, slow)


@every_host
def test_a_peft_model_of_a_host_trains_and_switches_off(host: HostCase):
    base = host.build()
    inputs = host.inputs()
    plain = logits_of(base, inputs)
    model: Any = get_peft_model(base, compare.strong_config())  # pyright: ignore[reportArgumentType]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(compare.structural(model))
    assert not torch.equal(logits_of(model, inputs), plain)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, inputs), plain)
    assert torch.equal(logits_of(eject_sfa(model), inputs), plain)


def test_modules_to_save_are_trained_and_saved_with_the_adapter(tmp_path):
    host = next(host for host in HOSTS if host.name == "internvl")
    config = compare.strong_config(modules_to_save=["multi_modal_projector"])
    model: Any = get_peft_model(host.build(), config)  # pyright: ignore[reportArgumentType]
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "multi_modal_projector" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.mul_(1.5)
    expected = logits_of(model, host.inputs())
    model.save_pretrained(str(tmp_path))
    loaded = type(model).from_pretrained(host.build(), str(tmp_path))
    assert torch.equal(logits_of(loaded, host.inputs()), expected)


@pytest.mark.parametrize("host", [host for host in HOSTS if host.layers == 2], ids=str)
@pytest.mark.parametrize("layers", [2, [0, 2], -1])
def test_a_layer_that_the_host_does_not_read_is_refused(host: HostCase, layers: Any):
    model = host.build()
    snapshot = compare.Snapshot(model)
    with pytest.raises(InjectionError, match=r"names layer 2, but the host reads only layers 0\.\.1"):
        inject_sfa(model, compare.strong_config(layers_to_transform=layers))
    snapshot.assert_unchanged(model)


def test_chosen_layers_only():
    host = HOSTS[0]
    model = inject_sfa(host.build(), compare.strong_config(layers_to_transform=[-1, 0]))
    assert describe(model).num_layers == 2
    assert {name.split(".layer.")[1][0] for name in compare.structural(model)} == {"0", "2"}


def test_several_feature_layers_are_all_read():
    llava = next(host for host in HOSTS if host.name == "llava")
    model: Any = llava.build()
    model.config.vision_feature_layer = [-3, -1]
    assert describe(model).num_layers == 3
    model.config.vision_feature_layer = [0, 1]
    assert describe(model).num_layers == 1


def test_dual_encoders_adapt_vision_only():
    text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    siglip = SiglipModel(SiglipConfig(vision_config=VISION, text_config=text))
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text))
    for model, backbone in ((lively(lambda: siglip)(), "siglip"), (lively(lambda: clip)(), "clip")):
        inputs: dict[str, Any] = {"input_ids": torch.tensor([[3, 4, 5, 2]]), "pixel_values": torch.randn(2, 3, 56, 56)}
        with torch.no_grad():
            before = model(**inputs)
            inject_sfa(model, compare.strong_config())
            after = model(**inputs)
        assert (describe(model).backbone, describe(model).num_layers) == (backbone, 3)
        assert all("vision_model" in name for name in compare.structural(model))
        assert torch.equal(before.text_embeds, after.text_embeds)
        assert not torch.equal(before.image_embeds, after.image_embeds)
