"""Small towers of the kind of SigLIP: those of transformers without prefix tokens that were built after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.testing.cases import Inputs
from sfa_adapters.testing.members import Small, installed
from sfa_adapters.testing.towers_vit import COMMON, INTERPOLATED, OPTIONS, PATCH, RESIZED

__all__ = ["MOLMO2", "SIGLIP_KIN"]

PLAIN = {**COMMON, "prefix": 0}
# Of towers that are no `PreTrainedModel` themselves: their host chooses.
FUSED = {"attn_implementation": "sdpa"}


def patches(seed: int) -> Inputs:
    """Two crops of 4x4 patches, cut into patches."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(2, 16, 3 * PATCH**2, generator=generator)}


def before_the_downsampler(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the last layer gives; behind it two convolutions of a stride of 2 leave one token of sixteen."""
    seen: list[Tensor] = []  # `output_hidden_states` would leave hooks of transformers on the model
    tower: Any = next(module for module in model.modules() if hasattr(module, "downsampler1"))
    handle = tower.downsampler1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        model(**inputs)
    finally:
        handle.remove()
    return list(seen[0].flatten(2).transpose(1, 2))


SIGLIP_KIN = installed(
    "siglip_kin", OPTIONS, PLAIN,
    (
        Small("granite_docling.modeling_granite_docling", "GraniteDoclingVisionModel", "GraniteDoclingVisionConfig",
              {"out_hidden_size": 32, "deepstack_visual_indexes": [0]}),
        Small("ovis2.modeling_ovis2", "Ovis2VisionTransformer", "Ovis2VisionConfig", FUSED, encoder="encoder",
              eager=None, checkpointing=None),
        Small("janus.modeling_janus", "JanusVisionModel", "JanusVisionConfig", resized=INTERPOLATED,
              encoder="encoder"),
        Small("step3p7.modeling_step3p7", "Step3p7VisionModel", "Step3p7VisionConfig", {"layer_scale_init_value": 1.0},
              resized=RESIZED, hidden=before_the_downsampler),
        Small("aimv2.modeling_aimv2", "Aimv2VisionModel", "Aimv2VisionConfig", {"is_native": True}, resized=RESIZED,
              encoder="encoder"),
    ),
)  # fmt: skip
MOLMO2 = installed(
    "molmo2", OPTIONS, PLAIN,
    (
        Small("molmo2.modeling_molmo2", "Molmo2VisionModel", "Molmo2VisionConfig",
              {"image_size": [56, 56], "num_position_embeddings": 16, "num_key_value_heads": 4, "head_dim": 8},
              inputs=patches, grids=None),
    ),
)  # fmt: skip
