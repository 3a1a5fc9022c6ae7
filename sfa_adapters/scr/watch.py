"""`Watch`: the layers of a host that SCR reads, and what is kept of one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.attention_call import AttentionCall
from sfa_adapters.errors import DataError, InjectionError, NoMatchingBackboneError, ObservationError
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.observe import attention_modules, observe
from sfa_adapters.scr.augment import Statistics
from sfa_adapters.scr.config import SCRConfig
from sfa_adapters.tower_input import TowerInput, watching_input
from sfa_adapters.tower_search import find_tower
from sfa_adapters.vlm.parts import image_token_side, still_image_id
from sfa_adapters.vlm.records import find_spec

__all__ = ["Seen", "Watch"]

# The name of the feature, for `sfa_adapters.hooks`.
SCR = "scr"
TILES_BEHIND = "image_newline"  # the parameter of hosts that put the whole page before its tiles


@dataclass(eq=False)
class Seen:
    """What is kept of one forward.

    Attributes:
        calls: The attention computation of each chosen layer.
        towers: For each forward of the tower its images `[n, 3, H, W]` and the grid of their patches.
    """

    calls: dict[str, AttentionCall] = field(default_factory=dict)
    towers: list[tuple[Tensor, tuple[int, int]]] = field(default_factory=list)

    def record_input(self, given: TowerInput) -> None:
        """Keeps the images of a call of the tower."""
        if isinstance(given.images, Tensor) and given.grid is not None:
            self.towers.append((given.images.detach(), given.grid))

    @property
    def tower(self) -> tuple[Tensor, tuple[int, int]]:
        """The images that the tower saw, and their grid.

        Raises:
            ObservationError: The tower did not run once.
        """
        if len(self.towers) != 1:
            raise ObservationError(
                f"The vision tower ran {len(self.towers)} times inside watch(), expected once, on images: run the "
                "model on a batch with pixel_values."
            )
        return self.towers[0]


class Watch:
    """Records attention and images of one forward of a host. Arguments and errors are those of `SCRLoss`.

    Attributes:
        host: The module whose configuration names the image token.
        image_token: Its id.
        vision: Paths of the layers that the entropy term reads.
        language: Paths of the layers that the grounding term reads.
        page_first: Whether the tokens of a whole page are before those of its tiles, not after them.
        apart: Whether text stands between the tiles of a page.
        packs: Whether tiles are packed with newline tokens, so that tokens do not tell how many tiles there are.
    """

    def __init__(self, model: nn.Module, config: SCRConfig) -> None:
        self.model, self.config = model, config
        self.host, self.image_token = _host(model)
        spec = find_spec(self.host)
        rules = None if spec is None else spec.image_tokens
        self.packs = any(name.rpartition(".")[2] == TILES_BEHIND for name, _ in self.host.named_parameters())
        self.page_first = self.packs if rules is None else rules.page_first
        self.apart = rules is not None and rules.apart
        try:
            self.tower = find_tower(model)
        except NoMatchingBackboneError:
            if config.entropy:
                raise
            self.tower = None
        self.vision, self.language = (), ()
        if config.entropy:
            assert self.tower is not None
            if self.tower.backbone.joined != "batch":
                raise ObservationError(
                    f"A {self.tower.backbone.name} tower has no fixed grid of patches, so dense patches cannot be told "
                    "from others: set entropy=0."
                )
            used = [name for name, _ in self.tower.attentions][: self.tower.used_layers]
            self.vision = _chosen(used, config.vision_layers, "vision_layers")
        if config.grounding:
            there = list(attention_modules(model, "language"))
            self.language = _chosen(there, config.language_layers, "language_layers")

    @contextmanager
    def __call__(self) -> Iterator[Seen]:
        """Keeps references to q and k of the chosen layers for one forward; nothing is computed here."""
        seen, differentiable = Seen(), torch.is_grad_enabled()

        def keep(call: AttentionCall) -> None:
            if call.segment:
                raise ObservationError(
                    f"{call.layer} attends within images or windows one after the other: adaptive tokens have no grid "
                    "of patches, so dense patches cannot be told from others. Set entropy=0."
                )
            if call.layer in seen.calls:
                raise ObservationError(
                    f"{call.layer} computed attention twice inside watch(): run the model once, on images only, and "
                    "without generate."
                )
            if differentiable and not torch.is_grad_enabled():
                raise ObservationError(
                    f"{call.layer} runs without gradients inside a forward with gradients, as under reentrant "
                    "checkpointing: switch it on with {'use_reentrant': False}."
                )
            seen.calls[call.layer] = call

        with ExitStack() as stack:
            if self.tower is not None and self.tower.backbone.joined == "batch":
                tower, backbone = self.tower.tower, self.tower.backbone
                stack.enter_context(watching_input(tower, backbone, SCR, seen.record_input, seen))
            if self.vision or self.language:
                stack.enter_context(observe(self.model, keep, modules=[*self.vision, *self.language]))
            yield seen

    # -- the host -----------------------------------------------------------------------------------------------------

    @property
    def tower_prefix(self) -> int:
        """Leading tokens of the tower that are no patches."""
        return 0 if self.tower is None else self.tower.backbone.geometry(self.tower.tower).prefix_tokens

    @property
    def kept_prefix(self) -> int:
        """How many prefix tokens of the tower become image tokens."""
        return self.tower_prefix if getattr(self._config, "vision_feature_select_strategy", "") == "full" else 0

    def token_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of image tokens (InternVL: one for 2x2 patches).

        Args:
            grid: Rows and columns of patches.
        """
        spec = find_spec(self.host)
        if spec is not None and spec.image_tokens is not None:
            side = spec.image_tokens.side(self._config)
        else:
            side = image_token_side(self._config, grid)
        return grid[0] // side, grid[1] // side

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation that images are normalised with.

        Raises:
            DataError: They are not known.
        """
        backbone, tower = (None, None) if self.tower is None else (self.tower.backbone, self.tower.tower)
        known = image_statistics(backbone, tower, self.config.image_mean, self.config.image_std)
        if known is None:
            raise DataError("Set image_mean and image_std in SCRConfig: what this model's images are normalised with.")
        return known

    @property
    def _config(self) -> Any:
        return self.host.config


def _host(model: nn.Module) -> tuple[Any, int]:
    for module in model.modules():
        # PEFT's wrapper shows the configuration of the model inside, but is not that model.
        if type(module).__module__.startswith("peft.") or not hasattr(module, "get_input_embeddings"):
            continue
        token = still_image_id(getattr(module, "config", None))
        if token is not None:
            return module, token
    raise InjectionError(
        f"{type(model).__name__} has no image_token_id in its configuration. SCR needs a vision-language model of "
        "transformers whose image tokens are in input_ids."
    )


def _chosen(names: Sequence[str], wanted: Sequence[int] | None, option: str) -> tuple[str, ...]:
    if wanted is None:
        return tuple(names[-max(1, len(names) // 3) :])
    wrong = [number for number in wanted if not -len(names) <= number < len(names)]
    if wrong:
        raise InjectionError(f"{option}={list(wanted)}: there is no layer {wrong[0]}, the model has {len(names)}.")
    return tuple(names[number] for number in sorted({number % len(names) for number in wanted}))
