"""Records of backbones in the form before `layouts`: what they say, in the new form. Gone in 0.2.

A record said the grid of a forward (`grid_of_input`), or described the inputs of a segmented tower (`describe_input`)
and built the layout of each segment from that (`segment_layouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sfa_adapters.arrangement import ImageTokens, TokenArrangement
from sfa_adapters.block_maps import check_block_map
from sfa_adapters.layout import TokenLayout

__all__ = ["DescribedSegments", "grid_layouts", "segment_arrangements"]

Inputs = tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class DescribedSegments(TokenArrangement):
    """Segments that an old record described, in a form of its own.

    Attributes:
        description: What `describe_input` gave; hashable.
        count: Tokens of the forward.
        build: The record's `segment_layouts`.
    """

    description: Any = None
    count: int = 0
    build: Callable[[Any, tuple[int, ...], Tensor], list[TokenLayout]] = field(default=lambda *_: [], compare=False)

    @property
    def num_tokens(self) -> int:
        """As the record says."""
        return self.count

    def segments(self, bounds: Sequence[int], block_map: Tensor | None) -> list[TokenLayout]:
        """As in `TokenArrangement`, by the record's own function."""
        return self.build(self.description, tuple(bounds), check_block_map(block_map))


def grid_layouts(
    read: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[int, int] | None],
) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], ImageTokens | None]:
    """`layouts` from a `grid_of_input`."""

    def layouts(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ImageTokens | None:
        grid = read(module, args, kwargs)
        return None if grid is None else ImageTokens(grid)

    return layouts


def segment_arrangements(
    describe: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], tuple[int, Any]],
    build: Callable[[Any, tuple[int, ...], Tensor], list[TokenLayout]],
) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], TokenArrangement]:
    """`layouts` from a `describe_input` and a `segment_layouts`."""

    def layouts(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenArrangement:
        count, description = describe(module, args, kwargs)
        one = (ImageTokens((1, count)),)  # the grids are in the description
        return DescribedSegments("segments", one, description=description, count=count, build=build)

    return layouts
