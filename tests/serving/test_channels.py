"""What an engine's attention computes on wider heads, against the matrix of phi; and heads that ranks share."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.arrangement import ImageTokens, MergeGroups, TokenArrangement, Windows
from sfa_adapters.bias import StructuralWeights, bias_factors
from sfa_adapters.errors import LayoutError, ServingError
from sfa_adapters.layout import TokenLayout
from sfa_adapters.serving.channels import attend_groups, heads_of_rank, phi_width, widen_groups, widen_images
from sfa_adapters.serving.places import segment_groups

HEADS, WIDTH = 4, 16
SCALE = WIDTH**-0.5
WINDOWS = TokenArrangement(
    "segments",
    (ImageTokens((6, 10), Windows(2, 2)), ImageTokens((8, 4), Windows(2, 2)), ImageTokens((6, 10), Windows(2, 2))),
)


def _weights(terms: str = "rcdb") -> StructuralWeights:
    values = torch.randn(3, HEADS, generator=torch.Generator().manual_seed(1)).double() * 3
    block = torch.randn(HEADS, 16, generator=torch.Generator().manual_seed(2)).double()
    row, col, dist = (value if letter in terms else None for value, letter in zip(values, "rcd", strict=True))
    return StructuralWeights(row, col, dist, block if "b" in terms else None)


def _states(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, batch, tokens, HEADS, WIDTH, generator=generator)
    return query, key, value


def _engine(query: Tensor, key: Tensor, value: Tensor, bounds: list[int] | None = None) -> Tensor:
    """Attention as an engine computes it: no mask, the scale that it was built with, each segment by itself."""
    bounds = bounds or [0, query.shape[1]]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    parts = [
        F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, start:stop], v[:, :, start:stop], scale=SCALE)
        for start, stop in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)[..., :WIDTH]


def _slow(
    states: tuple[Tensor, ...], layouts: list[TokenLayout], bounds: list[int], weights: StructuralWeights
) -> Tensor:
    """Softmax of the logits with phi as a matrix, in fp64, segment by segment."""
    parts: list[Tensor] = []
    for (start, stop), layout in zip(itertools.pairwise(bounds), layouts, strict=True):
        query, key, value = (x[:, start:stop].double().transpose(1, 2) for x in states)
        logits = query @ key.transpose(-1, -2) * SCALE + bias_factors([weights], layout, HEADS).dense().double()
        parts.append((logits.softmax(-1) @ value).transpose(1, 2))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("terms", ["rc", "rcdb", "b", "d"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_images_in_a_batch(terms: str, prefix: int) -> None:
    layout, weights = TokenLayout.regular(5, 7, prefix), _weights(terms)
    states = _states(2, 35 + prefix)
    wide = widen_images(*states, layout, weights, SCALE)
    assert wide[0].shape == wide[1].shape == wide[2].shape
    assert wide[0].shape[-1] >= WIDTH + phi_width([layout], weights)
    expected = _slow(states, [layout], [0, 35 + prefix], weights)
    torch.testing.assert_close(_engine(*wide).double(), expected, atol=1e-5, rtol=0)
    assert (_engine(*states) - expected).abs().max() > 0.1  # the bias matters


@pytest.mark.parametrize("terms", ["rc", "rcdb", "b", "d"])
@pytest.mark.parametrize(
    ("arrangement", "bounds"),
    [
        (WINDOWS, [0, 60, 92, 152]),  # whole images
        (WINDOWS, [0, 16, 32, 40, 48, 56, 60, 76, 92, 108, 124, 132, 140, 148, 152]),  # windows, ragged at the border
        (TokenArrangement("segments", (ImageTokens((4, 6), MergeGroups(2), frames=2),)), [0, 24, 48]),
        (TokenArrangement("segments", (ImageTokens((4, 6)), ImageTokens((3, 3))), prefix_tokens=1), [0, 25, 35]),
    ],
)
def test_segments(terms: str, arrangement: TokenArrangement, bounds: list[int]) -> None:
    weights, states = _weights(terms), _states(1, arrangement.num_tokens)
    groups = segment_groups(arrangement, bounds, None)
    expected = _slow(states, arrangement.segments(bounds, None), bounds, weights)
    wide = widen_groups(*states, groups, weights, SCALE)
    torch.testing.assert_close(_engine(*wide, bounds).double(), expected, atol=1e-5, rtol=0)
    own = attend_groups(*states, groups, weights, SCALE)
    torch.testing.assert_close(own.double(), expected, atol=1e-5, rtol=0)


def test_windows_of_one_shape_share_a_narrow_table() -> None:
    page = TokenArrangement("segments", (ImageTokens((32, 48), Windows(2, 4)),))
    bounds = list(range(0, 32 * 48 + 1, 64))
    groups = segment_groups(page, bounds, None)
    assert [tuple(group.tokens.shape) for group in groups] == [(24, 64)]
    assert phi_width([groups[0].layout], _weights("rc")) == 14  # 8 rows and 8 columns, each less one
    whole = segment_groups(page, [0, 32 * 48], None)
    assert phi_width([whole[0].layout], _weights("rc")) == 78


def test_empty_segments_are_left_out() -> None:
    groups = segment_groups(WINDOWS, [0, 60, 60, 92, 152, 152], None)
    assert sum(group.tokens.numel() for group in groups) == 152


def test_other_tokens_are_refused() -> None:
    with pytest.raises(LayoutError, match="36 tokens for each image, but a grid of"):
        widen_images(*_states(1, 36), TokenLayout.regular(5, 7), _weights(), SCALE)
    with pytest.raises(LayoutError, match="segments have 152"):
        widen_groups(*_states(1, 150), segment_groups(WINDOWS, [0, 60, 92, 152], None), _weights(), SCALE)
    with pytest.raises(LayoutError, match="does not lie inside one image"):
        segment_groups(WINDOWS, [0, 70, 152], None)


def test_heads_of_ranks() -> None:
    weights = _weights()
    parts = [heads_of_rank(weights, HEADS, 2, rank, 2) for rank in range(2)]
    assert parts[0].row is not None
    assert weights.row is not None
    assert torch.equal(torch.cat([p.row for p in parts if p.row is not None]), weights.row)
    assert torch.equal(torch.cat([p.block for p in parts if p.block is not None]), weights.block)  # pyright: ignore
    assert heads_of_rank(weights, HEADS, HEADS, 1, 2) is weights  # every rank has all heads


def test_heads_that_an_engine_adds_have_no_bias() -> None:
    last = heads_of_rank(_weights("rc"), HEADS, 3, 1, 2)  # 4 heads on 2 ranks of 3
    assert last.row is not None
    assert last.dist is None
    assert torch.equal(last.row[1:], torch.zeros(2, dtype=last.row.dtype))
    assert last.row[0] == _weights("rc").row[3]  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize(("here", "ranks"), [(1, 2), (8, 1), (3, 1)])
def test_other_heads_are_refused(here: int, ranks: int) -> None:
    with pytest.raises(ServingError, match=f"{here} heads on each of {ranks} ranks"):
        heads_of_rank(_weights(), HEADS, here, 0, ranks)
