"""The counts that were published for InternVL3.5-8B must come out exactly; the model is built without memory."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from sfa_adapters import SFAAttention, StructuralBias, describe, eject_sfa, inject_sfa
from sfa_adapters.choices import TERMS
from sfa_adapters.recipes.internvl3_5_8b import architecture
from tests.support.compare import structural


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def internvl_8b() -> nn.Module:
    with torch.device("meta"):
        return InternVLForConditionalGeneration(architecture())


def test_every_layer_of_the_tower_gets_32_scalars(internvl_8b: nn.Module):
    inject_sfa(internvl_8b)
    info = describe(internvl_8b)
    assert (info.backbone, info.num_layers, info.tower_layers, info.num_heads) == ("internvit", 24, 24, 16)
    assert (info.grid, info.prefix_tokens) == ((32, 32), 1)
    assert info.num_parameters == 768
    per_layer: dict[str, int] = {}
    for name, parameter in structural(internvl_8b).items():
        assert parameter.is_meta
        layer = name.partition(".sfa.")[0]
        per_layer[layer] = per_layer.get(layer, 0) + parameter.numel()
    assert list(per_layer.values()) == [32] * 24
    eject_sfa(internvl_8b)


def test_trainable_and_total_parameters(internvl_8b: nn.Module):
    inject_sfa(internvl_8b)
    model: Any = internvl_8b.model
    for parameter in internvl_8b.parameters():
        parameter.requires_grad_(False)
    for part in (model.vision_tower, model.multi_modal_projector):
        for parameter in part.parameters():
            parameter.requires_grad_(True)
    assert sum(p.numel() for p in internvl_8b.parameters() if p.requires_grad) == 337_583_872
    assert count(internvl_8b) == 8_528_319_232
    assert count(model.language_model) + count(internvl_8b.get_submodule("lm_head")) == 8_190_735_360
    eject_sfa(internvl_8b)


def test_one_layer_alone():
    assert count(StructuralBias(num_heads=16)) == 32
    assert count(StructuralBias(num_heads=16, terms=TERMS)) == 304  # as published
    attention = SFAAttention(1024, num_heads=16, grid=(28, 28))
    assert count(attention.structural_bias) == 32
    assert attention(torch.randn(2, 784, 1024)).shape == (2, 784, 1024)
