"""`Prompt`: a prompt in the language model, which of its tokens are image tokens, and which of those stay.

Shape letters: B samples, L tokens of a prompt, P of them kept, N image tokens of the sample that has most, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.errors import PlanError
from sfa_adapters.reduction.fastv.query_rows import query_rows
from sfa_adapters.reduction.fastv.selectors import ImageTokens, Selector, select
from sfa_adapters.reduction.image_tokens import Counts, image_places
from sfa_adapters.reduction.kept_tokens import keep_states, visible_tokens

__all__ = ["NOTED", "Prompt", "placeholders", "prompt_of"]

# Arguments of the modules around the language model that tell image tokens from text.
NOTED = ("input_ids", "inputs_embeds", "labels", "logits_to_keep", "position_ids", "mm_token_type_ids")


@dataclass(eq=False)
class Prompt:
    """The prompts of a batch and the choice of their tokens.

    Attributes:
        image: Which tokens are image tokens, bool `[B, L]`.
        valid: Which are not padding, bool `[B, L]`.
        past: Tokens in the cache before it; on the device where the cache is static.
        counts: Image tokens and real tokens of each sample, tokens after the last image of any sample, and `past`
            where that is on the device.
        find_rows: Gives the query rows, whose attention counts, from the largest number of text tokens.
        images: Image tokens of each sample.
        reals: Tokens of each sample that are not padding.
        budgets: Image tokens of each sample that stay.
        behind: Tokens after the last image or padding of any sample; this many can be removed from the cache again.
        start: `past` as a number.
        importance: How much the question attends to each token, `[B, L]`.
        states: Of all tokens before the pruning; those of the dropped ones go back to their places.
        index: Kept tokens, int64 `[B, P]`, ascending; None before they are chosen.
        live: False for slots that fill up a shorter sample, bool `[B, P]`.
        all_live: Whether no slot is such a one.
    """

    image: Tensor
    valid: Tensor
    past: int | Tensor
    counts: Counts
    find_rows: Callable[[int], tuple[Tensor, Tensor]]
    images: list[int] = field(default_factory=list)
    reals: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    behind: int = 0
    start: int = 0
    importance: Tensor | None = None
    states: Tensor | None = None
    index: Tensor | None = None
    live: Tensor | None = None
    all_live: bool = True

    @property
    def length(self) -> int:
        """L."""
        return self.image.shape[1]

    def read(self, budget: Callable[[int], int]) -> None:
        """Fetches the counts from the device, once.

        Args:
            budget: Gives the number of image tokens that stay, from that of a sample.
        """
        if not self.budgets:
            batch = len(self.image)
            numbers = self.counts.read()
            self.images, self.reals, self.behind = numbers[:batch], numbers[batch : 2 * batch], numbers[2 * batch]
            self.start = numbers[-1] if isinstance(self.past, Tensor) else self.past
            self.budgets = [budget(count) for count in self.images]

    def rows(self) -> tuple[Tensor, Tensor]:
        """The query rows, int64 `[B, R]`, and which of them are real, bool `[B, R]`; call `read` first."""
        return self.find_rows(max(real - image for real, image in zip(self.reals, self.images, strict=True)))

    @torch.no_grad()
    def choose(
        self,
        states: Tensor,
        selector: Selector,
        seed: int,
        balance: float,
        density: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Chooses the tokens that stay: all text, and of each sample its budget of image tokens; call `read` first.

        Args:
            states: Before the pruning, `[B, L, D]`.
            selector: By what.
            seed: As in `select`.
            balance: As in `select`.
            density: Gives the text density at the image tokens, `[B, N]`, from N.
        """
        device, image, most = states.device, self.image, max(self.images)
        places = (~image).int().argsort(dim=1, stable=True)[:, :most]  # of image tokens, in order, then of others
        count, budget = (torch.tensor(numbers).to(device, non_blocking=True) for numbers in (self.images, self.budgets))
        real = torch.arange(most, device=device) < count[:, None]
        begins = image & ~F.pad(image, (1, 0))[:, :-1]
        tokens = ImageTokens(
            real=real,
            budget=budget,
            most=max(self.budgets),
            states=keep_states(states, places),
            run=begins.cumsum(1).gather(1, places),
            importance=None if self.importance is None else self.importance.to(device).gather(1, places),
            density=None if density is None else density(most).to(device),
        )
        chosen = select(tokens, selector, seed, balance)
        stays = self.valid & ~image
        stays = stays.scatter(1, places, torch.where(real, chosen, stays.gather(1, places)))
        lengths = [r - i + b for r, i, b in zip(self.reals, self.images, self.budgets, strict=True)]
        longest = max(lengths)
        # Dropped tokens first, then the kept ones in order: the last of these are the slots, dead ones in front.
        self.index = stays.int().argsort(dim=1, stable=True)[:, -longest:]
        self.live = stays.gather(1, self.index)
        self.all_live = min(lengths) == longest

    def scattered_back(self, states: Tensor) -> Tensor:
        """The kept states at their places, and at the others the states that the dropped tokens had, `[B, L, D]`.

        Args:
            states: Of the kept tokens, `[B, P, D]`.
        """
        assert self.index is not None
        assert self.live is not None
        assert self.states is not None
        index, live = self.index.to(states.device), self.live.to(states.device)
        full = self.states.to(states.device, states.dtype)
        if not self.all_live:
            states = torch.where(live[:, :, None], states, keep_states(full, index))
        return full.scatter(1, index[:, :, None].expand_as(states), states)


def placeholders(noted: Mapping[str, Any], ids: tuple[int, ...], batch: int, length: int) -> Tensor | None:
    """Which tokens of a prompt stand for a part of an image, bool `[B, L]`; None where the language model runs alone.

    Args:
        noted: Arguments of the modules around the language model.
        ids: Placeholder ids.
        batch: B, as the language model sees it.
        length: L, as the language model sees it.

    Raises:
        PlanError: The arguments do not say it.
    """
    tokens, types = noted.get("input_ids"), noted.get("mm_token_type_ids")
    if tokens is not None:
        places = image_places(tokens, ids)
    elif types is not None and types.shape[-1] == length:
        places = types > 0
    elif "inputs_embeds" in noted:
        raise PlanError(
            "FastV tells image tokens by their ids, but the model was called with inputs_embeds alone. Pass input_ids "
            "(or mm_token_type_ids beside inputs_embeds), or call eject_fastv(model)."
        )
    else:
        return None
    if tuple(places.shape) != (batch, length):
        raise PlanError(
            f"The prompt has {tuple(places.shape)} ids, but the language model sees {(batch, length)} tokens: the host "
            "expands its placeholders inside. Let its processor write one placeholder per image token."
        )
    return places


def prompt_of(
    states: Tensor, image: Tensor, mask: Any, past: int | Tensor, noted: Mapping[str, Any], query: str
) -> Prompt:
    """A prompt before it runs, nothing chosen yet.

    Args:
        states: Input of the language model, `[B, L, D]`.
        image: Which of them are image tokens, bool `[B, L]`.
        mask: The attention mask of its first layer.
        past: Tokens in the cache.
        noted: Arguments of the modules around the language model.
        query: "last" or "mean".
    """
    batch, length = states.shape[:2]
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    valid = visible_tokens(mask, batch, length, past, states.device)
    image = image.to(states.device) & valid
    blocked = torch.arange(1, length + 1, device=states.device) * (image | ~valid)
    numbers = [image.sum(1), valid.sum(1), (length - blocked.amax()).reshape(1)]
    if isinstance(past, Tensor):
        numbers.append(past.reshape(1).to(states.device))
    labels, logits = noted.get("labels"), noted.get("logits_to_keep")

    def find_rows(texts: int) -> tuple[Tensor, Tensor]:
        return query_rows(image, valid, labels, logits, texts if query == "mean" else 0)

    return Prompt(image, valid, past, Counts(torch.cat(numbers)), find_rows)
