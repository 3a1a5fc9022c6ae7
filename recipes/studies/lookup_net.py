"""A small vision transformer with the position encodings that the lookup study compares.

All arms share one network and its initial values; only the `Position` differs:

    learned      an embedding per place (what every ViT has); larger grids interpolate it
    sincos       fixed sines and cosines instead (MAE, He et al. 2022)
    sfa          learned + the structural bias of this library
    placebo      learned + the same bias with places that are shuffled once
    rope         learned + rotary embedding by row and column on q and k (Heo et al., ECCV 2024)
    swin         learned + a dense table of relative offsets (Liu et al., ICCV 2021); larger grids interpolate it
    extra        learned + a rank-1 matrix on q and on k: about as many parameters as SFA, without places
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfa_adapters import StructuralBias, TokenLayout
from sfa_adapters.bias import TERMS
from sfa_adapters.errors import DataError
from sfa_adapters.recipes.studies.lookup_pictures import BLANK, CELL

__all__ = ["LookupNet", "Position"]

Grid = tuple[int, int]
BIASES = ("none", "sfa", "placebo", "rope", "swin", "extra")


class Position(nn.Module):
    """The position encoding in the attention of one layer.

    Args:
        kind: One of `BIASES`.
        heads: Attention heads.
        width: Width of the model.
        grid: The training grid.
        options: `terms`, `init`, `init_strength` of SFA.
    """

    def __init__(self, kind: str, heads: int, width: int, grid: Grid, options: Mapping[str, Any]) -> None:
        super().__init__()
        if kind not in BIASES:
            raise DataError(f"bias={kind!r} is none of {', '.join(BIASES)}.")
        self.kind, self.heads, self.grid = kind, heads, grid
        if kind in ("sfa", "placebo"):
            start = {name: options[name] for name in ("init", "init_strength") if name in options}
            self.structure = StructuralBias(heads, terms=options.get("terms", TERMS), **start)
        if kind == "swin":
            self.offsets = nn.Parameter(torch.randn(heads, 2 * grid[0] - 1, 2 * grid[1] - 1) * 0.02)
        if kind == "extra":
            self.down = nn.Parameter(torch.randn(2, width) * width**-0.5)
            self.up = nn.Parameter(torch.zeros(2, width))  # zero, as LoRA: the model starts as the control does

    def bias(self, layout: TokenLayout, grid: Grid) -> Tensor | None:
        """Bias of the attention logits, `[1, heads, tokens, tokens]`, prefix included; None for kinds without.

        Args:
            layout: Layout of the tokens.
            grid: Rows and columns of cells.
        """
        if self.kind in ("sfa", "placebo"):
            phi = self.structure(layout)
            if self.kind == "placebo":
                generator = torch.Generator().manual_seed(99)
                order = 1 + torch.randperm(phi.shape[-1] - 1, generator=generator)
                order = torch.cat((torch.zeros(1, dtype=torch.long), order))
                phi = phi[..., order, :][..., order]
            return phi
        if self.kind == "swin":
            return _swin(self.offsets, grid, self.grid)
        return None

    def queries_and_keys(self, states: Tensor, query: Tensor, key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Queries and keys with the encodings that change them, `[batch, heads, tokens, head width]`.

        Args:
            states: Input of the attention, `[batch, tokens, width]`.
            query: `[batch, heads, tokens, head width]`.
            key: As `query`.
            grid: Rows and columns of cells.
        """
        if self.kind == "rope":
            cosine, sine = _rotary(query.shape[-1], grid)
            return _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        if self.kind == "extra":
            change = [
                (states @ down)[..., None] * up for down, up in zip(self.down.unbind(), self.up.unbind(), strict=True)
            ]
            extra = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in change]
            return query + extra[0], key + extra[1]
        return query, key


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, position: Position) -> None:
        super().__init__()
        self.heads, self.position = heads, position
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, layout: TokenLayout, grid: Grid) -> Tensor:
        states = self.norm1(x)
        query, key, value = self.qkv(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.position.queries_and_keys(states, query, key, grid)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        bias = self.position.bias(layout, grid)
        if bias is not None:
            scores = scores + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)
        x = x + self.out(mixed)
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class LookupNet(nn.Module):
    """A ViT of three layers; its CLS token answers, and every cell predicts its own digit and those of its headers.

    Args:
        grid: The training grid.
        options: `embedding` (learned or sincos), `bias` with its options; `width`, `heads`, `layers`.
        seed: Of the initial values; those that arms share are equal for equal seeds.
    """

    def __init__(self, grid: Grid, options: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        width, heads, layers = options.get("width", 48), options.get("heads", 4), options.get("layers", 3)
        self.grid, self.width = grid, width
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(3 * CELL * CELL, width)
            self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
            places = nn.Parameter(torch.randn(grid[0] * grid[1], width) * 0.02)
            self.places = places if options.get("embedding", "learned") == "learned" else None
            none = Position("none", heads, width, grid, {})
            self.blocks = nn.ModuleList(_Block(width, heads, none) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.answer, self.read = nn.Linear(width, 10), nn.Linear(width, BLANK + 1)
            self.header = nn.Linear(width, 20)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.trunc_normal_(module.weight, std=0.05)
                    nn.init.zeros_(module.bias)
            for block in self.blocks:  # last, so that the shared weights of arms are drawn before they differ
                block.position = Position(options.get("bias", "none"), heads, width, grid, options)

    def forward(self, patches: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the answer and, for each cell, of its own digit and of those of its headers.

        Returns:
            `[batch, 10]`, `[batch, cells, 11]` and `[batch, cells, 2, 10]` (row, column).
        """
        x = self.embed(patches) + (_sincos(grid, self.width) if self.places is None else self._places(grid))
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1)
        layout = TokenLayout.regular(*grid, prefix_tokens=1)
        for block in self.blocks:
            x = block(x, layout, grid)
        x = self.norm(x)
        return self.answer(x[:, 0]), self.read(x[:, 1:]), self.header(x[:, 1:]).unflatten(-1, (2, 10))

    def _places(self, grid: Grid) -> Tensor:
        assert self.places is not None
        if grid == self.grid:
            return self.places
        table = self.places.T.reshape(1, -1, *self.grid)
        return functional.interpolate(table, grid, mode="bicubic", align_corners=False)[0].flatten(1).T

    def structures(self) -> list[StructuralBias]:
        """The structural bias of each layer; empty for arms without."""
        return [module for module in self.modules() if isinstance(module, StructuralBias)]


def _sincos(grid: Grid, width: int) -> Tensor:
    frequencies = 20.0 ** (-torch.arange(width // 4) / (width // 4))

    def line(count: int) -> Tensor:
        angles = torch.arange(count)[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), -1)

    rows, columns = line(grid[0])[:, None].expand(-1, grid[1], -1), line(grid[1])[None].expand(grid[0], -1, -1)
    return 0.5 * torch.cat((rows, columns), -1).reshape(grid[0] * grid[1], width)


def _swin(offsets: Tensor, grid: Grid, trained: Grid) -> Tensor:
    """`[1, heads, 1 + cells, 1 + cells]`; the CLS token gets 0."""
    if grid != trained:
        size = (2 * grid[0] - 1, 2 * grid[1] - 1)
        offsets = functional.interpolate(offsets[None], size, mode="bilinear", align_corners=True)[0]
    row, column = torch.arange(grid[0]).repeat_interleave(grid[1]), torch.arange(grid[1]).repeat(grid[0])
    picked = offsets[:, row[:, None] - row + grid[0] - 1, column[:, None] - column + grid[1] - 1]
    return functional.pad(picked, (1, 0, 1, 0))[None]


def _rotary(head_width: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each token and channel, `[1 + cells, head width]`; the CLS token is not rotated."""
    quarter = head_width // 4
    frequencies = 30.0 ** (-torch.arange(quarter) / quarter)
    row, column = torch.arange(grid[0]).repeat_interleave(grid[1]), torch.arange(grid[1]).repeat(grid[0])
    angles = torch.cat((row[:, None] * frequencies, column[:, None] * frequencies), -1).repeat_interleave(2, -1)
    angles = functional.pad(angles, (0, 0, 1, 0))
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cosine + turned * sine
