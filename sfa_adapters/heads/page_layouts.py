"""Layouts of the tokens of a running tower, with SFA in it or without, from the inputs of its forward.

SFA's layers know their layouts; before injection they are made here, from the same record of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sfa_adapters.attention_call import AttentionCall
from sfa_adapters.errors import LayoutError
from sfa_adapters.hooks import features_of
from sfa_adapters.layout import TokenLayout
from sfa_adapters.tower_input import TowerInput, watching_input
from sfa_adapters.tower_search import FoundTower

__all__ = ["layouts_of"]


@contextmanager
def layouts_of(vision: FoundTower) -> Iterator[Callable[[AttentionCall], TokenLayout]]:
    """Context that watches the inputs of a tower.

    Args:
        vision: The tower.

    Yields:
        A function from an attention call of the forward under way to the layout of its tokens. It raises `LayoutError`
        if the tokens are not those of the grid.

    Raises:
        LayoutError: The tower has adaptive or merged tokens.
    """
    if {"adat", "dymu"} & features_of(vision.tower).keys():
        raise LayoutError(
            f"The tokens of {vision.name or type(vision.tower).__name__} are adaptive or merged, so they have no rows "
            "and columns. Choose heads before inject_adat or inject_dymu, or eject these first."
        )
    pages = _Pages(vision)
    with watching_input(vision.tower, vision.backbone, "layouts", pages.record_input):
        yield pages.layout


class _Pages:
    """The arrangement of the tokens in the forward under way, and layouts made from it."""

    def __init__(self, vision: FoundTower) -> None:
        self.backbone = vision.backbone
        self.arrangement: Any = None
        self.tokens = 0
        self.known: dict[Any, TokenLayout] = {}
        self.ends: dict[str, int] = {}

    def record_input(self, given: TowerInput) -> None:
        """Records the arrangement when a forward begins."""
        self.ends = {}
        self.arrangement = given.arrangement()
        self.tokens = 0 if self.arrangement is None else self.arrangement.num_tokens

    def layout(self, call: AttentionCall) -> TokenLayout:
        """The layout of an attention call; the segments of a layer are called in order."""
        key: Any = self.arrangement
        start = stop = 0
        if self.arrangement is not None and self.arrangement.after_merge is not None:
            raise LayoutError(
                f"The {self.backbone.name} tower makes one token of several between its layers, so the tokens of "
                f"{call.layer} cannot be told from those in front. Choose heads by another criterion."
            )
        if self.backbone.joined == "segments":
            start = self.ends.get(call.layer, 0) if call.segment else 0
            stop = self.ends[call.layer] = start + call.num_queries
            key = (self.arrangement, start, stop)
        fits = stop <= self.tokens if self.backbone.joined == "segments" else call.num_queries == self.tokens
        if self.arrangement is None or not fits or call.num_keys != call.num_queries:
            raise LayoutError(
                f"{call.layer} attends over {call.num_queries} queries and {call.num_keys} keys, but the images of "
                f"this forward have {self.tokens} tokens, so their rows and columns are not known."
            )
        if key not in self.known:
            self.known[key] = self._build(start, stop)
        return self.known[key].to(call.device)

    def _build(self, start: int, stop: int) -> TokenLayout:
        if self.backbone.joined == "segments":
            return self.arrangement.segments((start, stop), None)[0]
        return self.arrangement.layout(None)
