"""Where each visual token lies on the page: row, column, extent, block, prefix and padding.

Positions are real numbers in cells of the finest grid ("pixels of the finest grid"): on a regular 32x32 grid token (r,
c) has row r, column c and extent 1; on an adaptive one a token that covers 1.75 x 1.75 finest cells has extent 1.75.

Shape letters: B batch, N tokens, U distinct (start, extent) pairs on one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.axis_kinds import AxisKinds, axis_of_boxes, axis_of_cells, merge_axes, pad_rows
from sfa_adapters.block_maps import block_of, check_block_map
from sfa_adapters.compat import check_versions
from sfa_adapters.errors import LayoutError
from sfa_adapters.moved import know_old_names

__all__ = ["TokenLayout"]

check_versions()
know_old_names(__name__)


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Position, extent and block of every token of a sequence, prefix tokens first.

    Build one with `TokenLayout.regular`, `TokenLayout.from_boxes` or `TokenLayout.batch`; the plain constructor checks
    shapes but computes nothing.

    Attributes:
        grid: Rows and columns of the finest grid, one pair, or one pair per image of a batch.
        prefix_tokens: How many leading tokens (CLS, registers) have no place on the page.
        block: Block id of each token, `[N]` or `[B, N]`, int64.
        rows: Positions on the vertical axis.
        columns: Positions on the horizontal axis.
        padding: True where a token is padding, `[B, N]`, or None when there is none.
        placeless: True at tokens behind the prefix that have no place either, `[N]` or `[B, N]`, or None when there are
            none: a CLS token at the end, or in front of each tile. As prefix tokens they are seen, with phi = 0.
        memo: What other modules worked out from this layout, so that it is worked out once. Not part of it.
    """

    grid: tuple[int, int] | tuple[tuple[int, int], ...]
    prefix_tokens: int
    block: Tensor
    rows: AxisKinds
    columns: AxisKinds
    padding: Tensor | None = None
    placeless: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _derived: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shape = self.block.shape
        if self.rows.index.shape != shape or self.columns.index.shape != shape:
            shapes = [tuple(axis.index.shape) for axis in (self.rows, self.columns)]
            raise LayoutError(
                f"block {tuple(shape)}, row {shapes[0]} and column {shapes[1]} "
                "must have one shape, [tokens] or [batch, tokens]."
            )
        if not 0 <= self.prefix_tokens <= shape[-1]:
            raise LayoutError(f"prefix_tokens={self.prefix_tokens} must lie in 0..{shape[-1]}, the number of tokens.")
        for name, marks in (("padding", self.padding), ("placeless", self.placeless)):
            if marks is not None and marks.shape != shape:
                raise LayoutError(f"{name} {tuple(marks.shape)} must have the tokens' shape {tuple(shape)}.")

    # -- construction -----------------------------------------------------------------------------------------------

    @classmethod
    def regular(
        cls,
        height: int,
        width: int,
        prefix_tokens: int = 0,
        block_map: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> TokenLayout:
        """Lays `height * width` tokens out row by row behind `prefix_tokens` prefix tokens.

        Args:
            height: Rows of the grid.
            width: Columns of the grid.
            prefix_tokens: Leading tokens without a place (CLS, registers).
            block_map: Integer map `[m, n]` of any size, stretched over the page; a 4x4 partition by default.
            device: Where the index tensors live.

        Raises:
            LayoutError: A side or the prefix is negative, the grid is empty with no prefix, or the map is not an
                integer map.
        """
        if height < 0 or width < 0 or prefix_tokens < 0 or (height * width == 0 and prefix_tokens == 0):
            raise LayoutError(f"A layout needs tokens: got a {height}x{width} grid and {prefix_tokens} prefix tokens.")
        reach = max(height + width - 2, 1)
        row = torch.arange(height, device=device).repeat_interleave(width)
        column = torch.arange(width, device=device).repeat(height)
        block_map = check_block_map(block_map).to(row.device)
        block = block_of(row + 0.5, column + 0.5, height, width, block_map)
        pad = (prefix_tokens, 0)
        rows = axis_of_cells(torch.nn.functional.pad(row, pad), height, reach)
        columns = axis_of_cells(torch.nn.functional.pad(column, pad), width, reach)
        return cls((height, width), prefix_tokens, torch.nn.functional.pad(block, pad), rows, columns)

    @classmethod
    def from_boxes(
        cls,
        row: Tensor,
        column: Tensor,
        extent: Tensor,
        grid: tuple[int, int],
        prefix_tokens: int = 0,
        block_map: Tensor | None = None,
    ) -> TokenLayout:
        """Lays out tokens of different sizes, behind `prefix_tokens` prefix tokens that the boxes do not list.

        Args:
            row: Upper edge of each token in finest cells, `[tokens]`.
            column: Left edge of each token in finest cells, `[tokens]`.
            extent: Side of each token in finest cells, `[tokens]` (square) or `[tokens, 2]` (height, width); at least
                1.
            grid: Rows and columns of the finest grid.
            prefix_tokens: Leading tokens without a place.
            block_map: As in `regular`; a token takes the block of its centre.

        Raises:
            LayoutError: Shapes differ, a token lies outside the grid, or is smaller than a finest cell.
        """
        size = extent if extent.ndim == 2 else torch.stack((extent, extent), dim=-1)
        if row.ndim != 1 or column.shape != row.shape or size.shape != (*row.shape, 2):
            raise LayoutError(
                f"row {tuple(row.shape)}, column {tuple(column.shape)} and extent {tuple(extent.shape)} must be "
                "[tokens], [tokens] and [tokens] or [tokens, 2]."
            )
        height, width = grid
        start = torch.stack((row, column), dim=-1).double()
        size = size.double()
        limit = start.new_tensor([height, width])
        if row.numel() and (not bool(torch.isfinite(start + size).all()) or bool((size < 1 - 1e-9).any())):
            raise LayoutError(
                f"Token extents must be finite and at least 1 finest cell; the smallest is {size.min().item():g}."
            )
        if bool((start < -1e-6).any()) or bool((start + size > limit + 1e-6).any()):
            raise LayoutError(f"A token lies outside the {height}x{width} grid; row + extent must be at most its side.")
        reach = max(height + width - 2, 1)
        centre = start + size / 2
        block = block_of(centre[:, 0], centre[:, 1], height, width, check_block_map(block_map).to(row.device))
        rows = axis_of_boxes(start[:, 0] / reach, size[:, 0] / reach, prefix_tokens)
        columns = axis_of_boxes(start[:, 1] / reach, size[:, 1] / reach, prefix_tokens)
        return cls(grid, prefix_tokens, torch.nn.functional.pad(block, (prefix_tokens, 0)), rows, columns)

    @classmethod
    def batch(cls, layouts: Sequence[TokenLayout], length: int | None = None) -> TokenLayout:
        """Puts per-image layouts side by side; shorter ones are padded, and padding is never attended to.

        Args:
            layouts: One for each image.
            length: Tokens of each row, padding included; by default those of the longest image.

        Raises:
            LayoutError: The list is empty, an entry is a batch already, the prefixes differ, or an image is longer
                than `length`.
        """
        if not layouts:
            raise LayoutError("TokenLayout.batch needs at least one layout.")
        if any(layout.block.ndim != 1 for layout in layouts):
            raise LayoutError("TokenLayout.batch takes single-image layouts ([tokens]), no batches.")
        prefixes = {layout.prefix_tokens for layout in layouts}
        if len(prefixes) > 1:
            raise LayoutError(f"All images of a batch need one prefix; found {sorted(prefixes)}.")
        longest = max(layout.num_tokens for layout in layouts)
        total = longest if length is None else length
        if longest > total:
            raise LayoutError(f"An image has {longest} tokens, more than the {total} of a padded row.")
        device = layouts[0].block.device
        lengths = torch.tensor([layout.num_tokens for layout in layouts], device=device)
        padding = torch.arange(total, device=device) >= lengths[:, None]
        block = pad_rows([layout.block for layout in layouts], total)
        grids = tuple(layout.grid for layout in layouts)
        rows = merge_axes([layout.rows for layout in layouts], total)
        columns = merge_axes([layout.columns for layout in layouts], total)
        marks = [layout.placeless for layout in layouts]
        placeless = None
        if any(mark is not None for mark in marks):
            filled = [
                torch.zeros_like(p.block, dtype=torch.bool) if p.placeless is None else p.placeless for p in layouts
            ]
            placeless = pad_rows(filled, total)
        padding = padding if bool(padding.any()) else None
        return cls(grids, prefixes.pop(), block, rows, columns, padding, placeless)  # pyright: ignore[reportArgumentType]

    # -- reading ----------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """N, prefix and padding included."""
        return self.block.shape[-1]

    @property
    def batch_size(self) -> int | None:
        """B for a batch of layouts, None for a layout that every image shares."""
        return self.block.shape[0] if self.block.ndim == 2 else None

    @property
    def spatial(self) -> Tensor:
        """True where a token has a place on the page (no prefix, no padding), bool, `[N]` or `[B, N]`."""
        mask = ~self.off_page
        return mask if self.padding is None else mask & ~self.padding

    @property
    def off_page(self) -> Tensor:
        """True at tokens that are seen but have no place: the prefix and `placeless`, bool, `[N]` or `[B, N]`."""
        mask = torch.zeros_like(self.block, dtype=torch.bool)
        mask[..., : self.prefix_tokens] = True
        return mask if self.placeless is None else mask | self.placeless

    @property
    def has_off_page(self) -> bool:
        """Whether there may be such tokens."""
        return self.prefix_tokens > 0 or self.placeless is not None

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.block.device

    @property
    def one_hot(self) -> Tensor:
        """Which row kind and which column kind each token is, `[(B,) N, U + V]`, fp32; zero off the page."""
        return self._derive("one_hot", self._build_one_hot)

    @property
    def key_channels(self) -> Tensor:
        """What a folded key says of its place, `[.., N, (U - 1) + (V - 1)]` and one channel for `off_page`, fp32."""
        return self._derive("key_channels", self._build_key_channels)

    def _build_one_hot(self) -> Tensor:
        parts = [torch.nn.functional.one_hot(axis.index, axis.num_kinds) for axis in (self.rows, self.columns)]
        return torch.cat(parts, dim=-1).float() * self.spatial.unsqueeze(-1)

    def _build_key_channels(self) -> Tensor:
        rows, columns = self.one_hot.split((self.rows.num_kinds, self.columns.num_kinds), dim=-1)
        parts = [rows[..., :-1], columns[..., :-1]]
        if self.has_off_page:
            parts.append(self.off_page.float().unsqueeze(-1))
        return torch.cat(parts, dim=-1)

    def _derive(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        """Keeps what depends on the layout alone, O(N), between forwards; not while a graph is being captured."""
        if torch.compiler.is_compiling():
            return build()
        if name not in self._derived:
            with torch.inference_mode(False):  # it may be used in training later
                self._derived[name] = build()
        return self._derived[name]

    def to(self, device: torch.device | str) -> TokenLayout:
        """Copies the layout to a device."""
        move = [
            AxisKinds(axis.index.to(device), axis.start.to(device), axis.extent.to(device))
            for axis in (self.rows, self.columns)
        ]
        padding, placeless = (None if mark is None else mark.to(device) for mark in (self.padding, self.placeless))
        block = self.block.to(device)
        return replace(self, block=block, rows=move[0], columns=move[1], padding=padding, placeless=placeless)

    def spread(self, where: Tensor, num_tokens: int) -> TokenLayout:
        """Puts tokens without a place between those of one image: token k of this layout becomes token `where[k]`.

        Args:
            where: Ascending, `[N]`, beginning with the prefix; all other tokens of the result are `placeless`.
            num_tokens: Tokens of the result.
        """

        def put(values: Tensor, fill: bool | int) -> Tensor:
            return torch.full((num_tokens,), fill, dtype=values.dtype, device=values.device).index_copy(
                0, where, values
            )

        rows = replace(self.rows, index=put(self.rows.index, 0))
        columns = replace(self.columns, index=put(self.columns.index, 0))
        placed = torch.zeros_like(self.block, dtype=torch.bool) if self.placeless is None else self.placeless
        padding = None if self.padding is None else put(self.padding, False)
        block, placeless = put(self.block, 0), put(placed, True)
        return TokenLayout(self.grid, self.prefix_tokens, block, rows, columns, padding, placeless)

    def select(self, index: Tensor, prefix_tokens: int | None = None) -> TokenLayout:
        """Reorders or drops tokens: token k of the result is token `index[..., k]` of this layout.

        Args:
            index: Token numbers, `[M]` (same for every image) or `[B, M]`.
            prefix_tokens: Prefix length of the result; by default this layout's, whose prefix must then stay in front.

        Raises:
            LayoutError: A prefix token would move behind the front.
        """
        keep = self.prefix_tokens if prefix_tokens is None else prefix_tokens
        if bool((index[..., keep:] < self.prefix_tokens).any()) or bool(
            (index[..., :keep] >= self.prefix_tokens).any()
        ):
            raise LayoutError(
                f"Prefix tokens (0..{self.prefix_tokens - 1}) must stay in front when tokens are selected."
            )

        def take(values: Tensor) -> Tensor:
            if values.ndim == 1:
                return values[index]
            return values.gather(-1, index.expand(values.shape[0], -1) if index.ndim == 1 else index)

        rows = replace(self.rows, index=take(self.rows.index))
        columns = replace(self.columns, index=take(self.columns.index))
        padding, placeless = (None if mark is None else take(mark) for mark in (self.padding, self.placeless))
        return TokenLayout(self.grid, keep, take(self.block), rows, columns, padding, placeless)
