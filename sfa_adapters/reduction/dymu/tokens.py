"""`TowerTokens`: where the tokens of one forward of a tower are while they merge, and how they are scattered back.

Until the first merge nothing moves. Then all images are concatenated to one packed sequence, `[1, T, D]`, each with its
prefix tokens first, so that images with different counts need no padding. After the tower every token of the regular
grid gets the value of the one that it is part of.

Shape letters: B images, N initial tokens of an image, T current tokens of all images, T0 initial ones, U current units,
u tokens of a unit, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.layout import TokenLayout
from sfa_adapters.packing import Packing
from sfa_adapters.reduction.dymu.merging import Merged, weighted_mean

__all__ = ["TowerTokens", "group_order", "packed_rows"]


def group_order(height: int, width: int, side: int) -> Tensor:
    """Numbers of the patches of a grid, group by group: groups row by row, patches row by row inside each.

    Args:
        height: Patch rows, whole groups.
        width: Patch columns, whole groups.
        side: Patches along one side of a group.

    Returns:
        int64 `[height * width]`.
    """
    grid = torch.arange(height * width).view(height // side, side, width // side, side)
    return grid.permute(0, 2, 1, 3).flatten()


def packed_rows(lengths: Sequence[int], unit: int, prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the tokens in a packed sequence.

    Args:
        lengths: Units of each image.
        unit: u.
        prefix: Prefix tokens of each image.
        device: Device of the result.

    Returns:
        Rows of the prefix tokens, `[B * prefix]`, and of the units' tokens, `[U, u]`.
    """
    counts = torch.tensor(lengths)
    tokens = prefix + unit * counts
    start = tokens.cumsum(0) - tokens
    image = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    first = torch.arange(len(image)) * unit + prefix * (image + 1)
    prefix_rows = (start[:, None] + torch.arange(prefix)).flatten()
    return prefix_rows.to(device), (first[:, None] + torch.arange(unit)).to(device)


@dataclass(eq=False)
class TowerTokens:
    """The tokens of one forward of a tower.

    Attributes:
        lengths: Initial units of each image.
        unit: u, tokens of a unit.
        prefix: Prefix tokens of each image.
        flat: Whether the tower itself works on one sequence `[T, D]` (Qwen-type).
        packed: Whether the sequence was packed from the start (adaptive tokens).
        order: Order of the patches of one image that makes units contiguous, or None where they are.
        layouts: Makes the initial layout of each image for a block map, prefix included; None for flat towers.
        device: Device of the tokens.
        merged: The current units, None while nothing has merged.
        history: The units in each layer so far.
    """

    lengths: tuple[int, ...]
    unit: int
    prefix: int
    flat: bool
    packed: bool
    order: Tensor | None
    layouts: Callable[[Tensor | None], Sequence[TokenLayout]] | None
    device: torch.device
    merged: Merged | None = None
    history: list[Merged | None] = field(default_factory=list)
    _back: dict[int, Tensor] = field(default_factory=dict)

    # -- reading ------------------------------------------------------------------------------------------------------

    def units(self, states: Tensor) -> Tensor:
        """The states of the units, `[U, u, D]`, from states as the layers have them now."""
        if self.merged is None and not self.flat and not self.packed:
            states = states[:, self.prefix :]
            states = states if self.order is None else states[:, self.order]
            return states.reshape(-1, self.unit, states.shape[-1])
        _, rows = self._rows(self.merged)
        return states.reshape(-1, states.shape[-1])[rows]

    @property
    def log_size(self) -> Tensor:
        """Log of the size of every current token, `[T]`; prefix tokens have size 1."""
        assert self.merged is not None
        _, rows = self._rows(self.merged)
        out = torch.zeros(sum(self.token_lengths), device=self.device)
        return out.index_copy(0, rows.flatten(), self.merged.size.log().repeat_interleave(self.unit))

    @property
    def token_lengths(self) -> tuple[int, ...]:
        """Current tokens of each image."""
        lengths = self.lengths if self.merged is None else self.merged.lengths
        return tuple(self.prefix + self.unit * length for length in lengths)

    def packing(self) -> Packing:
        """The packing for SFA: tokens have the places of their representatives."""
        assert self.merged is not None
        assert self.layouts is not None
        merged, build = self.merged, self.layouts
        index = self._origins(merged).cpu().split(list(self.token_lengths))

        def chosen(block_map: Tensor | None) -> list[TokenLayout]:
            return [layout.select(image_layout) for layout, image_layout in zip(build(block_map), index, strict=True)]

        return Packing(self.token_lengths, chosen)

    def _origins(self, merged: Merged) -> Tensor:
        """Initial number, in its own image, of the representative of every token, `[T]`."""
        image = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(merged.lengths)).to(self.device)
        counts = torch.tensor(self.lengths)
        start = (counts.cumsum(0) - counts).to(self.device)
        within = (merged.origin - start[image])[:, None] * self.unit + torch.arange(self.unit, device=self.device)
        within = within if self.order is None else self.order[within]
        sequence_rows, rows = self._rows(merged)
        out = torch.empty(len(sequence_rows) + rows.numel(), dtype=torch.long, device=self.device)
        out[sequence_rows] = torch.arange(self.prefix, device=self.device).repeat(len(self.lengths))
        out[rows.flatten()] = within.flatten() + self.prefix
        return out

    # -- merging ------------------------------------------------------------------------------------------------------

    def merge(self, states: Tensor, merged: Merged, target: Tensor) -> Tensor:
        """Merges units.

        Args:
            states: States as the layers have them now.
            merged: The units after this merge.
            target: Which of them each unit becomes part of, `[U]`.

        Returns:
            `[1, T, D]`, or `[T, D]` for flat towers.
        """
        width = states.shape[-1]
        units = self.units(states)
        if self.merged is None and not self.flat and not self.packed:
            front = states[:, : self.prefix].reshape(-1, width)
        else:
            front = states.reshape(-1, width)[self._rows(self.merged)[0]]
        size = torch.ones(len(units), device=self.device) if self.merged is None else self.merged.size
        new = weighted_mean(units, size, target, merged.size)
        self.merged = merged
        sequence_rows, rows = self._rows(merged)
        out = states.new_zeros(len(sequence_rows) + rows.numel(), width)
        out = out.index_copy(0, sequence_rows, front).index_copy(0, rows.flatten(), new.flatten(0, 1))
        return out if self.flat else out[None]

    def _rows(self, merged: Merged | None) -> tuple[Tensor, Tensor]:
        lengths = self.lengths if merged is None else merged.lengths
        return packed_rows(lengths, self.unit, self.prefix, self.device)

    # -- scattering back ----------------------------------------------------------------------------------------------

    def scatter_back(self, states: Tensor, merged: Merged | None) -> Tensor:
        """Scatters the states of merged tokens back to all tokens that they stand for.

        Args:
            states: `[1, T, D]` or `[T, D]`.
            merged: The units at that layer.

        Returns:
            `[B, N, D]`; `[1, T0, D]` where it was packed before, `[T0, D]` for flat towers.
        """
        if merged is None:
            return states
        if id(merged) not in self._back:
            self._back[id(merged)] = self._back_index(merged)
        out = states.reshape(-1, states.shape[-1])[self._back[id(merged)]]
        if self.flat:
            return out
        return out[None] if self.packed else out.view(len(self.lengths), -1, out.shape[-1])

    def _back_index(self, merged: Merged) -> Tensor:
        """Current row of every initial token, `[T0]`."""
        sequence_rows, rows = self._rows(merged)
        prefix_first, rows_first = packed_rows(self.lengths, self.unit, self.prefix, self.device)
        index = torch.empty(len(sequence_rows) + rows_first.numel(), dtype=torch.long, device=self.device)
        index[prefix_first] = sequence_rows
        index[rows_first.flatten()] = rows[merged.owner].flatten()
        if self.order is None:
            return index
        grid = index.view(len(self.lengths), -1)  # all images have one grid
        regular = grid.clone()
        regular[:, self.prefix + self.order] = grid[:, self.prefix :]
        return regular.flatten()


def adaptive_lengths(adat: Any, states: Tensor) -> tuple[int, ...] | None:
    """Lengths of the images in a packed sequence of adaptive tokens; None where the states are not one."""
    packing = getattr(adat, "packing", None)
    if packing is None or states.shape[:-1] != (1, packing.total):
        return None
    return packing.lengths
