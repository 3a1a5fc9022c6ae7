"""How many tokens a recipe's images and questions become, and how wide they are: what memory is counted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfa_adapters.attention import HEAD_WIDTHS
from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.registry import pair

__all__ = ["TEXT_TOKENS", "Lengths", "Widths", "lengths_of", "text_widths", "vision_widths"]

# Chat template, question and answer of a ChartQA row; the longest of its questions is about twice that.
TEXT_TOKENS = 96
# Where LLaVA-OneVision stops adding tokens: `anyres_max_9` times the tokens of a tile.
ANYRES_TILES = 9


@dataclass(frozen=True)
class Lengths:
    """Tokens of one question.

    Attributes:
        pixels: Pixels that the tower gets, over all tiles.
        tower: Tokens in the tower, over all tiles, with prefix tokens.
        image: Image tokens in the language model.
        text: Tokens of the text.
    """

    pixels: int
    tower: int
    image: int
    text: int = TEXT_TOKENS

    @property
    def sequence(self) -> int:
        """Tokens in the language model."""
        return self.image + self.text


@dataclass(frozen=True)
class Widths:
    """Sizes of one kind of layer.

    Attributes:
        layers: How many.
        width: Of the residual stream.
        inner: Of the MLP.
        heads: Of the queries.
        attended: Width of all queries together.
        keys: Width of all keys together.
        folded: Width of a query with a structural bias folded in; of a plain one without.
    """

    layers: int
    width: int
    inner: int
    heads: int
    attended: int
    keys: int
    folded: int


def lengths_of(recipe: Recipe, config: Any, tiles: int | None = None) -> Lengths:
    """Tokens of one question with the largest image that the recipe lets in.

    Args:
        recipe: `max_tiles` or `max_pixels` is used.
        config: The host's configuration.
        tiles: Tiles of the image in place of `max_tiles`, for hosts that tile.

    Raises:
        RecipeError: The host does not tile, or cannot cut so few tiles.
    """
    vision = config.vision_config
    if recipe.family == "qwen2_5_vl":
        if tiles is not None:
            raise RecipeError(f"tiles={tiles}: Qwen2.5-VL does not tile; set max_pixels (now {recipe.max_pixels}).")
        group = (vision.patch_size * vision.spatial_merge_size) ** 2
        tokens = max(1, recipe.max_pixels // group)
        # Every patch comes twice, as two frames of a film.
        return Lengths(2 * tokens * group, tokens * vision.spatial_merge_size**2, tokens)
    (height, width), (down, across) = pair(vision.image_size), pair(vision.patch_size)
    patches = (height // down) * (width // across)
    if recipe.family == "llava":
        if tiles not in (None, 1):
            raise RecipeError(f"tiles={tiles}: LLaVA-1.5 sees one tile.")
        return Lengths(height * width, patches + 1, patches)
    most = recipe.max_tiles if tiles is None else tiles
    if most < 1:
        raise RecipeError(f"tiles={tiles} must be at least 1.")
    if recipe.family == "internvl":
        count = most + (most > 1)  # the whole page as a thumbnail beside its tiles
        return Lengths(count * height * width, count * (patches + 1), count * int(patches * config.downsample_ratio**2))
    return _anyres(config, most, height, height // down)


def _anyres(config: Any, most: int, side: int, patches: int) -> Lengths:
    """LLaVA-OneVision: the page as one tile, and cut into tiles; a newline token ends each row of the cut page."""
    grids = [(max(1, h // side), max(1, w // side)) for h, w in config.image_grid_pinpoints]
    fitting = [grid for grid in grids if grid[0] * grid[1] <= most]
    if not fitting:
        raise RecipeError(f"tiles={most}: this host cuts into at least {min(h * w for h, w in grids)} tiles.")
    count = 1 + max(h * w for h, w in fitting)

    def tokens(grid: tuple[int, int]) -> int:
        scale = max(1.0, (grid[0] * grid[1] / ANYRES_TILES) ** 0.5)
        rows, columns = int(grid[0] * patches / scale), int(grid[1] * patches / scale)
        return rows * (columns + 1)

    image = patches**2 + max(tokens(grid) for grid in fitting)
    return Lengths(count * side**2, count * patches**2, image)


def vision_widths(recipe: Recipe, config: Any) -> Widths:
    """Sizes of a tower's layers."""
    vision = config.vision_config
    qwen = recipe.family == "qwen2_5_vl"
    heads = vision.num_heads if qwen else vision.num_attention_heads
    layers = vision.depth if qwen else vision.num_hidden_layers
    own = vision.hidden_size // heads
    folded = own
    if recipe.sfa and not qwen:
        (height, width), (down, across) = pair(vision.image_size), pair(vision.patch_size)
        prefix = 0 if recipe.family == "llava_onevision" else 1
        # One-hot rows and columns without the last of each, the prefix key, and the block term.
        wide = own + (height // down - 1) + (width // across - 1) + prefix + 1
        folded = next((native for native in HEAD_WIDTHS if native >= wide), -(-wide // 8) * 8)
    return Widths(
        layers, vision.hidden_size, vision.intermediate_size, heads, vision.hidden_size, vision.hidden_size, folded
    )


def text_widths(config: Any) -> Widths:
    """Sizes of a language model's layers."""
    text = config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads or text.num_attention_heads
    return Widths(
        text.num_hidden_layers,
        text.hidden_size,
        text.intermediate_size,
        text.num_attention_heads,
        head * text.num_attention_heads,
        head * keys,
        head,
    )
