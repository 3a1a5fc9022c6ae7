"""`PatchedPages`: the still images of a batch as a flat tower gets them, and its inputs for a part of their patches.

transformers takes positions, window order, segment bounds and interpolation of a table of positions beside the pixels,
so that a tower computes at the remaining patches what it would compute there on the whole page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.arrangement import MergeGroups
from sfa_adapters.errors import PlanError
from sfa_adapters.normalisation import Statistics
from sfa_adapters.patch_groups import PatchGroups

__all__ = ["PatchedPages"]


class PatchedPages:
    """The still images of a batch, as patches.

    Args:
        groups: The form of the patches.
        grid_thw: Frames, rows and columns of patches of each image, `[images, 3]`.
        patches: Of all images.

    Raises:
        PlanError: An image has several frames, or grids and patches do not fit each other.
    """

    def __init__(self, groups: PatchGroups, grid_thw: Tensor, patches: Tensor) -> None:
        self.groups, self.grid_thw, self.patches = groups, grid_thw, patches
        self.grids = [(int(h), int(w)) for _, h, w in grid_thw.tolist()]
        count = sum(h * w for h, w in self.grids)
        if bool((grid_thw[:, 0] != 1).any()) or count != len(patches):
            raise PlanError(
                f"image_grid_thw {grid_thw.tolist()} are grids of {count} patches of still images, and pixel_values "
                f"has {len(patches)}. Give what one call of the processor returns; drop_blank_groups takes no videos."
            )

    def kept(self, keep: Callable[[Tensor, int], Tensor], statistics: Statistics) -> list[Tensor]:
        """Which groups of each image are kept.

        Args:
            keep: Chooses them, from an image `[3, height, width]` in [0, 1] and the side of a group in pixels.
            statistics: Mean and standard deviation that the patches were normalised with.

        Returns:
            Bool `[group rows, group columns]` for each image.
        """
        mean, std = (torch.tensor(v, device=self.patches.device).view(3, 1, 1) for v in statistics)
        parts = self.patches.split([h * w for h, w in self.grids])
        pages = (self.groups.page(part, grid) * std + mean for part, grid in zip(parts, self.grids, strict=True))
        return [keep(page.clamp(0, 1), self.groups.side * self.groups.patch) for page in pages]

    def without(self, kept: list[Tensor], tower: nn.Module) -> dict[str, Any]:
        """The tower's inputs for the kept groups, by the names that the model passes on (prefix `image_`).

        Args:
            kept: Which groups of each image are kept.
            tower: The tower.
        """
        device, unit = self.patches.device, self.groups.side**2
        chosen, places, strips, start = [], [], [], 0
        for keep, (rows, columns) in zip(kept, self.grids, strict=True):
            index, strip = self.groups.strip(keep)
            chosen.append(index + start)
            places.append(torch.stack(self.groups.order.places(rows, columns), -1)[index])
            strips.append((1, *strip))
            start += rows * columns
        patches = torch.cat(chosen).to(device)
        counts = torch.stack([keep.sum() for keep in kept]).to(device)
        return {
            "pixel_values": self.patches[patches],
            # Where positions, windows and bounds are given, only the order of groups and their number are read here.
            "image_grid_thw": torch.tensor(strips, device=self.grid_thw.device),
            "image_position_ids": torch.cat(places).to(device),
            "image_cu_seqlens": F.pad((counts * unit).cumsum(0), (1, 0)).int(),
            "image_page_grids": self.grid_thw[:, 1:],  # for SFA: distances are relative to the whole page
            **self._windows(torch.cat([k.flatten() for k in kept]).to(device), tower),
            **self._table(patches, tower),
        }

    def _windows(self, stays: Tensor, tower: nn.Module) -> dict[str, Tensor]:
        """Order and bounds of the windows of Qwen2.5-VL without the dropped groups."""
        from transformers.vision_utils import get_vision_window_index

        config: Any = tower.config
        if getattr(config, "window_size", None) is None:
            return {}
        side = self.groups.side
        index, bounds = get_vision_window_index(self.grid_thw, side, int(config.window_size), self.groups.patch)
        index, bounds = index.to(stays.device), bounds.to(stays.device)
        in_order = stays[index]
        windows = F.pad(in_order.cumsum(0), (1, 0))[bounds.long() // side**2] * side**2
        renumbered = stays.cumsum(0) - 1
        return {
            "image_window_index": renumbered[index[in_order]],
            "image_cu_window_seqlens": torch.unique_consecutive(windows).int(),
        }

    def _table(self, patches: Tensor, tower: nn.Module) -> dict[str, Tensor]:
        """What a table of position embeddings is interpolated with at the remaining patches, where there is one."""
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        table: Any = next((module for module in tower.modules() if hasattr(module, "num_grid_per_side")), None)
        if table is None:
            return {}
        index, weights = get_vision_interpolation_indices_and_weights(
            self.grid_thw,
            num_grid_per_side=table.num_grid_per_side,
            mode=table.interpolation_mode,
            align_corners=table.interpolation_align_corners,
            spatial_merge_size=self.groups.side if isinstance(self.groups.order, MergeGroups) else 1,
        )
        chosen = patches.to(index.device)
        return {"image_interp_indices": index[chosen], "image_interp_weights": weights[chosen]}
