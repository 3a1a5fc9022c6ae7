"""PaddleOCR-VL: a SigLIP-like tower that takes any size, row by row, a projector behind it, and ERNIE-4.5."""

from __future__ import annotations

from typing import Any

from sfa_adapters.recipes.vlms.navit import (
    NO_DENSITY,
    NO_GRID,
    NO_MERGING,
    lengths,
    patch_grid,
    pixel_options,
    plain_layer,
)
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, MemoryRules, Precision, Widths, vit_widths
from sfa_adapters.vlm.spec import ImageRules, VLMSpec

__all__ = ["SPEC"]


def _layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    return plain_layer(sizes, part, fused=False)


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    vision = config.vision_config
    group = vision.spatial_merge_size**2
    wide = group * vision.hidden_size
    kept = 2 * (FLOAT * wide + 2 * FLOAT * group)  # the last norm of the tower, and the first of the projector
    return kept + part.product_inputs(wide, 1) + part.compute * wide * (1 + part.trains)


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_navit import paddleocr_vl

    return paddleocr_vl()


SPEC = register_vlm(
    VLMSpec(
        name="paddleocr_vl",
        title="PaddleOCR-VL",
        model_type="paddleocr_vl",
        model_class="PaddleOCRVLForConditionalGeneration",
        classes=(
            "transformers.models.paddleocr_vl.*.PaddleOCRVLForConditionalGeneration",
            "transformers.models.paddleocr_vl.*.PaddleOCRVLModel",
        ),
        images=ImageRules(setting="max_pixels", options=pixel_options),
        memory=MemoryRules(
            lengths=lengths,
            tower=vit_widths,
            layer=_layer,
            projector=_projector,
            fixed_grid=False,
            grid=patch_grid,
            narrow_stream=True,
        ),
        nano=_nano,
        refuses={"adat": NO_GRID, "text_density": NO_DENSITY, "dymu": NO_MERGING},
    )
)
