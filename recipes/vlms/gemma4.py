"""Gemma 4: a tower for pages of any aspect, padded rows of patches that bring their places, means of 3x3, Gemma.

Its language model adds an embedding of each token in every layer, and its later layers reuse keys and values of earlier
ones. The tower for audio is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, Lengths, MemoryRules, Precision, Widths, gemma_attention, gemma_norms
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


def _token_grids(batch: Mapping[str, Any], processor: Any) -> list[tuple[int, int]]:
    side = int(processor.image_processor.pooling_kernel_size)
    largest = (batch["image_position_ids"].amax(1) + 1) // side  # columns and rows; padding is -1
    return [(int(rows), int(columns)) for columns, rows in largest]


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


def _grid(config: Any, pixels: int) -> tuple[int, int]:
    """Rows and columns of a square page; those of a long one are more together, and its queries wider."""
    side = math.isqrt(_lengths(config, pixels).tower)
    return side, side


def _layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    """Four norms, norms of queries, keys and values, a gated MLP, and outputs before and behind they are clipped."""
    width, inner, compute, heads = sizes.width, sizes.inner, part.compute, sizes.heads
    kept = gemma_norms(width, part, fresh=2, passed=2) + part.stream * width + 4 * FLOAT  # a second root for each norm
    kept += 3 * FLOAT * (sizes.attended + 2 * heads) + (2 * FLOAT * sizes.attended if part.trains else 0)
    kept += 4 * compute * heads * sizes.folded + FLOAT * heads
    kept += part.product_inputs(width, 3) + part.product_inputs(sizes.attended, 1) + part.product_inputs(width, 2)
    kept += (3 + part.trains) * compute * inner
    if config.vision_config.use_clipped_linears:
        kept += compute * (5 * width + 4 * sizes.attended + 3 * inner)
    return kept


def _outer(recipe: Any, config: Any, lengths: Lengths, part: Precision, batch: int) -> int:
    """The means over patches are a product with a matrix."""
    return FLOAT * batch * lengths.tower * lengths.image


def _projector(part: Precision, tower: Precision, config: Any) -> int:
    """The means over patches in float32, a norm without a weight, and one linear layer."""
    width = config.vision_config.hidden_size
    return FLOAT * width * 2 + 2 * FLOAT + part.product_inputs(width, 1)


def _decoder(recipe: Any, config: Any, sizes: Widths, part: Precision, masked: int) -> int:
    """The mean over layers: those that see all tokens have wider heads, and the later ones no keys and a wider MLP."""
    text, width, compute = config.text_config, sizes.width, part.compute
    small, kept = text.hidden_size_per_layer_input, 0
    for number in range(text.num_hidden_layers):
        layer = text.per_layer_config[number]
        attended, keys = text.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        shared = number >= text.num_hidden_layers - text.num_kv_shared_layers
        inner = sizes.inner * (2 if shared and text.use_double_wide_mlp else 1)
        kept += gemma_attention(attended, 0 if shared else keys, sizes.heads, part, masked) + 3 * compute * inner
        kept += 0 if shared else FLOAT * keys
        if part.trains or recipe.lora_llm:
            kept += compute * inner
    kept //= text.num_hidden_layers
    kept += gemma_norms(width, part, fresh=2, passed=2) + part.stream * width + 4 * FLOAT
    kept += (FLOAT * width + 2 * FLOAT + 2 * compute * small) if small else 0
    if part.trains or recipe.lora_llm:
        adapted = Precision(part.stream, compute, True, compute != FLOAT)
        kept += adapted.product_inputs(width, 3) + adapted.product_inputs(width, 2)
        kept += 7 * compute * recipe.lora_llm
    return kept


def _decoder_outer(config: Any, part: Precision) -> int:
    """What is added in each layer."""
    text = config.text_config
    return text.num_hidden_layers * text.hidden_size_per_layer_input * (FLOAT + part.compute)


def _decoder_logits(config: Any, part: Precision) -> int:
    """The logits before they are bounded."""
    text = config.text_config
    return part.compute * text.vocab_size if text.final_logit_softcapping else 0


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
        images=ImageRules(setting="max_pixels", options=_options, token_grids=_token_grids),
        image_tokens=ImageTokens(kind="pixel_shuffle", side=_side),
        memory=MemoryRules(
            lengths=_lengths,
            tower=_tower,
            layer=_layer,
            projector=_projector,
            fixed_grid=False,
            grid=_grid,
            outer=_outer,
            decoder=_decoder,
            decoder_outer=_decoder_outer,
            decoder_logits=_decoder_logits,
        ),
        nano=_nano,
        refuses={
            "adat": "its tower has no fixed grid of patches. Leave adat out; for fewer tokens set max_pixels.",
            "dymu": "its tower pads pages of any aspect, and tokens merge on a fixed grid only. For fewer tokens set "
            "max_pixels.",
            "fastv": "most layers of its language model see a window of tokens, which would reach further back once "
            "some are gone, and later layers reuse the keys of earlier ones. For fewer image tokens set max_pixels.",
            "heads": "later layers of its language model reuse the keys and values of earlier ones, so heads of one "
            "layer cannot go alone. Prune heads of another host.",
            "text_density": "the density of text is not measured for a host without a fixed grid of patches.",
        },
    )
)
