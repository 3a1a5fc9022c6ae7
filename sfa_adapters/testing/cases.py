"""`TowerCase`: a small tower with its inputs for the contract suite, and helpers to write one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfa_adapters.errors import ContractError

__all__ = [
    "Grid",
    "Inputs",
    "NoTower",
    "Place",
    "TowerCase",
    "images",
    "lively",
    "or_no_tower",
    "read_hidden",
    "split_batch",
    "turn_images",
]

Inputs = dict[str, Any]
Grid = tuple[int, int]
Place = tuple[float, float] | None  # row and column of a token, None for a prefix token


def read_hidden(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Features of each image, of a tower whose output is a tensor or has a `last_hidden_state`.

    Args:
        model: The tower.
        inputs: Keyword arguments of its forward.

    Returns:
        `[tokens, width]` for each image. An output `[tokens, width]` is one image, `[batch, tokens, width]` several.
    """
    output: Any = model(**inputs)
    states = output if isinstance(output, Tensor) else output.last_hidden_state
    return [states] if states.ndim == 2 else list(states)


def split_batch(inputs: Inputs) -> list[Inputs]:
    """Cuts inputs along the first dimension of their tensors into inputs of one image each; other values stay.

    Args:
        inputs: Keyword arguments of a tower's forward.
    """
    batch = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
    return [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()} for i in range(batch)]


def turn_images(inputs: Inputs) -> Inputs:
    """Exchanges height and width of every `[batch, channels, height, width]` tensor.

    Args:
        inputs: Keyword arguments of a tower's forward.
    """
    return {
        name: value.transpose(-1, -2).contiguous() if isinstance(value, Tensor) and value.ndim == 4 else value
        for name, value in inputs.items()
    }


@dataclass(frozen=True)
class NoTower:
    """A registered backbone without a small tower for the suite.

    Attributes:
        name: Of the backbone.
        reason: What is missing, and what to do.
        library: The library to install, where one is missing or too old; else the record is incomplete.
    """

    name: str
    reason: str
    library: str | None = None

    def __str__(self) -> str:
        return self.name


def or_no_tower(backbone: str, cases: Sequence[TowerCase]) -> tuple[TowerCase | NoTower, ...]:
    """The cases of a family of transformers, or the reason where the installed release has no member of it.

    Args:
        backbone: Name of their record.
        cases: Those of the members that are there and work.
    """
    reason = f"The installed transformers has no tower of backbone {backbone!r} that works; install a newer one."
    return tuple(cases) or (NoTower(backbone, reason, "transformers"),)


@dataclass(frozen=True, kw_only=True)
class TowerCase:
    """One small tower under test. Its numbers are compared with what the library reads from the tower.

    Attributes:
        name: Its name in test ids.
        backbone: The name of the `Backbone` that must find it.
        build: Makes the tower, in eval mode, with the same weights every time; see `lively`.
        inputs: Makes keyword arguments of its forward from a seed: a batch of two different images, or one image for
            a tower that takes one at a time.
        layers: How many attention layers it has.
        unread: How many of them, at the end, get no bias since nobody reads their patch tokens.
        heads: Heads of each.
        grid: Rows and columns of patches at its default image size, None where it takes any size.
        prefix: Leading tokens without a place (CLS, registers).
        grids: Rows and columns of each image (and of each frame) of some inputs, in order. By default `grid`.
        grids_of_call: For towers that make one token of several between layers: as `grids`, from inputs and the keyword
            arguments of an attention's forward. By default `grids`.
        places: For towers whose attention does not see the tokens of an image row by row: place of each token, from
            inputs and the keyword arguments of the attention's forward.
        tokens: For towers that put the images of a batch together in another way than all patches behind the prefix:
            tokens of each image, those without a place included, for each of which `places` has an entry.
        hidden: Patch features of each image, `[tokens, width]`; never a pooled output.
        split: Cuts such inputs into inputs of one image each.
        resized: Inputs of another, non-square image size, or None where the tower takes one size only.
        turn: Exchanges rows and columns in inputs. By default `turn_images` where there are resized inputs.
        padded_length: For towers that pad each image to one length: that length, from inputs. By default the tokens of
            the largest image.
        real_tokens: For towers that pad: which tokens of the attention's input are real, `[batch, tokens]`, bool.
        eager: Moves a tower from fused to eager attention, or None where it has only one of them.
        eager_takes_bias: Whether its eager attention takes the bias.
        checkpointing: Switches gradient checkpointing on, with `use_reentrant` as given, or off for None. None where
            the tower has no checkpointing of its own.
        reentrant: Whether that checkpointing can be re-entrant, with the tower itself in training. It cannot where its
            layers get tensors as keyword arguments that need gradients, or get nothing else.
        rounding: How many times as far as in other towers gradients of checkpointed layers may lie from those of plain
            ones: above 1 where large terms cancel in the sums over its tokens, which recomputation adds in another
            order.
        encoder: Path of the module that runs all layers, if its forward takes the hidden states first or as
            `inputs_embeds`; it is then checkpointed as a whole, too.
        lora_targets: Projections for LoRA, one per attention layer. By default the first linear layer of each.
        compiles: What `torch.compile(fullgraph=True)` is tried on: "no", "one layer" (tracing takes seconds a layer)
            or "every layer" with a bias.
        plain: What the slow reference runs in place of a plain attention module, for modules whose logits cannot be
            reached from Python: one that computes the same step by step.
        library: Where the tower comes from, e.g. "timm". The suite does not read it.
        runs: What of the contract runs by default: "everything", its part about the bias ("bias"), or nothing of it
            ("nightly"). Members of a large family differ little, so that one of them is enough for each change; a
            nightly job runs all of it on all of them.
    """

    name: str
    backbone: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    layers: int
    heads: int
    grid: Grid | None
    prefix: int = 0
    unread: int = 0
    grids: Callable[[Inputs], Sequence[Grid]] | None = None
    grids_of_call: Callable[[Inputs, Mapping[str, Any]], Sequence[Grid]] | None = None
    places: Callable[[Inputs, Mapping[str, Any]], list[Place]] | None = None
    tokens: Callable[[Inputs], Sequence[int]] | None = None
    hidden: Callable[[nn.Module, Inputs], list[Tensor]] = read_hidden
    split: Callable[[Inputs], list[Inputs]] = split_batch
    resized: Callable[[int], Inputs] | None = None
    turn: Callable[[Inputs], Inputs] | None = None
    padded_length: Callable[[Inputs], int] | None = None
    real_tokens: Callable[[Inputs], Tensor] | None = None
    eager: Callable[[nn.Module], None] | None = None
    eager_takes_bias: bool = True
    checkpointing: Callable[[nn.Module, bool | None], None] | None = None
    reentrant: bool = True
    rounding: float = 1.0
    encoder: str | None = None
    lora_targets: tuple[str, ...] = ()
    compiles: Literal["no", "one layer", "every layer"] = "one layer"
    plain: Callable[[nn.Module], nn.Module] | None = None
    library: str = ""
    runs: Literal["everything", "bias", "nightly"] = "everything"

    def __post_init__(self) -> None:
        if self.grids is None and (self.grid is None or self.resized is not None):
            raise ContractError(
                f"Small tower {self.name!r} takes images of several sizes: say in grids=... how many rows and columns "
                "of patches each image of some inputs has."
            )

    def fresh(self) -> tuple[nn.Module, Inputs]:
        """A new tower and its inputs from seed 0."""
        return self.build(), self.inputs(0)

    def grids_of(self, inputs: Inputs) -> list[Grid]:
        """Rows and columns of each image of some inputs; one pair where all images share it.

        Args:
            inputs: The inputs.
        """
        if self.grids is not None:
            return list(self.grids(inputs))
        assert self.grid is not None
        return [self.grid]

    def oblong(self) -> tuple[Inputs, Inputs] | None:
        """Inputs with non-square images, and the same with rows and columns exchanged; None if the tower takes none."""
        inputs = self.inputs(0) if self.resized is None else self.resized(0)
        turn = turn_images if self.turn is None and self.resized is not None else self.turn
        if turn is None or all(rows == columns for rows, columns in self.grids_of(inputs)):
            return None
        return inputs, turn(inputs)

    def __str__(self) -> str:
        return self.name


def lively(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Gives a tower the same random weights each time, so large that attention is far from uniform.

    With the small initial weights of libraries, a tiny tower is nearly linear, and a bias would have no effect.

    Args:
        build: Makes the tower.

    Returns:
        Makes the tower with these weights, in eval mode.
    """

    def make() -> nn.Module:
        torch.manual_seed(7)  # not restored: what a test draws next is then the same every time, too
        tower = build()
        with torch.no_grad():
            for parameter in tower.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return tower.eval()

    return make


def images(height: int, width: int, name: str = "pixel_values", **others: Any) -> Callable[[int], Inputs]:
    """Makes inputs of two different images per seed.

    Args:
        height: In pixels.
        width: In pixels.
        name: The argument that takes the images, `[2, 3, height, width]`.
        **others: Further arguments of the tower's forward.

    Returns:
        Makes the inputs from a seed.
    """

    def make(seed: int) -> Inputs:
        return {name: torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed)), **others}

    return make
