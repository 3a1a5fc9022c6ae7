"""Adaptive tokens for hosts of any image size (Qwen-VL, GLM-OCR, PaddleOCR-VL): drops groups before the tower.

Their towers rotate queries and keys by row and column, and 2x2 patches become one token of the language model. So
groups that are blank, or that repeat a neighbour, are dropped as a whole, and the remaining patches and tokens keep
their position ids. (Renumbering these costs accuracy on documents: 83.0 against 38.8 F1 on CORD in the ablation of
arXiv 2509.06415.)

Only the processor's output is rewritten; the model is not changed: transformers accepts positions, windows and segment
bounds of the tower beside the pixels, what it interpolates its table of position embeddings with, and position ids
beside the text. Which patch stands where says the record of the tower (`Backbone.patch_groups`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.adat.duplicates import repeated_groups
from sfa_adapters.adat.patched_pages import PatchedPages
from sfa_adapters.adat.scorers import Scorer, check_scorer, score
from sfa_adapters.compat import with_encoded_images
from sfa_adapters.errors import InjectionError, PlanError
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.tower_search import find_tower
from sfa_adapters.vlm.parts import still_image_id

__all__ = ["GroupPolicy", "drop_blank_groups"]


@dataclass(frozen=True, kw_only=True)
class GroupPolicy:
    """Which merge groups of a page are dropped.

    Attributes:
        threshold: Groups with a density up to this are blank; by default 0.05. With `scorer="duplicates"`: by how much
            colors in [0, 1] may differ that count as equal; by default 0, and only exact repetitions are dropped.
        margin: Groups within this distance, in groups, of a kept one are kept as well; by default 1, and 0 with
            `scorer="duplicates"`.
        scorer: As in `PatchPolicy`, or "duplicates": drops the groups that repeat a neighbour, text or not, see
            `sfa_adapters.adat.duplicates`.

    Raises:
        PlanError: A field cannot be used.
    """

    threshold: float | None = None
    margin: int | None = None
    scorer: Scorer | Literal["duplicates"] = "density"

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise PlanError(f"threshold={self.threshold} must lie in 0..1, as densities and colors do.")
        if self.margin is not None and self.margin < 0:
            raise PlanError(f"margin={self.margin} must be at least 0 groups.")
        if self.scorer != "duplicates":
            check_scorer(self.scorer, "max")

    def keep(self, image: Tensor, side: int) -> Tensor:
        """Selects the groups of one image that are kept.

        Args:
            image: `[3, height, width]` in [0, 1].
            side: Side of a merge group in pixels.

        Returns:
            Bool `[rows, columns]`; at least one group is kept: the densest where all are blank, and the first of those
            that are equal.
        """
        if self.scorer == "duplicates":
            repeated, _ = repeated_groups(image, side, self.threshold or 0.0)
            return _with_margin(~repeated, self.margin or 0)
        density = score(image[None], self.scorer, side)[0]
        keep = density > (0.05 if self.threshold is None else self.threshold)
        if not bool(keep.any()):
            keep = density == density.max()
            return keep & (keep.flatten().cumsum(0).view_as(keep) == 1)  # the first of the densest
        return _with_margin(keep, 1 if self.margin is None else self.margin)


def _with_margin(keep: Tensor, margin: int) -> Tensor:
    """Kept groups, and those within a distance of them."""
    return F.max_pool2d(keep[None].float(), 2 * margin + 1, stride=1, padding=margin)[0] > 0


def drop_blank_groups(
    model: nn.Module, inputs: Mapping[str, Any], policy: GroupPolicy | None = None, for_generate: bool = False
) -> dict[str, Any]:
    """Removes the blank parts of the pages from a batch, or those that repeat a neighbour.

    Args:
        model: A Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-OCR or PaddleOCR-VL model; it is not changed.
        inputs: What the processor returned: `input_ids`, `attention_mask`, `mm_token_type_ids`, `pixel_values`,
            `image_grid_thw`, perhaps `labels`.
        policy: Which groups are dropped; by default blank ones.
        for_generate: Set it for `generate`, which does not pass positions of patches to the tower: the tower then runs
            here, and the batch holds `inputs_embeds` instead of text and pixels. `generate` returns new tokens only.
            Qwen3-VL needs features of several layers of its tower: its batch holds all of them beside the text
            (transformers 5.18 or later), and `generate` returns the shortened prompt in front of the new tokens.

    Returns:
        The same batch with fewer patches and fewer image tokens. Positions are those of the whole page; shorter rows
        are padded on the side that the batch was padded on (left where it was not).

    Raises:
        InjectionError: The model is of another kind.
        PlanError: A key is missing, or the batch holds videos.
        UnknownInterfaceError: `for_generate` with Qwen3-VL and transformers before 5.18.
    """
    policy = policy or GroupPolicy()
    located = find_tower(model)
    groups = located.backbone.patch_groups_of(located.tower)
    core: Any = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
    statistics = image_statistics(located.backbone, located.tower)
    if groups is None or core is None or statistics is None:
        instead = (
            f"its tower {type(located.tower).__name__} ({located.backbone.name}) takes whole pages only."
            if located.backbone.patches is None
            else "it takes inject_adat(model)."
        )
        raise InjectionError(
            f"drop_blank_groups is for Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-OCR and PaddleOCR-VL; the model is "
            f"a {type(model).__name__}, and {instead}"
        )
    missing = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"} - set(inputs)
    if missing or inputs.get("pixel_values_videos") is not None:
        what = f"lacks {sorted(missing)}" if missing else "holds videos"
        raise PlanError(f"The batch {what}; give what the processor returns for text and still images.")
    pages = PatchedPages(groups, inputs["image_grid_thw"], inputs["pixel_values"])
    kept = pages.kept(policy.keep, statistics)
    new = {**inputs, **_text_inputs(core, inputs, [k.flatten() for k in kept]), **pages.without(kept, located.tower)}
    return _embedded(core, new) if for_generate else new


def _embedded(core: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """Replaces pixels of a batch by what the tower makes of them; text too, where its embeddings can hold all of it."""
    pages = {k: v for k, v in batch.items() if k == "pixel_values" or k.startswith("image_")}
    seen = core.get_image_features(**pages, return_dict=True)
    rest = {k: v for k, v in batch.items() if k not in pages}
    if getattr(seen, "deepstack_features", None):
        return rest | with_encoded_images(core, seen)
    features = torch.cat(list(seen.pooler_output))
    words = core.get_input_embeddings()(batch["input_ids"])
    places = (batch["input_ids"] == still_image_id(core.config))[..., None].expand_as(words)
    embeds = words.masked_scatter(places, features.to(words.dtype))
    gone = {"input_ids", "mm_token_type_ids"}
    return {k: v for k, v in rest.items() if k not in gone} | {"inputs_embeds": embeds}


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
