"""The towers of Llama 4 and Llama 3.2 Vision: CLS tokens behind the patches, or in front of each tile.

Llama 4 sees tiles one by one, with a CLS token at the end of each; its attention has an argument for a mask and does
not use it, but hands a `position_bias` on.

Llama 3.2 Vision (Mllama) puts up to four tiles of an image into one sequence: of each tile its CLS token, its patches
row by row, and padding up to a multiple of eight. A patch has the place that it has on the whole image. CLS tokens,
padding and unused tiles have none; the tower lets them take part in attention, and so does the bias, with phi = 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sfa_adapters.arrangement import ImageTokens, Listed, Raster, TokenArrangement
from sfa_adapters.errors import LayoutError
from sfa_adapters.family import Member, attention_patterns, grid_behind_prefix, tower_patterns
from sfa_adapters.pixel_grids import config_grid, pixel_grid
from sfa_adapters.registry import Backbone, Geometry, register_backbone

LLAMA4_MEMBERS = (Member("llama4", "Llama4VisionModel", "Llama4VisionAttention"),)
MLLAMA_MEMBERS = (Member("mllama", "MllamaVisionModel", "MllamaVisionAttention"),)
# Mllama pads each tile to a multiple of this many tokens.
TILE_MULTIPLE = 8


def llama4_layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> ImageTokens | None:
    """One grid for all tiles, and a CLS token behind it."""
    grid = pixel_grid(tower, args, kwargs)
    if grid is None:
        return None
    count = grid[0] * grid[1]
    return ImageTokens(grid, without_place=((count, count + 1),))


LLAMA4 = register_backbone(
    Backbone(
        name="llama4",
        towers=tower_patterns(LLAMA4_MEMBERS),
        attentions=attention_patterns(LLAMA4_MEMBERS),
        geometry=grid_behind_prefix(LLAMA4_MEMBERS),
        layouts=llama4_layouts,
        mask_argument="position_bias",
        small_towers="sfa_adapters.testing.towers_llama:LLAMA4",
    )
)


def mllama_geometry(tower: nn.Module) -> Geometry:
    """Images of one to `max_num_tiles` tiles, beside and below each other."""
    return Geometry(grid=None, prefix_tokens=0)


def mllama_layouts(tower: nn.Module, args: tuple[Any, ...], kwargs: Any) -> TokenArrangement:
    """The tokens of all tiles of each image; how its tiles lie says its aspect ratio id.

    Raises:
        LayoutError: An aspect ratio id is not known, or has more tiles than the images have.
    """
    model: Any = tower
    given = dict(zip(("pixel_values", "aspect_ratio_ids"), args, strict=False))
    pixels = given.get("pixel_values", kwargs.get("pixel_values"))
    ids = given.get("aspect_ratio_ids", kwargs.get("aspect_ratio_ids"))
    side = config_grid(tower)
    ratios = [tuple(ratio) for ratio in model.config.supported_aspect_ratios]
    tiles = int(pixels.shape[2])
    images: dict[int, ImageTokens] = {}
    for number in set(ids.flatten().tolist()):
        if not 0 <= number <= len(ratios) or (number and ratios[number - 1][0] * ratios[number - 1][1] > tiles):
            raise LayoutError(
                f"aspect_ratio_ids has {number}; ids are 0 (no image) to {len(ratios)}, for the tiles "
                f"{ratios} of the configuration, and pixel_values has {tiles} tiles for each image."
            )
        images[number] = tiled_image(ratios[number - 1] if number else (0, 0), side, tiles)
    return TokenArrangement("padded", tuple(images[number] for number in ids.flatten().tolist()))


def tiled_image(shape: tuple[int, int], side: tuple[int, int], tiles: int) -> ImageTokens:
    """An image of `shape` rows and columns of tiles, of `side` patches each, in a sequence of `tiles` tiles.

    Args:
        shape: Rows and columns of tiles, (0, 0) for no image.
        side: Rows and columns of patches of a tile.
        tiles: Tiles in the sequence, unused ones included.
    """
    count, used = side[0] * side[1], shape[0] * shape[1]
    length = -(-(count + 1) // TILE_MULTIPLE) * TILE_MULTIPLE
    row, column = Raster().places(*side)
    starts = [(tile // shape[1] * side[0], tile % shape[1] * side[1]) for tile in range(used)]
    rows = torch.cat([row + top for top, _ in starts] or [row[:0]])
    columns = torch.cat([column + left for _, left in starts] or [column[:0]])
    # Between the patches of two tiles: the padding of the one and the CLS token of the other.
    ends = [0, *(tile * length + 1 + count for tile in range(used))]
    starts_of_patches = [*(tile * length + 1 for tile in range(used)), tiles * length]
    without_place = tuple((end, start) for end, start in zip(ends, starts_of_patches, strict=True) if end < start)
    grid = (max(shape[0], 1) * side[0], max(shape[1], 1) * side[1])
    return ImageTokens(grid, Listed.of(torch.stack((rows, columns), -1)), without_place=without_place)


MLLAMA = register_backbone(
    Backbone(
        name="mllama",
        towers=tower_patterns(MLLAMA_MEMBERS),
        attentions=attention_patterns(MLLAMA_MEMBERS),
        geometry=mllama_geometry,
        layouts=mllama_layouts,
        joined="padded",
        small_towers="sfa_adapters.testing.towers_llama:MLLAMA",
    )
)
