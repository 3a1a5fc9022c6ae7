"""Two towers without a batch dimension, `[tokens, width]`, whose projections have unusual names."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfa_adapters import Backbone, register_backbone
from sfa_adapters.arrangement import ImageTokens
from sfa_adapters.pixel_grids import image_grid
from sfa_adapters.registry import Geometry

WIDTH, HEADS, PATCH = 16, 2, 8


class PageAttention(nn.Module):
    """Attends to one page, or to each of several that lie behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.read, self.write_back, self.gate = (nn.Linear(WIDTH, n * WIDTH) for n in (3, 1, 1))

    def forward(
        self, tokens: Tensor, unused: Any = None, extra_logits: Any = None, page_ends: Tensor | None = None
    ) -> Tensor:
        states = self.read(tokens).view(1, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        lengths = [len(tokens)] if page_ends is None else page_ends.diff().tolist()
        pages = zip(*(part.split(lengths, dim=2) for part in states), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(q, k, v, extra_logits) for q, k, v in pages], dim=2)
        return self.write_back(out[0].transpose(0, 1).flatten(1)) * self.gate(tokens).sigmoid()


class PageBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(WIDTH), PageAttention()

    def forward(self, tokens: Tensor, page_ends: Tensor | None = None) -> Tensor:
        return tokens + self.mixer(self.norm(tokens), page_ends=page_ends)


class Page(nn.Module):
    """Takes one image, `[3, height, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, WIDTH))
        self.blocks = nn.ModuleList(PageBlock() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        tokens = torch.cat((self.cls, self.patches(image).flatten(1).T))
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class Pages(nn.Module):
    """Takes patches of several pages behind each other, `[tokens, 12]`, and their rows and columns, `[pages, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing, self.use_reentrant = False, False
        self.patches = nn.Linear(12, WIDTH)
        self.blocks = nn.ModuleList(PageBlock() for _ in range(2))

    def forward(self, patches: Tensor, sizes: Tensor) -> Tensor:
        tokens = self.patches(patches)
        page_ends = F.pad(sizes.prod(-1).cumsum(0), (1, 0))
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                tokens: Any = checkpoint(block, tokens, page_ends, use_reentrant=self.use_reentrant)
            else:
                tokens = block(tokens, page_ends)
        return tokens


def pages(tower: nn.Module, args: Any, kwargs: Any) -> list[ImageTokens]:
    sizes = (args[1] if len(args) > 1 else kwargs["sizes"]).tolist()
    return [ImageTokens((rows, columns)) for rows, columns in sizes]


def page(tower: nn.Module, args: Any, kwargs: Any) -> ImageTokens | None:
    grid = image_grid(args[0] if args else kwargs["image"], PATCH)
    return None if grid is None else ImageTokens(grid)


PAGE = register_backbone(
    Backbone(
        name="page",
        towers=("page_towers.Page",),
        attentions=("page_towers.PageAttention",),
        mask_argument="extra_logits",
        geometry=lambda tower: Geometry(grid=(4, 4), prefix_tokens=1),
        layouts=page,
        small_towers="page_cases:PAGE",
    )
)
PAGES = register_backbone(
    Backbone(
        name="pages",
        towers=("page_towers.Pages",),
        attentions=("page_towers.PageAttention",),
        mask_argument="extra_logits",
        geometry=lambda tower: Geometry(grid=None, prefix_tokens=0),
        layouts=pages,
        joined="segments",
        segment_argument="page_ends",
        small_towers="page_cases:PAGES",
    )
)
