"""The placebo of the studies: SFA with the places of tokens shuffled once.

It has the parameters, the learning rates and the size of the bias, but no information about the page. So its gain over
a model without SFA does not come from structure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from sfa_adapters.errors import InjectionError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.tuner import injected_layers

__all__ = ["ShuffledPlaces", "shuffle_places"]


@dataclass(frozen=True)
class ShuffledPlaces:
    """Gives every token with a place the place of another; prefix tokens (CLS) keep theirs.

    Attributes:
        seed: Of the shuffle; one seed and one number of tokens always give the same.
    """

    seed: int = 0

    def __call__(self, layout: TokenLayout) -> TokenLayout:
        """The layout with permuted rows, columns and blocks.

        Args:
            layout: The layout of one grid.
        """
        order = torch.arange(layout.num_tokens)
        generator = torch.Generator().manual_seed(self.seed)
        places = layout.num_tokens - layout.prefix_tokens
        order[layout.prefix_tokens :] = layout.prefix_tokens + torch.randperm(places, generator=generator)
        order = order.to(layout.block.device)
        rows = replace(layout.rows, index=layout.rows.index[order])
        columns = replace(layout.columns, index=layout.columns.index[order])
        return replace(layout, block=layout.block[order], rows=rows, columns=columns)


def shuffle_places(model: nn.Module, seed: int = 0) -> None:
    """Turns the SFA of a model into a placebo, in place; for towers with one grid per image.

    Args:
        model: A model with SFA that has not run yet, or whose training starts over.
        seed: Of the shuffle.

    Raises:
        InjectionError: The model has no SFA.
    """
    states = {id(layer.state): layer.state for _, _, layer in injected_layers(model)}
    if not states:
        raise InjectionError(
            f"{type(model).__name__} has no SFA whose places could be shuffled; call inject_sfa first."
        )
    for state in states.values():
        state.rearrange = ShuffledPlaces(seed)
        state.layouts.clear()
