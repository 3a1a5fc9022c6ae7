"""The tower of BLIP: one CLS token, fused `qkv`, and a softmax written by hand that takes no mask.

`MaskedBlipAttention` stands in for its attention modules, as in `internvit_remote`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.family import Member, attention_patterns, grid_behind_prefix, tower_patterns
from sfa_adapters.pixel_grids import pixel_layouts
from sfa_adapters.registry import Backbone, register_backbone
from sfa_adapters.stand_in import StandIn, unwrap, wrapping

__all__ = ["BLIP", "MaskedBlipAttention"]

MEMBERS = (Member("blip", "BlipVisionModel", "BlipAttention", 1),)


class MaskedBlipAttention(StandIn):
    """Stands in for a `BlipAttention`, with a mask argument; without a mask the original runs.

    Args:
        original: The attention module.
    """

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.qkv: Any
        self.projection: Any
        self.dropout: Any
        self.config = original.config
        self.num_heads, self.scale = int(original.num_heads), float(original.scale)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; `[batch, tokens, width]` to the same shape, and attention weights where there is no mask."""
        if attention_mask is None:
            return self.restore()(hidden_states, **kwargs)
        batch, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch, tokens, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout_p = self.dropout.p if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p, scale=self.scale)
        return self.projection(out.transpose(1, 2).reshape(hidden_states.shape)), None


BLIP = register_backbone(
    Backbone(
        name="blip",
        towers=tower_patterns(MEMBERS),
        attentions=(*attention_patterns(MEMBERS), "sfa_adapters.backbones.blip.MaskedBlipAttention"),
        geometry=grid_behind_prefix(MEMBERS),
        layouts=pixel_layouts,
        image_module="embeddings",
        wrap_attention=wrapping(MaskedBlipAttention, "BlipAttention"),
        unwrap_attention=unwrap,
        small_towers="sfa_adapters.testing.towers_clip_kin:BLIP",
    )
)
