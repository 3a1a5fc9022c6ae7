"""Token counts of a recipe's images and questions and widths of its layers, from which memory is predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.folded import native_width
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.pixel_grids import pair
from sfa_adapters.vlm.records import vlm_spec
from sfa_adapters.vlm.sizes import TEXT_TOKENS, Lengths, MemoryRules, Widths

__all__ = ["TEXT_TOKENS", "Lengths", "Widths", "lengths_of", "memory_rules", "text_widths", "vision_widths"]


def memory_rules(recipe: Recipe) -> MemoryRules:
    """The memory rules in the record of a recipe's host.

    Raises:
        RecipeError: The record has none.
    """
    spec = vlm_spec(recipe.family)
    spec.require("memory")
    assert spec.memory is not None
    return spec.memory


def lengths_of(recipe: Recipe, config: Any, tiles: int | None = None, answer_tokens: int | None = None) -> Lengths:
    """Tokens of one question with the largest image that the recipe allows.

    Args:
        recipe: `max_tiles` or `max_pixels` is used.
        config: The host's configuration.
        tiles: Tiles of the image in place of `max_tiles`, for hosts that tile.
        answer_tokens: Tokens of the longest answer, which come on top of the 96 of template and question. By default
            these 96 have the answer in them, and any of them may have a label.

    Raises:
        RecipeError: The host does not tile, or cannot cut this number of tiles; or `answer_tokens` is below 1.
    """
    spec, rules = vlm_spec(recipe.family), memory_rules(recipe)
    setting = None if spec.images is None else spec.images.setting
    if setting == "max_pixels" and tiles is not None:
        raise RecipeError(f"tiles={tiles}: {spec.title} does not tile; set max_pixels (now {recipe.max_pixels}).")
    if setting is None and tiles not in (None, 1):
        raise RecipeError(f"tiles={tiles}: {spec.title} sees one tile.")
    if tiles is not None and tiles < 1:
        raise RecipeError(f"tiles={tiles} must be at least 1.")
    lengths = rules.lengths(config, recipe.image_limit if tiles is None else tiles)
    if answer_tokens is None:
        return lengths
    if answer_tokens < 1:
        raise RecipeError(f"answer_tokens={answer_tokens} must be at least 1.")
    return replace(lengths, text=lengths.text + answer_tokens, answer=answer_tokens)


def vision_widths(recipe: Recipe, config: Any) -> Widths:
    """Widths of the tower's layers and their number, those that the host reads."""
    rules = memory_rules(recipe)
    sizes = rules.tower(config)
    if not recipe.sfa or not (rules.fixed_grid or rules.grid):
        return sizes
    if rules.grid is not None:
        rows, columns = rules.grid(config, recipe.image_limit)
    else:
        (height, width), (down, across) = pair(config.vision_config.image_size), pair(config.vision_config.patch_size)
        rows, columns = height // down, width // across
    # One-hot rows and columns without the last of each, the prefix key, and the block term.
    wide = sizes.folded + (rows - 1) + (columns - 1) + rules.prefix_tokens + 1
    return replace(sizes, folded=native_width(wide))


def text_widths(config: Any) -> Widths:
    """Widths of the language model's layers and their number; of its first layer where they differ."""
    text = config.text_config
    layers = getattr(text, "per_layer_config", None)
    layer = layers[0] if layers else text
    head = getattr(layer, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = layer.num_key_value_heads or text.num_attention_heads
    return Widths(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        head * text.num_attention_heads,
        head * keys,
        head,
    )
