"""`PatchGroups`: the patches of a still image as a flat tower is given them, and those that become one image token.

What reads pixels of such a tower (text density) or leaves patches out (`drop_blank_groups`) needs to know in which
order the processor lists them; see `Backbone.patch_groups`.

Shape letters: N patches of an image, p side of a patch in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfa_adapters.arrangement import TokenOrder

__all__ = ["PatchGroups"]


@dataclass(frozen=True)
class PatchGroups:
    """The form of the patches that a flat tower is given.

    Attributes:
        order: In which order the processor lists them.
        side: Patches along one side of an image token.
        patch: Side of a patch in pixels.
    """

    order: TokenOrder
    side: int
    patch: int

    def page(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Puts the patches of a still image together again.

        Args:
            patches: `[N, ...]`, of each patch 3 channels, then its frames, all the same, then its rows.
            grid: Rows and columns of patches.

        Returns:
            `[3, height, width]`, float32.
        """
        row, column = (place.to(patches.device) for place in self.order.places(*grid))
        pixels = patches.float().reshape(len(patches), 3, -1, self.patch, self.patch)[:, :, 0]
        canvas = pixels.new_empty(*grid, *pixels.shape[1:])
        canvas[row, column] = pixels
        return canvas.permute(2, 0, 3, 1, 4).reshape(3, grid[0] * self.patch, grid[1] * self.patch)

    def strip(self, keep: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Lays kept groups side by side, in the order in which the processor would list such a strip.

        A model that joins `side` x `side` patches after its tower by their order alone then joins the right ones.

        Args:
            keep: Which groups of an image are kept, bool `[group rows, group columns]`.

        Returns:
            Which of the image's patches stand in the strip, `[kept patches]`, numbered as the processor lists them, and
            rows and columns of the strip.
        """
        side, grid = self.side, (keep.shape[0] * self.side, keep.shape[1] * self.side)
        number = torch.empty(grid, dtype=torch.long)
        number[self.order.places(*grid)] = torch.arange(grid[0] * grid[1])
        groups = number.unfold(0, side, side).unfold(1, side, side)[keep.cpu()]  # [kept, side, side]
        laid = groups.transpose(0, 1).reshape(side, -1)
        return laid[self.order.places(*laid.shape)], (laid.shape[0], laid.shape[1])
