"""Towers and hosts that carry no bias are refused with a reason of their own: small real models, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from torch import nn
from transformers.initialization import meta_device_safe_creation_ops

from sfa_adapters import describe, inject_sfa
from sfa_adapters.errors import NoMatchingBackboneError
from sfa_adapters.refusals import REFUSALS, has_attention, refusal_of
from tests.support import compare

Build = Callable[[], nn.Module]
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SAM: dict[str, Any] = {**SMALL, "image_size": 64, "patch_size": 16, "output_channels": 16, "global_attn_indexes": [1]}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 4}


def of(model: Any, config: Any, **settings: Any) -> Build:
    """A model of transformers."""
    return lambda: model(config(**settings))


def auto(model_type: str, host: Any = tf.AutoModelForImageTextToText, **settings: Any) -> Build:
    """A host with a short language model, else at its default size, without memory."""

    def build() -> nn.Module:
        config: Any = tf.AutoConfig.for_model(model_type, **settings)
        parts: list[Any] = [config, getattr(config, "text_config", None)]
        for part in parts:
            if hasattr(part, "num_hidden_layers"):
                part.num_hidden_layers = 1
            if getattr(part, "layer_types", None):
                part.layer_types = part.layer_types[:1]
            if hasattr(part, "num_kv_shared_layers"):
                part.num_kv_shared_layers = 0
        with torch.device("meta"), meta_device_safe_creation_ops():
            make = getattr(host, "from_config", None) or host._from_config
            return make(config)

    return build


def from_timm(name: str, **settings: Any) -> Build:
    """A model of timm, without memory."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, **settings)

    return build


# (name, model, the class that is blamed, a part of the reason); those with a True are built in each run.
CASES: list[tuple[str, Build, str, str, bool]] = [
    ("swin", of(tf.SwinModel, tf.SwinConfig, **SWIN), "SwinModel", "relative positions of its own", True),
    ("resnet", of(tf.ResNetModel, tf.ResNetConfig, hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8),
     "ResNetModel", "has no attention", True),
    ("sam", of(tf.SamVisionModel, tf.SamVisionConfig, **SAM), "SamVisionEncoder", "relative rows and columns", True),
    ("swinv2", of(tf.Swinv2Model, tf.Swinv2Config, **SWIN), "Swinv2Model", "relative positions of its own", False),
    ("hiera", of(tf.HieraModel, tf.HieraConfig, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
     "HieraModel", "lie on different grids", False),
    ("vjepa2", of(tf.VJEPA2Model, tf.VJEPA2Config, **SMALL, crop_size=32, frames_per_clip=4, pred_hidden_size=32,
                  pred_num_attention_heads=4, pred_num_hidden_layers=1),
     "VJEPA2Model", "through several frames", False),
    ("videoprism", of(tf.VideoPrismVisionModel, tf.VideoPrismVisionConfig), "VideoPrismVisionModel",
     "through several frames", False),
    ("sam3", of(tf.Sam3VisionModel, tf.Sam3VisionConfig), "Sam3ViTModel", "windows that it cuts out", False),
    ("imagegpt", of(tf.ImageGPTModel, tf.ImageGPTConfig, n_layer=1, n_embd=32, n_head=2), "ImageGPTModel",
     "without a place", False),
    ("perceiver", of(tf.PerceiverModel, tf.PerceiverConfig), "PerceiverModel", "without a place", False),
    ("segformer", of(tf.SegformerModel, tf.SegformerConfig), "SegformerModel", "lie on different grids", False),
    ("mobilevit", of(tf.MobileViTModel, tf.MobileViTConfig), "MobileViTModel", "coarse feature maps", False),
    ("convnext", of(tf.ConvNextModel, tf.ConvNextConfig, hidden_sizes=[8] * 4, depths=[1] * 4),
     "ConvNextModel", "has no attention", False),
    ("timm wrapper", lambda: tf.TimmWrapperModel(tf.TimmWrapperConfig(architecture="resnet18")),
     "TimmWrapperModel", "has no attention", False),
    ("timm resnet", from_timm("resnet18"), "ResNet", "has no attention", False),
    ("timm cait", from_timm("cait_xxs24_224"), "Cait", "mixes the logits of all heads", False),
    ("timm convit", from_timm("convit_tiny"), "ConVit", "mixes the logits of all heads", False),
    ("timm xcit", from_timm("xcit_nano_12_p16_224"), "Xcit", "runs over channels", False),
    ("timm swin", from_timm("swin_tiny_patch4_window7_224"), "SwinTransformer", "relative positions", False),
    ("timm relpos", from_timm("vit_relpos_small_patch16_224"), "VisionTransformerRelPos", "relative rows", False),
    ("timm samvit", from_timm("samvit_base_patch16_224"), "VisionTransformerSAM", "relative rows and columns", False),
    ("timm levit", from_timm("levit_128s"), "LevitDistilled", "relative positions of its own", False),
    ("timm maxvit", from_timm("maxvit_tiny_rw_224"), "MaxxVit", "relative positions of its own", False),
    ("timm hiera", from_timm("hiera_tiny_224"), "Hiera", "lie on different grids", False),
    ("timm fastvit", from_timm("fastvit_t8"), "FastVit", "coarse feature maps", False),
    ("got_ocr2", auto("got_ocr2"), "GotOcr2VisionEncoder", "relative rows and columns", False),
    ("pp_chart2table", auto("pp_chart2table"), "GotOcr2VisionEncoder", "relative rows and columns", False),
    ("pp_formulanet", auto("pp_formulanet"), "PPFormulaNetVisionModel", "relative rows and columns", False),
    ("florence2", auto("florence2"), "Florence2VisionBackbone", "runs over channels", False),
    ("fast_vlm", auto("fast_vlm"), "FastVit", "coarse feature maps", False),
    ("gemma3n", auto("gemma3n"), "MobileNetV5Encoder", "coarse feature maps", False),
    ("chameleon", auto("chameleon", vocabulary_map={"<image>": 1}), "ChameleonVQVAE", "discrete tokens", False),
    ("emu3", auto("emu3", vocabulary_map={"<image>": 1}), "Emu3VQVAE", "discrete tokens", False),
    ("apertus1p5", auto("apertus1p5"), "Apertus1p5VisionTokenizerModel", "discrete tokens", False),
    ("fuyu", auto("fuyu"), "FuyuForCausalLM", "no vision attention", False),
    ("gemma4_unified", auto("gemma4_unified"), "Gemma4UnifiedForConditionalGeneration", "no vision attention", False),
    ("inkling_mm_model", auto("inkling_mm_model"), "InklingForConditionalGeneration", "no vision attention", False),
    ("mistral4", auto("mistral4"), "Mistral4ForCausalLM", "reads no images", False),
    ("evolla", auto("evolla", tf.EvollaForProteinText2Text), "EvollaForProteinText2Text", "reads no images", False),
    ("udop", auto("udop"), "UdopForConditionalGeneration", "words and patches share one encoder", False),
]  # fmt: skip
PARAMETERS = [pytest.param(*case[1:4], id=case[0], marks=() if case[4] else pytest.mark.nightly) for case in CASES]


@pytest.mark.parametrize(("build", "kind", "reason"), PARAMETERS)
def test_the_reason_is_the_error_and_the_model_stays_as_it_was(build: Build, kind: str, reason: str) -> None:
    model = build()
    snapshot = None if next(model.parameters()).is_meta else compare.Snapshot(model)
    for act in (inject_sfa, describe):
        with pytest.raises(NoMatchingBackboneError) as error:
            act(model)
        text = str(error.value)
        assert f" is a {kind}: " in text
        assert reason in text
        assert "register_backbone" not in text, "a record would not help"
    if snapshot is not None:
        snapshot.assert_unchanged(model)
    known = refusal_of(model)
    assert known is not None
    assert type(model.get_submodule(known.path)).__name__ == known.kind == kind


def test_each_refusal_is_reached_by_a_model_says_why_and_what_to_do() -> None:
    assert len({refusal.name for refusal in REFUSALS}) == len(REFUSALS)
    for refusal in REFUSALS:
        assert any(part in refusal.reason for _, _, _, part, _ in CASES), f"no model above has: {refusal.reason}"
        assert refusal.reason[0].islower()
        assert refusal.reason.endswith(".")
        assert refusal.advice.endswith(".")


def test_an_unknown_tower_is_no_refusal_even_with_convolutions_in_front() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.attn = nn.MultiheadAttention(8, 2)

    tower = Tower()
    assert has_attention(tower)
    assert not has_attention(tower.patches)
    assert refusal_of(tower) is None
    with pytest.raises(NoMatchingBackboneError, match=r"(?s)Attention modules.*MultiheadAttention.*register_backbone"):
        inject_sfa(tower)
    with pytest.raises(NoMatchingBackboneError, match="register_backbone"):  # no library's, so somebody may know better
        inject_sfa(nn.Sequential(nn.Conv2d(3, 8, 4)))
