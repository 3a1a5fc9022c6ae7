"""Adaptive tokens for Qwen2.5-VL: drops blank merge groups before the tower; all others keep their position ids.

The tower of Qwen2.5-VL has no table of position embeddings to interpolate: it rotates queries and keys by row and
column, and merges 2x2 patches into one token of the language model. So blank groups are dropped as a whole, and the
remaining patches and tokens keep their position ids. (Renumbering these costs accuracy on documents: 83.0 against 38.8
F1 on CORD in the ablation of arXiv 2509.06415.)

Only the processor's output is rewritten; the model is not changed: transformers accepts positions, windows and segment
bounds of the tower beside the pixels, and position ids beside the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.adat.scorers import Scorer, score
from sfa_adapters.errors import InjectionError, PlanError
from sfa_adapters.normalisation import Statistics, image_statistics
from sfa_adapters.registry import find_tower
from sfa_adapters.vlm.parts import still_image_id

__all__ = ["GroupPolicy", "drop_blank_groups"]


@dataclass(frozen=True, kw_only=True)
class GroupPolicy:
    """Which merge groups of a page count as blank.

    Attributes:
        threshold: Groups with a density up to this are blank.
        margin: Groups within this distance, in groups, of one that is not blank are kept as well.
        scorer: As in `PatchPolicy`.

    Raises:
        PlanError: A field cannot be used.
    """

    threshold: float = 0.05
    margin: int = 1
    scorer: Scorer = "density"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise PlanError(f"threshold={self.threshold} must lie in 0..1, as densities do.")
        if self.margin < 0:
            raise PlanError(f"margin={self.margin} must be at least 0 groups.")

    def keep(self, image: Tensor, side: int) -> Tensor:
        """Selects the groups of one image that are kept.

        Args:
            image: `[3, height, width]` in [0, 1].
            side: Side of a merge group in pixels.

        Returns:
            Bool `[rows, columns]`; at least one group is kept, the densest where all are blank.
        """
        density = score(image[None], self.scorer, side)[0]
        keep = density > self.threshold
        if not bool(keep.any()):
            keep = density == density.max()
            return keep & (keep.flatten().cumsum(0).view_as(keep) == 1)  # the first of the densest
        return F.max_pool2d(keep[None].float(), 2 * self.margin + 1, stride=1, padding=self.margin)[0] > 0


def drop_blank_groups(
    model: nn.Module, inputs: Mapping[str, Any], policy: GroupPolicy | None = None, for_generate: bool = False
) -> dict[str, Any]:
    """Removes the blank parts of the pages from a batch.

    Args:
        model: A Qwen2.5-VL model; it is not changed.
        inputs: What the processor returned: `input_ids`, `attention_mask`, `mm_token_type_ids`, `pixel_values`,
            `image_grid_thw`, perhaps `labels`.
        policy: Which groups are blank.
        for_generate: Set it for `generate`, which does not pass positions of patches to the tower: the tower then runs
            here, and the batch holds `inputs_embeds` instead of text and pixels. `generate` returns new tokens only.

    Returns:
        The same batch with fewer patches and fewer image tokens. Positions are those of the whole page; shorter rows
        are padded on the side that the batch was padded on (left where it was not).

    Raises:
        InjectionError: The model is no Qwen2.5-VL.
        PlanError: A key is missing, or the batch holds videos.
    """
    policy = policy or GroupPolicy()
    located = find_tower(model)
    core: Any = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
    if located.backbone.name != "qwen2_5_vit" or core is None:
        raise InjectionError(f"drop_blank_groups is for Qwen2.5-VL; {type(model).__name__} takes inject_adat(model).")
    missing = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"} - set(inputs)
    if missing or inputs.get("pixel_values_videos") is not None:
        what = f"lacks {sorted(missing)}" if missing else "holds videos"
        raise PlanError(f"The batch {what}; give what the processor returns for text and still images.")
    vision: Any = located.tower.config
    grids = [(int(h), int(w)) for _, h, w in inputs["image_grid_thw"].tolist()]
    statistics = image_statistics(located.backbone, located.tower)
    assert statistics is not None
    kept = _kept(inputs["pixel_values"], grids, vision, policy, statistics)
    tower, tokens = _tower_inputs(inputs, grids, kept, vision)
    new = {**inputs, **_text_inputs(core, inputs, tokens), **tower}
    return _embedded(core, new) if for_generate else new


def _embedded(core: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Replaces text and pixels of a batch by `inputs_embeds` of the language model."""
    pages = {k: v for k, v in batch.items() if k == "pixel_values" or k.startswith("image_")}
    features = torch.cat(list(core.get_image_features(**pages).pooler_output))
    words = core.get_input_embeddings()(batch["input_ids"])
    places = (batch["input_ids"] == still_image_id(core.config))[..., None].expand_as(words)
    embeds = words.masked_scatter(places, features.to(words.dtype))
    gone = {*pages, "input_ids", "mm_token_type_ids"}
    return {k: v for k, v in batch.items() if k not in gone} | {"inputs_embeds": embeds}


def _kept(
    pixel_values: Tensor, grids: list[tuple[int, int]], vision: Any, policy: GroupPolicy, statistics: Statistics
) -> list[Tensor]:
    """Which groups of each image are kept, bool `[groups]`, in the order of the processor (row by row)."""
    merge, patch = int(vision.spatial_merge_size), int(vision.patch_size)
    mean, std = (torch.tensor(v, device=pixel_values.device).view(3, 1, 1) for v in statistics)
    kept = []
    for part, (h, w) in zip(pixel_values.split([h * w for h, w in grids]), grids, strict=True):
        # [rows, columns, 2, 2, channels, frames, patch, patch]; a still image repeats its only frame
        flat = part.float().view(
            h // merge, w // merge, merge, merge, -1, int(vision.temporal_patch_size), patch, patch
        )
        image = flat[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, h * patch, w * patch)
        kept.append(policy.keep((image * std + mean).clamp(0, 1), merge * patch).flatten())
    return kept


def _tower_inputs(
    inputs: Mapping[str, Any], grids: list[tuple[int, int]], kept: list[Tensor], vision: Any
) -> tuple[dict[str, Any], list[Tensor]]:
    """The tower's inputs for the kept groups, by the names that the model passes on (prefix `image_`)."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    unit, device = int(vision.spatial_merge_size) ** 2, inputs["pixel_values"].device
    grid_thw = inputs["image_grid_thw"]
    stays = torch.cat(kept).to(device)
    positions = get_vision_position_ids(grid_thw, int(vision.spatial_merge_size)).to(device)
    index, bounds = get_vision_window_index(
        grid_thw, int(vision.spatial_merge_size), int(vision.window_size), int(vision.patch_size)
    )
    index, bounds = index.to(device), bounds.to(device)
    in_order = stays[index]
    # New numbers of the kept groups, and window bounds without the dropped ones.
    renumbered = stays.cumsum(0) - 1
    windows = F.pad(in_order.cumsum(0), (1, 0))[bounds.long() // unit] * unit
    counts = torch.stack([k.sum() for k in kept]).to(device)
    patches = stays.repeat_interleave(unit)
    new = {
        "pixel_values": inputs["pixel_values"][patches],
        # Only products of these are used where positions, windows and bounds are given.
        "image_grid_thw": torch.stack([torch.tensor([1, unit, int(c)]) for c in counts]).to(grid_thw.device),
        "image_position_ids": positions[patches],
        "image_window_index": renumbered[index[in_order]],
        "image_cu_window_seqlens": torch.unique_consecutive(windows).int(),
        "image_cu_seqlens": F.pad((counts * unit).cumsum(0), (1, 0)).int(),
        "image_page_grids": grid_thw[:, 1:],  # for SFA: distances are relative to the whole page
    }
    return new, kept


def _text_inputs(core: Any, inputs: Mapping[str, Any], kept: list[Tensor]) -> dict[str, Any]:
    """The text without the tokens of the dropped groups, with the position ids of the whole page."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    three, _ = core.get_rope_index(
        ids, inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"], attention_mask=mask
    )
    image = ids == still_image_id(core.config)
    if int(image.sum()) != sum(len(k) for k in kept):
        raise PlanError(
            f"{int(image.sum())} image tokens in the text, {sum(len(k) for k in kept)} groups in the images."
        )
    stays = mask.bool()
    stays = stays.masked_scatter(image, torch.cat(kept).to(ids.device))
    lengths = stays.sum(-1)
    longest = int(lengths.max())
    right = bool((mask[:, -1] == 0).any())
    places = torch.arange(longest, device=ids.device)
    filled = places < lengths[:, None] if right else places >= longest - lengths[:, None]

    def shorten(values: Tensor, blank: int) -> Tensor:
        out = values.new_full((*values.shape[:-1], longest), blank)
        shape = values.shape[:-2]
        out[filled.expand(*shape, *filled.shape)] = values[stays.expand(*shape, *stays.shape)]
        return out

    pad = int(ids[mask == 0][0]) if bool((mask == 0).any()) else 0
    new = {
        "input_ids": shorten(ids, pad),
        "attention_mask": shorten(mask, 0),
        "mm_token_type_ids": shorten(inputs["mm_token_type_ids"], 0),
    }
    # Four rows: text positions for the language model's mask, then time, height and width.
    plain = (new["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    new["position_ids"] = torch.cat((plain[None], shorten(three, 0)))
    if inputs.get("labels") is not None:
        new["labels"] = shorten(inputs["labels"], -100)
    return new
