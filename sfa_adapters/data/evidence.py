"""The evidence of a batch (where its answers are printed), in the form that the grounding term of SCR takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfa_adapters.data.preprocess import Page
from sfa_adapters.data.rows import Row
from sfa_adapters.scr.targets import boxes_to_tokens, image_tokens

__all__ = ["evidence_of"]


def evidence_of(
    rows: Sequence[Row],
    pages: Sequence[Page],
    batch: Mapping[str, Any],
    image_id: int,
    grids: Sequence[tuple[int, int]] | None,
) -> dict[str, Any]:
    """Makes the evidence of a batch: boxes or token masks of the places where the answers are printed.

    Args:
        rows: The rows of the batch.
        pages: Their images as the processor got them.
        batch: `input_ids`.
        image_id: Id of the image token.
        grids: Rows and columns of image tokens of each page; None for a host with a fixed grid.

    Returns:
        `evidence_boxes` (the boxes of each sample in pixels of its whole page) with `page_sizes` `[B, 2]`, height and
        width; empty if no row of the batch has boxes: then text density is used instead. For a host without a fixed
        grid `evidence_mask` `[B, T]`, which is all 0 for a sample without boxes.
    """
    boxes = [[page.place(box, row.page_size) for box in row.boxes] for row, page in zip(rows, pages, strict=True)]
    sizes = [page.image.shape[:2] for page in pages]
    if grids is None:
        return {"evidence_boxes": boxes, "page_sizes": torch.tensor(sizes)} if any(boxes) else {}
    places = image_tokens(batch["input_ids"], image_id).places
    mask = torch.zeros(places.shape)
    for number, (page_boxes, size, (down, across)) in enumerate(zip(boxes, sizes, grids, strict=True)):
        mask[number, : down * across] = boxes_to_tokens(page_boxes, size, (down, across))
    return {"evidence_mask": mask}
