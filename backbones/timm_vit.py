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


def grid_of_input(patch_embed: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[int, int] | None:
    """The patch embedding gets the image first, as `x`; sizes may vary where the model has `dynamic_img_size`."""
    embedding: Any = patch_embed
    return image_grid(args[0] if args else kwargs.get("x"), embedding.patch_size)


TIMM_VIT = register_backbone(
    Backbone(
        name="timm_vit",
        towers=("timm.models.vision_transformer.VisionTransformer",),
        attentions=("timm.layers.attention.Attention",),
        geometry=geometry,
        grid_of_input=grid_of_input,
        image_module="patch_embed",  # forward_features and forward_intermediates do not pass the model's forward
        mask_argument="attn_mask",
    )
)
