"""How the tokens of one forward of a tower lie: grid and token order of each image, and how images are joined.

A backbone says it (`Backbone.layouts`); everything that has to know where a token stands on the page reads it here.
What is said is hashable, so that layouts are built once for each arrangement and not once for each forward.

Shape letters: N tokens of an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from sfa_adapters.errors import LayoutError
from sfa_adapters.layout import TokenLayout

__all__ = ["ImageTokens", "Joined", "Listed", "MergeGroups", "Raster", "TokenArrangement", "TokenOrder", "Windows"]

# How the images of a forward are put together:
#   batch     `[B, N, width]`, one grid for all of them
#   padded    `[B, N, width]`, a grid for each image; tokens behind its own are padding, which nothing attends to
#   packed    `[1, all tokens, width]`, images behind one another, kept apart by a block-diagonal mask
#   segments  `[all tokens, width]` or `[1, all tokens, width]`, one attention computation for each segment between two
#             boundaries (`cu_seqlens`); a segment is an image, a frame or a window of one
Joined = Literal["batch", "padded", "packed", "segments"]


class TokenOrder(Protocol):
    """In which order a sequence lists the patches of a grid. Equal orders must be equal and have one hash."""

    def places(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Row and column of each token, `[N]` each, in patches from the upper left corner."""
        ...


@dataclass(frozen=True)
class Raster:
    """Row by row, from the upper left corner."""

    def places(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """As in `TokenOrder`."""
        return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)


@dataclass(frozen=True)
class MergeGroups:
    """Groups of `side` x `side` patches row by row, and inside each group its patches row by row.

    The order in which the processors of Qwen-VL, GLM-V and their relatives list patches that the model will merge.

    Attributes:
        side: Patches per side of a group.
    """

    side: int

    def places(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """As in `TokenOrder`.

        Raises:
            LayoutError: The grid has no whole groups.
        """
        return Windows(self.side, max(rows, columns)).places(rows, columns)


@dataclass(frozen=True)
class Windows:
    """Merge groups as in `MergeGroups`, sorted by windows of `window` x `window` groups, ragged at the borders.

    Attributes:
        side: Patches per side of a group.
        window: Groups per side of a window.
    """

    side: int
    window: int

    def places(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """As in `TokenOrder`.

        Raises:
            LayoutError: The grid has no whole groups.
        """
        if rows % self.side or columns % self.side:
            raise LayoutError(
                f"A grid of {rows}x{columns} patches has no whole {self.side}x{self.side} groups; both sides must be "
                f"multiples of {self.side} (check image_grid_thw, and that the processor is that of this model)."
            )
        group_rows, group_columns = rows // self.side, columns // self.side
        row, column = Raster().places(group_rows, group_columns)
        across = -(-group_columns // self.window)
        number = (row // self.window) * across + column // self.window
        order = torch.argsort(number * self.window**2 + (row % self.window) * self.window + column % self.window)
        inner_row, inner_column = Raster().places(self.side, self.side)
        row = (row[order, None] * self.side + inner_row).flatten()
        return row, (column[order, None] * self.side + inner_column).flatten()


@dataclass(frozen=True)
class Listed:
    """Any order, or a part of the grid: the places themselves.

    Attributes:
        rows: Row of each token, in patches.
        columns: Column of each token, in patches.
    """

    rows: tuple[float, ...]
    columns: tuple[float, ...]

    @classmethod
    def of(cls, places: Tensor) -> Listed:
        """From rows and columns `[N, 2]`."""
        row, column = places.unbind(-1)
        return cls(tuple(row.tolist()), tuple(column.tolist()))

    def places(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """As in `TokenOrder`; `TokenLayout` refuses places outside of the grid."""
        return torch.tensor(self.rows), torch.tensor(self.columns)


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of one image, without prefix tokens.

    Attributes:
        grid: Rows and columns of patches.
        order: In which order the sequence lists them; None is row by row (`Raster`).
        frames: How often the grid is listed: the frames of a video, one behind the other.
        padding: Padding tokens behind them; of towers that pad.
    """

    grid: tuple[int, int]
    order: TokenOrder | None = None
    frames: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if min(self.grid) < 1 or self.frames < 1 or self.padding < 0:
            raise LayoutError(
                f"An image needs tokens: got a grid of {self.grid[0]}x{self.grid[1]} patches, {self.frames} frames and "
                f"{self.padding} padding tokens."
            )

    @property
    def num_tokens(self) -> int:
        """N, of all frames, without padding."""
        one = len(self.order.rows) if isinstance(self.order, Listed) else self.grid[0] * self.grid[1]
        return one * self.frames

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each token, `[N]` each.

        Raises:
            LayoutError: The order does not fit the grid.
        """
        row, column = (self.order or Raster()).places(*self.grid)
        return row.repeat(self.frames), column.repeat(self.frames)

    def layout(self, prefix_tokens: int, block_map: Tensor | None) -> TokenLayout:
        """The layout of the image's tokens behind `prefix_tokens` prefix tokens; padding is not in it.

        Raises:
            LayoutError: The order does not fit the grid.
        """
        if (self.order is None or isinstance(self.order, Raster)) and self.frames == 1:
            return TokenLayout.regular(*self.grid, prefix_tokens, block_map)
        row, column = self.places()
        return TokenLayout.from_boxes(row, column, torch.ones(len(row)), self.grid, prefix_tokens, block_map)


@dataclass(frozen=True)
class TokenArrangement:
    """How the tokens of one forward lie.

    Attributes:
        joined: How the images are put together.
        images: The images in order; one for `batch`, where they share a grid.
        prefix_tokens: Leading tokens of each image without a place on the page.

    Raises:
        LayoutError: There is no image, a segmented tower has prefix tokens, or padded images differ in length.
    """

    joined: Joined
    images: tuple[ImageTokens, ...]
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.joined not in get_args(Joined):
            raise LayoutError(f"joined={self.joined!r} must be one of {', '.join(get_args(Joined))}.")
        if not self.images:
            raise LayoutError("A forward needs at least one image; its list of images (or their grids) is empty.")
        if self.joined == "segments" and self.prefix_tokens:
            raise LayoutError("The images of a segmented tower have no prefix tokens here; describe them as `packed`.")
        lengths = {image.num_tokens + image.padding for image in self.images}
        if self.joined == "padded" and len(lengths) > 1:
            raise LayoutError(f"Padded images must have one length; with their padding they have {sorted(lengths)}.")
        if self.joined == "batch" and len(self.images) > 1:
            raise LayoutError(f"A batch has one grid for all images, which is given once; got {len(self.images)}.")

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that an attention layer sees, prefix and padding included."""
        lengths = [self.prefix_tokens + image.num_tokens + image.padding for image in self.images]
        return sum(lengths) if self.joined in ("packed", "segments") else lengths[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the first image; of all of them where they share one grid."""
        return self.images[0].grid

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each image, prefix tokens included, without padding."""
        return tuple(self.prefix_tokens + image.num_tokens for image in self.images)

    def image_layouts(self, block_map: Tensor | None) -> list[TokenLayout]:
        """One layout for each image; equal images share one object."""
        known = {image: image.layout(self.prefix_tokens, block_map) for image in set(self.images)}
        return [known[image] for image in self.images]

    def layout(self, block_map: Tensor | None) -> TokenLayout:
        """The layout of a `batch` (one for all images) or of `padded` images (one row for each)."""
        if self.joined == "batch":
            return self.images[0].layout(self.prefix_tokens, block_map)
        return TokenLayout.batch(self.image_layouts(block_map), self.num_tokens)

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(image.num_tokens for image in self.images))

    def segments(self, bounds: Sequence[int], block_map: Tensor | None) -> list[TokenLayout]:
        """The layout of each segment; distances are relative to the whole image, also inside a window.

        Args:
            bounds: Where segments begin and end, ascending from 0; `cu_seqlens`.
            block_map: As in `TokenLayout.regular`.

        Raises:
            LayoutError: A segment reaches over the border of an image, or is empty.
        """
        places = {image: image.places() for image in set(self.images)}
        layouts: list[TokenLayout] = []
        number = 0
        for start, stop in itertools.pairwise(bounds):
            while number < len(self._ends) and self._ends[number] <= start:
                number += 1
            if start >= stop or number == len(self._ends) or stop > self._ends[number]:
                raise LayoutError(f"Segment {start}..{stop} does not lie inside one image; images end at {self._ends}.")
            image = self.images[number]
            first = self._ends[number] - image.num_tokens
            row, column = (axis[start - first : stop - first] for axis in places[image])
            layouts.append(TokenLayout.from_boxes(row, column, torch.ones(len(row)), image.grid, block_map=block_map))
        return layouts
