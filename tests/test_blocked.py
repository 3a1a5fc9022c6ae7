"""Attention in tiles equals phi looked up pair by pair, to the last digits of float64, however the tiles are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters import StructuralBias, TokenLayout, attend, blocked
from sfa_adapters.bias import BiasFactors
from sfa_adapters.blocked import blocked_attention
from sfa_adapters.choices import TERMS
from sfa_adapters.phi_tiles import key_order

exact = settings(max_examples=30, derandomize=True, deadline=None, database=None)
HEADS, WIDTH = 3, 4


def of_image(values: Tensor, image: int, layout: TokenLayout) -> Tensor:
    return values if layout.batch_size is None else values[image]


def phi_of_pairs(bias: BiasFactors, image: int) -> Tensor:
    """Phi by its definition: two look-ups and a product for each pair of tokens, `[H, N, N]`."""
    layout = bias.layout
    row, column, placed = (
        of_image(t, image, layout) for t in (layout.rows.index, layout.columns.index, layout.spatial)
    )
    phi = bias.row_table[:, row][:, :, row] + bias.column_table[:, column][:, :, column]
    values = bias.block_value if layout.batch_size is None else bias.block_value[:, :, :]
    for value in values:
        one = value if layout.batch_size is None else value[image]
        phi = phi + one[:, :, None] * one[:, None, :]
    return phi * (placed[:, None] & placed)


def slow(query: Tensor, key: Tensor, value: Tensor, bias: BiasFactors, mask: Tensor | None, scale: float) -> Tensor:
    outs = []
    for image in range(len(query)):
        logits = scale * query[image] @ key[image].transpose(-1, -2) + phi_of_pairs(bias, image)
        if mask is not None:
            part = mask.expand(len(query), HEADS, *logits.shape[-2:])[image]
            logits = logits.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else logits + part
        if bias.layout.padding is not None:
            logits = logits.masked_fill(bias.layout.padding[image], float("-inf"))
        outs.append(logits.softmax(-1) @ value[image])
    return torch.stack(outs)


def shuffled(height: int, width: int, prefix: int, seed: int) -> TokenLayout:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(height * width, generator=generator)
    return TokenLayout.regular(height, width, prefix).select(torch.cat((torch.arange(prefix), prefix + order)))


def part_of(height: int, width: int, prefix: int, seed: int) -> TokenLayout:
    """Tokens that fill no whole grid, and two of them in one place."""
    layout = shuffled(height, width, prefix, seed)
    spatial = torch.arange(prefix, layout.num_tokens - height * width // 3)
    return layout.select(torch.cat((torch.arange(prefix), spatial, spatial[:1])))


def batched(height: int, width: int, prefix: int, seed: int) -> TokenLayout:
    pages = [shuffled(height, width, prefix, seed), TokenLayout.regular(width, 1, prefix), part_of(2, 3, prefix, seed)]
    return TokenLayout.batch(pages)


def placeless(height: int, width: int, prefix: int, seed: int) -> TokenLayout:
    layout = TokenLayout.regular(height, width, prefix)
    where = torch.cat((torch.arange(prefix), prefix + 1 + torch.arange(height * width)))
    return layout.spread(where, layout.num_tokens + 2)


LAYOUTS = {"regular": lambda h, w, p, _: TokenLayout.regular(h, w, p), "shuffled": shuffled, "part": part_of}
LAYOUTS |= {"batch": batched, "placeless": placeless}


def factors(layout: TokenLayout, adapters: int, seed: int) -> BiasFactors:
    """Tables in float64, as leaves."""
    torch.manual_seed(seed)
    plain = StructuralBias(HEADS, init_std=1.0, terms=TERMS).factors(layout)
    one = plain.block_value.detach().double()
    values = torch.cat([one * (1 + number) for number in range(adapters)]) if adapters else one[:0]
    leaves = (plain.row_table.detach().double(), plain.column_table.detach().double(), values)
    return BiasFactors(layout, *(leaf.requires_grad_() for leaf in leaves))


def mask_of(kind: str, batch: int, tokens: int) -> Tensor | None:
    if kind == "boolean":
        return torch.rand(1, 1, tokens, tokens).fill_diagonal_(1.0) if tokens < 2 else _diagonal(tokens)
    if kind == "additive":
        return torch.randn(batch, HEADS, tokens, tokens, dtype=torch.float64)
    return torch.randn(batch, 1, 1, tokens, dtype=torch.float64) if kind == "of keys" else None


def _diagonal(tokens: int) -> Tensor:
    allowed = torch.rand(1, 1, tokens, tokens) > 0.4
    allowed[:, :, torch.arange(tokens), torch.arange(tokens)] = True
    allowed[..., 0] = True
    return allowed


@exact
@given(
    kind=st.sampled_from(sorted(LAYOUTS)),
    sides=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    prefix=st.integers(0, 2),
    adapters=st.integers(0, 2),
    mask=st.sampled_from(["none", "boolean", "additive", "of keys"]),
    rows=st.integers(1, 7),
    tile_bytes=st.sampled_from([1, 600, 2000, 10**6]),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_in_float64(
    kind: str, sides: tuple[int, int], prefix: int, adapters: int, mask: str, rows: int, tile_bytes: int, seed: int
) -> None:
    layout = LAYOUTS[kind](*sides, prefix, seed)
    bias = factors(layout, adapters, seed)
    batch = layout.batch_size or 2
    inputs = [
        torch.randn(batch, HEADS, layout.num_tokens, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    further = mask_of(mask, batch, layout.num_tokens) if layout.num_tokens > 1 else None
    tables = [table for table in (bias.row_table, bias.column_table, bias.block_value) if table.numel()]
    expected = slow(*inputs, bias, further, 0.3)  # pyright: ignore[reportCallIssue]
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [*inputs, *tables], allow_unused=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "TILE_BYTES", tile_bytes)
        patch.setattr(blocked, "TILE_QUERIES", rows)
        out = blocked_attention(*inputs, bias, further, 0.3)  # pyright: ignore[reportCallIssue]
        gradients = torch.autograd.grad((out * weights).sum(), [*inputs, *tables])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for gradient, other in zip(gradients, wanted, strict=True):
        other = torch.zeros_like(gradient) if other is None else other
        torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-12)


def test_a_query_that_may_see_nothing_is_zero_and_passes_no_gradient() -> None:
    bias = factors(TokenLayout.regular(2, 3, 1), 1, 0)
    inputs = [torch.randn(1, HEADS, 7, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[2] = False
    out = blocked_attention(*inputs, bias, mask)  # pyright: ignore[reportCallIssue]
    assert not out[:, :, 2].any()
    out.square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in inputs)
    assert inputs[0].grad is not None
    assert not inputs[0].grad[:, :, 2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_states_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Nearer to the exact result than a mask that was rounded to the dtype of the states."""
    torch.manual_seed(0)
    layout = TokenLayout.regular(6, 7, 1)
    bias = StructuralBias(HEADS, init_std=2.0, terms=TERMS).factors(layout)
    states = [torch.randn(2, HEADS, 43, WIDTH).to(dtype) for _ in range(3)]
    exactly = attend(*(s.double() for s in states), _double(bias), backend="blocked")  # pyright: ignore[reportCallIssue]
    errors = {
        name: (attend(*states, bias, backend=name).double() - exactly).abs().max()  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name in ("blocked", "dense")
    }
    assert errors["blocked"] <= errors["dense"]
    assert attend(*states, bias, backend="blocked").dtype == dtype  # pyright: ignore[reportCallIssue]


def _double(bias: BiasFactors) -> BiasFactors:
    return BiasFactors(bias.layout, bias.row_table.double(), bias.column_table.double(), bias.block_value.double())


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11
def test_no_more_than_a_tile_of_phi_exists_at_a_time() -> None:
    """Memory is linear: twice as many tokens need twice as much beyond the tiles, not four times."""

    def peak(side: int) -> float:
        from torch.profiler import ProfilerActivity, profile

        layout = TokenLayout.regular(side, 2 * side)
        torch.manual_seed(0)
        bias = StructuralBias(2).factors(layout)
        states = [torch.randn(1, 2, layout.num_tokens, 8, requires_grad=True) for _ in range(3)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            blocked_attention(*states, bias).sum().backward()  # pyright: ignore[reportCallIssue]
        current = highest = 0
        results: Any = profiler.profiler
        events = results.kineto_results.events()
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            current += size
            highest = max(highest, current)
        return highest

    small, large = peak(24), peak(48)  # 1,152 and 4,608 tokens; the matrices of phi are 10 and 170 MB
    assert large < 4.5 * small
    assert large < 40e6


# -- the order of the keys --------------------------------------------------------------------------------------------


def test_keys_that_lie_row_by_row_stay_where_they_are() -> None:
    order = key_order(TokenLayout.regular(3, 4, 2), 0)
    assert order.index is None
    assert order.is_grid
    assert (order.off_page, len(order.rows), len(order.columns)) == (2, 3, 4)


def test_a_grid_in_another_order_is_sorted() -> None:
    layout = shuffled(3, 4, 1, 5)
    order = key_order(layout, 0)
    assert order.is_grid
    assert order.index is not None
    row, column = layout.rows.index[order.index[1:]], layout.columns.index[order.index[1:]]
    assert (row * 4 + column).tolist() == list(range(12))


def test_keys_with_gaps_are_no_grid_and_padding_is_left_out() -> None:
    layout = batched(3, 4, 1, 2)
    assert [key_order(layout, image).is_grid for image in range(3)] == [True, True, False]
    for image in range(3):
        index = key_order(layout, image).index
        assert index is not None
        assert layout.padding is not None
        assert not layout.padding[image, index].any()
        assert len(index) == (~layout.padding[image]).sum()
