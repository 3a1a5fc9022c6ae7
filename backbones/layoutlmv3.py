"""LayoutLMv3: words and patches in one sequence. The patches have a place on the page, behind words and a CLS token.

Words have none here: their boxes go into their embeddings and into the model's own relative bias, to which the
structural bias is added.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.arrangement import ImageTokens, Listed, TokenArrangement
from sfa_adapters.errors import UnsupportedAttentionError
from sfa_adapters.pixel_grids import image_grid
from sfa_adapters.registry import Backbone, Geometry, register_backbone

ARGUMENTS = ("input_ids", "bbox", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "pixel_values")


def geometry(tower: nn.Module) -> Geometry:
    """Grid of the configuration, behind the CLS token of the image; words come in front of it."""
    model: Any = tower
    side = int(model.config.input_size / model.config.patch_size)
    return Geometry(grid=(side, side), prefix_tokens=1)


def layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> TokenArrangement | None:
    """Words, the CLS token of the image and its patches; words alone have no place."""
    model: Any = tower
    given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    ids, embedded = given.get("input_ids"), given.get("inputs_embeds")
    text = ids if ids is not None else embedded
    words = 0 if text is None else int(text.shape[1])
    grid = image_grid(given.get("pixel_values"), model.config.patch_size)
    if grid is None:
        if not words:
            return None
        return TokenArrangement("batch", (ImageTokens((1, 1), Listed((), ()), without_place=((0, words),)),))
    return TokenArrangement("batch", (ImageTokens(grid),), words + 1)


def check(tower: nn.Module) -> None:
    """Refuses models of words alone.

    Raises:
        UnsupportedAttentionError: The model was built without an image part.
    """
    model: Any = tower
    if not model.config.visual_embed:
        raise UnsupportedAttentionError(
            "This LayoutLMv3 has no image part (visual_embed=False), and words have no place on a grid. Build it with "
            "visual_embed=True."
        )


LAYOUTLMV3 = register_backbone(
    Backbone(
        name="layoutlmv3",
        towers=("transformers.models.layoutlmv3.*.LayoutLMv3Model",),
        attentions=("transformers.models.layoutlmv3.*.LayoutLMv3SelfAttention",),
        geometry=geometry,
        layouts=layouts,
        check=check,
        small_towers="sfa_adapters.testing.towers_vit:LAYOUTLMV3",
    )
)
