"""Qwen2.5-VL: a tower that takes any size, one sequence cut into windows, groups of 2x2 patches merged in it, Qwen2."""

from __future__ import annotations

from typing import Any

from sfa_adapters.recipes.vlms.navit import NO_DENSITY, NO_GRID, lengths, merge_side, pixel_options
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, MemoryRules, Precision, Widths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC"]


def _tower(config: Any) -> Widths:
    vision = config.vision_config
    heads, width = vision.num_heads, vision.hidden_size
    return Widths(vision.depth, width, vision.intermediate_size, heads, width, width, width // heads)


def _layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 2 * part.rms_norm(width) + part.stream * width
    kept += 3 * compute * width  # v is a view of the fused product of q, k and v
    kept += (2 + 1 + part.trains) * compute * width + FLOAT * sizes.heads  # q and k turned, output, and it joined
    kept += part.product_inputs(width, 1) + part.product_inputs(width, 2) + (3 + part.trains) * compute * inner
    if sfa:
        window = (config.vision_config.window_size // config.vision_config.patch_size) ** 2
        kept += 2 * compute * sizes.heads * window  # short windows take phi as a matrix
    return kept


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    width, group = config.vision_config.hidden_size, config.vision_config.spatial_merge_size**2
    kept = group * (tower.stream * width + tower.rms_norm(width) + part.product_inputs(width, 1))
    return kept + part.compute * width * group * (1 + part.trains)


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts import qwen2_5_vl

    return qwen2_5_vl()


SPEC = register_vlm(
    VLMSpec(
        name="qwen2_5_vl",
        title="Qwen2.5-VL",
        model_type="qwen2_5_vl",
        model_class="Qwen2_5_VLForConditionalGeneration",
        classes=(
            "transformers.models.qwen2_5_vl.*.Qwen2_5_VLForConditionalGeneration",
            "transformers.models.qwen2_5_vl.*.Qwen2_5_VLModel",
        ),
        projector=("model.visual.merger",),  # a child of the tower
        images=ImageRules(setting="max_pixels", options=pixel_options),
        image_tokens=ImageTokens(kind="merged_groups", side=merge_side),
        memory=MemoryRules(lengths=lengths, tower=_tower, layer=_layer, projector=_projector, fixed_grid=False),
        nano=_nano,
        refuses={
            "adat": NO_GRID,
            "text_density": NO_DENSITY,
        },
    )
)
