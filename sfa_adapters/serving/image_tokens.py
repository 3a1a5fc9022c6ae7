"""Fewer image tokens for the language model of an inference engine: which of them stay, and at which positions.

Two kinds of rules need the pixels alone, so an engine can apply them where it prepares a request:

- a share, as in `FastVConfig(prune_at="input", selector="density")`, image by image: the tokens with the most text
  under them stay, and all others leave behind the tower;
- `blank` or `duplicates`, as in `drop_blank_groups`: groups of patches that are blank, or repeat a neighbour, never
  reach the tower (`kept_groups`).

Tokens that stay keep their positions on the page, which only language models with positions by row and column can say
(Qwen-VL).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sfa_adapters.adat.groups import GroupPolicy
from sfa_adapters.adat.patched_pages import PatchedPages
from sfa_adapters.errors import PlanError, ServingError, SFAError
from sfa_adapters.normalisation import Statistics
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.reduction.fastv.inject import FastVConfig
from sfa_adapters.reduction.fastv.selectors import ImageTokens, select
from sfa_adapters.reduction.fastv.token_density import TowerImages, token_density
from sfa_adapters.serving.adapter import model_without_weights
from sfa_adapters.tower_search import find_tower

__all__ = ["KEPT", "TOKENS", "TokenChooser", "before_tower", "chooser", "kept_features", "kept_positions", "token_rule"]

TOKENS = "SFA_IMAGE_TOKENS"  # variable of the environment: the rule
KEPT = "image_kept"  # under this name the choice travels with the pixels of a request

Groups = Literal["blank", "duplicates"]  # what is left out before the tower
Positions = Callable[[list[int], list[Any]], tuple[Tensor, int]]


def token_rule() -> float | Groups | None:
    """Which image tokens stay, from the environment: a share, or all but some groups; None where all do.

    Raises:
        ServingError: It is no rule.
    """
    text = os.environ.get(TOKENS)
    if not text:
        return None
    for name in get_args(Groups):
        if text == name:
            return name
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ServingError(
            f"{TOKENS}={text!r} must be the share of image tokens that stays, above 0 and below 1, or what is left "
            f"out: {' or '.join(get_args(Groups))}."
        )
    return share


def before_tower() -> bool:
    """Whether the rule leaves out patches before the tower."""
    return isinstance(token_rule(), str)


@dataclass(frozen=True)
class TokenChooser:
    """Chooses the image tokens of a model that stay.

    Attributes:
        rule: As in `token_rule`.
        groups: The form of the patches that the model's processor gives.
    """

    rule: float | Groups
    groups: PatchGroups

    def kept(self, patches: Tensor, grids: Tensor, statistics: Statistics) -> list[Tensor]:
        """Which tokens of each image stay.

        Args:
            patches: Patches of all images, `[patches, ...]`: normalised, or in bytes where the engine normalises them
                itself.
            grids: Frames, rows and columns of patches of each image, `[images, 3]`.
            statistics: Mean and standard deviation that normalised patches are normalised with.

        Returns:
            For each image a bool `[tokens]`, in the order of its tokens.

        Raises:
            ServingError: The patches are not those of these grids, or belong to a video.
        """
        sizes = [tuple(int(n) for n in grid) for grid in grids.tolist()]
        if sum(math.prod(size) for size in sizes) != len(patches):
            raise ServingError(f"{len(patches)} patches are not those of the grids {sizes}.")
        if not patches.is_floating_point():
            patches, statistics = patches.float() / 255, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        patches = patches.float().cpu()
        try:
            if isinstance(self.rule, str):
                policy = GroupPolicy(scorer="density" if self.rule == "blank" else "duplicates")
                pages = PatchedPages(self.groups, grids.cpu(), patches)
                return [keep.flatten() for keep in pages.kept(policy.keep, statistics)]
            return self._share(self.rule, patches, sizes, statistics)
        except PlanError as error:
            raise ServingError(f"{TOKENS}: {error}") from error

    def _share(
        self, share: float, patches: Tensor, sizes: list[tuple[int, ...]], statistics: Statistics
    ) -> list[Tensor]:
        budget = FastVConfig(ratio=1 - share, selector="density", prune_at="input")
        parts = patches.split([math.prod(size) for size in sizes])
        chosen = []
        for part, (frames, rows, columns) in zip(parts, sizes, strict=True):
            images = TowerImages(part, ((frames, rows, columns),), self.groups, patch=self.groups.patch)
            count = rows * columns // self.groups.side**2
            density = token_density(images, [count], count, statistics)
            stay = budget.budget(count)
            tokens = ImageTokens(
                real=torch.ones(1, count, dtype=torch.bool),
                budget=torch.tensor([stay]),
                most=stay,
                states=torch.zeros(1, count, 0),
                run=torch.zeros(1, count, dtype=torch.long),
                density=density,
            )
            chosen.append(select(tokens, "density")[0])
        return chosen


@lru_cache(maxsize=4)
def chooser(rule: float | Groups, model: str, revision: str | None = None) -> TokenChooser:
    """The chooser of a model, of which only the configuration is read.

    Args:
        rule: As in `token_rule`.
        model: Hub id or folder.
        revision: Its revision on the hub.

    Raises:
        ServingError: The patches of its tower cannot be put together to a page.
    """
    try:
        located = find_tower(model_without_weights(model, revision))
        groups = located.backbone.patch_groups_of(located.tower)
    except SFAError as error:
        raise ServingError(f"{TOKENS} cannot be used with {model}: {error}") from error
    if groups is None:
        raise ServingError(
            f"{TOKENS} reads text off the pixels, and how the tower of {model} is given its pixels is not known. "
            "Serve it with smaller images instead."
        )
    return TokenChooser(rule, groups)


def kept_features(features: Sequence[Tensor], kept: Sequence[Tensor] | Tensor) -> tuple[Tensor, ...]:
    """The features of the tokens that stay.

    Args:
        features: Of each image, `[tokens, channels]`.
        kept: Which stay: bool, of each image or of all images behind one another.

    Raises:
        ServingError: They do not belong together.
    """
    flat = kept if isinstance(kept, Tensor) else torch.cat(list(kept))
    counts = [len(feature) for feature in features]
    if sum(counts) != len(flat):
        raise ServingError(f"{TOKENS}: the images have {sum(counts)} tokens, and {len(flat)} were chosen from.")
    chosen = flat.bool().split(counts)
    return tuple(feature[stays.to(feature.device)] for feature, stays in zip(features, chosen, strict=True))


def kept_positions(positions: Positions, tokens: list[int], features: list[Any]) -> tuple[Tensor, int]:
    """Positions of a prompt without the tokens that were left out: those that the whole prompt would have.

    Args:
        positions: Computes them for a whole prompt, `[3, tokens]`, and by how much they are ahead of counting.
        tokens: The prompt, with as many image tokens as stay.
        features: Its images, as the engine records them: `mm_position` with `offset` and `length`, and `data`.

    Returns:
        Positions of the tokens of the prompt, and by how much the next one is ahead of counting.

    Raises:
        ServingError: An image has another number of tokens in the prompt than stay of it.
    """
    whole: list[int] = []
    spread: list[Any] = []
    stays: list[Tensor] = []
    end = 0
    for feature in sorted(features, key=lambda f: f.mm_position.offset):
        place = feature.mm_position
        text = tokens[end : place.offset]
        kept = feature.data[KEPT].data.bool().cpu() if KEPT in feature.data else torch.ones(place.length).bool()
        if int(kept.sum()) != place.length:
            raise ServingError(
                f"{TOKENS}: the prompt has {place.length} tokens of an image, and {int(kept.sum())} stay."
            )
        stays += [torch.ones(len(text), dtype=torch.bool), kept]
        whole += text
        spread.append(replace(feature, mm_position=replace(place, offset=len(whole), length=len(kept), is_embed=None)))
        whole += [tokens[place.offset]] * len(kept)
        end = place.offset + place.length
    whole += tokens[end:]
    stays.append(torch.ones(len(tokens) - end, dtype=torch.bool))
    all_positions, ahead = positions(whole, spread)
    return all_positions[:, torch.cat(stays)], ahead + len(whole) - len(tokens)
