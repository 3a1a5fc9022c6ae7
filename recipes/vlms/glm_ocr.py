"""GLM-OCR: a tower that takes any size, a convolution that joins groups of patches, and a small GLM."""

from __future__ import annotations

from typing import Any

from sfa_adapters.recipes.vlms.navit import (
    NO_DENSITY,
    NO_GRID,
    NO_MERGING,
    attention_bytes,
    lengths,
    patch_grid,
    pixel_options,
)
from sfa_adapters.recipes.vlms.qwen3_vl import tower
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, MemoryRules, Precision, Widths, decoder_layer
from sfa_adapters.vlm.spec import ImageRules, VLMSpec

__all__ = ["SPEC"]


def _options(processor: Any, pixels: int) -> dict[str, Any]:
    return pixel_options(processor, pixels, frames=int(processor.temporal_patch_size))


def _layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 2 * part.rms_norm(width) + part.stream * width
    kept += attention_bytes(sizes, part, fused=True)
    kept += 2 * FLOAT * sizes.heads + (2 * compute * width if part.trains else 0)  # queries and keys have norms, too
    if compute != FLOAT:
        kept += 2 * FLOAT * width  # which copy them to float32
    elif sizes.folded * sizes.heads > sizes.attended:
        kept += 3 * compute * width  # and keep the fused product of them and of the value
    return kept + part.product_inputs(width, 1) + part.product_inputs(width, 2) + (3 + part.trains) * compute * inner


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    vision = config.vision_config
    group, width, wide = vision.spatial_merge_size**2, vision.hidden_size, vision.out_hidden_size
    inner = wide * vision.in_channels
    kept = group * (tower.stream * width + tower.rms_norm(width) + part.compute * width)  # last norm, convolution
    kept += part.product_inputs(wide, 1) + part.compute * wide + 2 * FLOAT + part.stream * wide  # product, norm, GELU
    return kept + part.product_inputs(wide, 2) + (3 + part.trains) * part.compute * inner


def _decoder(recipe: Any, config: Any, sizes: Widths, part: Precision, masked: int) -> int:
    after = FLOAT * sizes.width + FLOAT + (part.stream * sizes.width if part.trains else 0)
    return decoder_layer(recipe, config, sizes, part, masked) + 2 * after  # attention and MLP have a norm behind them


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_navit import glm_ocr

    return glm_ocr()


SPEC = register_vlm(
    VLMSpec(
        name="glm_ocr",
        title="GLM-OCR",
        model_type="glm_ocr",
        model_class="GlmOcrForConditionalGeneration",
        classes=(
            "transformers.models.glm_ocr.*.GlmOcrForConditionalGeneration",
            "transformers.models.glm_ocr.*.GlmOcrModel",
        ),
        projector=("model.visual.merger", "model.visual.downsample"),  # children of the tower
        images=ImageRules(setting="max_pixels", options=_options),
        memory=MemoryRules(
            lengths=lengths,
            tower=tower,
            layer=_layer,
            projector=_projector,
            fixed_grid=False,
            grid=patch_grid,
            narrow_stream=True,
            decoder=_decoder,
        ),
        nano=_nano,
        refuses={"adat": NO_GRID, "text_density": NO_DENSITY, "dymu": NO_MERGING},
    )
)
