"""Blank parts of a page left out before the tower of an inference engine: what the tower computes with then.

The rule is that of `drop_blank_groups`: whole merge groups of patches are left out, and the rest keeps its rotary
angles, its windows and its positions in the prompt. An engine's tower computes these from the grid of the page, so its
own results for the whole page are cut down here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from sfa_adapters.adat.patched_pages import PatchedPages
from sfa_adapters.errors import ServingError
from sfa_adapters.patch_groups import PatchGroups

__all__ = ["arguments_of_kept", "metadata_of_kept", "written_page"]

PER_PATCH = ("rotary_pos_emb_cos", "rotary_pos_emb_sin")
PER_IMAGE = ("cu_seqlens", "cu_window_seqlens")


def metadata_of_kept(metadata: Mapping[str, Any], kept: Tensor, unit: int) -> dict[str, Any]:
    """What vLLM's tower of Qwen2.5-VL computes with, for a part of the groups of its images.

    Args:
        metadata: What the tower prepares for whole images (`prepare_encoder_metadata`).
        kept: Which groups of all images stay, bool `[groups]`, in the order in which the processor lists them.
        unit: Patches of a group.

    Returns:
        The same names, for the patches of the groups that stay.

    Raises:
        ServingError: The groups are not those of the images, or the attention backend needs lengths of its own.
    """
    index = metadata["window_index"]
    if len(kept) != len(index):
        raise ServingError(f"The images have {len(index)} merge groups, and {len(kept)} were chosen from.")
    if metadata.get("sequence_lengths_full") is not None:
        raise ServingError("The FlashInfer backend of the encoder cannot leave out groups: --mm-encoder-attn-backend.")
    stays = kept.to(index.device).bool()
    in_order = stays[index]  # by windows
    before = F.pad(in_order.cumsum(0), (1, 0)) * unit
    new_index = (stays.cumsum(0) - 1)[index[in_order]]
    new = {**metadata, "window_index": new_index, "reverse_indices": new_index.argsort()}
    for name in PER_PATCH:
        values = metadata[name]
        new[name] = values[in_order.repeat_interleave(unit).to(values.device)]
    for name in PER_IMAGE:
        bounds = metadata[name]
        cut = before.to(bounds.device)[bounds.long() // unit]
        new[name] = torch.unique_consecutive(cut).to(bounds.dtype)
    new["max_seqlen_full"] = new["cu_seqlens"].diff().max().int().cpu()
    new["max_seqlen_window"] = new["cu_window_seqlens"].diff().max().int().cpu()
    return new


def arguments_of_kept(
    groups: PatchGroups, grids: Sequence[tuple[int, ...]], kept: Tensor, tower: nn.Module
) -> dict[str, Any]:
    """What the tower of transformers is given for the groups that stay (`PatchedPages.without`), without pixels.

    Args:
        groups: The form of the patches.
        grids: Frames, rows and columns of patches of each image.
        kept: As in `metadata_of_kept`.
        tower: The tower of transformers; its configuration is read.

    Raises:
        ServingError: The groups are not those of the grids.
    """
    shapes = [(rows // groups.side, columns // groups.side) for _, rows, columns in grids]
    counts = [math.prod(shape) for shape in shapes]
    if sum(counts) != len(kept):
        raise ServingError(f"The images have {sum(counts)} merge groups, and {len(kept)} were chosen from.")
    parts = kept.bool().cpu().split(counts)
    pages = PatchedPages(groups, torch.tensor(grids), torch.empty(sum(map(math.prod, grids)), 0))
    arguments = pages.without([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], tower)
    return {name.removeprefix("image_"): value for name, value in arguments.items() if name != "pixel_values"}


def written_page(width: int, height: int) -> Image.Image:
    """A page full of letters, of which no rule leaves anything out; engines measure their memory with such a page.

    Args:
        width: In pixels.
        height: In pixels.
    """
    page = Image.new("RGB", (width, height), "white")
    draw, letters = ImageDraw.Draw(page), random.Random(0)  # noqa: S311
    for top in range(-2, height, 10):
        draw.text((0, top), "".join(letters.choices("ABDEGHKMNQRSXZaeghkmsxz2345689", k=width // 5 + 1)), fill="black")
    return page
