"""What is done to an image before the host's own processor gets it, and which options that processor gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sfa_adapters.data.rows import Box
from sfa_adapters.errors import RecipeError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from sfa_adapters.hosts.recipe import Family, Recipe

__all__ = ["Page", "page_of", "processor_options"]


@dataclass(frozen=True, eq=False)
class Page:
    """An image as the processor gets it.

    Attributes:
        image: uint8 `[H, W, 3]`.
        given: Width and height of the image that was given.
        inner: Width and height that it takes in `image`; the rest is padding.
        offset: (left, top) of its corner there.
    """

    image: np.ndarray
    given: tuple[int, int]
    inner: tuple[int, int]
    offset: tuple[int, int] = (0, 0)

    def place(self, box: Box, source: tuple[int, int] | None = None) -> Box:
        """A box (left, top, right, bottom) of the given image, or of one of size `source`, in pixels of `image`."""
        width, height = self.given if source is None else source
        across, down = self.inner[0] / width, self.inner[1] / height
        x, y = self.offset
        return (box[0] * across + x, box[1] * down + y, box[2] * across + x, box[3] * down + y)


def processor_options(processor: ProcessorMixin, family: Family, recipe: Recipe) -> dict[str, Any]:
    """Options for the host's image processor that follow from the recipe.

    Raises:
        RecipeError: The processor cannot keep to `max_tiles` or `max_pixels`.
    """
    own: Any = getattr(processor, "image_processor", None)
    if own is None:
        raise RecipeError(f"{type(processor).__name__} has no image processor; load it from the host.")
    if family == "internvl":
        return {"crop_to_patches": recipe.max_tiles > 1, "min_patches": 1, "max_patches": recipe.max_tiles}
    if family == "qwen2_5_vl":
        least = (own.patch_size * own.merge_size) ** 2
        if recipe.max_pixels < least:
            raise RecipeError(f"max_pixels={recipe.max_pixels} must be at least {least}, one image token.")
        smallest = min(int(own.size["shortest_edge"]), recipe.max_pixels)
        return {"size": {"shortest_edge": smallest, "longest_edge": recipe.max_pixels}}
    if family == "llava_onevision":
        fewest = min(tiles_of(point, tile_side(own)) for point in own.image_grid_pinpoints)
        if fewest > recipe.max_tiles:
            raise RecipeError(f"max_tiles={recipe.max_tiles} must be at least {fewest}: the host cuts into no fewer.")
    return {}


def page_of(image: np.ndarray, processor: ProcessorMixin, family: Family, recipe: Recipe) -> Page:
    """Prepares an image, uint8 `[H, W, 3]`.

    * LLaVA-1.5 learned on pages padded to a square, but its processor on the hub cuts the middle out: what stands at
      the sides would be lost. Pages are padded with the mean colour here.
    * LLaVA-OneVision cuts a page into as many tiles as fit its size. Where these are more than `max_tiles` the page is
      made smaller first; options of the processor would not do, because the model goes by the size as well.
    """
    own: Any = getattr(processor, "image_processor", None)
    size = image.shape[1], image.shape[0]
    if family == "llava" and own.do_center_crop and size[0] != size[1]:
        side = max(size)
        offset = (side - size[0]) // 2, (side - size[1]) // 2
        return Page(_squared(image, own.image_mean, offset), size, size, offset)
    if family == "llava_onevision":
        smaller = _within(image, own, recipe.max_tiles)
        return Page(smaller, size, (smaller.shape[1], smaller.shape[0]))
    return Page(image, size, size)


def tile_side(image_processor: Any) -> int:
    """Side of a tile of LLaVA-OneVision in pixels."""
    size = image_processor.size
    return int(size["height"] if size.get("height") else size["shortest_edge"])


def tiles_of(point: Sequence[int], side: int) -> int:
    """How many tiles a resolution (height, width) is cut into."""
    return (point[0] // side) * (point[1] // side)


def _squared(image: np.ndarray, mean: Sequence[float], offset: tuple[int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * value) for value in mean]
    square[offset[1] : offset[1] + height, offset[0] : offset[0] + width] = image
    return square


def _within(image: np.ndarray, own: Any, most: int) -> np.ndarray:
    from transformers.image_processing_utils import select_best_resolution

    height, width = image.shape[:2]
    side, points = tile_side(own), [list(point) for point in own.image_grid_pinpoints]
    if tiles_of(select_best_resolution((height, width), points), side) <= most:
        return image
    target = select_best_resolution((height, width), [p for p in points if tiles_of(p, side) <= most])
    ratio = min(target[0] / height, target[1] / width)
    size = max(1, int(width * ratio)), max(1, int(height * ratio))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
