"""Images whose tokens bring their rows and columns along, in rows of one length: Gemma 4, Pix2Struct, NaFlex.

Shape letters: B images, N tokens of a padded row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfa_adapters.arrangement import ImageTokens, Listed, Raster
from sfa_adapters.errors import LayoutError

__all__ = ["placed_images", "sized_images"]


def placed_images(places: Tensor, real: Tensor) -> list[ImageTokens]:
    """The tokens of each image, from where each token lies; the grid reaches to the largest row and column.

    Args:
        places: Row and column of each token, from 0, `[B, N, 2]`; anything at padding.
        real: Which tokens are no padding, bool, `[B, N]`.

    Raises:
        LayoutError: An image has no token, padding stands between its tokens, or a row or column is negative.
    """
    rows, keep = places.detach().cpu().long(), real.detach().cpu().bool()
    return [_image(number, *image) for number, image in enumerate(zip(rows, keep, strict=True))]


def _image(number: int, places: Tensor, real: Tensor) -> ImageTokens:
    count, length = int(real.sum()), len(real)
    if not count or not bool(real[:count].all()):
        what = "has no tokens" if not count else f"has padding in front of some of its {count} tokens"
        raise LayoutError(
            f"Image {number} of the batch {what}. Padding must stand behind the patches of an image, and each image "
            "needs some: pass on what the processor of this model gives."
        )
    places = places[:count]
    if int(places.min()) < 0:
        raise LayoutError(
            f"Image {number} of the batch has a patch at row and column {places[places.amin(-1) < 0][0].tolist()}; "
            "they count from the upper left corner. Pass the places of patches and their mask from the same image."
        )
    grid = (int(places[:, 0].max()) + 1, int(places[:, 1].max()) + 1)
    raster = count == grid[0] * grid[1] and torch.equal(places, torch.stack(Raster().places(*grid), -1))
    return ImageTokens(grid, None if raster else Listed.of(places), padding=length - count)


def sized_images(sizes: Tensor, length: int) -> list[ImageTokens]:
    """The tokens of each image, row by row, from its rows and columns.

    Args:
        sizes: Rows and columns of each image, `[B, 2]`.
        length: N, the tokens of a row with its padding.

    Raises:
        LayoutError: An image has more tokens than a row holds.
    """
    grids = [(int(rows), int(columns)) for rows, columns in sizes.tolist()]
    over = next((grid for grid in grids if grid[0] * grid[1] > length), None)
    if over is not None:
        raise LayoutError(
            f"An image of {over[0]}x{over[1]} patches does not fit into the {length} tokens of its row. Pass the sizes "
            "and the patches from one call of the processor."
        )
    return [ImageTokens(grid, padding=length - grid[0] * grid[1]) for grid in grids]
