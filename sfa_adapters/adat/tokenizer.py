"""`AdaptiveTokenizer`, and the state and hooks that apply it inside a tower.

Five hooks, no changed forward: (1) before the patch embedding the images are scored and their patch plans made; (2)
before the encoder the tower's own tokens are replaced by those of the plans, all images in one packed sequence; (3)
before every attention layer a mask keeps the images apart; (4) after the encoder tokens are scattered back onto the
regular grid, or padded; (5) after the tower the same is done with recorded hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfa_adapters.adat.embed import PatchEmbedder
from sfa_adapters.adat.plan import PatchPlan
from sfa_adapters.adat.policy import PatchPolicy
from sfa_adapters.errors import BiasNotAppliedError, InjectionError, LayoutError, PlanError
from sfa_adapters.forward_hooks import hidden_states_of
from sfa_adapters.forwards import NOT_IN_BACKWARD, ForwardLog, TowerForward, backward_task
from sfa_adapters.hooks import state_of
from sfa_adapters.mask_argument import give_mask, given_mask, unused_mask
from sfa_adapters.moved import know_old_names
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.packing import PackedMask, Packing
from sfa_adapters.registry import Backbone, PatchSeam
from sfa_adapters.tower_input import TowerInput

__all__ = ["ADAT", "RESIDUAL_NAME", "AdaptiveTokenizer", "AdatState", "Output"]

know_old_names(__name__)

Output = Literal["grid", "tokens"]
# The name of the feature, for `sfa_adapters.hooks`, and of the child module of the tower with the learned residual.
ADAT, RESIDUAL_NAME = "adat", "adat_residual"


@dataclass(frozen=True, kw_only=True)
class AdaptiveTokenizer:
    """Options of adaptive tokens: how a tower cuts its images, and the form of its output.

    Attributes:
        policy: Where which patch size is used.
        output: "grid" scatters the tokens back onto the tower's regular grid, so that any host works unchanged;
            "tokens" returns them as they are, padded to the longest image of the batch.
        residual: Adds a learned residual for large patches (see `LargePatchResidual`), which starts at zero.
        image_mean: Mean that images were normalised with, by channel; by default the tower's.
        image_std: Standard deviation that images were normalised with, by channel; by default the tower's.

    Raises:
        InjectionError: An option has a wrong value.
    """

    policy: PatchPolicy = field(default_factory=PatchPolicy)
    output: Output = "grid"
    residual: bool = False
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.output not in ("grid", "tokens"):
            raise InjectionError(f"output={self.output!r} must be 'grid' or 'tokens'.")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and len(value) != 3:
                raise InjectionError(f"{name}={value} must have one number for each of three channels.")
        if self.image_std is not None and not all(s > 0 for s in self.image_std):
            raise InjectionError(f"image_std={self.image_std} must be above 0.")


@dataclass(eq=False)
class AdatForward(TowerForward):
    """One forward of a tower with adaptive tokens.

    Attributes:
        plans: Patch plans, one per image.
        images: Input of the tower; kept where checkpointing may replace the tokens again.
        pairs: Overlaps of tokens with patches of the regular grid, per image; see `PatchPlan.grid_pairs`.
    """

    plans: tuple[PatchPlan, ...] = ()
    images: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)


@dataclass(eq=False)
class AdatState:
    """State of adaptive tokens in one tower.

    Attributes:
        tower: The tower.
        latest: The latest forward.
        log: Finds the forward that hidden states belong to, when checkpointing recomputes layers.
    """

    tower: nn.Module
    tokenizer: AdaptiveTokenizer
    backbone: Backbone
    seam: PatchSeam
    prefix_tokens: int
    own_grid: tuple[int, int]
    embedder: PatchEmbedder
    latest: AdatForward = field(default_factory=AdatForward)
    log: ForwardLog = field(default_factory=ForwardLog)
    waiting_images: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "latest": AdatForward(), "waiting_images": None}

    @property
    def plans(self) -> tuple[PatchPlan, ...]:
        """Patch plans of the latest forward, one per image."""
        return self.latest.plans

    @property
    def packing(self) -> Packing | None:
        """How the images of the latest forward are packed."""
        return self.latest.packing

    def forward_of(self, states: Tensor, module: nn.Module | None = None) -> AdatForward:
        """The forward that hidden states belong to: the latest one, or the one that checkpointing recomputes.

        Raises:
            LayoutError: They are recomputed, and their images cannot be determined.
        """
        if torch.compiler.is_compiling() or backward_task() == NOT_IN_BACKWARD:
            return self.latest
        current = self.log.current()
        traced: list[Any] = self.log.trace(states, module) if current is None else [current]
        if len(traced) != 1:
            raise LayoutError(
                f"Gradient checkpointing runs a part of the tower again on {states.shape[-2]} adaptive tokens, and "
                "their images cannot be determined. Checkpoint whole layers or the whole encoder, with "
                "use_reentrant=False."
            )
        return traced[0]

    # -- 1: before the patch embedding --------------------------------------------------------------------------------

    def record_input(self, given: TowerInput) -> None:
        """Scores the images that the tower is called with, and makes their patch plans.

        Raises:
            PlanError: It is not a batch of RGB images, or smaller than a patch.
        """
        images = given.images
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
            shape = tuple(getattr(images, "shape", ()))
            raise PlanError(f"Adaptive tokens need images [batch, 3, height, width]; the tower was given {shape}.")
        patch = self.embedder.patch
        height, width = (side // patch * patch for side in images.shape[-2:])
        if not height or not width:
            raise PlanError(f"An image of {tuple(images.shape[-2:])} px is smaller than one patch of {patch} px.")
        statistics = image_statistics(self.backbone, self.tower, self.tokenizer.image_mean, self.tokenizer.image_std)
        assert statistics is not None  # every record with a `patches` seam has them
        mean, std = (torch.tensor(one, device=images.device, dtype=torch.float32).view(3, 1, 1) for one in statistics)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            pixels = (images[..., :height, :width].float() * std + mean).clamp_(0, 1)
            plans = tuple(self.tokenizer.policy.plan_images(pixels, patch))
        self.latest = AdatForward(plans=plans, images=images if torch.is_grad_enabled() else None)
        self.waiting_images = images
        if not torch.compiler.is_compiling():
            self.log.begin(self.latest)

    # -- 2: before the encoder ----------------------------------------------------------------------------------------

    def exchange(self, tokens: Tensor) -> Tensor:
        """Replaces the tower's own tokens by those of the patch plans, packed into one sequence.

        Args:
            tokens: The tower's embedded tokens, `[B, prefix + rows * columns, D]`.

        Returns:
            `[1, T, D]`, prefix tokens in front of each image.

        Raises:
            LayoutError: The tokens were embedded without images, or do not match them.
        """
        now = self.forward_of(tokens)
        images = self.waiting_images if now is self.latest else now.images
        self.waiting_images = None
        if images is None and backward_task() != NOT_IN_BACKWARD:
            images = now.images
        if images is None or len(now.plans) != len(tokens):
            raise LayoutError(
                "Embedded tokens reached the encoder without images in front of them: adaptive tokens need the images. "
                "Call the tower with pixel values, not with embeddings."
            )
        plan = now.plans[0]
        grid = tuple(side // plan.patch for side in plan.image_size)
        if tokens.shape[1] != self.prefix_tokens + grid[0] * grid[1]:
            raise LayoutError(
                f"The tower embedded {tokens.shape[1]} tokens, expected {grid[0]}x{grid[1]} and {self.prefix_tokens}."
            )
        tower = self.tower
        projection: Any = tower.get_submodule(self.seam.projection)
        residual: Any = tower._modules.get(RESIDUAL_NAME)
        positions = self._positions(tower, grid)
        prefix, patches = tokens[:, : self.prefix_tokens], tokens[:, self.prefix_tokens :]
        exchanged = self.embedder(projection, positions, now.plans, images, patches, residual)
        if residual is not None and torch.is_grad_enabled():
            # Without a large patch in the batch its parameters would get no gradient, and DDP would fail.
            exchanged[0] = exchanged[0] + 0.0 * sum(p.sum() for p in residual.parameters())
        lengths = tuple(self.prefix_tokens + plan.num_tokens for plan in now.plans)
        plans, count = now.plans, self.prefix_tokens
        if now.packing is None:  # in a recomputation it is set already, here and in SFA
            now.packing = Packing(lengths, lambda blocks: [p.layout(count, blocks) for p in plans])
            if (sfa := state_of(tower, "sfa")) is not None:  # its bias follows
                sfa.packing = now.packing
        return torch.cat([part for pair in zip(prefix, exchanged, strict=True) for part in pair])[None]

    def _positions(self, tower: nn.Module, grid: tuple[int, ...]) -> Tensor:
        table = self.seam.positions(tower).unflatten(0, self.own_grid)
        if grid == self.own_grid:
            return table
        chw = table.permute(2, 0, 1)[None].float()
        chw = F.interpolate(chw, grid, mode="bicubic", align_corners=False)  # as the towers do themselves
        return chw[0].permute(1, 2, 0).to(table.dtype)

    # -- 4, 5: after the encoder --------------------------------------------------------------------------------------

    def lay_out(self, packed: Tensor) -> Tensor:
        """Unpacks a sequence to a batch: scattered back onto the regular grid, or as padded tokens.

        Args:
            packed: `[1, T, D]`.

        Returns:
            `[B, prefix + rows * columns, D]` or `[B, longest, D]`.
        """
        now = self.forward_of(packed)
        lengths = [self.prefix_tokens + plan.num_tokens for plan in now.plans]
        parts = packed[0].split(lengths)
        if self.tokenizer.output == "tokens":
            return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
        if not now.pairs:
            now.pairs = [tuple(t.to(packed.device) for t in plan.grid_pairs()) for plan in now.plans]  # pyright: ignore[reportAttributeAccessIssue]
        height, width = (side // self.embedder.patch for side in now.plans[0].image_size)
        laid = []
        for part, (place, token, weight) in zip(parts, now.pairs, strict=True):
            prefix, tokens = part[: self.prefix_tokens], part[self.prefix_tokens :]
            grid = tokens.new_zeros(height * width, tokens.shape[-1])
            grid = grid.index_add(0, place, tokens[token] * weight.to(tokens.dtype)[:, None])
            laid.append(torch.cat((prefix, grid)))
        return torch.stack(laid)

    def is_packed(self, value: Any) -> bool:
        """Whether a recorded hidden state is a packed sequence of the latest forward."""
        packing = self.packing
        return packing is not None and isinstance(value, Tensor) and value.shape[:-1] == (1, packing.total)


# -- the hooks: functions that look the state up in their module, so that copies of a model are independent -----------


def exchange_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the first module behind the embedding: replaces its tokens by those of the plans."""
    state: AdatState = state_of(module, ADAT)
    if args:
        return (state.exchange(args[0]), *args[1:]), kwargs
    name = "inputs_embeds" if "inputs_embeds" in kwargs else "hidden_states"
    return args, {**kwargs, name: state.exchange(kwargs[name])}


def attention_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention layer: its mask keeps the images apart, unless SFA's mask does so already."""
    state: AdatState = state_of(module, ADAT)
    given = given_mask(module, ADAT, args, kwargs)
    if isinstance(given, PackedMask):
        return give_mask(module, ADAT, None, args, kwargs)
    packing = state.forward_of(hidden_states_of(args, kwargs), module).packing
    assert packing is not None
    if given is not None:
        raise InjectionError(f"{type(module).__name__} got a mask of its own, which fits no adaptive tokens.")
    return give_mask(module, ADAT, PackedMask(packing.lengths), args, kwargs)


def attended_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an attention layer: checks that the mask that keeps images apart was used.

    Raises:
        BiasNotAppliedError: The attention implementation dropped the mask.
    """
    mask: PackedMask | None = unused_mask(module, ADAT)
    if mask is not None and len(mask.lengths) > 1:
        raise BiasNotAppliedError(
            f"{type(module).__name__} dropped the mask that keeps images apart. Load the model with "
            "attn_implementation='sdpa', or call tower.set_attn_implementation('sdpa')."
        )


def lay_out_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the module whose output is the packed sequence: unpacks it."""
    state: AdatState = state_of(module, ADAT)
    if isinstance(output, Tensor):
        return state.lay_out(output)
    if isinstance(output, tuple):
        return (state.lay_out(output[0]), *output[1:])
    output["last_hidden_state"] = state.lay_out(output["last_hidden_state"])
    return output


def tower_hook(tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of the tower: unpacks recorded hidden states like the last one."""
    state: AdatState = state_of(tower, ADAT)

    def lay(states: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(state.lay_out(s) if state.is_packed(s) else s for s in states)

    if isinstance(output, tuple):
        return tuple(lay(part) if isinstance(part, tuple) else part for part in output)
    if isinstance(output, dict) and output.get("hidden_states") is not None:
        output["hidden_states"] = lay(output["hidden_states"])
    return output
