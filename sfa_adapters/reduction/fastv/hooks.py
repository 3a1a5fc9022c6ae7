"""The state and the hooks of FastV: what happens at each decoder layer while a host runs.

At a prompt, the attention of layer K - 1 is read for the query rows (nothing else of it is computed twice), and the
best image tokens are chosen. From layer K on, states, positions and masks of the kept tokens replace those of all
tokens. After the last layer the kept states go back to their places, so that logits keep their shape. While decoding,
layers from K on get masks without the columns that they do not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer

from sfa_adapters.compat import cache_of
from sfa_adapters.errors import UnsupportedAttentionError
from sfa_adapters.reduction.fastv.prompt import NOTED, Prompt, placeholders, prompt_of
from sfa_adapters.reduction.fastv.query_rows import AttentionReader
from sfa_adapters.reduction.fastv.selectors import needs_attention
from sfa_adapters.reduction.fastv.token_density import TowerImages, pack_density, token_density, tower_images
from sfa_adapters.reduction.image_tokens import arguments
from sfa_adapters.reduction.kept_tokens import (
    KEPT,
    KeptTokens,
    keep_positions,
    keep_states,
    nothing_before,
    pruned_mask,
)
from sfa_adapters.tower_input import TowerInput

__all__ = ["FASTV", "FastVState"]

# The name of the feature, for `sfa_adapters.hooks`.
FASTV = "fastv"


class Scored(Exception):
    """Ends the pass over the first layers once the scores of a prompt are read."""


@dataclass(eq=False)
class FastVState:
    """What the hooks of one model share.

    Attributes:
        config: The options, a `FastVConfig`.
        ids: Placeholder ids of image tokens.
        layers: How many decoder layers there are.
        statistics: Mean and deviation of the tower's images, for `density`.
        noted: Arguments of the modules around the language model.
        prompt: The current prompt, or the latest one, for gradient checkpointing.
        kept: Which tokens pruned layers hold.
        images: The latest images of the tower, for `density`.
        reader: Reads attention while layer K - 1 runs.
        side: Patches along the side of an image token, for `density` on pages of any size.
        scoring: Whether a pass for the scores alone is running (`prune_at="input"`).
        memo: Masks and positions that all pruned layers share.
    """

    config: Any
    ids: tuple[int, ...]
    layers: int
    statistics: tuple[Any, Any] | None = None
    side: int = 1
    noted: dict[str, Any] = field(default_factory=dict)
    prompt: Prompt | None = None
    kept: KeptTokens | None = None
    images: TowerImages | None = None
    reader: AttentionReader | None = None
    scoring: bool = False
    memo: dict[Any, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        fresh: dict[str, Any] = {"noted": {}, "prompt": None, "kept": None, "images": None, "reader": None}
        return {**self.__dict__, **fresh, "scoring": False, "memo": {}}

    @property
    def at_input(self) -> bool:
        """Whether tokens are dropped before layer 0."""
        return self.config.prune_at == "input"

    # -- around the language model ------------------------------------------------------------------------------------

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keeps the arguments that tell image tokens from text; those of inner modules replace those of outer ones."""
        given = arguments(module, args, kwargs)
        self.noted.update({name: given[name] for name in NOTED if given.get(name) is not None})

    def forget(self) -> None:
        """Clears what belongs to a forward that ended; a backward pass may still need what was chosen."""
        if self.scoring:
            return
        self.noted = {}
        if not torch.is_grad_enabled():
            self.prompt, self.kept = None, None
            self.memo.clear()

    def keep_noted(self, start: int, index: Tensor | None) -> None:
        """Shortens the noted arguments to the tokens that DyMU left of a prompt.

        Args:
            start: How many tokens at the beginning are gone.
            index: Which of the others stay, int64 `[B, P]`; None for all.
        """
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            value = self.noted.get(name)
            if value is not None:
                value = value[:, start:]
                self.noted[name] = value if index is None else value.gather(1, index.to(value.device))

    def record_input(self, given: TowerInput) -> None:
        """Keeps the images that the tower is called with, for `density`."""
        self.images = tower_images(given, self.side)

    def pack(self, pack: Callable[[Tensor], Tensor]) -> None:
        """Packs the density map of the images that the tower has seen, as the host packs its features.

        Args:
            pack: Packs densities of tiles, `[tiles, patches]`, into those of image tokens.
        """
        if self.images is not None:
            self.images = pack_density(self.images, self.statistics, pack)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def begin(self, states: Tensor, cache: Any, mask: Any) -> None:
        """Begins a forward of the language model: a prompt with images, or tokens that follow one.

        Args:
            states: Input of the language model, `[B, L, D]`.
            cache: Its cache, or None.
            mask: Its attention mask.

        Raises:
            PlanError: The places of image tokens are not known, or the cache is of another batch or was cut.
        """
        self.prompt = self.kept = None
        self.memo.clear()
        if self.config.ratio == 0:
            return
        batch, length = states.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        kept: KeptTokens | None = getattr(cache, KEPT, None)
        if kept is not None and isinstance(past, int) and past == 0:  # the cache was reset
            kept = None
            delattr(cache, KEPT)
        if cache is not None and kept is not None:
            slots = cache.get_seq_length(0 if self.at_input else self.config.layer)
            if isinstance(slots, int):
                kept = kept.cut_to(slots, None if self.at_input else past)
            setattr(cache, KEPT, kept)
            self.kept = kept.of_batch(batch)
        image = placeholders(self.noted, self.ids, batch, length) if length > 1 else None
        if image is not None:
            self.prompt = prompt_of(states, image, mask, past, self.noted, self.config.query)

    def drops(self, prompt: Prompt) -> bool:
        """Whether the prompt loses a token; if not, it runs as without FastV."""
        prompt.read(self.config.budget)
        if prompt.start == 0:
            self.kept = None  # a static cache that was reset
        if prompt.budgets != prompt.images and not (self.at_input and prompt.start):
            return True
        self.prompt = None
        return False

    def choose(self, states: Tensor) -> bool:
        """Chooses the tokens of the prompt that stay.

        Args:
            states: Before the pruning, `[B, L, D]`.

        Returns:
            Whether any token is dropped.
        """
        prompt = self.prompt
        if prompt is None:
            return False
        if prompt.index is None:
            if not self.drops(prompt):
                return False
            config = self.config
            density = self._density if config.selector == "density" else None
            prompt.choose(states.detach(), config.selector, config.seed, config.balance, density)
            prompt.states = states.detach()
        return True

    def _density(self, most: int) -> Tensor:
        assert self.prompt is not None
        images, self.images = self.images, None
        return token_density(images, self.prompt.images, most, self.statistics)

    def settle(self, cache: Any) -> None:
        """Sets which tokens pruned layers hold after this prompt, and stores it on the cache."""
        prompt = self.prompt
        assert prompt is not None
        assert prompt.index is not None
        assert prompt.live is not None
        before = self.kept
        if before is None:
            before = nothing_before(len(prompt.index), prompt.start, prompt.index.device)
        self.kept = before.followed_by(
            prompt.start, prompt.index, prompt.live, prompt.length, prompt.all_live, prompt.behind
        )
        self.remember(cache)

    def remember(self, cache: Any) -> None:
        """Stores on a cache which tokens its pruned layers hold."""
        if cache is not None and self.kept is not None:
            setattr(cache, KEPT, self.kept)
        elif cache is not None and hasattr(cache, KEPT):
            delattr(cache, KEPT)

    # -- decoder layers -----------------------------------------------------------------------------------------------

    def enter_layer(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of a decoder layer: begins a prompt, reads attention, or gives the kept tokens.

        Raises:
            UnknownInterfaceError: A cache is in use under a name that is not known.
        """
        given = arguments(layer, args, kwargs) if len(args) > 1 else kwargs
        states = args[0] if args else given["hidden_states"]
        cache, config = cache_of(layer, given), self.config
        if number == 0 and not self.scoring:
            if not self.at_input:
                self.begin(states, cache, given.get("attention_mask"))
            elif self.prompt is not None:
                self.remember(cache)  # the language model may have made it after its inputs were pruned
        if number == config.layer - 1 and needs_attention(config.selector) and (self.scoring or not self.at_input):
            self._listen()
        if self.at_input or number < config.layer:
            return None
        prompt = self.prompt
        if number == config.layer:
            if prompt is None or not self.choose(states):
                self.remember(cache)
            elif self.kept is None or self.kept.full != prompt.start + prompt.length:  # not a layer computed again
                self.settle(cache)
        if self.kept is None:
            return None
        return self._pruned_call(number, layer, args, {**given, "hidden_states": states})

    def _pruned_call(self, number: int, layer: nn.Module, args: tuple[Any, ...], new: dict[str, Any]) -> Any:
        kept, states = self.kept, new.pop("hidden_states")
        assert kept is not None
        rows = None if self.prompt is None else self.prompt.index
        if rows is not None:
            if states.shape[1] != rows.shape[1]:  # the first pruned layer; the later ones get its output
                states = keep_states(states, rows)
            for name, channels in (("position_embeddings", True), ("position_ids", False)):
                new[name] = self._once(name, new.get(name), lambda v, c=channels: keep_positions(v, rows, c))
        cache, queries = cache_of(layer, new), states.shape[1]

        def mask_of(mask: Any) -> Any:
            if cache is not None and isinstance(cache.layers[number], StaticLayer):
                slots = cache.layers[number].max_cache_len
            else:
                slots = kept.slots
                if rows is None and cache is not None:
                    slots = cache.get_seq_length(number) + queries
            return pruned_mask(mask, kept, rows, queries, slots, _kind(layer))

        new["attention_mask"] = self._once("attention_mask", new.get("attention_mask"), mask_of)
        return ((states,), new) if args else ((), {**new, "hidden_states": states})

    def _once(self, name: str, value: Any, make: Callable[[Any], Any]) -> Any:
        """All layers get the same objects, so each is pruned once per forward."""
        known = self.memo.get((name, id(value)))
        if known is None or known[0] is not value:
            known = self.memo[name, id(value)] = (value, make(value))
        return known[1]

    def leave_layer(self, number: int, layer: nn.Module, output: Any) -> Any:
        """Hook after a decoder layer, also after one that failed, whose output is None.

        Raises:
            UnsupportedAttentionError: Scores are needed, and the attention did not show them.
        """
        if number == self.config.layer - 1 and self.reader is not None:
            reader, self.reader = self.reader, None
            scores = reader.close()
            if output is not None:
                if scores is None:
                    raise UnsupportedAttentionError(_unseen(self.config.selector, number, _kind(layer)))
                assert self.prompt is not None
                self.prompt.importance = scores
                if self.scoring:
                    raise Scored
        prompt = self.prompt
        if number < self.layers - 1 or output is None or self.scoring or prompt is None or prompt.index is None:
            return None
        if isinstance(output, tuple):
            return (prompt.scattered_back(output[0]), *output[1:])
        return prompt.scattered_back(output)

    def _listen(self) -> None:
        prompt = self.prompt
        if prompt is None or prompt.importance is not None or not self.drops(prompt):
            return
        rows, real = prompt.rows()
        self.reader = AttentionReader(rows, real, prompt.past, prompt.length)
        self.reader.open()


def _kind(module: nn.Module) -> str:
    config = next((m.config for m in module.modules() if hasattr(m, "config")), None)
    return str(getattr(config, "_attn_implementation", "unknown"))


def _unseen(selector: str, number: int, kind: str) -> str:
    return (
        f"selector={selector!r} reads the attention of layer {number}, but the attention implementation {kind!r} shows "
        "neither scaled_dot_product_attention nor a softmax. Call model.set_attn_implementation('sdpa'), or choose "
        "another selector: diversity, density, downsample or random."
    )
