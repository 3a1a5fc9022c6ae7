"""timm `VisionTransformer`: its ViT, SigLIP, CLIP and InternViT-300M variants; the prefix is read from the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.registry import Backbone, Geometry, image_grid, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """Grid and number of prefix tokens (CLS and registers) as the model has them."""
    model: Any = tower
    rows, columns = model.patch_embed.grid_size
    return Geometry(grid=(int(rows), int(columns)), prefix_tokens=int(model.num_prefix_tokens))


def grid_of_input(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[int, int] | None:
    """The image comes first, as `x`; sizes may vary where the model was built with `dynamic_img_size`."""
    model: Any = tower
    return image_grid(args[0] if args else kwargs.get("x"), model.patch_embed.patch_size)


TIMM_VIT = register_backbone(
    Backbone(
        name="timm_vit",
        towers=("timm.models.vision_transformer.VisionTransformer",),
        attentions=("timm.layers.attention.Attention",),
        geometry=geometry,
        grid_of_input=grid_of_input,
        mask_argument="attn_mask",
    )
)
