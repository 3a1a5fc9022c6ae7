"""Gemma 4: a tower for pages of any aspect, padded rows of patches that bring their places, means of 3x3 patches, Gemma.

Its language model adds an embedding of each token in every layer, and its later layers reuse keys and values of earlier
ones. The tower for audio is left alone.
"""

from __future__ import annotations

from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, Lengths, MemoryRules, Precision, Widths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC"]

BUDGETS = (70, 140, 280, 560, 1120)  # the numbers of image tokens that its image processor can be set to


def _budget(pixels: int, token: int) -> int:
    """The largest budget of image tokens whose page has at most so many pixels.

    Args:
        pixels: The most pixels of a page.
        token: Side of an image token in pixels.
    """
    fitting = [budget for budget in BUDGETS if budget * token**2 <= pixels]
    if not fitting:
        raise RecipeError(f"max_pixels={pixels} must be at least {BUDGETS[0] * token**2}, {BUDGETS[0]} image tokens.")
    return fitting[-1]


def _options(processor: Any, pixels: int) -> dict[str, Any]:
    return {"max_soft_tokens": _budget(pixels, processor.patch_size * processor.pooling_kernel_size)}


def _side(config: Any) -> int:
    return int(config.vision_config.pooling_kernel_size)


def _lengths(config: Any, pixels: int) -> Lengths:
    """Every page takes the whole budget, because rows of patches are padded to it."""
    vision, side = config.vision_config, _side(config)
    budget = _budget(pixels, vision.patch_size * side)
    return Lengths(budget * (side * vision.patch_size) ** 2, budget * side**2, budget)


def _tower(config: Any) -> Widths:
    vision = config.vision_config
    heads, head = vision.num_attention_heads, vision.head_dim
    keys = vision.num_key_value_heads * head
    return Widths(
        vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, heads, heads * head, keys, head
    )


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_gemma import gemma4

    return gemma4()


SPEC = register_vlm(
    VLMSpec(
        name="gemma4",
        title="Gemma 4",
        model_type="gemma4",
        model_class="Gemma4ForConditionalGeneration",
        classes=(
            "transformers.models.gemma4.*.Gemma4ForConditionalGeneration",
            "transformers.models.gemma4.*.Gemma4Model",
        ),
        tower="model.vision_tower",
        projector=("model.embed_vision",),
        unused=("model.audio_tower", "model.embed_audio"),
        images=ImageRules(setting="max_pixels", options=_options),
        image_tokens=ImageTokens(kind="pixel_shuffle", side=_side),
        nano=_nano,
        refuses={
            "adat": "its tower has no fixed grid of patches. Leave adat out; for fewer tokens set max_pixels.",
            "dymu": "its tower pads pages of any aspect, and tokens merge on a fixed grid only. For fewer tokens set "
            "max_pixels.",
            "text_density": "the density of text is not measured for a host without a fixed grid of patches.",
        },
    )
)
