"""`TowerState`: what the adapted layers of one tower share, and the hook that keeps it up to date."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import LayoutError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.packing import Packing
from sfa_adapters.registry import Backbone, Geometry

__all__ = ["STATE_NAME", "TowerState", "see_tower_input"]

STATE_NAME = "_sfa_state"
# Segments up to this length get dense masks, built for all of them at once: a window of 64 tokens has no use for a
# fold.
SHORT_SEGMENT = 256
# Layouts of this many different inputs are kept; documents come in many shapes, training sets in few.
LAYOUTS_KEPT = 64


@dataclass(eq=False)
class TowerState:
    """What the adapted layers of one tower share: how to lay out the tokens of the forward under way.

    Grids are remembered per token count, not only for the latest forward, because gradient checkpointing runs the
    layers again in the backward pass, when another image may have passed the tower.

    Attributes:
        packing: Set by whoever packs images of different token counts into one sequence; its layouts then count.
        warned: Whether the user was warned that PEFT will not load these adapters.
    """

    backbone: Backbone
    geometry: Geometry
    tower_name: str
    packing: Packing | None = None
    grids: dict[int, tuple[int, int]] = field(default_factory=dict)
    inputs: dict[int, Any] = field(default_factory=dict)
    layouts: dict[Any, Any] = field(default_factory=dict)
    warned: bool = False

    def __post_init__(self) -> None:
        if self.geometry.grid is not None:
            self._remember(self.geometry.grid)

    def _remember(self, grid: tuple[int, int]) -> None:
        self.grids[grid[0] * grid[1] + self.geometry.prefix_tokens] = grid

    def see_input(self, seer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes the shape of the images that the tower is about to see."""
        if self.backbone.grid_of_input is not None:
            grid = self.backbone.grid_of_input(seer, args, kwargs)
            if grid is not None:
                self._remember(grid)
        elif self.backbone.describe_input is not None:
            tokens, description = self.backbone.describe_input(seer, args, kwargs)
            self.inputs[tokens] = description

    def layout(self, num_tokens: int, block_map: Tensor, key: Any, device: torch.device) -> TokenLayout:
        """The layout of `num_tokens` tokens on a fixed grid.

        Raises:
            LayoutError: No grid with this many tokens was seen.
        """
        grid = self.grids.get(num_tokens)
        prefix = self.geometry.prefix_tokens
        if grid is None:
            known = ", ".join(f"{h}x{w}+{prefix}={n}" for n, (h, w) in self.grids.items())
            raise LayoutError(
                f"An adapted {self.backbone.name} layer got {num_tokens} tokens; the tower's grids have {known}. "
                f"Call the tower ({self.tower_name or 'the model'}) itself, with sides that its patch size divides."
            )
        return self._cached((grid, key, device), lambda: TokenLayout.regular(*grid, prefix, block_map, device))

    def segments(
        self, num_tokens: int, bounds: tuple[int, ...], block_map: Tensor, key: Any, device: torch.device
    ) -> list[TokenLayout]:
        """Layouts of the segments of a flat sequence: short ones batched (padded), long ones alone.

        Raises:
            LayoutError: No input with this many tokens was seen.
        """
        if num_tokens not in self.inputs:
            raise LayoutError(
                f"An adapted {self.backbone.name} layer got {num_tokens} tokens that bypassed the forward of its tower "
                f"({self.tower_name or 'the model'}); call the tower, so that the image sizes are known."
            )
        description = self.inputs[num_tokens]

        def build() -> list[TokenLayout]:
            assert self.backbone.segment_layouts is not None
            layouts = self.backbone.segment_layouts(description, bounds, block_map)
            if max(layout.num_tokens for layout in layouts) <= SHORT_SEGMENT:
                layouts = [TokenLayout.batch(layouts)]
            return [layout.to(device) for layout in layouts]

        return self._cached((description, bounds, key, device), build)

    def _cached(self, key: Any, build: Any) -> Any:
        if torch.compiler.is_compiling():
            return build()
        if key not in self.layouts:
            if len(self.layouts) >= LAYOUTS_KEPT:
                self.layouts.pop(next(iter(self.layouts)))
            with torch.inference_mode(False):  # a later training step may use it
                self.layouts[key] = build()
        return self.layouts[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layouts": {}, "packing": None}


def see_tower_input(seer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a tower (or of its `Backbone.image_module`): notes the grid of the images."""
    seer.__dict__[STATE_NAME].see_input(seer, args, kwargs)
