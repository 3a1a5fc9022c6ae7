"""timm `VisionTransformer`: its ViT, SigLIP, CLIP and InternViT-300M variants; the prefix is read from the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.errors import InjectionError
from sfa_adapters.pixel_grids import image_grid
from sfa_adapters.registry import Backbone, Geometry, PatchSeam, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """Grid and number of prefix tokens (CLS and registers) as the model has them."""
    model: Any = tower
    rows, columns = model.patch_embed.grid_size
    return Geometry(grid=(int(rows), int(columns)), prefix_tokens=int(model.num_prefix_tokens))


def layouts(patch_embed: nn.Module, args: tuple[Any, ...], kwargs: Any) -> ImageTokens | None:
    """The patch embedding gets the image first, as `x`; sizes may vary where the model has `dynamic_img_size`."""
    embedding: Any = patch_embed
    grid = image_grid(args[0] if args else kwargs.get("x"), embedding.patch_size)
    return None if grid is None else ImageTokens(grid)


def positions(tower: nn.Module) -> Tensor:
    """The position embeddings of all patches; rows of prefix tokens come first where the model has them."""
    model: Any = tower
    return model.pos_embed[0, 0 if model.no_embed_class else model.num_prefix_tokens :]


def check_patches(tower: nn.Module) -> None:
    """Refuses settings that adaptive tokens, which replace the plain ones in front of `norm_pre`, would bypass.

    Raises:
        InjectionError: No absolute position embeddings to resample, dropout of patches or positions, or a patch norm.
    """
    model: Any = tower
    if model.pos_embed is None:
        raise InjectionError(f"This {type(tower).__name__} has no absolute position embeddings (pos_embed).")
    if not isinstance(model.patch_drop, nn.Identity) or model.pos_drop.p:
        raise InjectionError("pos_drop_rate and patch_drop_rate must be 0: adaptive tokens would not pass them.")
    if not isinstance(model.patch_embed.norm, nn.Identity):
        raise InjectionError("This patch embedding has a norm of its own, which resampled patches would not pass.")


def pools(tower: nn.Module) -> bool:
    """Whether the head looks at every token."""
    model: Any = tower
    return model.attn_pool is not None or model.global_pool not in ("", "token")


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pretrained configuration by channel, else 0.5."""
    model: Any = tower
    settings = getattr(model, "pretrained_cfg", None) or {}
    return tuple(settings.get("mean", (0.5, 0.5, 0.5))), tuple(settings.get("std", (0.5, 0.5, 0.5)))


TIMM_VIT = register_backbone(
    Backbone(
        name="timm_vit",
        towers=("timm.models.vision_transformer.VisionTransformer",),
        attentions=("timm.layers.attention.Attention",),
        geometry=geometry,
        layouts=layouts,
        image_module="patch_embed",  # forward_features and forward_intermediates do not pass the model's forward
        patches=PatchSeam(
            images="patch_embed",
            projection="patch_embed.proj",
            positions=positions,
            tokens_in="norm_pre",
            tokens_out="norm",
            check=check_patches,
            pools=pools,
            statistics=statistics,
        ),
        small_towers="sfa_adapters.testing.towers_timm:TIMM_VIT",
    )
)
