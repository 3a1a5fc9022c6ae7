"""`TowerState`: state that the adapted layers of one tower share; the hooks in `tower_hooks` keep it up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sfa_adapters.arrangement import TokenArrangement
from sfa_adapters.errors import LayoutError, TrainingError
from sfa_adapters.forwards import NOT_IN_BACKWARD, Arrangement, ForwardLog, TowerForward, backward_task
from sfa_adapters.layout import TokenLayout
from sfa_adapters.moved import know_old_names
from sfa_adapters.packing import Packing
from sfa_adapters.ramp_watch import RampWatch
from sfa_adapters.registry import Backbone, Geometry
from sfa_adapters.tower_input import TowerInput

__all__ = ["SFA", "TowerState"]

know_old_names(__name__)

# The name of the feature, for `sfa_adapters.hooks`.
SFA = "sfa"

# Segments up to this length get dense masks, built for all of them at once: for a window of 64 tokens the fold does not
# pay.
SHORT_SEGMENT = 256
# Layouts of this many different inputs are cached: documents come in many shapes, training sets in few.
LAYOUTS_KEPT = 64
# In `TowerState.seen`: inputs with this many tokens came in more than one arrangement.
SEVERAL = "several"


@dataclass(eq=False)
class TowerState:
    """State that the adapted layers of one tower share: where the tokens lie, in the running or recomputed forward.

    Attributes:
        layers: The SFA layers of the tower.
        log: Which forward hidden states belong to.
        seen: For each number of tokens, the only arrangement of inputs so far, or `SEVERAL`.
        layouts: Layouts that were built, by arrangement.
        warned: Whether the user was warned that PEFT will not load these adapters.
        rearrange: Function applied to every layout of a regular grid as it is built; the placebo of the studies
            shuffles places with it. Set it before the first forward.
        ramp_watch: Notices training without `AxialRamp`.
    """

    backbone: Backbone
    geometry: Geometry
    tower_name: str
    layers: list[Any] = field(default_factory=list)
    log: ForwardLog = field(default_factory=ForwardLog)
    seen: dict[int, Any] = field(default_factory=dict)
    layouts: dict[Any, Any] = field(default_factory=dict)
    warned: bool = False
    rearrange: Callable[[TokenLayout], TokenLayout] | None = None
    ramp_watch: RampWatch = field(default_factory=RampWatch)

    # -- the forward under way --------------------------------------------------------------------------------------

    def record_input(self, given: TowerInput) -> None:
        """Records, when a forward begins, where the tokens of its images lie."""
        forward = TowerForward()
        arrangement = given.arrangement()
        if arrangement is not None:
            forward.inputs[arrangement.num_tokens] = arrangement
            self._see(arrangement.num_tokens, arrangement)
        if torch.compiler.is_compiling():
            self.log.compiled = forward
        else:
            self.log.begin(forward)

    def _see(self, num_tokens: int, arrangement: Any) -> None:
        self.seen[num_tokens] = arrangement if self.seen.get(num_tokens, arrangement) == arrangement else SEVERAL

    def _forward(self) -> TowerForward | None:
        return self.log.compiled if torch.compiler.is_compiling() else self.log.current()

    @property
    def packing(self) -> Packing | None:
        """How images of different token counts are packed in the forward under way."""
        forward = self._forward()
        return None if forward is None else forward.packing

    @packing.setter
    def packing(self, packing: Packing | None) -> None:
        forward = self._forward()
        if forward is not None:
            forward.packing = packing
        if packing is not None:
            self.seen[packing.total] = SEVERAL  # no two packings are alike

    @property
    def inputs(self) -> dict[int, TokenArrangement]:
        """How the tokens lie that the forward under way was given, by their number."""
        forward = self._forward()
        return {} if forward is None else forward.inputs

    def arrangement(self, hidden_states: Tensor, layer: Any) -> Arrangement:
        """Finds how the input tokens of an attention layer lie, also when checkpointing recomputes the layer.

        Args:
            hidden_states: Input of the attention layer, `[.., tokens, width]`.
            layer: Its `SFALayer`.

        Returns:
            The packing, grid or description recorded for the forward that they belong to.

        Raises:
            LayoutError: The tokens come from no forward of the tower, or from one of several that cannot be told apart.
        """
        num_tokens = hidden_states.shape[-2]
        if torch.compiler.is_compiling():
            forward = self.log.compiled
            arrangement = self.seen.get(num_tokens) if forward is None else forward.arrangement(num_tokens)
            if arrangement is None or arrangement is SEVERAL:
                raise LayoutError(self._unknown(num_tokens))
            return arrangement
        forward = self.log.of_call()
        if forward is not None:
            arrangement = forward.arrangement(num_tokens)
            if arrangement is None:
                raise LayoutError(self._unknown(num_tokens, forward))
            return arrangement
        if backward_task() == NOT_IN_BACKWARD:
            return self._without_call(num_tokens, layer.index)
        return self._recomputed(hidden_states, layer)

    def _without_call(self, num_tokens: int, layer: int) -> Arrangement:
        """As `arrangement`, for a layer that runs outside of a call of the tower, perhaps after its embedding."""
        forwards = self.log.without_call(num_tokens, layer)
        arrangements = _different(forward.arrangement(num_tokens) for forward in forwards)
        if not arrangements:
            raise LayoutError(self._unknown(num_tokens))
        if len(arrangements) > 1:
            raise LayoutError(
                f"An adapted {self.backbone.name} layer got {num_tokens} tokens outside of a call of its tower, after "
                f"inputs of this many tokens that lie differently. Call the tower ({self.tower_name or 'the model'}) "
                "itself, once per input."
            )
        self.log.run_layer(forwards, layer)
        return arrangements.pop()

    def _recomputed(self, hidden_states: Tensor, layer: Any) -> Arrangement:
        """As `arrangement`, for a layer that checkpointing recomputes, perhaps after other images passed the tower."""
        num_tokens = hidden_states.shape[-2]
        only = self.seen.get(num_tokens, SEVERAL)
        if only is not SEVERAL:
            return only
        forwards = self.log.trace(hidden_states, layer)
        if not forwards:  # the whole forward is being run again, not through the tower's call
            forwards = self.log.without_call(num_tokens, layer.index)
        arrangements = _different(forward.arrangement(num_tokens) for forward in forwards)
        if len(arrangements) != 1:
            raise LayoutError(
                f"Gradient checkpointing runs layer {layer.index} of the {self.backbone.name} tower again on "
                f"{num_tokens} tokens, and inputs of this many tokens came in several shapes: which one this is cannot "
                "be told. Checkpoint with use_reentrant=False, or let the checkpoint begin with a layer or with the "
                "encoder of the tower."
            )
        return arrangements.pop()

    def _unknown(self, num_tokens: int, forward: TowerForward | None = None) -> str:
        name, prefix = self.tower_name or "the model", self.geometry.prefix_tokens
        if self.backbone.joined != "batch":
            return (
                f"An adapted {self.backbone.name} layer got {num_tokens} tokens that bypassed the forward of its tower "
                f"({name}); call the tower, so that the image sizes are known."
            )
        given = forward.inputs if forward is not None else self.seen
        grids = [entry.grid for entry in given.values() if entry is not SEVERAL]
        if forward is None and self.geometry.grid is not None and self.geometry.grid not in grids:
            grids.insert(0, self.geometry.grid)
        known = ", ".join(f"{h}x{w}+{prefix}={h * w + prefix}" for h, w in grids)
        where = ", and the layer ran outside of a call of the tower" if forward is None else ""
        return (
            f"An adapted {self.backbone.name} layer got {num_tokens} tokens; the tower's grids have {known}{where}. "
            f"Call the tower ({name}) itself, with sides that its patch size divides."
        )

    # -- layouts ----------------------------------------------------------------------------------------------------

    def layout(self, arrangement: TokenArrangement, block_map: Tensor, key: Any, device: torch.device) -> TokenLayout:
        """The layout of images in a batch, of one grid or padded, prefix in front."""

        def build() -> TokenLayout:
            layout = arrangement.layout(block_map).to(device)
            return layout if self.rearrange is None else self.rearrange(layout)

        return self._cached((arrangement, key, device), build)

    def image_layouts(
        self, arrangement: TokenArrangement, block_map: Tensor, key: Any, device: torch.device
    ) -> list[TokenLayout]:
        """The layout of each image of a packed sequence; equal images share one object."""

        def build() -> list[TokenLayout]:
            layouts = arrangement.image_layouts(block_map)
            moved = {id(layout): layout.to(device) for layout in layouts}
            return [moved[id(layout)] for layout in layouts]

        return self._cached((arrangement, key, device), build)

    def segments(
        self,
        arrangement: TokenArrangement,
        bounds: tuple[int, ...],
        block_map: Tensor,
        key: Any,
        device: torch.device,
    ) -> list[TokenLayout]:
        """Layouts of the segments of a flat sequence, cached: short ones in one padded batch, long ones each alone."""

        def build() -> list[TokenLayout]:
            layouts = arrangement.segments(bounds, block_map)
            if max(layout.num_tokens for layout in layouts) <= SHORT_SEGMENT:
                layouts = [TokenLayout.batch(layouts)]
            return [layout.to(device) for layout in layouts]

        return self._cached((arrangement, bounds, key, device), build)

    def _cached(self, key: Any, build: Any) -> Any:
        if torch.compiler.is_compiling():
            return build()
        if key not in self.layouts:
            if len(self.layouts) >= LAYOUTS_KEPT:
                self.layouts.pop(next(iter(self.layouts)))
            with torch.inference_mode(False):  # a later training step may use it
                self.layouts[key] = build()
        return self.layouts[key]

    # -- gradients --------------------------------------------------------------------------------------------------

    def first_training_layer(self) -> int | None:
        """Index of the first layer with trainable active adapters; None where there is none."""
        training: list[int] = [layer.index for layer in self.layers if layer.trains]
        return min(training, default=None)

    def see_states(self, hidden_states: Tensor, layer: Any) -> None:
        """Records the input of an attention layer.

        Raises:
            TrainingError: Reentrant checkpointing runs the layer, so its scalars would get no gradient.
        """
        if torch.compiler.is_compiling():
            return
        self.log.note(hidden_states)
        if not layer.active and self.log.of_call() is None:  # it needs no arrangement, but counts as run
            forwards = self.log.without_call(hidden_states.shape[-2], layer.index)
            if forwards:
                self.log.run_layer(forwards[-1:], layer.index)
        forward = self.log.current()
        if forward is None or not forward.with_grad or forward.requires_grad or torch.is_grad_enabled():
            return
        if layer.trains:
            raise TrainingError(
                f"{layer.name} runs without gradients inside a forward with gradients, as reentrant checkpointing "
                "does, and nothing in front of it requires gradients: its structural scalars would not train. "
                "Checkpoint with use_reentrant=False, or let the input of the checkpoint require gradients."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layouts": {}, "seen": {}}


def _different(arrangements: Iterable[Arrangement | None]) -> set[Arrangement]:
    return {arrangement for arrangement in arrangements if arrangement is not None}
