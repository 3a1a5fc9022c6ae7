"""InternVL: an InternViT tower, pages cut into tiles beside a thumbnail, pixel shuffle, Qwen."""

from __future__ import annotations

from typing import Any

from sfa_adapters.pixel_grids import pair
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, Lengths, MemoryRules, Precision, Widths, vit_layer, vit_widths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC"]


def _options(processor: Any, tiles: int) -> dict[str, Any]:
    return {"crop_to_patches": tiles > 1, "min_patches": 1, "max_patches": tiles}


def _side(config: Any) -> int:
    return round(1 / float(config.downsample_ratio))


def _lengths(config: Any, tiles: int) -> Lengths:
    (height, width), (down, across) = pair(config.vision_config.image_size), pair(config.vision_config.patch_size)
    patches = (height // down) * (width // across)
    count = tiles + (tiles > 1)  # the whole page as a thumbnail beside its tiles
    return Lengths(count * height * width, count * (patches + 1), count * int(patches * config.downsample_ratio**2))


def _layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    scale = 2 * part.compute * sizes.width if part.trains else 0  # layer scale
    return vit_layer(sizes, part, config, sfa) + scale


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    wide = config.text_config.hidden_size
    gathered = round(config.vision_config.hidden_size / config.downsample_ratio**2)
    kept = tower.stream * gathered + 2 * FLOAT + part.product_inputs(gathered, 1)
    return kept + part.compute * wide * (1 + part.trains)


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts import internvl

    return internvl()


SPEC = register_vlm(
    VLMSpec(
        name="internvl",
        title="InternVL",
        model_type="internvl",
        model_class="InternVLForConditionalGeneration",
        projector=("model.multi_modal_projector",),
        classes=(
            "transformers.models.internvl.*.InternVLForConditionalGeneration",
            "transformers.models.internvl.*.InternVLModel",
        ),
        images=ImageRules(setting="max_tiles", options=_options),
        image_tokens=ImageTokens(kind="pixel_shuffle", side=_side),
        memory=MemoryRules(lengths=_lengths, tower=vit_widths, layer=_layer, projector=_projector, prefix_tokens=1),
        nano=_nano,
    )
)
