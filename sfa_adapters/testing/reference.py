"""Slow, obvious references: phi pair by pair from its formula, and attention in float64 inside the plain tower.

The reference of an attention layer is the layer of a tower without SFA, run on the same hidden states, with the softmax
of q.k replaced: `SlowAttention` takes the place of `scaled_dot_product_attention`, or of the softmax of an eager
implementation. So the module itself projects, normalises and rotates, and whatever it does with the result (an output
projection of any name, a norm, a gate) happens in the reference as well.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfa_adapters.layer import SFALayer
from sfa_adapters.registry import Backbone
from sfa_adapters.testing.cases import Grid, Inputs, Place, TowerCase

__all__ = [
    "SlowAttention",
    "arguments_by_name",
    "layer_phi",
    "phi_by_pairs",
    "phis_of_call",
    "regular_places",
    "softmax_attention",
]

SOFTMAX = {torch.softmax, torch.special.softmax, F.softmax, Tensor.softmax}


def phi_by_pairs(
    places: list[Place],
    grid: Grid,
    row: Tensor,
    col: Tensor,
    dist: Tensor,
    block: Tensor,
    block_grid: tuple[int, int] = (4, 4),
) -> Tensor:
    """Phi by its formula, pair by pair, for tokens of one patch each.

    Args:
        places: Row and column of each token; None for prefix tokens.
        grid: Rows and columns of patches.
        row: `[heads]`.
        col: `[heads]`.
        dist: `[heads]`.
        block: `[heads, blocks]`.
        block_grid: Rows and columns of blocks.

    Returns:
        `[heads, tokens, tokens]`, float64, logits.
    """
    reach = max(grid[0] - 1 + grid[1] - 1, 1)

    def block_id(place: tuple[float, float]) -> int:
        return int((place[0] + 0.5) * block_grid[0] / grid[0]) * block_grid[1] + int(
            (place[1] + 0.5) * block_grid[1] / grid[1]
        )

    row, col, dist, block = (weights.detach().double() for weights in (row, col, dist, block))
    phi = torch.zeros(len(row), len(places), len(places), dtype=torch.float64)
    for i, here in enumerate(places):
        for j, there in enumerate(places):
            if here is None or there is None:
                continue
            value = block[:, block_id(here)] * block[:, block_id(there)]
            if here[0] == there[0]:
                value = value + row
            if here[1] == there[1]:
                value = value + col
            manhattan = abs(here[0] - there[0]) + abs(here[1] - there[1])
            phi[:, i, j] = value - dist * manhattan / reach
    return phi


def regular_places(grid: Grid, prefix: int) -> list[Place]:
    """Places of the tokens of an image, row by row after the prefix."""
    return [None] * prefix + [(float(r), float(c)) for r in range(grid[0]) for c in range(grid[1])]


def layer_phi(layer: SFALayer, places: list[Place], grid: Grid) -> Tensor:
    """Phi of one injected layer, from its scalars, `[heads, tokens, tokens]`; a term that is off counts as zero."""
    zeros = {name: torch.zeros(layer.num_heads, *shape) for name, shape in (("one", ()), ("sfa_block", (16,)))}
    scalars: list[Any] = [
        dict(getattr(layer, name).items()).get("default", zeros.get(name, zeros["one"]))
        for name in layer.adapter_layer_names
    ]
    return phi_by_pairs(places, grid, *scalars)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, phi: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention of `[..., heads, tokens, width]` with phi on its logits; `allowed` says which keys may be seen."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + phi
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


class SlowAttention(TorchFunctionMode):
    """Context in which attention is computed in float64, step by step, with one given phi after the other added.

    Args:
        phis: One `[heads, tokens, tokens]` per computation, in order; `[images, heads, tokens, tokens]` where images
            of a batch differ.
    """

    def __init__(self, phis: Sequence[Tensor]) -> None:
        super().__init__()
        self.phis = list(phis)
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replaces SDPA and softmax; everything else runs as it is."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            return (scores.double() + self._next(scores)).softmax(-1).to(scores.dtype)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        assert not dropout_p, "the reference knows no dropout: build the tower in eval mode"
        assert not is_causal, "a vision tower that attends causally is not known to the reference"
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        phi = self._next(query)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=torch.float64).masked_fill(~attn_mask, float("-inf"))
            phi = phi + attn_mask.double()
        # `softmax_attention` divides by the root of the width; another scale goes into the query.
        factor = 1.0 if scale is None else scale * query.shape[-1] ** 0.5
        out = softmax_attention(query.double() * factor, key.double(), value.double(), phi)
        return out.to(query.dtype)

    def _next(self, states: Tensor) -> Tensor:
        """The phi of this computation, for queries `[.., heads, tokens, width]` or scores."""
        self.calls += 1
        assert self.calls <= len(self.phis), (
            f"the attention ran {self.calls} computations, and there are {len(self.phis)} segments"
        )
        phi = self.phis[self.calls - 1]
        assert states.shape[-3:-1] == phi.shape[-3:-1], (
            f"the attention has {tuple(states.shape)} [.., heads, tokens, width or tokens]; by its inputs there are "
            f"{phi.shape[-3]} heads and {phi.shape[-2]} tokens"
        )
        return phi


def phis_of_call(
    case: TowerCase, backbone: Backbone, layer: SFALayer, call: Mapping[str, Any], inputs: Inputs
) -> list[Tensor]:
    """Phi of each computation of one call of an attention layer, from what the case says about some inputs.

    Args:
        case: The small tower.
        backbone: Its record.
        layer: The scalars.
        call: The arguments of the attention's forward by name.
        inputs: The inputs of the tower.
    """
    grids = case.grids_of(inputs) if case.grids_of_call is None else list(case.grids_of_call(inputs, call))
    if backbone.joined in ("padded", "packed"):
        return [_joined_phi(case, backbone.joined == "packed", layer, call, inputs)]
    # A tower that takes a batch or a packed sequence names boundaries for the latter.
    if backbone.joined == "batch" and call.get(backbone.segment_argument) is None:
        places = regular_places(grids[0], case.prefix) if case.places is None else case.places(inputs, call)
        return [layer_phi(layer, places, grids[0])]
    if case.places is None:
        places = [place for grid in grids for place in regular_places(grid, case.prefix)]
    else:
        places = case.places(inputs, call)
    ends = list(itertools.accumulate(case.prefix + rows * columns for rows, columns in grids))
    bounds = [int(bound) for bound in call[backbone.segment_argument]]
    assert bounds[-1] == ends[-1] == len(places), (
        f"{backbone.segment_argument} ends at {bounds[-1]}, by its inputs the tower has {ends[-1]} tokens, and there "
        f"are {len(places)} places"
    )
    phis: list[Tensor] = []
    for start, stop in itertools.pairwise(bounds):
        image = next(number for number, end in enumerate(ends) if start < end)
        phis.append(layer_phi(layer, places[start:stop], grids[image]))
    return phis


def _joined_phi(case: TowerCase, packed: bool, layer: SFALayer, call: Mapping[str, Any], inputs: Inputs) -> Tensor:
    """Phi of all images of one computation: block-diagonal `[heads, all, all]`, or `[images, heads, tokens, tokens]`.

    Zero between images and at padding, which the tower's own mask hides.
    """
    grids = case.grids_of(inputs)
    counts = [case.prefix + rows * columns for rows, columns in grids] if case.tokens is None else case.tokens(inputs)
    if case.places is None:
        places = [place for grid in grids for place in regular_places(grid, case.prefix)]
    else:
        places = case.places(inputs, call)
    assert len(places) == sum(counts), f"{len(places)} places for images of {counts} tokens"
    ends = list(itertools.accumulate(counts))
    parts = [places[end - count : end] for end, count in zip(ends, counts, strict=True)]
    phis = [layer_phi(layer, part, grid) for part, grid in zip(parts, grids, strict=True)]
    if packed:
        return torch.stack([torch.block_diag(*(phi[head] for phi in phis)) for head in range(len(phis[0]))])
    length = case.padded_length(inputs) if case.padded_length is not None else max(counts)
    return torch.stack([F.pad(phi, (0, length - phi.shape[-1]) * 2) for phi in phis])


def arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name; those that it takes through `**kwargs` included."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs).arguments
    rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
    return {**bound.pop(rest, {}), **bound}
