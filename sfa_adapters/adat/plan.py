"""`PatchPlan`: how one page is cut into tokens of different sizes, every pixel in exactly one of them.

The page is cut into square cells of c pixels; a cell at level l is cut into n_l x n_l tokens of c / n_l pixels. So
tokens of 8, 14 and 32 pixels, which do not nest, still tile the page. A page that c does not divide is padded at the
bottom and at the right to whole cells; tokens that lie wholly in the padding are left out.

All positions are computed as integers in units of 1 / n pixels and divided once, so that no edge has a rounding error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfa_adapters.errors import PlanError
from sfa_adapters.layout import TokenLayout

__all__ = ["PatchPlan", "cell_grid", "check_page", "tokens_per_cell"]


def check_page(image_size: tuple[int, int], patch: int) -> None:
    """Checks that a page consists of whole patches of the tower.

    Args:
        image_size: Height and width of the page in pixels.
        patch: Side of the tower's own patches in pixels.

    Raises:
        PlanError: The patch is not a positive whole number, or a side is shorter than one patch or no multiple of it.
    """
    if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"patch={patch!r} must be the side of the tower's own patches, a whole number of pixels.")
    height, width = image_size
    if height < patch or width < patch:
        raise PlanError(
            f"A {height}x{width} px page is smaller than one {patch} px patch of the tower; pass a larger image."
        )
    if height % patch or width % patch:
        whole = (height // patch * patch, width // patch * patch)
        raise PlanError(
            f"image_size={image_size} is not whole patches of {patch} px, and the tower sees only these: use {whole}."
        )


def cell_grid(image_size: tuple[int, int], cell: int) -> tuple[int, int]:
    """Rows and columns of the cells that cover a page; the last ones may lie partly in the padding."""
    return -(-image_size[0] // cell), -(-image_size[1] // cell)


def tokens_per_cell(image_size: tuple[int, int], cell: int, sides: Sequence[int]) -> Tensor:
    """Counts the tokens of each cell at each level, without those wholly in the padding.

    Args:
        image_size: Height and width of the page in pixels.
        cell: Side of a cell in pixels.
        sides: n of each level: a whole cell gives n * n tokens.

    Returns:
        Counts, `[levels, cell_rows, cell_columns]`, int64.
    """
    rows, columns = (
        # A token begins r * cell / n px into its cell, and counts when the page shows more of the cell than that.
        (_shown(side, cell) * torch.tensor(sides)[:, None] + cell - 1) // cell
        for side in image_size
    )
    return rows[:, :, None] * columns[:, None, :]


def _shown(side: int, cell: int) -> Tensor:
    """Pixels of each cell along one axis that lie on the page."""
    return (side - torch.arange(0, side, cell)).clamp(max=cell)


def _expand(count: Tensor) -> tuple[Tensor, Tensor]:
    """Lists `count[k]` >= 1 items for every k, in order: the k of each item, and its number within its k."""
    end = count.cumsum(0)
    owner = torch.zeros(int(end[-1]), dtype=torch.long)
    owner[end[:-1]] = 1  # not repeat_interleave, which starts threads and costs milliseconds on a busy CPU
    owner = owner.cumsum(0)
    return owner, torch.arange(len(owner)) - (end - count)[owner]


@dataclass(frozen=True, eq=False)
class PatchPlan:
    """How one page is cut into tokens; made by `PatchPolicy.plan` or `PatchPlan.from_levels`. Tensors are on the CPU.

    Tokens are in reading order, by upper and then by left edge. With one level of the tower's own patch size that is
    the order of the tower's own tokens.

    Attributes:
        image_size: Height and width of the page in pixels, as the tower sees it.
        patch: Side of the tower's own patches in pixels.
        cell: Side of a cell in pixels.
        sides: n of every level, finest first: a cell holds n * n tokens.
        level: Level of each cell, `[cell_rows, cell_columns]`, int64, an index into `sides`.
        token_level: Level of each token, `[tokens]`, int64.
        boxes: Top, left, height and width of each token in pixels of the padded page, `[tokens, 4]`, float64.
        index: Number of each token in its level's full grid (`[cell_rows * n, cell_columns * n]`, row by row),
            `[tokens]`, int64.
    """

    image_size: tuple[int, int]
    patch: int
    cell: int
    sides: tuple[int, ...]
    level: Tensor
    token_level: Tensor
    boxes: Tensor
    index: Tensor

    @classmethod
    def from_levels(
        cls, level: Tensor, sides: Sequence[int], image_size: tuple[int, int], patch: int, cell: int
    ) -> PatchPlan:
        """Makes the patch plan of a page from the level of each cell.

        Args:
            level: Level of each cell, `[cell_rows, cell_columns]`, integers from 0 (finest).
            sides: n of every level, descending.
            image_size: Height and width of the page in pixels, multiples of `patch`.
            patch: Side of the tower's own patches in pixels.
            cell: Side of a cell in pixels.

        Raises:
            PlanError: `level` does not have the shape of the page's cells or names a level that does not exist, or
                `sides` do not descend from at most `cell` to at least 1.
        """
        check_page(image_size, patch)
        rows, columns = cell_grid(image_size, cell)
        if tuple(level.shape) != (rows, columns):
            raise PlanError(
                f"level {tuple(level.shape)} must have one entry per cell: a page of {image_size} px has "
                f"({rows}, {columns}) cells of {cell} px."
            )
        if not sides or any(a <= b for a, b in zip((cell + 1, *sides), (*sides, 0), strict=True)):
            raise PlanError(f"sides={tuple(sides)} must descend, from at most the cell ({cell} px) to at least 1.")
        level = level.long().cpu()
        if bool((level < 0).any()) or bool((level >= len(sides)).any()):
            raise PlanError(
                f"Levels run from 0 to {len(sides) - 1}; the map holds {int(level.min())} to {int(level.max())}."
            )
        of_cell = torch.tensor(sides)[level.flatten()]
        shown = [_shown(side, cell) for side in image_size]
        in_rows = (shown[0].expand(columns, rows).T.flatten() * of_cell + cell - 1) // cell
        in_columns = (shown[1].repeat(rows) * of_cell + cell - 1) // cell
        owner, within = _expand(in_rows * in_columns)
        n, width = of_cell[owner], in_columns[owner]
        row = owner // columns * n + within // width  # of the full grid of the token's level
        column = owner % columns * n + within % width
        boxes = torch.stack((row * cell, column * cell, torch.full_like(n, cell), torch.full_like(n, cell)), -1)
        boxes = boxes.double() / n[:, None]
        order = torch.argsort(boxes[:, 0], stable=True)  # cells come row by row, so the left edges are in order already
        token_level, index = level.flatten()[owner], row * (columns * n) + column
        return cls(image_size, patch, cell, tuple(sides), level, token_level[order], boxes[order], index[order])

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """Tokens of the page, without prefix tokens."""
        return len(self.index)

    @property
    def uniform_tokens(self) -> int:
        """Tokens that the tower itself would make of the page."""
        return (self.image_size[0] // self.patch) * (self.image_size[1] // self.patch)

    @property
    def ratio(self) -> float:
        """Tokens of the plan over `uniform_tokens`."""
        return self.num_tokens / self.uniform_tokens

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of the page in pixels after padding to whole cells."""
        return self.level.shape[0] * self.cell, self.level.shape[1] * self.cell

    @property
    def finest(self) -> float:
        """Side in pixels of the smallest token that the policy can give, whether or not this page has one."""
        return self.cell / self.sides[0]

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each token in the full grid of its level, and n of its level."""
        n = torch.tensor(self.sides)[self.token_level]
        width = self.level.shape[1] * n
        return self.index // width, self.index % width, n

    def layout(self, prefix_tokens: int = 0, block_map: Tensor | None = None) -> TokenLayout:
        """The layout of the tokens, for the bias of SFA.

        Its grid is the smallest grid of finest cells that holds all tokens: the page, and the part of the padding that
        tokens at its border cover.

        Args:
            prefix_tokens: Leading tokens without a place on the page (CLS, registers).
            block_map: As in `TokenLayout.regular`.

        Returns:
            The layout.

        Raises:
            LayoutError: The block map cannot be used.
        """
        row, column, n = self._places()
        finest = self.sides[0]
        grid = tuple(int((-(-(place + 1) * finest // n)).max()) for place in (row, column))
        start = torch.stack((row, column), -1).double() * finest / n[:, None]
        return TokenLayout.from_boxes(
            start[:, 0], start[:, 1], finest / n.double(), (grid[0], grid[1]), prefix_tokens, block_map
        )

    def grid_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of token and patch of the tower's own grid that overlap, with the overlap.

        `torch.zeros(patches, dim).index_add_(0, patch_number, weight[:, None] * tokens[token_number])` scatters tokens
        back onto the regular grid; the same pairs, normalised per token, average a grid (of positions, say) under each
        token.

        Returns:
            patch_number: Patch of the page, row by row, `[pairs]`, int64.
            token_number: Token of this plan, `[pairs]`, int64.
            weight: Share of the patch's area under the token, above 0, `[pairs]`, float32; sums to 1 for every patch.
        """
        row, column, n = self._places()
        unit = self.patch * n  # side of a patch in units of 1 / n px, in which all edges are whole numbers
        first, count = list[Tensor](), list[Tensor]()
        limits = (self.image_size[0] // self.patch, self.image_size[1] // self.patch)
        for place, limit in zip((row, column), limits, strict=True):
            first.append(place * self.cell // unit)
            count.append((-(-(place + 1) * self.cell // unit)).clamp(max=limit) - first[-1])
        token, within = _expand(count[0] * count[1])
        across = count[1][token]
        patch_row = first[0][token] + within // across
        patch_column = first[1][token] + within % across
        area = torch.ones_like(token)
        for patch_place, place in ((patch_row, row[token]), (patch_column, column[token])):
            end = torch.minimum((patch_place + 1) * unit[token], (place + 1) * self.cell)
            area = area * (end - torch.maximum(patch_place * unit[token], place * self.cell))
        weight = (area.double() / (unit * unit)[token]).float()
        return patch_row * limits[1] + patch_column, token, weight
