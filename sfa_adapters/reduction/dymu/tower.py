"""`TowerState`: the state of a vision tower that merges tokens, and the updates that each merge needs.

The hooks in `hooks` call it; where tokens are is in `tokens`, which of them merge in `merging`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.arrangement import ImageTokens, Listed, TokenArrangement
from sfa_adapters.errors import LayoutError
from sfa_adapters.hooks import state_of
from sfa_adapters.layout import TokenLayout
from sfa_adapters.reduction.dymu.merging import Merged, Pairs, merge_above, pair_scores
from sfa_adapters.reduction.dymu.tokens import TowerTokens, adaptive_lengths, group_order
from sfa_adapters.registry import Backbone
from sfa_adapters.tower_input import TowerInput

__all__ = ["DYMU", "TowerState", "follow_flat", "follow_packed"]

# The name of the feature, for `sfa_adapters.hooks`.
DYMU = "dymu"
# (number of the place between two layers, the pairs there, images) -> threshold to use.
Calibrator = Callable[[int, Pairs, int], float]


@dataclass(eq=False)
class TowerState:
    """State of DyMU in one tower.

    Attributes:
        tower: The tower.
        backbone: Its record.
        thresholds: One per place between layers; 1 merges nothing.
        side: Tokens along one side of a group that merges whole.
        prefix: Prefix tokens of each image.
        feature_layer: The first layer whose output the host reads.
        heads: Heads of each attention layer.
        tokens: Tokens of the current or the latest forward.
        grid: Rows and columns of patches of the images; None for flat towers.
        window_index: Flat towers: which group is at each place of the sequence, `[groups]`.
        calibrator: Chooses thresholds while they are calibrated.
        keys: Keys of the latest attention layer.
        flat_input: Flat towers: groups of each image, places of their patches, and page grids.
        language: The `LanguageState` of the host's language model, None where merging stays in the tower.
    """

    tower: nn.Module
    backbone: Backbone
    thresholds: tuple[float, ...]
    side: int
    prefix: int
    feature_layer: int
    heads: int
    tokens: TowerTokens | None = None
    grid: tuple[int, int] | None = None
    window_index: Tensor | None = None
    calibrator: Calibrator | None = None
    keys: Tensor | None = None
    flat_input: dict[str, Any] | None = None
    language: Any = None

    def __getstate__(self) -> dict[str, Any]:
        gone = dict.fromkeys(("tokens", "window_index", "calibrator", "keys", "flat_input"))
        return {**self.__dict__, **gone}

    @property
    def flat(self) -> bool:
        """Whether the tower works on one sequence of segments."""
        return self.backbone.joined == "segments"

    def merges_at(self, place: int) -> bool:
        """Whether tokens can merge between layers `place` and `place + 1`."""
        return place < len(self.thresholds) and (self.calibrator is not None or self.thresholds[place] < 1.0)

    # -- the start of a forward ---------------------------------------------------------------------------------------

    def record_input(self, given: TowerInput) -> None:
        """Records the grid of the images that the tower is called with, or the places of its segments."""
        self.tokens = self.keys = None
        if not self.flat:
            self.grid = given.grid
            return
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        config: Any = self.tower.config
        merge = int(config.spatial_merge_size)
        grid_thw, index = given.argument("grid_thw", 1), given.kwargs.get("window_index")
        if index is None:
            index, _ = get_vision_window_index(grid_thw, merge, int(config.window_size), int(config.patch_size))
        places = given.kwargs.get("position_ids")
        places = get_vision_position_ids(grid_thw, merge) if places is None else places
        index = index.to(places.device)
        self.window_index = index
        self.flat_input = {
            "lengths": tuple((grid_thw.prod(-1) // merge**2).tolist()),
            "places": places.view(len(index), merge**2, 2)[index],
            "pages": given.kwargs.get("page_grids", grid_thw[:, 1:]),
        }

    def begin(self, attention: nn.Module, states: Tensor) -> None:
        """Begins the tokens of a forward, at its first layer.

        Args:
            attention: The attention module of the first layer.
            states: Input of that layer, `[B, N, D]`, `[1, T, D]` or `[T, D]`.

        Raises:
            LayoutError: The grid of the images is not known, or has no whole groups.
        """
        device, unit = states.device, self.side**2
        sfa = state_of(self.tower, "sfa")
        if self.flat:
            assert self.flat_input is not None
            lengths = self.flat_input["lengths"]
            self.tokens = TowerTokens(lengths, unit, 0, True, False, None, None, device)
            return
        adat = state_of(attention, "adat")
        packed = adaptive_lengths(adat, states)
        prefix = self.prefix
        if packed is not None:
            build = adat.packing.build
            lengths = tuple(length - prefix for length in packed)
            self.tokens = TowerTokens(lengths, 1, prefix, False, True, None, build, device)
            return
        if sfa is not None:
            sfa.packing = None
        grid = self._grid(states.shape[1] - prefix)
        if self.side > 1 and (grid[0] % self.side or grid[1] % self.side):
            raise LayoutError(f"A grid of {grid[0]}x{grid[1]} patches has no whole {self.side}x{self.side} groups.")
        order = group_order(*grid, self.side).to(device) if self.side > 1 else None
        images = len(states)

        def build_regular(block_map: Tensor | None) -> list[TokenLayout]:
            return [TokenLayout.regular(*grid, prefix, block_map)] * images

        lengths = (grid[0] * grid[1] // unit,) * images
        self.tokens = TowerTokens(lengths, unit, prefix, False, False, order, build_regular, device)

    def _grid(self, patches: int) -> tuple[int, int]:
        if self.grid is None or self.grid[0] * self.grid[1] != patches:
            raise LayoutError(
                f"A layer got {patches} patches, but the tower saw a grid of {self.grid}. Call the tower with images."
            )
        return self.grid

    # -- merging ------------------------------------------------------------------------------------------------------

    def merge(self, place: int, states: Tensor) -> Tensor:
        """The states with tokens merged before layer `place + 1`; the same tensor where none merges."""
        tokens, keys, self.keys = self.tokens, self.keys, None
        if tokens is None or keys is None or not self.merges_at(place):
            return states
        with torch.no_grad():
            metric = tokens.units(keys)
            metric = metric.unflatten(-1, (self.heads, -1)).float().mean(dim=(1, 2))
            now = tokens.merged or Merged.start(tokens.lengths, states.device)
            pairs = pair_scores(metric, now.lengths)
            threshold = self.thresholds[place]
            if self.calibrator is not None:
                threshold = self.calibrator(place, pairs, len(now.lengths))
            merged_now = merge_above(now, pairs, threshold)
        return states if merged_now is None else tokens.merge(states, *merged_now)


def follow_packed(state: TowerState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Gives SFA the packing of the tokens that are left; the arguments of the layer stay."""
    assert state.tokens is not None
    if (sfa := state_of(state.tower, "sfa")) is not None:
        sfa.packing = state.tokens.packing()
    return kwargs


def follow_flat(state: TowerState, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Segment bounds and rotations of a Qwen-type layer for the tokens that are left; gives SFA their places."""
    tokens, seen = state.tokens, state.flat_input
    assert tokens is not None
    assert tokens.merged is not None
    assert seen is not None
    unit, merged = tokens.unit, tokens.merged
    before = F.pad(merged.is_represented.long().cumsum(0), (1, 0))
    given = kwargs["cu_seqlens"]
    bounds = torch.unique_consecutive(before[given.long() // unit] * unit).to(given.dtype)
    rows = (merged.origin[:, None] * unit + torch.arange(unit, device=before.device)).flatten()
    new = {**kwargs, "cu_seqlens": bounds}
    new["position_embeddings"] = tuple(part[rows] for part in kwargs["position_embeddings"])
    if kwargs.get("max_seqlen") is not None:
        new["max_seqlen"] = int(bounds.diff().max())
    sfa = state_of(state.tower, "sfa")
    if sfa is not None:
        places = seen["places"].to(before.device)[merged.origin].flatten(0, 1)
        parts = places.split([length * unit for length in merged.lengths])
        pages = [(int(rows), int(columns)) for rows, columns in seen["pages"]]
        images = [ImageTokens(page, Listed.of(part)) for page, part in zip(pages, parts, strict=True)]
        sfa.inputs[len(places)] = TokenArrangement("segments", tuple(images))
    return new
