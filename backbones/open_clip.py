"""open_clip's own `VisionTransformer`: one CLS token, and `torch.nn.MultiheadAttention`.

torch's module takes only masks of three dimensions, in matrix form, and in inference it may leave Python for a kernel
of its own. `MaskedMultiheadAttention` stands in for it. The attention of open_clip's custom blocks takes a mask itself.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters import processor_statistics
from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.errors import UnsupportedAttentionError
from sfa_adapters.pixel_grids import image_grid
from sfa_adapters.registry import Backbone, Geometry, register_backbone
from sfa_adapters.stand_in import StandIn, unwrap, wrapping

__all__ = ["OPEN_CLIP", "MaskedMultiheadAttention"]


class MaskedMultiheadAttention(StandIn):
    """Stands in for a self-attending `torch.nn.MultiheadAttention`; without a lazy mask the original runs.

    Args:
        original: The attention module.
    """

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.in_proj_weight: Any
        self.in_proj_bias: Any
        self.out_proj: Any
        self.num_heads, self.dropout, self.batch_first = original.num_heads, original.dropout, original.batch_first

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, attn_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; arguments as those of `torch.nn.MultiheadAttention`, batch first.

        Returns:
            The output `[batch, tokens, width]`, and attention weights where the original gives them.
        """
        if attn_mask is None:
            return self.restore()(query, key, value, *args, **kwargs)
        batch, tokens, width = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).reshape(batch, tokens, width)), None


def geometry(tower: nn.Module) -> Geometry:
    """Grid as the model has it, behind the CLS token."""
    model: Any = tower
    return Geometry(grid=(int(model.grid_size[0]), int(model.grid_size[1])), prefix_tokens=1)


def layouts(conv: nn.Module, args: tuple[Any, ...], kwargs: Any) -> ImageTokens | None:
    """The convolution that cuts patches gets the image first, also where people call other methods than forward."""
    grid = image_grid(args[0] if args else kwargs.get("input"), conv.kernel_size)
    return None if grid is None else ImageTokens(grid)


def check(tower: nn.Module) -> None:
    """Refuses towers whose tokens cannot be placed.

    Raises:
        UnsupportedAttentionError: Patches are dropped in training, or the sequence comes first.
    """
    model: Any = tower
    if not isinstance(model.patch_dropout, nn.Identity):
        raise UnsupportedAttentionError(
            "This tower drops patches in training (patch_dropout), so that the place of a token is not known. Build it "
            "with patch_dropout=0."
        )
    if not model.transformer.batch_first:
        raise UnsupportedAttentionError(
            "The transformer of this tower puts the sequence in front of the batch (batch_first=False). Build it with "
            "batch_first=True, as open_clip does by default."
        )


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What its image processor normalises with."""
    return processor_statistics.CLIP


OPEN_CLIP = register_backbone(
    Backbone(
        name="open_clip",
        towers=("open_clip.transformer.VisionTransformer",),
        attentions=(
            "torch.nn.modules.activation.MultiheadAttention",
            "open_clip.transformer.Attention",
            "sfa_adapters.backbones.open_clip.MaskedMultiheadAttention",
        ),
        attention_paths=("transformer.resblocks.*",),  # not those of the attentional pooler
        geometry=geometry,
        layouts=layouts,
        image_module="conv1",
        wrap_attention=wrapping(MaskedMultiheadAttention, nn.MultiheadAttention),
        unwrap_attention=unwrap,
        check=check,
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_open_clip:OPEN_CLIP",
    )
)
