"""Plain attention corrected along rows and columns equals phi looked up pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters import StructuralBias, TokenLayout, attend, line_page
from sfa_adapters.bias import BiasFactors
from sfa_adapters.choices import DEFAULT_TERMS, TERMS
from sfa_adapters.lines import LARGEST_LOSS, lines_attention, lines_fit
from tests.test_blocked import HEADS, WIDTH, part_of, placeless, shuffled, slow

exact = settings(max_examples=40, derandomize=True, deadline=None, database=None)


def batched(height: int, width: int, prefix: int, seed: int) -> TokenLayout:
    pages = [shuffled(height, width, prefix, seed), TokenLayout.regular(width, 1, prefix), shuffled(2, 3, prefix, seed)]
    return TokenLayout.batch(pages)


LAYOUTS = {"regular": lambda h, w, p, _: TokenLayout.regular(h, w, p), "shuffled": shuffled}
LAYOUTS |= {"batch": batched, "placeless": placeless}


def factors(layout: TokenLayout, weights: Tensor) -> BiasFactors:
    """From w_row and w_col, `[2, H]`, in their dtype."""
    tables = [
        weight[:, None, None] * axis.overlap().to(weight)
        for weight, axis in zip(weights, (layout.rows, layout.columns), strict=True)
    ]
    empty = weights.new_zeros(0, *layout.block.shape[:-1], HEADS, layout.num_tokens)
    return BiasFactors(layout, *tables, empty, weights)  # pyright: ignore[reportCallIssue]


def leaves(layout: TokenLayout, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shape = (layout.batch_size or 2, HEADS, layout.num_tokens, WIDTH)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


@exact
@given(
    kind=st.sampled_from(sorted(LAYOUTS)),
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    prefix=st.integers(0, 2),
    spread=st.sampled_from([0.0, 0.02, 1.0, 3.0]),
    scale=st.sampled_from([None, 1.3]),
    chunk=st.sampled_from([1, 200, 2**19]),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_in_float64(
    kind: str, sides: tuple[int, int], prefix: int, spread: float, scale: float | None, chunk: int, seed: int
) -> None:
    layout = LAYOUTS[kind](*sides, prefix, seed)
    torch.manual_seed(seed)
    weights = (spread * torch.randn(2, HEADS, dtype=torch.float64)).clamp(min=-3.9).requires_grad_()
    query, key, value = leaves(layout)
    bias = factors(layout, weights)
    assert lines_fit(query, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_page, "CHUNK_BYTES", chunk)
        got = lines_attention(query, key, value, bias, scale)
        above = torch.randn_like(got)
        mine = torch.autograd.grad(got, (query, key, value, weights), above)
    expected = slow(query, key, value, bias, None, WIDTH**-0.5 if scale is None else scale)
    theirs = torch.autograd.grad(expected, (query, key, value, weights), above)
    for one, other in zip((got, *mine), (expected, *theirs), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_other_dtypes(dtype: torch.dtype, bound: float) -> None:
    """As near to float64 as its own rounding allows."""
    layout = TokenLayout.regular(6, 5, 1)
    torch.manual_seed(0)
    weights = torch.tensor([[2.5, -1.5, 0.3], [0.4, 2.0, -0.9]], requires_grad=True)
    inputs = leaves(layout, dtype)
    got = attend(*inputs, factors(layout, weights), backend="lines")  # pyright: ignore[reportCallIssue]
    mine = torch.autograd.grad(got.double().square().sum(), (*inputs, weights))
    wide = [states.detach().double().requires_grad_() for states in inputs]
    exact_weights = weights.detach().double().requires_grad_()
    expected = slow(*wide, factors(layout, exact_weights), None, WIDTH**-0.5)  # pyright: ignore[reportCallIssue]
    theirs = torch.autograd.grad(expected.square().sum(), (*wide, exact_weights))
    for one, other, like in zip((got, *mine), (expected, *theirs), (got, *inputs, weights), strict=True):
        assert one.dtype == like.dtype
        assert (one.double() - other).abs().max() <= bound * other.abs().max()


def test_more_than_one_adapter_and_a_missing_term() -> None:
    from sfa_adapters.bias import bias_factors

    layout = TokenLayout.regular(4, 3)
    torch.manual_seed(0)
    one, other = StructuralBias(HEADS, init_std=1.0), StructuralBias(HEADS, init_std=1.0, terms=["col"])
    bias = bias_factors([one.weights, other.weights], layout, HEADS)
    assert bias.lines is not None
    states = [t.float() for t in leaves(layout)]
    got = attend(*states, bias, backend="lines")  # pyright: ignore[reportCallIssue]
    got.square().sum().backward()
    scalars = [one.get_parameter("row"), one.get_parameter("col"), other.get_parameter("col")]
    mine = [p.grad for p in scalars]
    for parameter in scalars:
        parameter.grad = None
    expected = attend(*states, bias_factors([one.weights, other.weights], layout, HEADS), backend="dense")  # pyright: ignore[reportCallIssue]
    expected.square().sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    for gradient, parameter in zip(mine, scalars, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-5)


def boxes(numbers: list[list[int]]) -> TokenLayout:
    """Tokens from rows, columns and sides."""
    row, column, side = torch.tensor(numbers)
    return TokenLayout.from_boxes(row, column, side, (4, 4))


def test_where_it_does_not_apply() -> None:
    """There `attend` computes the same with `folded`."""
    torch.manual_seed(0)
    whole = TokenLayout.regular(4, 4)
    plain = StructuralBias(HEADS, init_std=1.0)
    overlapping = boxes([[0, 0, 2], [0, 2, 0], [2, 1, 1]])
    a_grid_of_overlapping_rows = boxes([[0, 0, 1, 1], [0, 2, 0, 2], [2, 2, 2, 2]])
    for layout, module in (
        (whole, StructuralBias(HEADS, terms=["row", "dist"])),
        (whole, StructuralBias(HEADS, terms=["row", "block"])),
        (part_of(4, 4, 0, 0), plain),
        (overlapping, plain),
        (a_grid_of_overlapping_rows, plain),
    ):
        query, key, value = (t.float() for t in leaves(layout))
        bias = module.factors(layout)
        assert not lines_fit(query, bias)
        torch.testing.assert_close(
            attend(query, key, value, bias, backend="lines"), attend(query, key, value, bias, backend="folded")
        )
    query, key, value = (t.float() for t in leaves(whole))
    mask = torch.ones(16, 16).tril().bool()
    masked = attend(query, key, value, plain.factors(whole), attention_mask=mask, backend="lines")
    torch.testing.assert_close(
        masked, attend(query, key, value, plain.factors(whole), attention_mask=mask, backend="dense")
    )


def test_scalars_that_are_too_negative_are_left_to_the_folded_backend() -> None:
    layout = TokenLayout.regular(3, 3)
    for dtype, most in LARGEST_LOSS.items():
        query = torch.randn(1, HEADS, 9, WIDTH, dtype=dtype)
        weights = torch.zeros(2, HEADS)
        weights[:, 1] = -most / 2
        assert lines_fit(query, factors(layout, weights))
        weights[0, 1] = -most - 0.1
        weights[1, 1] = 50.0  # a positive one makes up for nothing
        assert not lines_fit(query, factors(layout, weights))


def test_the_largest_loss_that_is_allowed_costs_few_digits() -> None:
    """The worst case: nearly all plain attention is on the token itself, from which phi takes it away."""
    layout = TokenLayout.regular(4, 4)
    states = 8 * torch.eye(16).view(1, 1, 16, 16).expand(1, HEADS, 16, 16)
    value = torch.randn(1, HEADS, 16, 16)
    weights = torch.full((2, HEADS), -LARGEST_LOSS[torch.float32] / 2)
    got = attend(states, states, value, factors(layout, weights), backend="lines")
    expected = slow(states.double(), states.double(), value.double(), factors(layout, weights.double()), None, 0.25)
    assert (got - expected).abs().max() < 3e-4


def test_memory_is_linear_in_the_tokens() -> None:
    """No tensor of the forward or the backward pass is larger than a line of the page per token."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                if isinstance(one, Tensor):
                    largest = max(largest, one.numel())
            return out

    layout = TokenLayout.regular(24, 24)
    inputs = [torch.randn(1, HEADS, 576, WIDTH, requires_grad=True) for _ in range(3)]
    weights = torch.ones(2, HEADS, requires_grad=True)
    bias = factors(layout, weights)
    assert lines_fit(inputs[0], bias)
    with Watch():
        lines_attention(*inputs, bias).sum().backward()  # pyright: ignore[reportCallIssue]
    assert largest <= HEADS * 576 * 24


def test_fake_tensors_are_left_to_the_folded_backend() -> None:
    """As memory planners use them: no number can be read from them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layout = TokenLayout.regular(20, 20)
        query = torch.randn(1, HEADS, 400, WIDTH)
        for terms in (DEFAULT_TERMS, TERMS):
            bias = StructuralBias(HEADS, terms=terms).factors(layout)
            assert attend(query, query, query, bias).shape == (1, HEADS, 400, WIDTH)
