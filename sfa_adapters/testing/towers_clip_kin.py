"""Small towers of the kind of CLIP: those of transformers that were built after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sfa_adapters.testing.cases import Inputs, Place
from sfa_adapters.testing.members import Small, installed
from sfa_adapters.testing.reference import regular_places
from sfa_adapters.testing.towers_vit import COMMON, INTERPOLATED, OPTIONS, PATCH, RESIZED

__all__ = ["BLIP", "CLIP_KIN", "X_CLIP"]

# The fused attention adds a position_bias; the eager one of these towers does not know it.
FUSED_ONLY: dict[str, Any] = {"resized": INTERPOLATED, "encoder": "encoder", "eager_takes_bias": False}
# Of towers that are no `PreTrainedModel` themselves: their host chooses.
FUSED = {"attn_implementation": "sdpa"}
QIANFAN: dict[str, Any] = {
    "image_size": (56, 56),
    "patch_size": (14, 14),
    "layer_scale_init_value": 1.0,
    "drop_path_rate": 0.0,
}

CLIP_KIN = installed(
    "clip_kin", OPTIONS, COMMON,
    (
        Small("blip_2.modeling_blip_2", "Blip2VisionModel", "Blip2VisionConfig", **FUSED_ONLY),
        Small("kosmos2.modeling_kosmos2", "Kosmos2VisionTransformer", "Kosmos2VisionConfig", resized=INTERPOLATED,
              encoder="encoder"),
        Small("qianfan_ocr.modeling_qianfan_ocr", "QianfanOCRVisionModel", "QianfanOCRVisionConfig", QIANFAN,
              resized=RESIZED),
        Small("instructblip.modeling_instructblip", "InstructBlipVisionModel", "InstructBlipVisionConfig",
              **FUSED_ONLY),
        Small("instructblipvideo.modeling_instructblipvideo", "InstructBlipVideoVisionModel",
              "InstructBlipVideoVisionConfig", **FUSED_ONLY),
        Small("git.modeling_git", "GitVisionTransformer", "GitVisionConfig", FUSED, resized=INTERPOLATED,
              encoder="encoder", eager=None, checkpointing=None),
        Small("idefics.vision", "IdeficsVisionTransformer", "IdeficsVisionConfig", {"embed_dim": 32, **FUSED},
              resized=INTERPOLATED, encoder="encoder", eager=None, checkpointing=None),
        Small("altclip.modeling_altclip", "AltCLIPVisionModel", "AltCLIPVisionConfig", resized=INTERPOLATED,
              encoder="encoder"),
        Small("chinese_clip.modeling_chinese_clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig",
              resized=INTERPOLATED),
        Small("metaclip_2.modeling_metaclip_2", "MetaClip2VisionModel", "MetaClip2VisionConfig", resized=INTERPOLATED,
              encoder="encoder"),
        Small("clipseg.modeling_clipseg", "CLIPSegVisionModel", "CLIPSegVisionConfig", resized=INTERPOLATED,
              encoder="encoder"),
        Small("owlvit.modeling_owlvit", "OwlViTVisionTransformer", "OwlViTVisionConfig", resized=INTERPOLATED,
              encoder="encoder"),
        Small("owlv2.modeling_owlv2", "Owlv2VisionTransformer", "Owlv2VisionConfig", resized=INTERPOLATED,
              encoder="encoder"),
        Small("mlcd.modeling_mlcd", "MLCDVisionModel", "MLCDVisionConfig", reentrant=False),
    ),
)  # fmt: skip
BLIP = installed(
    "blip", OPTIONS, {**COMMON, "eager": None},
    (Small("blip.modeling_blip", "BlipVisionModel", "BlipVisionConfig", resized=INTERPOLATED, encoder="encoder"),),
)  # fmt: skip


# -- a video of two frames --


def frames_of_one_video(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The tokens of both frames, which see each other."""
    return [model(**inputs).last_hidden_state.flatten(0, 1)]


def message_last(inputs: Inputs, call: Mapping[str, Any]) -> list[Place]:
    """CLS, the patches, and the message of the other frame."""
    height, width = inputs["pixel_values"].shape[-2:]
    return [*regular_places((height // PATCH, width // PATCH), 1), None]


X_CLIP = installed(
    "x_clip", {**OPTIONS, "num_frames": 2}, COMMON,
    (
        Small("x_clip.modeling_x_clip", "XCLIPVisionModel", "XCLIPVisionConfig", resized=INTERPOLATED,
              places=message_last, hidden=frames_of_one_video, encoder="encoder"),
    ),
)  # fmt: skip
