"""`Page`: an image as a host's processor gets it, and the places of boxes of the given image in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Box", "Page", "padded_to_square"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Page:
    """An image as the processor gets it.

    Attributes:
        image: uint8 `[H, W, 3]`.
        given: Width and height of the image that was given.
        inner: Width and height of the given image in `image`; the rest is padding.
        offset: (left, top) of its corner there.
    """

    image: np.ndarray
    given: tuple[int, int]
    inner: tuple[int, int]
    offset: tuple[int, int] = (0, 0)

    @classmethod
    def unchanged(cls, image: np.ndarray) -> Page:
        """The image as it was given, uint8 `[H, W, 3]`."""
        size = image.shape[1], image.shape[0]
        return cls(image, size, size)

    def place(self, box: Box, source: tuple[int, int] | None = None) -> Box:
        """A box of the given image in pixels of `image`.

        Args:
            box: (left, top, right, bottom), in pixels of the given image.
            source: Width and height of the image that the box is given for; by default those of the given image.
        """
        width, height = self.given if source is None else source
        across, down = self.inner[0] / width, self.inner[1] / height
        x, y = self.offset
        return (box[0] * across + x, box[1] * down + y, box[2] * across + x, box[3] * down + y)


def padded_to_square(image: np.ndarray, mean: Sequence[float]) -> Page:
    """The image in the middle of a square of the mean colour.

    Args:
        image: uint8 `[H, W, 3]`.
        mean: Mean that images are normalised with, by channel, in [0, 1].
    """
    height, width = image.shape[:2]
    side = max(height, width)
    offset = (side - width) // 2, (side - height) // 2
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * value) for value in mean]
    square[offset[1] : offset[1] + height, offset[0] : offset[0] + width] = image
    return Page(square, (width, height), (width, height), offset)
