"""The structural bias phi: four terms of learned scalars per head, and the small tables that phi is computed from.

    phi(i, j) = w_row * same_row(i, j) + w_col * same_col(i, j) - w_dist * manhattan(i, j) + e[block_i] * e[block_j]

phi is in logits: it is added to q.k / sqrt(d) before the softmax. It is zero whenever i or j is a prefix token.
`same_row` is 1[row_i = row_j] on a regular grid; for tokens of different sizes it is the overlap of their rows over the
shorter one. `manhattan` is the distance of the centres divided by its largest value on the grid, so phi does not depend
on resolution.

phi needs no N x N matrix: it is a row table, a column table and a rank-1 block term (`BiasFactors`).

Shape letters: B batch, H heads, N tokens, U / V row / column kinds of the layout, A active adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfa_adapters.axial import check_start, first_heads, start_values
from sfa_adapters.choices import DEFAULT_TERMS, TERMS, Init, Term
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.layout import TokenLayout

__all__ = ["TERMS", "BiasFactors", "StructuralBias", "StructuralWeights", "Term", "bias_factors"]


@dataclass(frozen=True)
class StructuralWeights:
    """The learned scalars of one layer, fp32; a term that is switched off is None.

    Attributes:
        row: `w_row`, `[H]`.
        col: `w_col`, `[H]`.
        dist: `w_dist`, `[H]`.
        block: `e`, `[H, num_blocks]`.
    """

    row: Tensor | None
    col: Tensor | None
    dist: Tensor | None
    block: Tensor | None


@dataclass(frozen=True, eq=False)
class BiasFactors:
    """phi of one layer in factored form, as `attend` takes it.

    Attributes:
        layout: The layout that the tables index.
        row_table: Bias between row kinds, logits, `[H, U, U]`, fp32.
        column_table: Bias between column kinds, logits, `[H, V, V]`, fp32.
        block_value: `e[block]` per token, zero at prefix and padding, `[A, H, N]` or `[A, B, H, N]`; A may be 0.
        lines: w_row and w_col, `[2, H]`, fp32, where these are all that phi is made of; else None.
    """

    layout: TokenLayout
    row_table: Tensor
    column_table: Tensor
    block_value: Tensor
    lines: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return self.row_table.shape[0]

    @property
    def requires_grad(self) -> bool:
        """Whether gradients are on and a structural weight needs one."""
        return torch.is_grad_enabled() and (
            self.row_table.requires_grad or self.column_table.requires_grad or self.block_value.requires_grad
        )

    def dense(self) -> Tensor:
        """Phi as a matrix, logits, `[1, H, N, N]` or `[B, H, N, N]`, fp32; minus infinity at keys that are padding."""
        layout = self.layout
        zeros = self.row_table.new_zeros(self.num_heads, layout.rows.num_kinds, layout.columns.num_kinds)
        upper = torch.cat((self.row_table, zeros), dim=-1)
        lower = torch.cat((zeros.transpose(-1, -2), self.column_table), dim=-1)
        blocks = [value.unsqueeze(-1) for value in self.block_value]  # [(B,) H, N, 1]
        left = look_up(layout.one_hot, torch.cat((upper, lower), dim=-2))
        right = layout.one_hot.unsqueeze(-3).expand(left.shape)
        # Products with one-hot rows pick entries exactly, and are faster than indexing, above all in backward.
        phi = torch.cat((left, *blocks), dim=-1) @ torch.cat((right, *blocks), dim=-1).transpose(-1, -2)
        if phi.ndim == 3:
            phi = phi.unsqueeze(0)
        if layout.padding is not None:
            phi = phi.masked_fill(layout.padding[:, None, None, :], float("-inf"))
        return phi


def look_up(one_hot: Tensor, tables: Tensor) -> Tensor:
    """Looks up a row of each head's table for each token: `[(B,) N, K]` and `[H, K, E]` to `[(B,) H, N, E]`."""
    heads, kinds, width = tables.shape
    chosen = one_hot @ tables.movedim(0, 1).reshape(kinds, heads * width)
    return chosen.unflatten(-1, (heads, width)).movedim(-2, -3)


def bias_factors(weights: Sequence[StructuralWeights], layout: TokenLayout, num_heads: int) -> BiasFactors:
    """Builds the tables of phi for a layout; the weights of several active adapters add up.

    Args:
        weights: One entry per active adapter.
        layout: Where the tokens lie; every block id must have a scalar (`check_blocks`).
        num_heads: H, needed when every term is off.

    Returns:
        The tables, fp32, on the device of the layout.
    """
    device = layout.device
    rows, columns = layout.rows, layout.columns
    row_table = torch.zeros(num_heads, rows.num_kinds, rows.num_kinds, device=device)
    column_table = torch.zeros(num_heads, columns.num_kinds, columns.num_kinds, device=device)
    values: list[Tensor] = []
    for weight in weights:
        if weight.row is not None:
            row_table = row_table + weight.row.float()[:, None, None] * rows.overlap()
        if weight.col is not None:
            column_table = column_table + weight.col.float()[:, None, None] * columns.overlap()
        if weight.dist is not None:
            row_table = row_table - weight.dist.float()[:, None, None] * rows.distance()
            column_table = column_table - weight.dist.float()[:, None, None] * columns.distance()
        if weight.block is not None:
            value = weight.block.float()[:, layout.block]  # [H, (B,) N]
            values.append(value.movedim(0, -2) * layout.spatial.unsqueeze(-2))
    empty = torch.zeros((0, *layout.block.shape[:-1], num_heads, layout.num_tokens), device=device)
    block_value = torch.stack(values) if values else empty
    return BiasFactors(layout, row_table, column_table, block_value, _lines(weights, num_heads, device))


def _lines(weights: Sequence[StructuralWeights], num_heads: int, device: torch.device) -> Tensor | None:
    """The sums of w_row and of w_col over adapters, `[2, H]`, if no adapter has another term."""
    if any(weight.dist is not None or weight.block is not None for weight in weights):
        return None
    zero = torch.zeros(num_heads, device=device)
    rows = sum((weight.row.float() for weight in weights if weight.row is not None), zero)
    columns = sum((weight.col.float() for weight in weights if weight.col is not None), zero)
    return torch.stack((rows, columns))


class StructuralBias(nn.Module):
    """The structural bias as a module, for people who write their own attention (see also `SFAAttention`).

    Args:
        num_heads: Attention heads of the layer.
        num_blocks: Block scalars per head, for the term `block`.
        init_std: Standard deviation of the initial values; the block term has no gradient at exactly zero.
        terms: Which of `row`, `col`, `dist`, `block` are learned; the others are absent.
        device: Device of the parameters.
        init: `normal`, or `axial`: a third of the heads starts with `w_row = init_strength`, as many others with
            `w_col = init_strength`; a single head stays normal.
        init_strength: In logits.

    Raises:
        InjectionError: A size is below 1, `init_std` is negative, a term is unknown, blocks are chosen without
            the term `block`, or the initialisation does not fit.
    """

    def __init__(
        self,
        num_heads: int,
        num_blocks: int = 16,
        init_std: float = 0.02,
        terms: Sequence[Term] = DEFAULT_TERMS,
        device: torch.device | str | None = None,
        init: Init = "normal",
        init_strength: float = 3.0,
    ) -> None:
        super().__init__()
        check_bias_options(num_blocks=num_blocks, init_std=init_std, terms=terms)
        check_blocks_used(num_blocks != 16, f"num_blocks={num_blocks}", terms)
        check_start(init, init_strength, terms)
        if num_heads < 1:
            raise InjectionError(f"num_heads={num_heads} must be at least 1.")
        self.num_heads, self.num_blocks, self.init_std = num_heads, num_blocks, init_std
        self.init, self.init_strength = init, init_strength
        self.terms: tuple[Term, ...] = tuple(term for term in TERMS if term in terms)
        for term, shape in parameter_shapes(num_heads, num_blocks, self.terms).items():
            self.register_parameter(term, nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises all scalars: normal with standard deviation `init_std`, then the strong heads of `axial`."""
        heads = first_heads(self.num_heads) if self.init == "axial" else {}
        shapes = parameter_shapes(self.num_heads, self.num_blocks, self.terms)
        device = next(self.parameters()).device
        with torch.no_grad():
            for term, values in start_values(shapes, self.init_std, heads, self.init_strength, device).items():
                getattr(self, term).copy_(values)

    @property
    def weights(self) -> StructuralWeights:
        """The scalars as `bias_factors` takes them."""
        return StructuralWeights(*(getattr(self, term) if term in self.terms else None for term in TERMS))

    def factors(self, layout: TokenLayout) -> BiasFactors:
        """The tables of phi for a layout; no N x N matrix is built.

        Raises:
            LayoutError: The block term is on, and the layout has a block id of `num_blocks` or more.
        """
        if "block" in self.terms:
            check_blocks(layout, self.num_blocks)
        return bias_factors([self.weights], layout, self.num_heads)

    def forward(self, layout: TokenLayout) -> Tensor:
        """Phi as a matrix in logits, `[1, heads, query, key]`, or `[batch, heads, query, key]` for a batch of layouts.

        Raises:
            LayoutError: The block term is on, and the layout has a block id of `num_blocks` or more.
        """
        return self.factors(layout).dense()

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"num_heads={self.num_heads}, num_blocks={self.num_blocks}, terms={'+'.join(self.terms)}"


def parameter_shapes(num_heads: int, num_blocks: int, terms: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shape of each learned tensor by term: 2 scalars per head for row and col, 19 for all terms and 16 blocks."""
    return {term: (num_heads, num_blocks) if term == "block" else (num_heads,) for term in TERMS if term in terms}


def check_bias_options(*, num_blocks: int, init_std: float, terms: Sequence[str]) -> None:
    """Checks the options that `StructuralBias` and `SFAConfig` have in common.

    Raises:
        InjectionError: An option is out of range; names the field and the value.
    """
    if num_blocks < 1:
        raise InjectionError(f"num_blocks={num_blocks} must be at least 1.")
    if not init_std >= 0:
        raise InjectionError(f"init_std={init_std} must be a number of at least 0.")
    unknown = [term for term in terms if term not in TERMS]
    if unknown or not terms:
        raise InjectionError(f"terms={list(terms)} must name at least one of {list(TERMS)}; unknown: {unknown}.")


def check_blocks_used(chosen: bool, what: str, terms: Sequence[str]) -> None:
    """Refuses options of the block term where it is off: they would silently do nothing.

    Args:
        chosen: Whether blocks other than the default 4x4 were asked for.
        what: The option and its value.
        terms: Terms that are on.

    Raises:
        InjectionError: They were, and `block` is off.
    """
    if chosen and "block" not in terms:
        raise InjectionError(f"{what} belongs to the term block, which is off; add it: terms={[*terms, 'block']}.")


def check_blocks(layout: TokenLayout, num_blocks: int) -> None:
    """Checks that every block id of a layout has a scalar.

    Raises:
        LayoutError: An id is too large; names the largest one.
    """
    # Reading a value would break the graph, and a fake tensor has none; the look-up itself fails on such an id.
    if torch.compiler.is_compiling() or type(layout.block) is not Tensor:
        return
    largest = int(layout.block.max()) if layout.block.numel() else 0
    if largest >= num_blocks:
        raise LayoutError(
            f"The layout has block id {largest}, but the bias has num_blocks={num_blocks} (ids 0..{num_blocks - 1}). "
            "Raise num_blocks or use a coarser block map."
        )
