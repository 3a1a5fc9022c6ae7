"""LLaVA-OneVision: a SigLIP tower, pages as one tile and cut into tiles, packed with newline tokens, Qwen2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sfa_adapters.errors import RecipeError
from sfa_adapters.vlm.page import Page
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import Lengths, MemoryRules, mlp_projector, vit_layer, vit_widths
from sfa_adapters.vlm.spec import ImageRules, ImageTokens, VLMSpec

__all__ = ["SPEC", "tile_side", "tiles_of"]

# Where the host stops adding tokens: `anyres_max_9` times the tokens of a tile.
ANYRES_TILES = 9


def tile_side(image_processor: Any) -> int:
    """Side of a tile in pixels, from the image processor."""
    size = image_processor.size
    return int(size["height"] if size.get("height") else size["shortest_edge"])


def tiles_of(point: Sequence[int], side: int) -> int:
    """Number of tiles of a resolution.

    Args:
        point: Height and width in pixels.
        side: Side of a tile in pixels.
    """
    return (point[0] // side) * (point[1] // side)


def _options(processor: Any, tiles: int) -> dict[str, Any]:
    fewest = min(tiles_of(point, tile_side(processor)) for point in processor.image_grid_pinpoints)
    if fewest > tiles:
        raise RecipeError(f"max_tiles={tiles} must be at least {fewest}: the host cuts into no fewer.")
    return {}


def _page(image: np.ndarray, processor: Any, tiles: int) -> Page:
    """Shrinks a page that the host would cut into too many tiles.

    The number of tiles follows from the size of the page. Options of the processor are not enough, because the model
    uses the size of the page as well.
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = image.shape[:2]
    side, points = tile_side(processor), [list(point) for point in processor.image_grid_pinpoints]
    if tiles_of(select_best_resolution((height, width), points), side) <= tiles:
        return Page.unchanged(image)
    target = select_best_resolution((height, width), [p for p in points if tiles_of(p, side) <= tiles])
    ratio = min(target[0] / height, target[1] / width)
    size = max(1, int(width * ratio)), max(1, int(height * ratio))
    from PIL import Image  # not among the dependencies of the library itself

    smaller = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    return Page(smaller, (width, height), size)


def _lengths(config: Any, tiles: int) -> Lengths:
    """The page as one tile, and cut into tiles; a newline token ends each row of the cut page."""
    vision = config.vision_config
    side, patches = vision.image_size, vision.image_size // vision.patch_size
    grids = [(max(1, h // side), max(1, w // side)) for h, w in config.image_grid_pinpoints]
    fitting = [grid for grid in grids if grid[0] * grid[1] <= tiles]
    if not fitting:
        raise RecipeError(f"tiles={tiles}: this host cuts into at least {min(h * w for h, w in grids)} tiles.")
    count = 1 + max(h * w for h, w in fitting)

    def tokens(grid: tuple[int, int]) -> int:
        scale = max(1.0, (grid[0] * grid[1] / ANYRES_TILES) ** 0.5)
        rows, columns = int(grid[0] * patches / scale), int(grid[1] * patches / scale)
        return rows * (columns + 1)

    image = patches**2 + max(tokens(grid) for grid in fitting)
    return Lengths(count * side**2, count * patches**2, image)


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts import llava_onevision

    return llava_onevision()


SPEC = register_vlm(
    VLMSpec(
        name="llava_onevision",
        title="LLaVA-OneVision",
        model_type="llava_onevision",
        model_class="LlavaOnevisionForConditionalGeneration",
        # The token that ends a row of tiles is a bare parameter of the model.
        projector=("model.multi_modal_projector", "model.image_newline"),
        classes=(
            "transformers.models.llava_onevision.*.LlavaOnevisionForConditionalGeneration",
            "transformers.models.llava_onevision.*.LlavaOnevisionModel",
        ),
        unread=("post_layernorm", "head"),
        images=ImageRules(setting="max_tiles", options=_options, page=_page),
        image_tokens=ImageTokens(kind="packed_tiles", page_first=True),
        memory=MemoryRules(
            lengths=_lengths, tower=vit_widths, layer=vit_layer, projector=mlp_projector, output_read=True
        ),
        nano=_nano,
        # It is pretrained, and would forget at the learning rate of random weights.
        nano_settings={"lr": 1e-4},
    )
)
