"""LightOnOCR: Pixtral's tower, pages of any size behind one another, groups of 2x2 patches merged behind it, Qwen3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.page import Page
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, Lengths, MemoryRules, Precision, Widths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC"]


def _patch(processor: Any) -> tuple[int, int]:
    size = processor.patch_size
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _options(processor: Any, pixels: int) -> dict[str, Any]:
    height, width = _patch(processor)
    if pixels < height * width:
        raise RecipeError(f"max_pixels={pixels} must be at least {height * width}, one step of the processor.")
    return {}


def _page(image: np.ndarray, processor: Any, pixels: int) -> Page:
    """Shrinks a page that would have more pixels; the processor itself limits the longer side only."""
    (height, width), (down, across) = image.shape[:2], _patch(processor)

    def fits(ratio: float) -> bool:  # the processor rounds both sides up to whole steps
        return math.ceil(height * ratio / down) * down * math.ceil(width * ratio / across) * across <= pixels

    ratio = min(1.0, int(processor.size["longest_edge"]) / max(height, width))
    if fits(ratio):
        return Page.unchanged(image)
    while not fits(ratio):
        ratio *= 0.99
    size = max(1, int(width * ratio)), max(1, int(height * ratio))
    from PIL import Image  # not among the dependencies of the library itself

    smaller = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return Page(smaller, (width, height), size)


def _token_grids(batch: Mapping[str, Any], processor: Any) -> list[tuple[int, int]]:
    step = int(processor.effective_patch_size)
    return [(int(height) // step, int(width) // step) for height, width in batch["image_sizes"]]


def _side(config: Any) -> int:
    return int(config.spatial_merge_size)


def _lengths(config: Any, pixels: int) -> Lengths:
    vision, side = config.vision_config, _side(config)
    group = (vision.patch_size * side) ** 2
    tokens = max(1, min(pixels, vision.image_size**2) // group)
    return Lengths(tokens * group, tokens * side**2, tokens)


def _grid(config: Any, pixels: int) -> tuple[int, int]:
    """Of the longest page: rows and columns of a square one are fewer together."""
    vision = config.vision_config
    patches = _lengths(config, pixels).tower
    longest = min(vision.image_size // vision.patch_size, patches)
    return longest, max(1, patches // longest)


def _tower(config: Any) -> Widths:
    vision = config.vision_config
    heads, head = vision.num_attention_heads, vision.head_dim
    attended = heads * head
    return Widths(
        vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, heads, attended, attended, head
    )


def _layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    width, inner, compute = sizes.width, sizes.inner, part.compute
    kept = 2 * part.rms_norm(width) + part.stream * width
    kept += 4 * compute * sizes.heads * sizes.folded + FLOAT * sizes.heads  # q and k turned, v, the output
    kept += part.product_inputs(width, 3) + part.product_inputs(sizes.attended, 1)
    return kept + part.product_inputs(width, 2) + (3 + part.trains) * compute * inner


def _outer(recipe: Any, config: Any, lengths: Lengths, part: Precision, batch: int) -> int:
    """The mask that keeps pages apart, over all tokens of a forward: a bias replaces it, checkpoints hold on to it."""
    numbers = (batch * lengths.tower) ** 2
    if recipe.gradient_checkpointing:
        return part.stream * numbers
    if recipe.sfa:
        return 0
    return numbers * (config.vision_config.num_hidden_layers * part.compute if part.mixed else part.stream)


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    width, wide, group = config.vision_config.hidden_size, config.text_config.hidden_size, _side(config) ** 2
    kept = group * (tower.stream * width + tower.rms_norm(width)) + part.product_inputs(width * group, 1)
    return kept + part.product_inputs(width, 1) + part.compute * wide * (1 + part.trains)


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_pixtral import lighton_ocr

    return lighton_ocr()


SPEC = register_vlm(
    VLMSpec(
        name="lighton_ocr",
        title="LightOnOCR",
        model_type="lighton_ocr",
        model_class="LightOnOcrForConditionalGeneration",
        classes=(
            "transformers.models.lighton_ocr.*.LightOnOcrForConditionalGeneration",
            "transformers.models.lighton_ocr.*.LightOnOcrModel",
        ),
        projector=("model.vision_projection",),
        images=ImageRules(setting="max_pixels", options=_options, page=_page, token_grids=_token_grids),
        image_tokens=ImageTokens(kind="pixel_shuffle", side=_side),
        memory=MemoryRules(
            lengths=_lengths,
            tower=_tower,
            layer=_layer,
            projector=_projector,
            fixed_grid=False,
            grid=_grid,
            outer=_outer,
            norm_in_front=True,
        ),
        nano=_nano,
        refuses={
            "adat": "its tower has no fixed grid of patches. Leave adat out; for fewer tokens set max_pixels.",
            "dymu": "its tower puts pages of any size behind one another, and tokens merge on a fixed grid only. For "
            "fewer tokens set max_pixels, or use FastV.",
            "text_density": "the density of text is not measured for a host without a fixed grid of patches.",
        },
    )
)
