"""Whole vision-language models from small configurations, with a prompt and two different images each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.support.towers import SMALL, lively

IMAGE, VOCABULARY = 60, 64
VIDEO_ID: dict[str, Any] = {"video_token_id": IMAGE + 1}
IMAGE_ID: dict[str, Any] = {"image_token_id": IMAGE}  # configurations take it, but do not all declare it
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {**SMALL, "image_size": 56, "patch_size": 14}


@dataclass(frozen=True)
class HostCase:
    """One host under test.

    Attributes:
        name: Its name in test ids.
        backbone: The registered backbone of its tower.
        build: Makes the model, in eval mode, the same every time.
        image_tokens: Image tokens of one prompt.
        vision_inputs: Makes what the model takes beside `input_ids`, for two images, from a seed.
        layers: Layers that get a bias, of the 3 that the tower has.
    """

    name: str
    backbone: str
    build: Callable[[], nn.Module]
    image_tokens: int
    vision_inputs: Callable[[int], dict[str, Any]]
    layers: int = 3

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Two prompts of the same text about two different images."""
        text = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))
        ids = torch.cat((text[:, :2], torch.full((2, self.image_tokens), IMAGE), text[:, 2:]), dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.vision_inputs(seed)}
        if self.name in ("paligemma", "gemma3"):
            inputs["token_type_ids"] = (ids == IMAGE).long()
        return inputs

    def __str__(self) -> str:
        return self.name


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def lm_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, labels=inputs["input_ids"]).loss


def pixels(*shape: int) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"pixel_values": torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}


def tiles(seed: int) -> dict[str, Any]:
    """A base tile and one more for each image."""
    return {**pixels(2, 2, 3, 56, 56)(seed), "image_sizes": torch.tensor([[56, 56], [56, 56]])}


def padded_tiles(seed: int) -> dict[str, Any]:
    """Padded images: the second one fills 42x28 pixels of its canvas."""
    mask = torch.ones(2, 1, 56, 56, dtype=torch.bool)
    mask[1, :, 42:], mask[1, :, :, 28:] = False, False
    return {**pixels(2, 1, 3, 56, 56)(seed), "pixel_attention_mask": mask}


def qwen_pixels(seed: int) -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 8], [1, 8, 4]])
    return {**pixels(64, 3 * 2 * 14 * 14)(seed), "image_grid_thw": grid}


def internvl() -> nn.Module:
    vision = transformers.InternVLVisionConfig(**VISION)
    text = transformers.Qwen2Config(**TEXT)
    config = transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return transformers.InternVLForConditionalGeneration(config)


def llava_onevision() -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Qwen2Config(**TEXT),
        **IMAGE_ID,
        **VIDEO_ID,
        image_grid_pinpoints=[[56, 56]],
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        **IMAGE_ID,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
        **IMAGE_ID,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[56, 56]],
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        text_config={**TEXT, "rope_parameters": rope},
        image_token_id=IMAGE, video_token_id=IMAGE + 1, vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
        **IMAGE_ID,
        projection_dim=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8),
        **IMAGE_ID,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def idefics3() -> nn.Module:
    config = transformers.Idefics3Config(
        vision_config={**VISION}, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def smolvlm() -> nn.Module:
    config = transformers.SmolVLMConfig(
        vision_config={**VISION}, text_config=transformers.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2
    )
    return transformers.SmolVLMForConditionalGeneration(config)


one_image = pixels(2, 3, 56, 56)
HOSTS: tuple[HostCase, ...] = (
    HostCase("internvl", "internvit", lively(internvl), 4, one_image),
    HostCase("llava_onevision", "siglip", lively(llava_onevision), 36, tiles),
    HostCase("llava", "clip", lively(llava), 16, one_image, layers=2),
    HostCase("llava_next", "clip", lively(llava_next), 36, tiles, layers=2),
    HostCase("qwen2_5_vl", "qwen2_5_vit", lively(qwen2_5_vl), 8, qwen_pixels),
    HostCase("paligemma", "siglip", lively(paligemma), 16, one_image),
    HostCase("gemma3", "siglip", lively(gemma3), 4, one_image),
    HostCase("idefics3", "idefics", lively(idefics3), 4, padded_tiles),
    HostCase("smolvlm", "idefics", lively(smolvlm), 4, padded_tiles),
)
every_host = pytest.mark.parametrize("host", HOSTS, ids=str)
