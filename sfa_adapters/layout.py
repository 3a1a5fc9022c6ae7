"""Where each visual token lies on the page: row, column, extent, block, prefix and padding.

Positions are real numbers in cells of the finest grid ("pixels of the finest grid"): on a regular 32x32 grid token (r,
c) has row r, column c and extent 1; on an adaptive one a token that covers 1.75 x 1.75 finest cells has extent 1.75.

Shape letters: B batch, N tokens, U distinct (start, extent) pairs on one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sfa_adapters.compat import check_versions
from sfa_adapters.errors import LayoutError

__all__ = ["AxisKinds", "TokenLayout", "default_block_map"]

check_versions()


def default_block_map(block_grid: tuple[int, int] = (4, 4)) -> Tensor:
    """Numbers the cells of a coarse partition of the page, row by row.

    Args:
        block_grid: Rows and columns of the partition.

    Returns:
        Integer map `[rows, columns]` with the values 0 .. rows * columns - 1.
    """
    return torch.arange(block_grid[0] * block_grid[1]).reshape(block_grid)


@dataclass(frozen=True, eq=False)
class AxisKinds:
    """The distinct positions of tokens on one axis; on a regular grid these are its rows (or columns).

    Positions are divided by the largest Manhattan distance of their own image, so that images of different sizes
    share one table and the distance term needs no per-image factor.

    Attributes:
        index: Which kind each token is, `[N]` or `[B, N]`, int64. Prefix and padding tokens have 0; they are masked
            later.
        start: Normalised upper (or left) edge of each kind, `[U]`, float32.
        extent: Normalised size of each kind, `[U]`, float32.
    """

    index: Tensor
    start: Tensor
    extent: Tensor

    @property
    def num_kinds(self) -> int:
        """U, the number of distinct positions."""
        return self.start.shape[0]

    def overlap(self) -> Tensor:
        """Share of the shorter token's extent beside the other, `[U, U]` in [0, 1]; 1[row_i = row_j] on a grid."""
        end = self.start + self.extent
        # Differences of edges that differ by rounding only must not count as a shared row.
        shared = torch.minimum(end[:, None], end) - torch.maximum(self.start[:, None], self.start)
        shorter = torch.minimum(self.extent[:, None], self.extent)
        return torch.where(shared > 1e-4 * shorter, (shared / shorter).clamp(max=1.0), 0.0).fill_diagonal_(1.0)

    def distance(self) -> Tensor:
        """Distance of centres along this axis in units of the largest Manhattan distance on the grid, `[U, U]`."""
        centre = self.start + self.extent / 2
        return (centre[:, None] - centre).abs()


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
    """

    grid: tuple[int, int] | tuple[tuple[int, int], ...]
    prefix_tokens: int
    block: Tensor
    rows: AxisKinds
    columns: AxisKinds
    padding: Tensor | None = None
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
        if self.padding is not None and self.padding.shape != shape:
            raise LayoutError(f"padding {tuple(self.padding.shape)} must have the tokens' shape {tuple(shape)}.")

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
        block = _block_of(row + 0.5, column + 0.5, height, width, block_map)
        pad = (prefix_tokens, 0)
        rows = _axis(torch.nn.functional.pad(row, pad), height, reach)
        columns = _axis(torch.nn.functional.pad(column, pad), width, reach)
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
        block = _block_of(centre[:, 0], centre[:, 1], height, width, check_block_map(block_map).to(row.device))
        rows = _axis_from_boxes(start[:, 0] / reach, size[:, 0] / reach, prefix_tokens)
        columns = _axis_from_boxes(start[:, 1] / reach, size[:, 1] / reach, prefix_tokens)
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
            raise LayoutError("TokenLayout.batch takes single-image layouts ([tokens]), not batches.")
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
        block = _pad_rows([layout.block for layout in layouts], total)
        grids = tuple(layout.grid for layout in layouts)
        rows = _merge([layout.rows for layout in layouts], total)
        columns = _merge([layout.columns for layout in layouts], total)
        return cls(grids, prefixes.pop(), block, rows, columns, padding if bool(padding.any()) else None)  # pyright: ignore[reportArgumentType]

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
        mask = torch.ones_like(self.block, dtype=torch.bool)
        mask[..., : self.prefix_tokens] = False
        return mask if self.padding is None else mask & ~self.padding

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
        """What a folded key says of its place, `[.., N, (U - 1) + (V - 1)]` and one channel for prefixes, fp32."""
        return self._derive("key_channels", self._build_key_channels)

    def _build_one_hot(self) -> Tensor:
        parts = [torch.nn.functional.one_hot(axis.index, axis.num_kinds) for axis in (self.rows, self.columns)]
        return torch.cat(parts, dim=-1).float() * self.spatial.unsqueeze(-1)

    def _build_key_channels(self) -> Tensor:
        rows, columns = self.one_hot.split((self.rows.num_kinds, self.columns.num_kinds), dim=-1)
        parts = [rows[..., :-1], columns[..., :-1]]
        if self.prefix_tokens:
            is_prefix = torch.arange(self.num_tokens, device=self.device) < self.prefix_tokens
            parts.append(is_prefix.float()[:, None].expand(*self.block.shape, 1))
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
        padding = None if self.padding is None else self.padding.to(device)
        return replace(self, block=self.block.to(device), rows=move[0], columns=move[1], padding=padding)

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
        padding = None if self.padding is None else take(self.padding)
        return TokenLayout(self.grid, keep, take(self.block), rows, columns, padding)


def check_block_map(block_map: Tensor | None) -> Tensor:
    """Returns a valid block map, the 4x4 partition for None.

    Raises:
        LayoutError: The map is not a non-empty two-dimensional integer map with values from 0.
    """
    if block_map is None:
        return default_block_map()
    if block_map.ndim != 2 or block_map.numel() == 0 or block_map.is_floating_point() or block_map.dtype == torch.bool:
        raise LayoutError(
            f"block_map must be a non-empty [m, n] integer map; got {tuple(block_map.shape)} {block_map.dtype}."
        )
    # A value cannot be looked at inside a compiled graph; maps come here checked by then (`SFAConfig`).
    if not torch.compiler.is_compiling() and bool((block_map < 0).any()):
        raise LayoutError(f"Block ids start at 0; block_map holds {int(block_map.min())}.")
    return block_map.long()


def _block_of(row: Tensor, column: Tensor, height: int, width: int, block_map: Tensor) -> Tensor:
    """Block of the map cell in which each centre lies."""
    map_row = (row * block_map.shape[0] / max(height, 1)).long().clamp_(0, block_map.shape[0] - 1)
    map_column = (column * block_map.shape[1] / max(width, 1)).long().clamp_(0, block_map.shape[1] - 1)
    return block_map[map_row, map_column]


def _axis(index: Tensor, cells: int, reach: int) -> AxisKinds:
    # A grid without cells (prefix tokens only) keeps one kind, so that tables are never empty.
    start = torch.arange(max(cells, 1), device=index.device, dtype=torch.float32) / reach
    return AxisKinds(index, start, torch.full_like(start, 1.0 / reach))


def _axis_from_boxes(start: Tensor, extent: Tensor, prefix_tokens: int) -> AxisKinds:
    if start.numel() == 0:
        return _axis(torch.zeros(prefix_tokens, dtype=torch.long, device=start.device), 1, 1)
    kinds, index = _distinct(torch.stack((start, extent), dim=-1).float())
    return AxisKinds(torch.nn.functional.pad(index, (prefix_tokens, 0)), kinds[:, 0].clone(), kinds[:, 1].clone())


def _distinct(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of fp32 `[N, 2]`, and which of them each row is.

    Two fp32 numbers are one int64; unique over numbers is many times as fast as over rows (`dim=0`).
    """
    codes = (pairs + 0.0).view(torch.int64)[:, 0]  # minus zero is zero
    kinds, index = torch.unique(codes, return_inverse=True)
    return kinds[:, None].view(torch.float32), index


def _pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Rows of different lengths as one matrix, `[B, length]`, zeros behind each."""
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])


def _merge(axes: Sequence[AxisKinds], length: int) -> AxisKinds:
    """One table of kinds for all images of a batch."""
    pairs = torch.cat([torch.stack((axis.start, axis.extent), dim=-1) for axis in axes])
    kinds, inverse = _distinct(pairs)
    renamed = [part[axis.index] for part, axis in zip(inverse.split([a.num_kinds for a in axes]), axes, strict=True)]
    index = _pad_rows(renamed, length)
    return AxisKinds(index, kinds[:, 0].clone(), kinds[:, 1].clone())
