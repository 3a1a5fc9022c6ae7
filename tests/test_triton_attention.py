"""The triton kernels equal phi looked up pair by pair, in outputs and all gradients: interpreted, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sfa_adapters import StructuralBias, TokenLayout, attend, packing, triton_attention, triton_launch
from sfa_adapters.bias import BiasFactors
from sfa_adapters.choices import DEFAULT_TERMS, TERMS
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.packing import PackedMask
from sfa_adapters.testing.contract_bias import check_every_layer
from sfa_adapters.testing.towers_grids import PIXTRAL
from sfa_adapters.triton_attention import triton_misfit, triton_varlen_attention
from sfa_adapters.triton_launch import launch_forward
from tests.support.towers import CASES, TowerCase
from tests.support.triton import ON_GPU, interpret
from tests.test_attention import adaptive
from tests.test_blocked import batched, part_of, phi_of_pairs, placeless, shuffled

HEADS = 2


def mixed_batch(height: int, width: int, prefix: int, seed: int) -> TokenLayout:
    return TokenLayout.batch([adaptive(2, prefix, seed), TokenLayout.regular(height, width, prefix)])


LAYOUTS = {
    "regular": lambda h, w, p, _: TokenLayout.regular(h, w, p),
    "shuffled": shuffled,
    "part": part_of,
    "batch": batched,
    "placeless": placeless,
    "adaptive": lambda _h, _w, p, seed: adaptive(2, p, seed),
    "mixed batch": mixed_batch,
}


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels run in a test."""
    if request.param == "cuda":
        return "cuda"
    interpret(monkeypatch)
    return "cpu"


class Case:
    """Leaves in float64, what `attend` gets of them, and what softmax by hand makes of them.

    Args:
        layout: Where the tokens lie.
        adapters: Adapters with blocks; None for a bias of w_row and w_col alone.
        width: Head width.
        dtype: Of the states that `attend` gets.
        device: Where it runs.
        batch: Images of a layout that they share.
    """

    def __init__(
        self, layout: TokenLayout, adapters: int | None, width: int = 16, dtype: torch.dtype = torch.float32,
        device: str = "cpu", batch: int = 1,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.layout, self.dtype, self.device = layout, dtype, device
        shape = (layout.batch_size or batch, HEADS, layout.num_tokens, width)
        self.states = [torch.randn(shape).to(dtype).double().requires_grad_() for _ in range(3)]
        sides = layout.rows.num_kinds, layout.columns.num_kinds
        if adapters is None:
            weights = torch.randn(2, HEADS, dtype=torch.float64).float().double()
            self.tables = [weights.requires_grad_()]
        else:
            tables = [torch.randn(HEADS, side, side) for side in sides]  # of no symmetry
            blocks = torch.randn(adapters, *layout.block.shape[:-1], HEADS, layout.num_tokens)
            self.tables = [t.double().requires_grad_() for t in (*tables, blocks)]
        self.above = torch.randn(shape).to(dtype).double()

    def bias(self, dtype: torch.dtype, device: str = "cpu") -> BiasFactors:
        leaves = [table.to(device, dtype) for table in self.tables]
        layout = self.layout.to(device)
        if len(leaves) > 1:  # a token without a place has no block
            return BiasFactors(layout, leaves[0], leaves[1], leaves[2] * layout.spatial.unsqueeze(-2))
        tables = [
            weight[:, None, None] * axis.overlap().to(weight)
            for weight, axis in zip(leaves[0], (layout.rows, layout.columns), strict=True)
        ]
        empty = leaves[0].new_zeros(0, *layout.block.shape[:-1], HEADS, layout.num_tokens)
        return BiasFactors(layout, tables[0], tables[1], empty, leaves[0])

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.states, *(table for table in self.tables if table.numel())]

    def expected(self, scale: float) -> list[Tensor]:
        """The output and all gradients."""
        bias, outs = self.bias(torch.float64), []
        for image, (query, key, value) in enumerate(zip(*self.states, strict=True)):
            logits = scale * query @ key.transpose(-1, -2) + phi_of_pairs(bias, image)
            if self.layout.padding is not None:
                logits = logits.masked_fill(self.layout.padding[image], float("-inf"))
            outs.append(logits.softmax(-1) @ value)
        out = torch.stack(outs)
        return [out, *torch.autograd.grad(out, self.leaves, self.above)]

    def computed(self, scale: float | None) -> list[Tensor]:
        states = [state.to(self.device, self.dtype) for state in self.states]
        assert triton_misfit(states[0]) is None
        out = attend(*states, self.bias(torch.float32, self.device), scale=scale, backend="triton")  # pyright: ignore[reportCallIssue]
        assert out.dtype == self.dtype
        assert "_Triton" in str(out.grad_fn)
        gradients = torch.autograd.grad(out, self.leaves, self.above.to(out))
        return [tensor.double().cpu() for tensor in (out, *gradients)]

    def check(self, scale: float | None = None, bound: float = 1e-5) -> None:
        width = self.states[0].shape[-1]
        pairs = zip(self.computed(scale), self.expected(width**-0.5 if scale is None else scale), strict=True)
        names = ["out", "query", "key", "value", "first table", "second table", "blocks"]
        for name, (one, other) in zip(names, pairs, strict=False):
            assert one.shape == other.shape, name
            error = (one - other).abs().max() / other.abs().max().clamp(min=1.0)
            assert error <= bound, f"{name}: {error:g}"


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
@pytest.mark.parametrize(("adapters", "prefix"), [(None, 1), (0, 0), (2, 1)])
def test_outputs_and_gradients(kind: str, adapters: int | None, prefix: int, device: str) -> None:
    if adapters is None and "ada" in kind:
        pytest.skip("tokens of different sizes have tables")
    Case(LAYOUTS[kind](3, 6, prefix, 3), adapters, device=device, batch=2 if kind == "regular" else 1).check()


@pytest.mark.parametrize("adapters", [None, 1])
@pytest.mark.parametrize("width", [7, 64, 72, 80, 128])
def test_head_widths_and_scales(adapters: int | None, width: int, device: str) -> None:
    Case(TokenLayout.regular(4, 5, 1), adapters, width, device=device).check(0.2 if width == 64 else None)


@pytest.mark.parametrize("adapters", [None, 1])
@pytest.mark.parametrize("sides", [(7, 7), (4, 8), (0, 0)])
def test_several_tiles_and_smallest_layouts(adapters: int | None, sides: tuple[int, int], device: str) -> None:
    """Tiles of 32 and 16 tokens that are full, and that are not."""
    Case(TokenLayout.regular(*sides, prefix_tokens=0 if sides == (4, 8) else 2), adapters, device=device).check()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("adapters", [None, 1])
def test_halves(dtype: torch.dtype, bound: float, adapters: int | None, device: str) -> None:
    Case(TokenLayout.regular(5, 7, 1), adapters, 16, dtype, device).check(bound=bound)


def test_kinds_and_heads_in_several_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "MOST_KINDS", 16)
    monkeypatch.setattr(triton_launch, "KIND_BYTES", 1)
    Case(TokenLayout.regular(2, 20, 1), 1, device=device).check()


def test_states_in_any_memory_order(device: str) -> None:
    """As towers give them: parts of one projection, `[B, N, 3, H, D]`; and a gradient that is expanded."""
    case = Case(TokenLayout.regular(3, 4, 1), 1, device=device)
    expected = case.expected(0.25)[0].detach().to(device)
    joined = torch.stack([state.detach().transpose(1, 2) for state in case.states], dim=2)
    joined = joined.to(device).float().requires_grad_()
    query, key, value = (part.transpose(1, 2) for part in joined.unbind(2))
    bias = case.bias(torch.float32, device)
    out = attend(query, key, value, bias, backend="triton")
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    mine = torch.autograd.grad(out.sum(), joined)[0]
    theirs = torch.autograd.grad(attend(query, key, value, bias, backend="dense").sum(), joined)[0]
    bound = 1e-5 if device == "cpu" else 1e-4  # fused kernels take shorter products
    torch.testing.assert_close(mine, theirs, atol=bound, rtol=bound)
    crossed = query.transpose(-1, -2).contiguous().transpose(-1, -2)  # channels far apart
    torch.testing.assert_close(attend(crossed, key, value, bias, backend="triton"), out)


def test_a_query_whose_keys_are_all_padding_is_zero(device: str) -> None:
    layout = TokenLayout.batch([TokenLayout.regular(2, 3, 1)] * 2)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1] = True
    factors = StructuralBias(HEADS, terms=TERMS, device=device).factors(replace(layout, padding=padding).to(device))
    states = [torch.randn(2, HEADS, 7, 16, device=device, requires_grad=True) for _ in range(3)]
    out = attend(*states, factors, backend="triton")  # pyright: ignore[reportCallIssue]
    assert not out[1].any()
    assert out[0].any()
    out.square().sum().backward()
    for state in states:
        assert state.grad is not None
        assert state.grad.isfinite().all()
        assert not state.grad[1].any()


def test_padding_in_any_place(device: str) -> None:
    layout = TokenLayout.batch([TokenLayout.regular(3, 4, 1), TokenLayout.regular(2, 2, 1)])
    order = torch.cat((torch.zeros(1, dtype=torch.long), 1 + torch.randperm(12)))
    Case(layout.select(order), 1, device=device).check()


def test_autocast_changes_nothing(device: str) -> None:
    case = Case(TokenLayout.regular(3, 4), 1, device=device)
    plain = case.computed(None)
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(*pair) for pair in zip(plain, case.computed(None), strict=True))


def test_two_backward_passes_give_the_same_bits(device: str) -> None:
    for adapters in (None, 1):
        case = Case(TokenLayout.regular(2, 3, 1), adapters, device=device)
        assert all(torch.equal(*pair) for pair in zip(case.computed(None), case.computed(None), strict=True))


# -- packed sequences -------------------------------------------------------------------------------------------------


def packed(terms: list[str], device: str) -> tuple[StructuralBias, list[BiasFactors], list[int], list[Tensor]]:
    """Pages of different sizes and two equal ones; one of mixed tokens where there are tables."""
    torch.manual_seed(0)
    page = TokenLayout.regular(4, 5, 1).to(device)
    other = adaptive(2, 1, 1) if len(terms) > 2 else shuffled(3, 4, 1, 0)
    layouts = [page, TokenLayout.regular(2, 3, 1).to(device), page, other.to(device)]
    module = StructuralBias(HEADS, init_std=1.0, terms=terms, device=device)  # pyright: ignore[reportArgumentType]
    factors = {id(layout): module.factors(layout) for layout in layouts}
    lengths = [layout.num_tokens for layout in layouts]
    states = [torch.randn(1, HEADS, sum(lengths), 16, device=device, requires_grad=True) for _ in range(3)]
    return module, [factors[id(layout)] for layout in layouts], lengths, states


@pytest.mark.parametrize("terms", [list(DEFAULT_TERMS), list(TERMS)], ids=["lines", "tables"])
def test_segments_of_a_packed_sequence(terms: list[str], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for all, against the block-diagonal matrix."""
    monkeypatch.setattr(packing, "attend", None)  # one for each would fail
    module, biases, lengths, states = packed(terms, device)
    leaves = [*states, *module.parameters()]
    matrix = PackedMask(lengths, biases).tensor(states[0])
    expected = torch.nn.functional.scaled_dot_product_attention(*states, matrix)  # pyright: ignore[reportArgumentType, reportCallIssue]
    above = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, leaves, above, retain_graph=True)  # the tables are made once
    out = PackedMask(lengths, biases, "triton").attend(*states, None, 0.0)  # pyright: ignore[reportCallIssue]
    mine = torch.autograd.grad(out, leaves, above)
    for one, two in zip((out, *mine), (expected, *theirs), strict=True):
        bound = 2e-5 if device == "cpu" else 2e-4
        torch.testing.assert_close(one, two, atol=bound, rtol=bound)
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0)
    flat = [state[0].transpose(0, 1) for state in states]
    assert torch.equal(triton_varlen_attention(*flat, bounds, biases)[None].transpose(1, 2), out)  # pyright: ignore[reportCallIssue]
    with pytest.raises(LayoutError, match=r"Segments \[0, 36, 50\] of \d+ tokens need a layout each"):
        triton_varlen_attention(*flat, [0, 36, 50], biases)  # pyright: ignore[reportCallIssue]
    other = StructuralBias(HEADS, terms=["block"], device=device).factors(biases[0].layout)
    if terms == list(DEFAULT_TERMS):
        with pytest.raises(LayoutError, match=r"2 heads; its biases have .*\[\(2, 0\), \(2, 1\)\]"):
            triton_varlen_attention(*flat, bounds, [other, *biases[1:]])  # pyright: ignore[reportCallIssue]


def test_packed_sequences_elsewhere_are_cut_into_segments() -> None:
    _, biases, lengths, states = packed(list(DEFAULT_TERMS), "cpu")
    out, expected = (PackedMask(lengths, biases, name).attend(*states, None, 0.0) for name in ("triton", "dense"))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    flat = [state[0].transpose(0, 1) for state in states]
    with pytest.raises(InjectionError, match="triton cannot be used: it is on the cpu, and the kernels run on CUDA"):
        triton_varlen_attention(*flat, [0, 1], biases)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("case", [*(case for case in CASES if case.name == "internvit"), *PIXTRAL], ids=str)
def test_towers(case: TowerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer against the slow reference: images in a batch, and packed into one sequence."""
    interpret(monkeypatch)
    launches: list[int] = []

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        launches.append(len(args[3].places.segments))
        return launch_forward(*args)

    monkeypatch.setattr(triton_attention, "launch_forward", forward)
    check_every_layer(case, case.fresh()[1], "triton")
    assert set(launches) == {2}  # both images at once


# -- where the kernels do not apply -----------------------------------------------------------------------------------


def test_elsewhere_it_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, bias = TokenLayout.regular(3, 4, 1), StructuralBias(HEADS, init_std=1.0, terms=TERMS)
    query, key, value = torch.randn(3, 2, HEADS, 13, 16).unbind(0)
    factors = bias.factors(layout)
    mask = torch.ones(13, 13, dtype=torch.bool).tril()

    def same(*states: Tensor, **options: Tensor | float) -> None:
        outs = []
        for backend in ("triton", "folded"):
            torch.manual_seed(0)
            outs.append(attend(*states, factors, backend=backend, **options))  # pyright: ignore[reportArgumentType, reportCallIssue]
        assert torch.equal(*outs)

    same(query, key, value)  # a CPU
    interpret(monkeypatch)
    monkeypatch.setattr(triton_attention, "launch_forward", None)  # would fail
    same(query, key, value, dropout_p=0.5)
    same(query, key, value, attention_mask=mask)
    same(query.double(), key.double(), value.double())


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    query = torch.zeros(1, 1, 4, 16)
    assert triton_misfit(query) == "it is on the cpu, and the kernels run on CUDA"
    interpret(monkeypatch)
    assert triton_misfit(query) is None
    assert "torch.float64" in str(triton_misfit(query.double()))
    assert "up to 256 wide" in str(triton_misfit(torch.zeros(1, 1, 4, 257)))
    assert "must be tokens" in str(triton_misfit(torch.zeros(1, 1, 0, 16)))
    with FakeTensorMode() as mode:
        assert triton_misfit(mode.from_tensor(query)) == "a FakeTensor is no plain tensor"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert triton_misfit(query) == "torch.compile traces the folded backend instead"
    monkeypatch.setattr(triton_attention, "has_triton", lambda: False)
    assert triton_misfit(query) == "triton is not installed"


# -- on a GPU, at the sizes of towers ---------------------------------------------------------------------------------


def gpu(test: Any) -> Any:
    for mark in ON_GPU:
        test = mark(test)
    return test


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("grid", "prefix", "width"), [((32, 32), 1, 64), ((72, 80), 0, 72)])
@pytest.mark.parametrize("terms", [list(DEFAULT_TERMS), list(TERMS)], ids=["lines", "tables"])
def test_at_the_sizes_of_towers(
    dtype: torch.dtype, grid: tuple[int, int], prefix: int, width: int, terms: list[str]
) -> None:
    """Outputs and gradients against the matrix in float32, relative to the largest entry; and twice the same bits."""
    torch.manual_seed(0)
    layout = TokenLayout.regular(*grid, prefix, device="cuda")
    module = StructuralBias(4, init_std=0.5, terms=terms, device="cuda")  # pyright: ignore[reportArgumentType]
    states = [torch.randn(1, 4, layout.num_tokens, width, device="cuda").to(dtype).requires_grad_() for _ in range(3)]
    leaves = [*states, *module.parameters()]
    assert triton_misfit(states[0]) is None
    outs = [
        attend(*inputs, module.factors(layout), backend=backend)  # pyright: ignore[reportCallIssue, reportArgumentType]
        for inputs, backend in ((states, "triton"), ([state.float() for state in states], "dense"))
    ]
    above = torch.randn_like(outs[0])
    mine, again = (torch.autograd.grad(outs[0], leaves, above, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(mine, again, strict=True))
    theirs = torch.autograd.grad(outs[1], leaves, above.float())
    for one, two in zip((outs[0], *mine), (outs[1], *theirs), strict=True):
        bound = 2e-2 * two.float().abs().max().item()
        torch.testing.assert_close(one.float(), two.float(), atol=bound, rtol=2e-2)


@gpu
@pytest.mark.parametrize("terms", [list(DEFAULT_TERMS), list(TERMS)], ids=["lines", "tables"])
def test_memory_is_linear_in_the_tokens(terms: list[str]) -> None:
    """Twice the tokens in as many rows and columns: twice the memory, and far less than a matrix of them."""

    def peak(images: int) -> int:
        page = TokenLayout.regular(48, 48, device="cuda")
        layout = page.select(torch.arange(48 * 48, device="cuda").repeat(images))  # as the frames of a video
        module = StructuralBias(8, terms=terms, device="cuda")  # pyright: ignore[reportArgumentType]
        factors = module.factors(layout)
        states = [
            torch.randn(1, 8, layout.num_tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert triton_misfit(states[0]) is None
        attend(*states, factors, backend="triton").sum().backward()  # pyright: ignore[reportCallIssue]
        return torch.cuda.max_memory_allocated() - before

    peak(1)
    small, large = peak(2), peak(4)
    assert large < 2.3 * small
    assert large < 8 * (4 * 48 * 48) ** 2  # bytes of a matrix [8, N, N] of one byte each
