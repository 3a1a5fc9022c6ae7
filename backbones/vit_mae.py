"""ViTMAE: a CLS token, then those patches that its mask keeps, in random order, of each image others.

Which they are follows from the `noise` that the model is called with; without one it draws it inside, where nobody can
know the order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sfa_adapters.arrangement import ImageTokens, Listed
from sfa_adapters.errors import LayoutError
from sfa_adapters.family import Member, attention_patterns, grid_behind_prefix, tower_patterns
from sfa_adapters.pixel_grids import pixel_grid
from sfa_adapters.registry import Backbone, register_backbone

MEMBERS = (Member("vit_mae", "ViTMAEModel", "ViTMAEAttention", 1),)


def layouts(embeddings: nn.Module, args: tuple[Any, ...], kwargs: Any) -> list[ImageTokens]:
    """The kept patches of each image, as the model shuffles them by `noise`.

    Raises:
        LayoutError: There is no noise.
    """
    model: Any = embeddings
    noise = kwargs.get("noise", args[1] if len(args) > 1 else None)
    grid = pixel_grid(embeddings, args, kwargs)
    if noise is None or grid is None:
        raise LayoutError(
            "ViTMAE shuffles patches by random numbers that it draws inside, so that the place of a token is not "
            "known. Call it with noise=torch.rand(images, patches)."
        )
    kept = int(noise.shape[1] * (1 - model.config.mask_ratio))
    order = torch.argsort(noise, dim=1)[:, :kept]
    places = torch.stack((order // grid[1], order % grid[1]), dim=-1)
    return [ImageTokens(grid, Listed.of(image)) for image in places]


VIT_MAE = register_backbone(
    Backbone(
        name="vit_mae",
        towers=tower_patterns(MEMBERS),
        attentions=attention_patterns(MEMBERS),
        geometry=grid_behind_prefix(MEMBERS),
        layouts=layouts,
        joined="padded",
        image_module="embeddings",
        small_towers="sfa_adapters.testing.towers_vit:VIT_MAE",
    )
)
