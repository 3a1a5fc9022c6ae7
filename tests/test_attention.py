"""`attend` is exact: folded equals dense equals softmax by hand, for regular, adaptive, ragged and selected layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters import StructuralBias, TokenLayout, attend
from sfa_adapters.attention import Backend
from sfa_adapters.choices import TERMS
from sfa_adapters.errors import LayoutError
from tests.support.compare import assert_close
from tests.support.reference import softmax_attention

exact = settings(max_examples=20, derandomize=True, deadline=None, database=None)
BACKENDS: tuple[Backend, ...] = ("dense", "folded", "blocked", "lines", "triton", "auto")
side, prefixes, seeds = st.integers(1, 7), st.integers(0, 3), st.integers(0, 10_000)


def adaptive(cells: int, prefix: int, seed: int) -> TokenLayout:
    """A page of cells of 2x2, each covered by one large token, two upright ones or four small ones."""
    generator = torch.Generator().manual_seed(seed)
    boxes: list[tuple[float, float, float, float]] = []
    for row in range(0, 2 * cells, 2):
        for column in range(0, 2 * cells, 2):
            kind = int(torch.randint(3, (1,), generator=generator))
            if kind == 0:
                boxes.append((row, column, 2, 2))
            elif kind == 1:
                boxes += [(row, column, 2, 1), (row, column + 1, 2, 1)]
            else:
                boxes += [(row + r, column + c, 1, 1) for r in range(2) for c in range(2)]
    rows, columns, *sizes = torch.tensor(boxes).unbind(-1)
    return TokenLayout.from_boxes(rows, columns, torch.stack(sizes, -1), (2 * cells, 2 * cells), prefix)


def states(layout: TokenLayout, seed: int, batch: int = 2, heads: int = 2, width: int = 8) -> list[Tensor]:
    torch.manual_seed(seed)
    shape = (layout.batch_size or batch, heads, layout.num_tokens, width)
    return [torch.randn(shape, requires_grad=True) for _ in range(3)]


def check_backends(layout: TokenLayout, seed: int) -> None:
    """Outputs against float64, and every gradient between the backends."""
    torch.manual_seed(seed)
    bias = StructuralBias(2, init_std=1.0, terms=TERMS)
    inputs = states(layout, seed)
    real = torch.ones_like(layout.block, dtype=torch.bool) if layout.padding is None else ~layout.padding
    real = real.expand(inputs[0].shape[0], -1)
    allowed = real[:, None, None, :]
    phi = bias(layout).double().masked_fill(~allowed, 0.0)
    expected = softmax_attention(*(t.double() for t in inputs), phi, allowed).transpose(1, 2)[real]  # pyright: ignore[reportCallIssue]
    weights = torch.randn(expected.shape)
    wanted = torch.autograd.grad((expected * weights).sum(), [*inputs, *bias.parameters()])
    for backend in BACKENDS:
        out = attend(*inputs, bias.factors(layout), backend=backend).transpose(1, 2)[real]  # pyright: ignore[reportCallIssue]
        assert_close(out.double(), expected, what=f"{backend} outputs")
        grads = torch.autograd.grad((out * weights).sum(), [*inputs, *bias.parameters()])
        for first, second in zip(grads, wanted, strict=True):
            assert_close(first, second, 2e-5, f"{backend} gradients")


@exact
@given(side, side, prefixes, seeds)
def test_regular_grids(height: int, width: int, prefix: int, seed: int):
    check_backends(TokenLayout.regular(height, width, prefix), seed)


@exact
@given(st.integers(1, 4), prefixes, seeds)
def test_adaptive_tokens(cells: int, prefix: int, seed: int):
    check_backends(adaptive(cells, prefix, seed), seed)


@exact
@given(side, side, prefixes, st.integers(1, 4), seeds)
def test_tokens_without_a_place_behind_the_prefix(height: int, width: int, prefix: int, more: int, seed: int):
    """A CLS token at the end, or one in front of each tile: phi is zero there, as at a prefix token."""
    tokens = prefix + height * width + more
    generator = torch.Generator().manual_seed(seed)
    where = prefix + torch.randperm(tokens - prefix, generator=generator)[: height * width].sort().values
    where = torch.cat((torch.arange(prefix), where))
    layout = TokenLayout.regular(height, width, prefix)
    spread = layout.spread(where, tokens)
    check_backends(spread, seed)
    bias = StructuralBias(2, init_std=1.0, terms=TERMS)
    phi = bias(spread)
    assert_close(phi[:, :, where[:, None], where], bias(layout))
    rest = torch.ones(tokens, dtype=torch.bool)
    rest[where] = False
    assert not phi[:, :, rest].any()
    assert not phi[..., rest].any()
    moved = spread.to("cpu").select(torch.arange(tokens))
    assert torch.equal(bias(moved), phi)
    check_backends(TokenLayout.batch([spread, TokenLayout.regular(height, width, prefix)]), seed)


@exact
@given(st.lists(st.tuples(side, side), min_size=1, max_size=3), prefixes, seeds)
def test_ragged_batches(grids: list[tuple[int, int]], prefix: int, seed: int):
    check_backends(TokenLayout.batch([TokenLayout.regular(*grid, prefix) for grid in grids]), seed)


@exact
@given(st.lists(st.integers(1, 3), min_size=2, max_size=3), prefixes, seeds)
def test_batches_of_adaptive_pages(cells: list[int], prefix: int, seed: int):
    check_backends(TokenLayout.batch([adaptive(n, prefix, seed + i) for i, n in enumerate(cells)]), seed)


@exact
@given(side, side, prefixes, seeds)
def test_selected_tokens(height: int, width: int, prefix: int, seed: int):
    layout = TokenLayout.regular(height, width, prefix)
    spatial = prefix + torch.randperm(height * width)[: max(1, height * width // 2)]
    check_backends(layout.select(torch.cat((torch.arange(prefix), spatial))), seed)


@pytest.mark.parametrize("shape", [(0, 0, 3), (1, 1, 0), (1, 1, 2)])
def test_smallest_layouts(shape: tuple[int, int, int]):
    check_backends(TokenLayout.regular(*shape), 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_is_never_attended_to(backend: Backend, dtype: torch.dtype):
    layout = TokenLayout.batch([TokenLayout.regular(3, 4, 1), TokenLayout.regular(2, 2, 1)])
    assert layout.padding is not None
    factors = StructuralBias(2, init_std=1.0, terms=TERMS).factors(layout)
    query, key, value = (t.detach().to(dtype) for t in states(layout, 0))
    out = attend(query, key, value, factors, backend=backend)
    padded = layout.padding[:, None, :, None].expand_as(key)
    changed_key, changed_value = key.clone(), value.clone()
    changed_key[padded], changed_value[padded] = 30.0, -30.0
    again = attend(query, changed_key, changed_value, factors, backend=backend)
    real = ~layout.padding
    assert out.isfinite().all()
    assert torch.equal(out.transpose(1, 2)[real], again.transpose(1, 2)[real])
    assert not torch.equal(key, changed_key)


@pytest.mark.parametrize("width", [8, 64, 128])
def test_padding_fits_fp16_at_every_head_width(width: int):
    """The logit of padding over the scale, -3e4 * sqrt(width), is beyond fp16: infinity, and NaN beside a real key."""
    layout = TokenLayout.batch([TokenLayout.regular(3, 4, 1), TokenLayout.regular(2, 2, 1)])
    factors = StructuralBias(2, init_std=1.0, terms=TERMS).factors(layout)
    low = [t.detach().half() for t in states(layout, 0, width=width)]
    assert layout.padding is not None
    real = ~layout.padding
    for scale in (None, 1.0, 0.01):
        out = attend(*low, factors, backend="folded", scale=scale).transpose(1, 2)[real]  # pyright: ignore[reportCallIssue]
        exact = attend(*(t.float() for t in low), factors, backend="dense", scale=scale).transpose(1, 2)[real]  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float", "keys only"])
def test_a_further_mask_is_merged(backend: Backend, kind: str):
    layout, bias = TokenLayout.regular(3, 4, 1), StructuralBias(2, init_std=1.0, terms=TERMS)
    query, key, value = states(layout, 0)
    allowed = torch.rand(2, 1, 13, 13) < 0.7
    allowed[..., 0] = True
    if kind == "keys only":
        allowed = allowed[:, :, :1]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf")) if kind == "float" else allowed
    out = attend(query, key, value, bias.factors(layout), attention_mask=mask, backend=backend)
    expected = softmax_attention(query.double(), key.double(), value.double(), bias(layout).double(), allowed)
    assert_close(out.double(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_head_widths(backend: Backend):
    layout, bias = TokenLayout.regular(5, 3, 1), StructuralBias(2, init_std=1.0, terms=TERMS)
    for width in (4, 7, 64, 72, 130):
        query, key, value = states(layout, width, width=width)
        scale = 0.3 / width**0.5
        out = attend(query, key, value, bias.factors(layout), scale=scale, backend=backend)
        expected = softmax_attention(query.double() * 0.3, key.double(), value.double(), bias(layout).double())
        assert out.shape == query.shape
        assert_close(out.double(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value_width", [3, 8, 13, 70])
@pytest.mark.parametrize("tokens", [(3, 4), (18, 18)])  # `auto` is dense, then lines
def test_values_of_another_width(backend: Backend, value_width: int, tokens: tuple[int, int]):
    layout = TokenLayout.regular(*tokens, 1)
    query, key, _ = states(layout, 0)
    value = torch.randn(2, 2, layout.num_tokens, value_width, requires_grad=True)
    bias = StructuralBias(2, init_std=1.0)
    out = attend(query, key, value, bias.factors(layout), backend=backend)
    assert out.shape == value.shape
    expected = attend(query, key, value, bias.factors(layout), backend="dense")
    assert_close(out, expected, what="outputs")
    weights = torch.randn_like(out)
    leaves = (query, key, value, *bias.parameters())
    for first, second in zip(*(torch.autograd.grad((o * weights).sum(), leaves) for o in (out, expected)), strict=True):
        assert_close(first, second, what="gradients")


def test_no_bias_is_plain_attention():
    query, key, value = states(TokenLayout.regular(3, 3), 0)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.equal(attend(query, key, value, None), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_named(backend: Backend):
    layout = TokenLayout.regular(3, 4, 1)
    query, key, value = states(layout, 0)
    with pytest.raises(LayoutError, match=r"layout has 15 tokens \(grid \(3, 5\), 0 prefix\).* sees 13"):
        attend(query, key, value, StructuralBias(2).factors(TokenLayout.regular(3, 5)), backend=backend)
    with pytest.raises(LayoutError, match="bias has 3 heads, but the attention has 2"):
        attend(query, key, value, StructuralBias(3).factors(layout), backend=backend)
    with pytest.raises(LayoutError, match="describes 3 images, but the batch has 2"):
        attend(query, key, value, StructuralBias(2).factors(TokenLayout.batch([layout] * 3)), backend=backend)
