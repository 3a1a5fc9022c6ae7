"""timm's NaFlexVit: dense images of one size, or padded rows of patches that bring their places; prefix from the model.

`forward` takes `[B, 3, H, W]`, or a dictionary of `patches`, `patch_coord` (row, column) and `patch_valid`; the patch
embedding gets either, so that `forward_features` and `forward_intermediates` are covered as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sfa_adapters.arrangement import ImageTokens, TokenArrangement
from sfa_adapters.errors import UnsupportedAttentionError
from sfa_adapters.placed_tokens import placed_images
from sfa_adapters.registry import Backbone, Geometry, register_backbone

# By `attn_type` and `rope_type` of the model's configuration.
ATTENTIONS = ("timm.layers.attention.Attention", "timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention")


def geometry(tower: nn.Module) -> Geometry:
    """Images of any size; number of prefix tokens (CLS and registers) as the model has them."""
    model: Any = tower
    return Geometry(grid=None, prefix_tokens=int(model.num_prefix_tokens))


def layouts(embeds: nn.Module, args: tuple[Any, ...], kwargs: Any) -> TokenArrangement:
    """One grid for dense images, a grid for each image where patches come with coordinates."""
    module: Any = embeds
    images, places, real = (
        args[position] if len(args) > position else kwargs.get(name)
        for position, name in enumerate(("x", "patch_coord", "patch_valid"))
    )
    prefix = int(module.has_class_token) + int(module.num_reg_tokens)
    if places is None:
        rows, columns = module.dynamic_feat_size(tuple(images.shape[-2:]))
        return TokenArrangement("batch", (ImageTokens((int(rows), int(columns))),), prefix)
    if real is None:
        real = torch.ones(places.shape[:2], dtype=torch.bool)
    return TokenArrangement("padded", tuple(placed_images(places, real)), prefix)


def check(tower: nn.Module) -> None:
    """Refuses models that drop patches behind their embedding.

    Raises:
        UnsupportedAttentionError: `patch_drop_rate` is above 0: which patches are left is drawn anew in each forward.
    """
    model: Any = tower
    if model.patch_drop is not None:
        raise UnsupportedAttentionError(
            "This NaFlexVit drops patches at random in training (patch_drop_rate), and a bias needs the place of each. "
            "Create it with patch_drop_rate=0."
        )


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As the pretrained configuration has them, or one half."""
    model: Any = tower
    settings = getattr(model, "pretrained_cfg", None) or {}
    return tuple(settings.get("mean", (0.5, 0.5, 0.5))), tuple(settings.get("std", (0.5, 0.5, 0.5)))


NAFLEXVIT = register_backbone(
    Backbone(
        name="naflexvit",
        towers=("timm.models.naflexvit.NaFlexVit",),
        attentions=ATTENTIONS,
        geometry=geometry,
        layouts=layouts,
        joined="padded",
        image_module="embeds",
        check=check,
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_naflexvit:NAFLEXVIT",
    )
)
