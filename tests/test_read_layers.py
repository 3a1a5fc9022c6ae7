"""Which layers of its tower a host reads, and hosts with two towers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sfa_adapters import describe, eject_sfa, inject_sfa, load_sfa, save_sfa
from sfa_adapters.errors import InjectionError, WeightsError
from sfa_adapters.testing.modeling_intern_vit import InternVisionConfig
from sfa_adapters.tower_search import find_tower
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.hosts import IMAGE, TEXT, VISION
from tests.support.remote.modeling_internvl_chat import InternVLChatModel
from tests.support.towers import images, lively

LAYERS = 5
PIXELS = images(56, 56)(0)["pixel_values"]


def without_gradient(model: nn.Module) -> list[str]:
    """Structural scalars that no gradient reached: they would stop distributed data parallel."""
    return [name for name, p in compare.structural(model).items() if p.grad is None or not p.grad.abs().max() > 0]


# -- remote-code InternVL: `select_layer` ------------------------------------------------------------------------------


@pytest.mark.parametrize(("select_layer", "used"), [(-1, 5), (-2, 4), (-4, 2), (5, 5), (3, 3)])
def test_select_layer_of_remote_code(select_layer: int, used: int):
    config = InternVisionConfig(num_hidden_layers=LAYERS)
    model: Any = lively(lambda: InternVLChatModel(config, select_layer))()
    inject_sfa(model, compare.strong_config())
    assert (describe(model).num_layers, describe(model).tower_layers) == (used, LAYERS)
    compare.freeze_base(model.train())
    model.extract_feature(PIXELS).square().sum().backward()
    assert without_gradient(model) == []


def test_select_layer_is_read_where_the_host_reads_it():
    """The attribute counts, not the configuration, which may say something else after somebody changed one of them."""
    config: Any = InternVisionConfig(num_hidden_layers=LAYERS)
    config.select_layer = -3
    model: Any = InternVLChatModel(config, select_layer=-2)
    assert describe(model).num_layers == 4
    del model.select_layer
    assert describe(model).num_layers == 3


# -- hosts and backbones that name layers in another way ---------------------------------------------------------------


@pytest.mark.parametrize(("layers", "used"), [([3, 1], 4), ([-2, 0], 4), ([-1], 5), ([0], 1)])
def test_molmo2_counts_layers_from_the_first(layers: list[int], used: int):
    pytest.importorskip("transformers.models.molmo2")
    from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig, Molmo2VisionConfig
    from transformers.models.molmo2.modeling_molmo2 import Molmo2VisionModel

    host: Any = nn.Module()
    host.config = transformers.PretrainedConfig()
    host.config.adapter_config = Molmo2AdapterConfig(vision_feature_layer=layers)
    options = {"image_size": [56, 56], "num_position_embeddings": 16, "num_key_value_heads": 4, "head_dim": 8}
    host.vision_tower = Molmo2VisionModel(Molmo2VisionConfig(**{**VISION, **options, "num_hidden_layers": LAYERS}))
    assert describe(host).num_layers == used


def test_the_decoder_of_clipseg_reads_outputs_of_layers():
    vision = {**VISION, "num_hidden_layers": LAYERS}
    config = transformers.CLIPSegConfig(vision_config=vision, extract_layers=[0, 2], reduce_dim=8)
    model: Any = transformers.CLIPSegForImageSegmentation(config)
    assert describe(model).num_layers == 3
    assert describe(model.clip).num_layers == LAYERS


@pytest.mark.parametrize(("stages", "used"), [(["stage2", "stage4"], 4), (["stem", "stage1"], 1), (None, 5)])
def test_a_backbone_is_read_at_its_stages(stages: list[str] | None, used: int):
    options: dict[str, Any] = {**VISION, "num_hidden_layers": LAYERS, "out_features": stages}
    config = transformers.Dinov2Config(**options)
    model: Any = lively(lambda: transformers.Dinov2Backbone(config))()
    inject_sfa(model, compare.strong_config())
    assert (describe(model).num_layers, describe(model).tower_layers) == (used, LAYERS)
    compare.freeze_base(model)
    torch.cat(model(PIXELS).feature_maps).square().sum().backward()
    assert without_gradient(model) == []
    host: Any = nn.Module()
    host.backbone = lively(lambda: transformers.Dinov2Backbone(config))()
    assert describe(host).num_layers == used
    assert describe(lively(lambda: transformers.Dinov2Model(config))()).num_layers == LAYERS


# -- Granite 4 Vision: several layers, under names of its own ----------------------------------------------------------


def granite(deepstack: list[tuple[int, int]], spatial: int) -> nn.Module:
    vision = transformers.CLIPVisionConfig(**{**VISION, "hidden_size": 64, "num_hidden_layers": LAYERS})
    config = transformers.Granite4VisionConfig(
        vision_config=vision,
        text_config={**TEXT, "num_hidden_layers": 6},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 56]],
        downsample_rate="1/2",
        deepstack_layer_map=deepstack,
        spatial_vision_layer=spatial,
        spatial_target_layers=[0, 1, 2, 3],
        projector_dropout=0.0,
    )
    return transformers.Granite4VisionForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("deepstack", "spatial", "used"),
    [([(-2, 4), (1, 5)], -1, 5), ([(-2, 4), (-4, 5)], -3, 4), ([(1, 4), (-4, 5)], -3, 3), ([(1, 4)], 2, 2)],
)
def test_granite_reads_several_layers(deepstack: list[tuple[int, int]], spatial: int, used: int):
    model: Any = lively(lambda: granite(deepstack, spatial))()
    assert model.config.vision_feature_layer == -2, "the default, which this host never reads"
    inject_sfa(model, compare.strong_config())
    assert (describe(model).num_layers, describe(model).tower_layers) == (used, LAYERS)
    compare.freeze_base(model)
    sizes = torch.tensor([[56, 56], [56, 56]])
    pixels = PIXELS[:, None].expand(-1, 2, -1, -1, -1)
    out = model.model.get_image_features(pixels, sizes, vision_feature_select_strategy="default")
    torch.cat([features for _, part in out.deepstack_features for features in part]).square().sum().backward()
    assert without_gradient(model) == []


# -- Video-LLaVA: one tower for images, one for videos -----------------------------------------------------------------

IMAGES, VIDEOS = "model.image_tower", "model.video_tower"


def video_llava() -> Any:
    config = transformers.VideoLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=IMAGE + 1,
        vision_feature_layer=-2,
    )
    return lively(lambda: transformers.VideoLlavaForConditionalGeneration(config))()


def ask(seed: int = 0) -> dict[str, Any]:
    """Two prompts, each about an image (16 tokens) and a video of two frames (17 tokens each)."""
    generator = torch.Generator().manual_seed(seed)
    media = torch.tensor([IMAGE] * 16 + [IMAGE + 1] * 34)
    ids = torch.cat((torch.randint(3, 50, (2, 4), generator=generator), media.expand(2, -1)), dim=1)
    forward = transformers.VideoLlavaForConditionalGeneration.forward
    # Until transformers 5.23 the images had another name.
    images_name = "pixel_values" if "pixel_values" in inspect.signature(forward).parameters else "pixel_values_images"
    return {
        "input_ids": torch.cat((ids, torch.randint(3, 50, (2, 4), generator=generator)), dim=1),
        images_name: torch.randn(2, 3, 56, 56, generator=generator),
        "pixel_values_videos": torch.randn(2, 2, 3, 56, 56, generator=generator),
    }


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**ask()).logits


both_towers = pytest.mark.parametrize("path", [IMAGES, VIDEOS])


def test_two_towers_without_a_choice_are_refused_and_named():
    model = video_llava()
    snapshot = compare.Snapshot(model)
    for act in (inject_sfa, describe, lambda host: get_peft_model(host, compare.strong_config())):
        with pytest.raises(InjectionError, match=rf"several vision towers: {VIDEOS}.*{IMAGES}.*tower='{VIDEOS}'"):
            act(model)
    snapshot.assert_unchanged(model)


@pytest.mark.parametrize("path", ["model.language_model", "model", "", "image_towers", "nowhere"])
def test_a_path_without_a_tower_is_refused(path: str):
    model = video_llava()
    snapshot = compare.Snapshot(model)
    with pytest.raises(InjectionError, match=rf"tower='{path}' is not the path of a vision tower.*{IMAGES}"):
        inject_sfa(model, tower=path)
    with pytest.raises(InjectionError, match=r"config has tower_path='model\.video_tower'; give one"):
        inject_sfa(model, compare.strong_config(tower_path=VIDEOS), tower=IMAGES)
    snapshot.assert_unchanged(model)


@both_towers
def test_the_chosen_tower_is_adapted_described_and_ejected(path: str):
    model = video_llava()
    plain, snapshot = answer(model), compare.Snapshot(model)
    before = describe(model, tower=path)
    assert (before.tower, before.num_layers, before.adapters) == (path, 2, ())
    assert inject_sfa(model, compare.strong_config(), tower=path) is model
    info = describe(model)
    assert (info.tower, info.num_layers, info.tower_layers, info.adapters) == (path, 2, 3, ("default",))
    assert path in str(info)
    other = describe(model, tower=IMAGES if path == VIDEOS else VIDEOS)
    assert (other.tower, other.adapters) == (IMAGES if path == VIDEOS else VIDEOS, ())
    assert {name.startswith(path) for name in compare.structural(model)} == {True}
    assert find_tower(model).name == path, "whoever looks for the tower takes the one that carries SFA"
    assert compare.difference(answer(model), plain) > 1e-3
    eject_sfa(model)
    assert torch.equal(answer(model), plain)
    snapshot.assert_unchanged(model)


@both_towers
def test_no_parameter_of_the_chosen_tower_is_dead(path: str):
    """The host reads layer -2, which the tower alone does not know."""
    model = inject_sfa(video_llava(), compare.strong_config(), tower=path)
    compare.freeze_base(model.train())
    inputs = ask()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert without_gradient(model) == []
    with pytest.raises(InjectionError, match=r"names layer 2, but the host reads only layers 0\.\.1"):
        inject_sfa(video_llava(), compare.strong_config(layers_to_transform=[-1]), tower=path)


@both_towers
def test_saved_and_loaded_into_a_fresh_host(path: str, tmp_path: Path):
    model = inject_sfa(video_llava(), compare.strong_config(), tower=path)
    expected = answer(model)
    save_sfa(model, tmp_path)
    assert torch.equal(answer(load_sfa(video_llava(), tmp_path)), expected)
    loaded = PeftModel.from_pretrained(video_llava(), str(tmp_path))
    assert torch.equal(answer(loaded), expected)
    assert describe(loaded).tower.endswith(path)


@both_towers
def test_as_a_peft_model(path: str, tmp_path: Path):
    model: Any = get_peft_model(video_llava(), compare.strong_config(tower_path=path))  # pyright: ignore[reportArgumentType]
    assert describe(model).tower.endswith(path)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(compare.structural(model))
    expected = answer(model)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(answer(PeftModel.from_pretrained(video_llava(), str(tmp_path))), expected)
    assert torch.equal(answer(load_sfa(video_llava(), tmp_path)), expected)
    assert torch.equal(answer(eject_sfa(model)), answer(video_llava()))


def test_all_towers_at_once(tmp_path: Path):
    model = video_llava()
    plain, snapshot = answer(model), compare.Snapshot(model)
    assert inject_sfa(model, compare.strong_config(), tower="all") is model
    for short in ("image_tower", "video_tower"):
        info = describe(model, tower=f"model.{short}")
        assert (info.adapters, info.num_layers) == ((f"default_{short}",), 2)
    expected = answer(model)
    assert compare.difference(expected, plain) > 1e-3
    assert save_sfa(model, tmp_path) == tmp_path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image_tower", "video_tower"]
    assert torch.equal(answer(load_sfa(video_llava(), tmp_path)), expected)
    named = load_sfa(video_llava(), tmp_path, "mine")
    assert describe(named, tower=IMAGES).adapters == ("mine_image_tower",)
    eject_sfa(model)
    assert torch.equal(answer(model), plain)
    snapshot.assert_unchanged(model)
    compare.freeze_base(named.train())
    named(**ask()).logits.square().mean().backward()
    assert without_gradient(named) == []


def test_all_towers_or_none_get_an_adapter(tmp_path: Path):
    model = video_llava()
    inject_sfa(model, compare.strong_config(), "default_image_tower", tower=IMAGES)
    before = answer(model)
    with pytest.raises(InjectionError, match="already has an SFA adapter named 'default_image_tower'"):
        inject_sfa(model, compare.strong_config(), tower="all")
    assert torch.equal(answer(model), before)
    with pytest.raises(InjectionError, match=r"tower='all', but the config has tower_path='model\.video_tower'"):
        inject_sfa(video_llava(), compare.strong_config(tower_path=VIDEOS), tower="all")
    save_sfa(inject_sfa(video_llava(), compare.strong_config(), tower="all"), tmp_path)
    (tmp_path / "video_tower" / "adapter_model.safetensors").unlink()
    fresh = video_llava()
    snapshot = compare.Snapshot(fresh)
    with pytest.raises(WeightsError, match=r"video_tower has no adapter_model"):
        load_sfa(fresh, tmp_path)
    snapshot.assert_unchanged(fresh)


def test_all_towers_of_a_host_with_one_are_that_one(tmp_path: Path):
    model: Any = lively(lambda: granite([(1, 4)], 2))()
    inject_sfa(model, tower="all")
    assert describe(model).adapters == ("default",)
    save_sfa(model, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


def test_beside_lora_the_path_is_that_of_the_host():
    model: Any = get_peft_model(video_llava(), LoraConfig(target_modules=["q_proj"]))
    inject_sfa(model, compare.strong_config(), tower=IMAGES)
    assert describe(model).tower == f"base_model.model.{IMAGES}"
    assert describe(model, tower=IMAGES).num_layers == 2


def test_both_towers_one_after_the_other(tmp_path: Path):
    model = video_llava()
    plain, snapshot = answer(model), compare.Snapshot(model)
    inject_sfa(model, compare.strong_config(), "pictures", tower=IMAGES)
    one = answer(model)
    with pytest.raises(InjectionError, match=r"choose another adapter_name for model\.video_tower"):
        inject_sfa(model, compare.strong_config(), "pictures", tower=VIDEOS)
    inject_sfa(model, compare.strong_config(), "films", tower=VIDEOS)
    assert compare.difference(answer(model), one) > 1e-3
    with pytest.raises(InjectionError, match="several vision towers, all with SFA"):
        describe(model)
    for name, path in (("pictures", IMAGES), ("films", VIDEOS)):
        assert (describe(model, tower=path).adapters, describe(model, tower=path).tower) == ((name,), path)
        save_sfa(model, tmp_path / name, name)
    fresh = video_llava()
    for name in ("pictures", "films"):
        load_sfa(fresh, tmp_path / name, name)
    assert torch.equal(answer(fresh), answer(model))
    eject_sfa(model, "films")
    assert torch.equal(answer(model), one)
    assert {layer.state.tower_name for _, _, layer in injected_layers(model)} == {IMAGES}
    eject_sfa(model)
    assert torch.equal(answer(model), plain)
    snapshot.assert_unchanged(model)
