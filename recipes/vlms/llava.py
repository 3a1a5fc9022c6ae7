"""LLaVA-1.5: a CLIP tower, one picture of one size, Llama."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfa_adapters.pixel_grids import pair
from sfa_adapters.vlm.page import Page, padded_to_square
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import Lengths, MemoryRules, Precision, Widths, mlp_projector, vit_layer, vit_widths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC"]


def _page(image: np.ndarray, processor: Any, limit: int) -> Page:
    """Pads a page to a square with the mean colour.

    The host was trained on such pages, but its processor on the hub crops the centre, which would lose both sides.
    """
    if processor.do_center_crop and image.shape[0] != image.shape[1]:
        return padded_to_square(image, processor.image_mean)
    return Page.unchanged(image)


def _lengths(config: Any, limit: int) -> Lengths:
    (height, width), (down, across) = pair(config.vision_config.image_size), pair(config.vision_config.patch_size)
    patches = (height // down) * (width // across)
    return Lengths(height * width, patches + 1, patches)


def _layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    return vit_layer(sizes, part, config, sfa) + part.compute * sizes.inner  # quick GELU keeps a sigmoid


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts import llava

    return llava()


SPEC = register_vlm(
    VLMSpec(
        name="llava",
        title="LLaVA-1.5",
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        projector=("model.multi_modal_projector",),
        classes=("transformers.models.llava.*.LlavaForConditionalGeneration", "transformers.models.llava.*.LlavaModel"),
        unread=("post_layernorm", "head"),
        images=ImageRules(page=_page),
        image_tokens=ImageTokens(kind="patches"),
        memory=MemoryRules(
            lengths=_lengths,
            tower=vit_widths,
            layer=_layer,
            projector=mlp_projector,
            prefix_tokens=1,
            output_read=True,
            norm_in_front=True,
        ),
        nano=_nano,
    )
)
