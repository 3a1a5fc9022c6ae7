"""SmolVLM and SmolVLM2: a SigLIP tower, pages cut into tiles with a tag before each, pixel shuffle, Llama.

The functions serve Idefics3 as well, whose tiles, tower and projector are the same.
"""

from __future__ import annotations

import math
from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.pixel_grids import pair
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, TEXT_TOKENS, Lengths, MemoryRules, Precision, vit_layer, vit_widths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC", "image_rules", "image_tokens", "memory_rules"]

# Tokens of text beside a tile: a mark, and the tag that says its row and column; beside a row: a line break.
TAGS = 2


def _options(processor: Any, tiles: int) -> dict[str, Any]:
    """A page becomes `longest` tiles along its longer side, always; a square one becomes `longest` x `longest`."""
    tile = int(processor.max_image_size["longest_edge"])
    longest = math.isqrt(tiles)
    if longest < 1:
        raise RecipeError(f"max_tiles={tiles} must be at least 1.")
    longest = min(longest, max(1, int(processor.size["longest_edge"]) // tile))
    return {"size": {"longest_edge": longest * tile}, "do_image_splitting": longest > 1}


def _side(config: Any) -> int:
    return int(config.scale_factor)


def _lengths(config: Any, tiles: int) -> Lengths:
    (height, width), (down, across) = pair(config.vision_config.image_size), pair(config.vision_config.patch_size)
    patches = (height // down) * (width // across)
    longest = math.isqrt(tiles)
    count = longest**2 + (longest > 1)  # the whole page behind its tiles
    text = TEXT_TOKENS + TAGS * count + longest
    return Lengths(count * height * width, count * patches, count * (patches // _side(config) ** 2), text)


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    """The norm behind the tower's layers, and one linear layer on the joined channels."""
    group = _side(config) ** 2
    gathered = config.vision_config.hidden_size * group
    return tower.stream * gathered + 2 * FLOAT * group + part.product_inputs(gathered, 1)


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_tiles import smolvlm

    return smolvlm()


image_rules = ImageRules(setting="max_tiles", options=_options)
image_tokens = ImageTokens(kind="pixel_shuffle", side=_side, apart=True)
memory_rules = MemoryRules(lengths=_lengths, tower=vit_widths, layer=vit_layer, projector=_projector)

SPEC = register_vlm(
    VLMSpec(
        name="smolvlm",
        title="SmolVLM",
        model_type="smolvlm",
        model_class="SmolVLMForConditionalGeneration",
        classes=(
            "transformers.models.smolvlm.*.SmolVLMForConditionalGeneration",
            "transformers.models.smolvlm.*.SmolVLMModel",
        ),
        projector=("model.connector",),
        joins_in_own_dtype=True,
        images=image_rules,
        image_tokens=image_tokens,
        memory=memory_rules,
        nano=_nano,
        nano_settings={"max_tiles": 4},
    )
)
