"""InternViT as it comes with its checkpoints (`InternVisionModel`, remote code): fused `qkv`, and no mask argument.

Its attention takes no bias through an argument: `MaskedInternAttention` stands in for each attention module.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.errors import UnsupportedAttentionError
from sfa_adapters.pixel_grids import config_grid, pixel_layouts
from sfa_adapters.registry import Backbone, Geometry, register_backbone
from sfa_adapters.stand_in import StandIn, unwrap, wrapping

__all__ = ["INTERNVIT_REMOTE", "MaskedInternAttention"]


class MaskedInternAttention(StandIn):
    """Stands in for a remote-code `InternAttention`, sharing its modules, with a mask argument.

    Without a mask it computes what the original's eager path does, operation by operation, so it is bit-exact with it.

    Args:
        original: The attention module.
    """

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.qkv: Any
        self.proj: Any
        self.q_norm: Any
        self.k_norm: Any
        self.attn_drop: Any
        self.proj_drop: Any
        self.config = original.config
        self.num_heads, self.scale = int(original.num_heads), float(original.scale)
        self.qk_normalization = bool(getattr(original, "qk_normalization", False))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Self-attention.

        Args:
            hidden_states: `[batch, tokens, width]`.
            attention_mask: Added to the logits, broadcast to `[batch, heads, tokens, tokens]`.

        Returns:
            `[batch, tokens, width]`.
        """
        batch, tokens, width = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.qk_normalization:
            query, key = self._normalise(self.q_norm, query), self._normalise(self.k_norm, key)
        dropout_p = self.attn_drop.p if self.training else 0.0
        if attention_mask is None:
            weights = ((query * self.scale) @ key.transpose(-2, -1)).softmax(dim=-1)
            out = self.attn_drop(weights) @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout_p, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))

    @staticmethod
    def _normalise(norm: nn.Module, states: Tensor) -> Tensor:
        """Applies a norm to the full width, all heads together; `[batch, heads, tokens, head width]`."""
        return norm(states.transpose(1, 2).flatten(-2, -1)).view_as(states.transpose(1, 2)).transpose(1, 2)


def geometry(tower: nn.Module) -> Geometry:
    """The patch grid of the configuration, and one prefix token (CLS)."""
    return Geometry(grid=config_grid(tower), prefix_tokens=1)


def check(tower: nn.Module) -> None:
    """Refuses the packed flash kernel.

    Raises:
        UnsupportedAttentionError: `use_flash_attn` is on; that path takes no bias.
    """
    for name, module in tower.named_modules():
        if getattr(module, "use_flash_attn", False) and not isinstance(module, MaskedInternAttention):
            raise UnsupportedAttentionError(
                f"{name} runs its own flash attention (use_flash_attn=True), which takes no bias. Load the model with "
                "use_flash_attn=False in its vision config; with SFA it then runs on torch's fused attention."
            )


INTERNVIT_REMOTE = register_backbone(
    Backbone(
        name="internvit_remote",
        towers=("*.modeling_intern_vit.InternVisionModel",),
        attentions=(
            "*.modeling_intern_vit.InternAttention",
            "sfa_adapters.backbones.internvit_remote.MaskedInternAttention",
        ),
        geometry=geometry,
        layouts=pixel_layouts,
        image_module="embeddings",
        wrap_attention=wrapping(MaskedInternAttention, "InternAttention"),
        unwrap_attention=unwrap,
        check=check,
        small_towers="sfa_adapters.testing.towers_remote:INTERNVIT_REMOTE",
    )
)
