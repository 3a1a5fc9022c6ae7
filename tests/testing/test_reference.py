"""The slow reference: against attention that is written out, and errors for wrong inputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfa_adapters.testing.reference import SlowAttention, arguments_by_name, phi_by_pairs, regular_places

HEADS, TOKENS, WIDTH = 2, 5, 4


def states(*batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, *batch, HEADS, TOKENS, WIDTH, generator=generator)
    return query, key, value, torch.randn(HEADS, TOKENS, TOKENS, generator=generator).double()


def written_out(query: Tensor, key: Tensor, value: Tensor, logits: Tensor, scale: float) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", query.double(), key.double()) * scale + logits
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("...qk,...kd->...qd", weights, value.double()).float()


@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=["tokens", "one", "batch"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_fused_attention(batch: tuple[int, ...], scale: float | None) -> None:
    query, key, value, phi = states(*batch)
    with SlowAttention([phi]) as slow:
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    assert slow.calls == 1
    torch.testing.assert_close(out, written_out(query, key, value, phi, scale or WIDTH**-0.5))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_towers_own_mask_stays(kind: str) -> None:
    query, key, value, phi = states(2)
    allowed = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    allowed[1, ..., 3:] = False
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
    with SlowAttention([phi]):
        out = F.scaled_dot_product_attention(query, key, value, allowed if kind == "bool" else additive)
    torch.testing.assert_close(out, written_out(query, key, value, phi + additive, WIDTH**-0.5))


def test_grouped_heads() -> None:
    query, key, value, phi = states(1)
    with SlowAttention([phi]):
        out = F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)
    expected = written_out(query, key[:, :1], value[:, :1], phi, WIDTH**-0.5)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("softmax", [torch.softmax, F.softmax, Tensor.softmax])
def test_eager_attention(softmax: Any) -> None:
    query, key, value, phi = states(2)
    with SlowAttention([phi]) as slow:
        out = softmax(query @ key.mT * WIDTH**-0.5, dim=-1) @ value
    assert slow.calls == 1
    torch.testing.assert_close(out, written_out(query, key, value, phi, WIDTH**-0.5))


def test_one_phi_after_the_other() -> None:
    query, key, value, phi = states(1)
    with SlowAttention([phi, 2 * phi]):
        outs = [F.scaled_dot_product_attention(query, key, value) for _ in range(2)]
    for out, factor in zip(outs, (1, 2), strict=True):
        torch.testing.assert_close(out, written_out(query, key, value, factor * phi, WIDTH**-0.5))
    with SlowAttention([phi]):
        F.scaled_dot_product_attention(query, key, value)
        with pytest.raises(AssertionError, match="ran 2 computations, and there are 1 segments"):
            F.scaled_dot_product_attention(query, key, value)


def test_phi_of_another_size_is_an_error() -> None:
    query, key, value, phi = states(1)
    with SlowAttention([phi[:, 1:, 1:]]), pytest.raises(AssertionError, match="there are 2 heads and 4 tokens"):
        F.scaled_dot_product_attention(query, key, value)


def test_phi_of_one_pair_by_hand() -> None:
    row, col, dist = torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([4.0])
    block = torch.arange(4.0)[None]
    places = regular_places((2, 2), 1)
    phi = phi_by_pairs(places, (2, 2), row, col, dist, block, (2, 2))[0]
    assert not phi[0].any()
    assert not phi[:, 0].any()
    # Same row: 2, distance 1 of at most 2: -2; blocks 2 and 3: 6.
    assert phi[3, 4] == 2 - 2 + 6
    assert phi[1, 4] == 0 - 4 + 0
    assert phi[2, 4] == 3 - 2 + 3


def test_arguments_are_known_by_name() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: Tensor, bounds: Any = None, **rest: Any) -> None: ...

    named = arguments_by_name(Attention(), (1, 2), {"other": 3})
    assert named == {"x": 1, "bounds": 2, "other": 3}
