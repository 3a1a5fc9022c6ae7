"""`EngineTower`: the tower of an engine under one adapter: where its tokens lie now, and what its layers add.

The engine's attention layers ask it for wider q, k and v; a hook on the engine's tower tells it the images of each
forward. Where tokens lie is said by the record of the tower (`Backbone.layouts`), which is asked with the arguments
that the tower of transformers would have got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sfa_adapters.arrangement import TokenArrangement
from sfa_adapters.attention import attend
from sfa_adapters.attention_contract import parameter_names
from sfa_adapters.bias import StructuralWeights, bias_factors
from sfa_adapters.errors import LayoutError, ServingError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.serving.adapter import ServedAdapter
from sfa_adapters.serving.channels import (
    attend_groups,
    heads_of_rank,
    phi_width,
    widen_groups,
    widen_images,
)
from sfa_adapters.serving.kept_groups import arguments_of_kept
from sfa_adapters.serving.places import SegmentGroup, segment_groups
from sfa_adapters.tower_input import arrangement_of

__all__ = ["EngineLayer", "EngineTower"]

GRIDS = ("grid_thw", "image_grid_thw")
LAYOUTS_KEPT = 64


@dataclass
class _Forward:
    """The forward under way: how its tokens lie, and the segments that were seen in it."""

    arrangement: TokenArrangement
    bounds: dict[int, tuple[Tensor, tuple[int, ...]]] = field(default_factory=dict)


class EngineTower:
    """State that the attention layers of an engine's tower share.

    Args:
        adapter: The adapter that it serves.

    Attributes:
        mode: What its layers add: their `bias`; `zeros`, on the same way through wider heads; or nothing (`off`). The
            self-check compares the three.
        acted: Numbers of the layers that added something since `acted` was cleared.
    """

    def __init__(self, adapter: ServedAdapter) -> None:
        self.adapter = adapter
        self.mode: Literal["bias", "zeros", "off"] = "bias"
        self.acted: set[int] = set()
        self._forward: _Forward | None = None
        self._layouts: dict[Any, Any] = {}
        config = adapter.config
        self._block_map = config.block_map_tensor()

    # -- what the tower is given --------------------------------------------------------------------------------------

    def see_images(self, shape: Sequence[int]) -> None:
        """Records the shape of images in a batch, `[B, 3, height, width]`.

        Raises:
            LayoutError: The record cannot say how their tokens lie.
        """
        self._record(torch.empty(tuple(shape), device="meta"))

    def see_grids(self, grids: Sequence[Sequence[int]], kept: Tensor | None = None) -> None:
        """Records the grids of the images of a flat sequence.

        Args:
            grids: Frames, rows and columns of patches of each.
            kept: Which merge groups the tower is given, bool `[groups]`, where that is not all of them.

        Raises:
            LayoutError: A grid has no whole merge groups.
        """
        rows = [tuple(int(n) for n in grid) for grid in grids]
        tower = self.adapter.located.tower
        name = next((name for name in parameter_names(tower)[0] if name in GRIDS), None)
        if name is None:
            raise ServingError(f"{type(tower).__name__} takes no grids, but the tower of the engine was given {rows}.")
        patches = sum(t * h * w for t, h, w in rows)
        groups = self.adapter.located.backbone.patch_groups_of(tower)
        if kept is not None and groups is not None:
            images = torch.empty(int(kept.sum()) * groups.side**2, 1, device="meta")
            self._record(images, **arguments_of_kept(groups, rows, kept, tower))
            return
        self._record(torch.empty(patches, 1, device="meta"), **{name: torch.tensor(rows)})

    def _record(self, images: Tensor, **kwargs: Any) -> None:
        located = self.adapter.located
        arrangement = arrangement_of(located.tower, located.backbone, images, **kwargs)
        if arrangement is None or arrangement.joined not in ("batch", "segments"):
            raise LayoutError(f"The record {located.backbone.name} does not say how the images of this forward lie.")
        self._forward = _Forward(arrangement)

    # -- what its layers ask for --------------------------------------------------------------------------------------

    def image_layout(self, device: torch.device) -> TokenLayout:
        """The layout of the images in a batch.

        Raises:
            LayoutError: The images of the forward are not known, or are a flat sequence.
        """
        arrangement = self._known().arrangement
        if arrangement.joined != "batch":
            raise LayoutError("A layer got images in a batch, but the tower was given a flat sequence of patches.")
        return self._kept((arrangement, device), lambda: arrangement.layout(self._block_map).to(device))

    def groups(self, bounds: Tensor | None, device: torch.device) -> list[SegmentGroup]:
        """The segments of a flat sequence.

        Args:
            bounds: Where they begin and end, `[segments + 1]`; None where the whole sequence is one.
            device: Where their index tensors shall be.

        Raises:
            LayoutError: The images of the forward are not known, or do not fit the segments.
        """
        forward = self._known()
        arrangement = forward.arrangement
        if bounds is None:
            ends: tuple[int, ...] = (0, arrangement.num_tokens)
        elif id(bounds) in forward.bounds:
            ends = forward.bounds[id(bounds)][1]
        else:
            ends = tuple(bounds.tolist())
            forward.bounds[id(bounds)] = (bounds, ends)  # kept, so that no other tensor gets its id in this forward

        def build() -> list[SegmentGroup]:
            groups = segment_groups(arrangement, ends, self._block_map)
            return [SegmentGroup(group.tokens.to(device), group.layout.to(device)) for group in groups]

        return self._kept((arrangement, ends, device), build)

    def _known(self) -> _Forward:
        if self._forward is None:
            raise LayoutError(
                "A layer of the tower ran, but the tower itself was not called: where tokens lie is lost."
            )
        return self._forward

    def _kept(self, key: Any, build: Any) -> Any:
        if key not in self._layouts:
            if len(self._layouts) >= LAYOUTS_KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[key] = build()
        return self._layouts[key]


class EngineLayer:
    """The scalars of one attention layer of an engine, for the heads that it has on this rank.

    Args:
        tower: State of its tower.
        index: Number of the layer in the tower.
        heads: Heads that the layer has here.
        rank: Number of this rank.
        ranks: How many ranks share the heads.

    Raises:
        ServingError: The heads cannot be those of the adapter.
    """

    def __init__(self, tower: EngineTower, index: int, heads: int, rank: int = 0, ranks: int = 1) -> None:
        self.tower, self.index = tower, index
        adapter = tower.adapter
        weights = adapter.layers.get(index)
        total = adapter.heads.get(index, heads)
        self._weights = None if weights is None else heads_of_rank(weights, total, heads, rank, ranks)
        self._moved: tuple[torch.device, StructuralWeights] | None = None

    @property
    def acts(self) -> bool:
        """Whether the layer takes the way through wider heads now."""
        return self._weights is not None and self.tower.mode != "off"

    def _on(self, device: torch.device) -> StructuralWeights:
        assert self._weights is not None
        if self._moved is None or self._moved[0] != device:
            moved = (None if v is None else v.to(device) for v in vars(self._weights).values())
            self._moved = (device, StructuralWeights(*moved))
        weights = self._moved[1]
        if self.tower.mode == "zeros":
            return StructuralWeights(*(None if v is None else torch.zeros_like(v) for v in vars(weights).values()))
        return weights

    def widen(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scale: float, most: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """q, k and v with phi in further channels, for the attention of the engine.

        Args:
            query: `[B, N, H, D]`; of a flat sequence `[1, N, H, D]`.
            key: Likewise.
            value: Likewise.
            bounds: Segments of a flat sequence, as in `EngineTower.groups`.
            scale: What the attention will multiply q.k with.
            most: The largest head width that the engine's kernel takes.

        Returns:
            The three, of one width; None where they would be wider than `most`: then use `attend`.

        Raises:
            LayoutError: The tokens are others than those of the images that the tower was given.
        """
        device = query.device
        weights = self._on(device)
        self.tower.acted.add(self.index)
        if self._flat(bounds):
            groups = self.tower.groups(bounds, device)
            if query.shape[-1] + phi_width([group.layout for group in groups], weights) > most:
                return None
            return widen_groups(query, key, value, groups, weights, scale)
        layout = self.tower.image_layout(device)
        if query.shape[-1] + phi_width([layout], weights) > most:
            return None
        return widen_images(query, key, value, layout, weights, scale)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scale: float) -> Tensor:
        """Attention by this library: exact for any page, also where heads would be too wide for the engine's kernel.

        Arguments as in `widen`; returns `[B, N, H, D]`.
        """
        device = query.device
        weights = self._on(device)
        self.tower.acted.add(self.index)
        if self._flat(bounds):
            return attend_groups(query, key, value, self.tower.groups(bounds, device), weights, scale)
        bias = bias_factors([weights], self.tower.image_layout(device), query.shape[-2])
        states = [x.transpose(1, 2) for x in (query, key, value)]
        return attend(states[0], states[1], states[2], bias, scale=scale).transpose(1, 2)

    def _flat(self, bounds: Tensor | None) -> bool:
        return bounds is not None or self.tower.adapter.located.backbone.joined == "segments"
