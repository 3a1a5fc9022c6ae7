"""`Evidence`: which image tokens hold the answers of a batch, from boxes, from a mask, or from the density map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.adat.scorers import score
from sfa_adapters.errors import DataError
from sfa_adapters.scr.augment import to_pages
from sfa_adapters.scr.targets import Box, ImageTokens, boxes_to_tokens, image_tokens
from sfa_adapters.scr.watch import Seen, Watch

__all__ = ["Evidence", "patch_density", "required"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Where the answers of a batch are printed; without boxes and mask it is taken to be where text is dense.

    Attributes:
        boxes: For each sample its boxes (left, top, right, bottom), or `[B, n, 4]` padded with NaN; a sample
            without boxes has no evidence and is skipped.
        mask: How much evidence lies under each image token, bool or from 0 up, `[B, T]`, or `[B, L, T]` with a row for
            each label. T is the number of image tokens of a sample, or of those with a place on the page.
        page_sizes: Height and width of the pages in the pixels of the boxes, `[B, 2]`; by default `image_sizes` of the
            inputs, else the size of what the tower sees.
    """

    boxes: Sequence[Sequence[Box]] | Tensor | None = None
    mask: Tensor | None = None
    page_sizes: Sequence[Sequence[float]] | Tensor | None = None

    def target(self, watch: Watch, seen: Seen, inputs: Mapping[str, Any]) -> tuple[ImageTokens, Tensor]:
        """Finds the image tokens that count, and how much evidence lies under each.

        With boxes and density these are the tokens of the whole page; attention on others (newlines, tiles of a page
        that is also there as a whole) is left out.

        Args:
            watch: The host.
            seen: What was kept of its latest forward.
            inputs: Inputs of that forward.

        Returns:
            The tokens, and the evidence, fp32 `[B, T]` or `[B, L, T]` on the device of the tokens.

        Raises:
            DataError: The evidence does not fit the batch; says what was expected.
            ObservationError: The tower did not run once.
        """
        if self.boxes is not None and self.mask is not None:
            raise DataError("Give evidence_boxes or evidence_mask, not both.")
        ids = required(inputs, "input_ids")
        samples, length = ids.shape
        tokens = image_tokens(ids, watch.image_token)
        whole = tokens.places.shape[1]
        if self.mask is not None and self.mask.shape[-1] == whole:
            return tokens, _checked(self.mask, samples, length, (whole,)).to(ids.device)
        images, grid = seen.tower
        shape = watch.token_grid(grid)
        page = tokens.of_page(shape[0] * shape[1], watch.kept_prefix, watch.page_first, watch.apart)
        if self.mask is not None:
            target = _checked(self.mask, samples, length, (whole, shape[0] * shape[1]))
        elif self.boxes is not None:
            target = self._covered(self.boxes, inputs, samples, shape, images)
        else:
            density = patch_density(_whole_pages(watch, inputs, tokens, page), grid, watch)
            dense = density * (density > watch.config.dense_threshold)
            target = F.adaptive_avg_pool2d(dense[:, None], shape).flatten(1)
        return page, target.to(ids.device)

    def _covered(
        self,
        boxes: Sequence[Sequence[Box]] | Tensor,
        inputs: Mapping[str, Any],
        samples: int,
        shape: tuple[int, int],
        images: Tensor,
    ) -> Tensor:
        sizes = inputs.get("image_sizes") if self.page_sizes is None else self.page_sizes
        sizes = [tuple(images.shape[-2:])] * samples if sizes is None else sizes
        for name, given in (("evidence_boxes", boxes), ("page_sizes", sizes)):
            if len(given) != samples:
                raise DataError(f"{name} has {len(given)} entries for {samples} samples.")
        covered = []
        for number, (page_boxes, size) in enumerate(zip(boxes, sizes, strict=True)):
            height, width = (float(side) for side in size)
            try:
                covered.append(boxes_to_tokens(page_boxes, (height, width), shape))
            except DataError as error:
                raise DataError(f"Sample {number}: {error}") from None
        return torch.stack(covered)


def patch_density(images: Tensor, grid: tuple[int, int], watch: Watch) -> Tensor:
    """Mean text density of each patch.

    Args:
        images: Normalised, `[n, 3, H, W]`.
        grid: Rows and columns of patches.
        watch: The host, for its statistics and the scorer.

    Returns:
        `[n, rows, columns]` in [0, 1].
    """
    patch = images.shape[-2] // grid[0]
    pages = to_pages(images, watch.statistics)[..., : grid[0] * patch, : grid[1] * patch]
    return score(pages, watch.config.scorer, patch, "mean")


def required(inputs: Mapping[str, Any], name: str) -> Tensor:
    """A tensor that a batch must have.

    Raises:
        DataError: It does not have it.
    """
    value = inputs.get(name)
    if not isinstance(value, Tensor):
        raise DataError(f"inputs has no tensor {name!r}; there are {sorted(inputs)}.")
    return value


def _whole_pages(watch: Watch, inputs: Mapping[str, Any], tokens: ImageTokens, page: ImageTokens) -> Tensor:
    """The whole page of each sample, `[B, 3, H, W]`; any for a sample without one."""
    pixels = required(inputs, "pixel_values")
    tiles = tokens.counts // (page.places.shape[1] + watch.kept_prefix)
    if pixels.ndim == 5:
        last = (tiles.clamp(max=pixels.shape[1]) - 1).clamp(min=0)
        return pixels[torch.arange(len(pixels)), torch.zeros_like(last) if watch.page_first else last]
    tiles = tiles.clamp(max=1) if watch.packs else tiles
    if int(tiles.sum()) != len(pixels):
        raise DataError(
            f"{len(pixels)} images for {int(tiles.sum())} tiles in {len(tiles)} samples: which belong together is not "
            "known. Give evidence_boxes or evidence_mask."
        )
    whole = tiles.cumsum(0) - (tiles if watch.page_first else 1)
    return pixels[whole.clamp(0, len(pixels) - 1)]


def _checked(mask: Tensor, samples: int, length: int, sizes: tuple[int, ...]) -> Tensor:
    shapes = [shape for size in sizes for shape in ((samples, size), (samples, length, size))]
    if tuple(mask.shape) not in shapes:
        raise DataError(f"evidence_mask {tuple(mask.shape)} must be one of {shapes}.")
    values = mask.float()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise DataError("evidence_mask has entries that are NaN, infinite or below 0.")
    return values
