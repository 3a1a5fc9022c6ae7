"""Gemma 3: a SigLIP tower, the page as one picture and in crops along its longer side, means of patches, Gemma."""

from __future__ import annotations

from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.pixel_grids import pair
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import (
    FLOAT,
    Lengths,
    MemoryRules,
    Precision,
    Widths,
    gemma_attention,
    gemma_norms,
    vit_layer,
    vit_widths,
)
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC"]

# Text around a picture of pan and scan: two blank lines, the marks of a picture, and the sentence before the crops.
AROUND = 30


def _options(processor: Any, crops: int) -> dict[str, Any]:
    """Pan and scan: at most so many crops along the longer side, beside the whole page."""
    if crops < 1:
        raise RecipeError(f"max_tiles={crops} must be at least 1.")
    options = {"do_pan_and_scan": crops > 1, "pan_and_scan_max_num_crops": crops}
    smallest = processor.pan_and_scan_min_crop_size
    # Without one in the processor's file, the processor of the host has a default.
    return options if smallest is None else {**options, "pan_and_scan_min_crop_size": smallest}


def _side(config: Any) -> int:
    vision = config.vision_config
    return pair(vision.image_size)[0] // pair(vision.patch_size)[0] // round(config.mm_tokens_per_image**0.5)


def _lengths(config: Any, crops: int) -> Lengths:
    (height, width), (down, across) = pair(config.vision_config.image_size), pair(config.vision_config.patch_size)
    count = crops + (crops > 1)
    patches = (height // down) * (width // across)
    plain = Lengths(count * height * width, count * patches, count * config.mm_tokens_per_image)
    return Lengths(plain.pixels, plain.tower, plain.image, plain.text + AROUND * (count > 1))


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    """The norm behind the tower's layers, the mean over patches, a norm in float32, and one matrix."""
    width, group = config.vision_config.hidden_size, _side(config) ** 2
    kept = group * (2 * tower.stream * width + 2 * FLOAT)
    kept += FLOAT * (width + 1) + (FLOAT * width if part.trains else 0)
    return kept + part.product_inputs(width, 1)


def _decoder(recipe: Any, config: Any, sizes: Widths, part: Precision, masked: int) -> int:
    """Four norms, norms of queries and keys, and a gated MLP."""
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = gemma_norms(width, part, fresh=2, passed=2) + part.stream * width
    kept += gemma_attention(sizes.attended, sizes.keys, sizes.heads, part, masked) + 3 * compute * inner
    if part.trains or recipe.lora_llm:
        adapted = Precision(part.stream, compute, True, compute != FLOAT)
        kept += adapted.product_inputs(width, 3) + adapted.product_inputs(width, 2) + compute * inner
        kept += 7 * compute * recipe.lora_llm
    return kept


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_gemma import gemma3

    return gemma3()


SPEC = register_vlm(
    VLMSpec(
        name="gemma3",
        title="Gemma 3",
        model_type="gemma3",
        model_class="Gemma3ForConditionalGeneration",
        classes=(
            "transformers.models.gemma3.*.Gemma3ForConditionalGeneration",
            "transformers.models.gemma3.*.Gemma3Model",
        ),
        projector=("model.multi_modal_projector",),
        unread=("head",),
        images=ImageRules(setting="max_tiles", options=_options),
        image_tokens=ImageTokens(kind="pixel_shuffle", side=_side, page_first=True, apart=True),
        memory=MemoryRules(
            lengths=_lengths, tower=vit_widths, layer=vit_layer, projector=_projector, decoder=_decoder, masks=2
        ),
        nano=_nano,
        refuses={
            "fastv": "most layers of its language model see a window of tokens, which would reach further back once "
            "some are gone. For fewer image tokens lower max_tiles.",
            "dymu": "in its language model image tokens attend to later ones of their picture, under masks that are "
            "made before tokens could be taken out. For fewer image tokens lower max_tiles.",
        },
    )
)
