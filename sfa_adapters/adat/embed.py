"""Embeds patches of any size with the patch embedding of a tower, which was trained for one size.

* The kernel of the patch embedding is resampled by the pseudo-inverse method (FlexiViT, arXiv 2212.08013, section 3.4):
  the embedding of an enlarged patch with the resampled kernel is that of the patch itself. timm computes it.
* The position embedding of a token is that of its true centre: bilinear between the tower's own patches if the token is
  no larger than one, else the mean over its area.
* Tokens of the tower's own patch size are not computed: they are taken from the tower's embedding, bit for bit.

Shape letters: B images, N tokens of one image, D width, n tokens along one side of a cell, s pixels along one side of
a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.adat.plan import PatchPlan
from sfa_adapters.errors import PlanError

__all__ = ["LargePatchResidual", "PatchEmbedder", "position_table"]


class LargePatchResidual(nn.Module):
    """A learned residual for large patches from the small patches inside: a convolution, then a linear layer.

    As in Adaptive Patch Transformers (arXiv 2510.18091, section 3.2): for a patch of 2^i times the tower's side the
    convolution is applied i times. The linear layer starts at zero, so untrained it adds nothing.

    Args:
        width: D of the tower.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    def __init__(self, width: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width, kernel_size=2, stride=2, device=device, dtype=dtype)
        self.out = nn.Linear(width, width, device=device, dtype=dtype)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, patches: Tensor, halvings: int) -> Tensor:
        """Computes the residual.

        Args:
            patches: Embedded patches of the tower's own size, `[B, D, rows, columns]`.
            halvings: How often rows and columns are halved.

        Returns:
            One vector per large patch, `[B, rows * columns / 4^halvings, D]`.
        """
        for _ in range(halvings):
            patches = self.reduce(patches)
        return self.out(patches.flatten(2).transpose(1, 2))


class PatchEmbedder:
    """Embeds the tokens of patch plans with one tower's patch embedding.

    Args:
        projection: The tower's patch convolution, kernel and stride of one patch.
    """

    def __init__(self, projection: nn.Conv2d) -> None:
        self.patch = projection.kernel_size[0]
        self._resample: Any = None
        self._kernels: dict[int, tuple[Any, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"patch": self.patch, "_resample": None, "_kernels": {}}

    def kernel(self, projection: nn.Conv2d, side: int) -> Tensor:
        """The kernel for patches of `side` pixels, `[D, channels, side, side]`; cached if it needs no gradient."""
        weight = projection.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return self._resampled(weight, side)
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._kernels.get(side, (None,))[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._kernels[side] = (key, self._resampled(weight.detach(), side))
        return self._kernels[side][1]

    def _resampled(self, weight: Tensor, side: int) -> Tensor:
        from timm.layers.patch_embed import PatchEmbedResamplerFixedOrigSize

        if self._resample is None:
            self._resample = PatchEmbedResamplerFixedOrigSize((self.patch, self.patch))
        return self._resample(weight, [side, side])

    def __call__(
        self,
        projection: nn.Conv2d,
        positions: Tensor,
        plans: Sequence[PatchPlan],
        images: Tensor,
        embedded: Tensor,
        residual: LargePatchResidual | None = None,
    ) -> list[Tensor]:
        """Embeds the tokens of patch plans.

        Args:
            projection: The patch convolution.
            positions: Position embeddings of the page, `[rows, columns, D]` in the tower's own patches.
            plans: One patch plan per image, all of one policy and one image size.
            images: Input images of the tower, `[B, channels, height, width]`.
            embedded: The tower's own tokens with their positions, without prefix, `[B, rows * columns, D]`.
            residual: Learned residual for large patches, or None.

        Returns:
            For each image its tokens, `[N, D]`, in the order of its plan.

        Raises:
            PlanError: The residual does not fit the patch sizes of the policy.
        """
        first = plans[0]
        height, width = first.image_size
        page = images[..., :height, :width].to(projection.weight.dtype)
        down, right = first.padded_size[0] - height, first.padded_size[1] - width
        if down or right:
            page = F.pad(page, (0, right, 0, down), mode="replicate")
        tokens = [embedded.new_empty(plan.num_tokens, embedded.shape[-1]) for plan in plans]
        level = torch.stack([plan.level for plan in plans])
        for number, n in enumerate(first.sides):
            chosen = [(plan.token_level == number).nonzero()[:, 0].to(embedded.device) for plan in plans]
            if not any(len(rows) for rows in chosen):
                continue
            index = [plan.index[plan.token_level == number].to(embedded.device) for plan in plans]
            if n * first.patch == first.cell:
                columns = width // first.patch
                chosen_pages = [o[_page_index(i, first, n, columns)] for o, i in zip(embedded, index, strict=True)]
            else:
                chosen_pages = self._level(projection, positions, first, page, level == number, n, index, residual)
            tokens = [
                t.index_copy(0, rows, new.to(t.dtype))
                for t, rows, new in zip(tokens, chosen, chosen_pages, strict=True)
            ]
        return tokens

    def _level(
        self,
        projection: nn.Conv2d,
        positions: Tensor,
        plan: PatchPlan,
        page: Tensor,
        chosen: Tensor,
        n: int,
        index: Sequence[Tensor],
        residual: LargePatchResidual | None,
    ) -> list[Tensor]:
        """Embeds the tokens of one level: all those of its cells, from which the ones in the plans are taken."""
        rows, columns = chosen.shape[1:]
        cell = plan.cell
        cells = page.unflatten(-1, (columns, cell)).unflatten(-3, (rows, cell)).permute(0, 2, 4, 1, 3, 5)
        cells = cells[chosen.to(page.device)]  # [K, channels, cell, cell]
        side = math.ceil(cell / n)
        if side * n != cell:  # a patch of fractional size is enlarged to whole pixels
            size = (side * n, side * n)
            cells = F.interpolate(cells.float(), size, mode="bilinear", antialias=True).to(cells.dtype)
        patches = cells.unflatten(-1, (n, side)).unflatten(-3, (n, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        embedded = F.linear(patches.flatten(0, 2), self.kernel(projection, side).flatten(1), projection.bias)
        # Where each patch of the level's full grid stands among the computed ones.
        place = torch.full((len(chosen), rows, n, columns, n), -1, device=page.device)
        inner = torch.arange(n * n, device=page.device).view(1, n, n)
        ranks = torch.arange(len(cells), device=page.device).view(-1, 1, 1) * n * n + inner
        place.permute(0, 1, 3, 2, 4)[chosen.to(page.device)] = ranks
        place = place.flatten(1)
        table = position_table(positions, plan, n)
        extra = self._residual(projection, page, plan, n, residual)
        out = []
        for b, wanted in enumerate(index):
            token = embedded[place[b, wanted]] + table[wanted].to(embedded.dtype)
            out.append(token if extra is None else token + extra[b, wanted])
        return out

    def _residual(
        self, projection: nn.Conv2d, page: Tensor, plan: PatchPlan, n: int, residual: LargePatchResidual | None
    ) -> Tensor | None:
        side = plan.cell / n
        if residual is None or side <= plan.patch:
            return None
        halvings = math.log2(side / plan.patch)
        if halvings != round(halvings) or any(x % side for x in plan.padded_size):
            raise PlanError(
                f"residual=True adds patches of {plan.patch} px by twos, so large patches must have {2 * plan.patch}, "
                f"{4 * plan.patch}, ... px; this policy has {side:g} px."
            )
        return residual(projection(page), round(halvings))


def _page_index(index: Tensor, plan: PatchPlan, n: int, columns: int) -> Tensor:
    """Converts patch numbers on the grid of the padded page to those of the page itself."""
    padded_columns = plan.level.shape[1] * n
    return index // padded_columns * columns + index % padded_columns


def position_table(positions: Tensor, plan: PatchPlan, n: int) -> Tensor:
    """Interpolates position embeddings for all patches of one level's full grid.

    Args:
        positions: Position embeddings of the page, `[rows, columns, D]`, one per patch of the tower.
        plan: Patch plan with the size of the page, its cells and the tower's patch.
        n: Patches of the level along one side of a cell.

    Returns:
        `[cell rows * n * cell columns * n, D]`, in the dtype of `positions`.
    """
    share = plan.cell / n / plan.patch
    weights = [
        axis_weights(cells * n, share, size, positions.device)
        for cells, size in zip(plan.level.shape, positions.shape[:2], strict=True)
    ]
    with torch.autocast(positions.device.type, enabled=False):
        table = torch.einsum("ir,rcd->icd", weights[0], positions.float())
        return torch.einsum("jc,icd->ijd", weights[1], table).flatten(0, 1).to(positions.dtype)


def axis_weights(count: int, size: float, side: int, device: torch.device | None = None) -> Tensor:
    """Interpolation weights of the tower's patches for each token, along one axis.

    Args:
        count: Tokens along the axis.
        size: Side of a token, in patches of the tower.
        side: Patches of the tower along the axis.
        device: Device of the result.

    Returns:
        `[count, side]`, fp32; rows sum to one, except for tokens that lie wholly in the padding.
    """
    start = torch.arange(count, device=device, dtype=torch.float64) * size
    edge = torch.arange(side, device=device, dtype=torch.float64)
    if size > 1:
        shared = torch.minimum(start[:, None] + size, edge + 1) - torch.maximum(start[:, None], edge)
        shared = shared.clamp(min=0)
        return (shared / shared.sum(-1, keepdim=True).clamp(min=1e-9)).float()
    centre = (start + size / 2 - 0.5).clamp(0, side - 1)
    return (1 - (centre[:, None] - edge).abs()).clamp(min=0).float()
