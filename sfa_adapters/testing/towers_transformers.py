"""Small towers of transformers with a grid of patches, each kind under the name that its record gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from sfa_adapters.testing.cases import Grid, Inputs, TowerCase, images, lively, split_batch

__all__ = ["CLIP", "IDEFICS", "INTERNVIT", "SIGLIP", "SMALL", "set_checkpointing", "set_eager"]

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
PATCH = 14
SIZE: dict[str, Any] = {**SMALL, "image_size": 56, "patch_size": PATCH}


def set_eager(tower: nn.Module) -> None:
    """Moves a tower of transformers to its eager attention."""
    tower.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]


def set_checkpointing(tower: nn.Module, reentrant: bool | None) -> None:
    """Switches gradient checkpointing on, or off for None; transformers renamed the methods between versions."""
    verb = "disable" if reentrant is None else "enable"
    switch: Any = getattr(tower, f"activation_checkpointing_{verb}", None)
    switch = switch or getattr(tower, f"gradient_checkpointing_{verb}")
    switch(*([] if reentrant is None else [{"use_reentrant": reentrant}]))


def grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of the patches of all images, which have one size."""
    height, width = inputs["pixel_values"].shape[-2:]
    return [(height // PATCH, width // PATCH)]


COMMON: dict[str, Any] = {
    "layers": 3, "heads": 4, "grid": (4, 4), "inputs": images(56, 56), "grids": grids, "library": "transformers",
    "eager": set_eager, "checkpointing": set_checkpointing, "lora_targets": ("q_proj",),
}  # fmt: skip
RESIZED = images(42, 70, interpolate_pos_encoding=True)

CLIP = (
    TowerCase(
        **COMMON, name="clip", backbone="clip", prefix=1, resized=RESIZED, encoder="encoder", compiles="every layer",
        build=lively(lambda: CLIPVisionModel(CLIPVisionConfig(**SIZE))),
    ),
)  # fmt: skip
SIGLIP = (
    TowerCase(
        **COMMON, name="siglip", backbone="siglip", resized=RESIZED, encoder="encoder",
        build=lively(lambda: SiglipVisionModel(SiglipVisionConfig(**SIZE))),
    ),
)  # fmt: skip
INTERNVIT = (
    TowerCase(
        **COMMON, name="internvit", backbone="internvit", prefix=1, resized=images(70, 42), encoder="encoder",
        build=lively(lambda: InternVLVisionModel(InternVLVisionConfig(**SMALL, image_size=56, attention_bias=True))),
    ),
    TowerCase(
        **COMMON, name="internvit_qknorm", backbone="internvit", prefix=1, compiles="no",
        build=lively(lambda: InternVLVisionModel(InternVLVisionConfig(**SMALL, image_size=56, use_qk_norm=True))),
    ),
)  # fmt: skip


# -- towers that pass a real mask --


def padded_images(seed: int) -> Inputs:
    """Two 5x4 canvases; the second image fills 3x3 patches of its canvas."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 5, 4, dtype=torch.bool)
    mask[1, 3:], mask[1, :, 3:] = False, False
    return {"pixel_values": torch.randn(2, 3, 70, 56, generator=generator), "patch_attention_mask": mask}


def turn_padded(inputs: Inputs) -> Inputs:
    """Exchanges rows and columns of canvases and masks."""
    return {name: value.transpose(-1, -2).contiguous() for name, value in inputs.items()}


def real_patches(inputs: Inputs) -> Tensor:
    """Which patches are not padding, `[batch, patches]`."""
    return inputs["patch_attention_mask"].flatten(1)


def read_unpadded(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Features of the real patches of each image."""
    hidden = model(**inputs).last_hidden_state
    return [states[real] for states, real in zip(hidden, real_patches(inputs), strict=True)]


def _idefics(name: str, tower: Any, config: Any, **options: Any) -> TowerCase:
    return TowerCase(
        **{
            **COMMON,
            "name": name,
            "backbone": "idefics",
            "build": lively(lambda: tower(config(**{**SIZE, "image_size": 70}))),
            "inputs": padded_images,
            "split": split_batch,
            "hidden": read_unpadded,
            "grid": (5, 5),
            "turn": turn_padded,
            "real_tokens": real_patches,
            **options,
        }
    )


IDEFICS = (
    _idefics("idefics2", Idefics2VisionTransformer, Idefics2VisionConfig, compiles="no"),
    _idefics("idefics3", Idefics3VisionTransformer, Idefics3VisionConfig, compiles="no"),
    _idefics("smolvlm", SmolVLMVisionTransformer, SmolVLMVisionConfig),
)
