"""Candidates of `benchmarks.attention`: attention alone, on a page of tokens, by every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reference import EagerBias
from sfa_adapters import StructuralBias, TokenLayout, attend
from sfa_adapters.attention import BACKENDS, Backend, dense_mask
from sfa_adapters.bias import BiasFactors
from sfa_adapters.choices import DEFAULT_TERMS, TERMS, Term
from sfa_adapters.lines import lines_fit
from sfa_adapters.triton_attention import triton_misfit

__all__ = ["CANDIDATES", "AttentionCase", "candidates", "mixed_layout"]

COMPUTING = tuple(name for name in BACKENDS if name != "auto")
CANDIDATES = (*COMPUTING, "cached", "auto", "flex", "eager")
# A score matrix of all heads above this many bytes is left out: some of them are alive at a time.
LARGEST_MATRIX = 2**31

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """What is measured.

    Attributes:
        layout: Where the tokens lie.
        title: The layout in words.
        terms: Terms of the bias.
        dtype: Of q, k and v.
        heads: H.
        width: D.
        batch: B.
        backward: Whether the backward pass is measured, too.
    """

    layout: TokenLayout
    title: str
    terms: Sequence[Term]
    dtype: torch.dtype
    heads: int
    width: int
    batch: int
    backward: bool

    @property
    def matrix_bytes(self) -> int:
        """Of the scores of all heads and images."""
        return self.batch * self.heads * self.layout.num_tokens**2 * self.dtype.itemsize


def mixed_layout(tokens: int, device: torch.device) -> TokenLayout:
    """About so many tokens of two sizes, as ADAT makes them: cells of one large token or of four small ones."""
    side = max(1, round(math.sqrt(tokens / 2.5)))
    boxes: list[tuple[int, int, int]] = []
    for row in range(0, 2 * side, 2):
        for column in range(0, 2 * side, 2):
            if (row // 2 + column // 2) % 2:
                boxes.append((row, column, 2))
            else:
                boxes += [(row + down, column + right, 1) for down in range(2) for right in range(2)]
    rows, columns, sizes = torch.tensor(boxes, device=device).unbind(-1)
    return TokenLayout.from_boxes(rows, columns, sizes, (2 * side, 2 * side))


def candidates(case: AttentionCase, names: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Functions without arguments, `plain` first; without those that do not apply, or need too large a matrix."""
    torch.manual_seed(0)
    device, backward = case.layout.device, case.backward
    bias = StructuralBias(case.heads, terms=case.terms, device=device)
    shape = (case.batch, case.layout.num_tokens, 3, case.heads, case.width)
    qkv = torch.randn(shape, device=device, dtype=case.dtype, requires_grad=backward)

    def run(attention: Attention) -> Callable[[], object]:
        def call() -> object:
            with torch.set_grad_enabled(backward):
                out = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
            if backward:
                qkv.grad = None
                bias.zero_grad()
                out.backward(torch.ones_like(out))
            return out

        return call

    def by_backend(name: Backend) -> Attention:
        return lambda q, k, v: attend(q, k, v, bias.factors(case.layout), backend=name)

    calls = {"plain": run(F.scaled_dot_product_attention)}
    for name in names:
        if name in ("dense", "cached", "eager") and case.matrix_bytes > LARGEST_MATRIX:
            continue
        if name == "cached" and not backward:
            mask = dense_mask(bias.factors(case.layout), qkv[:, :, 0].transpose(1, 2)).detach()
            calls[name] = run(lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask))
        elif name == "eager":
            everything = StructuralBias(case.heads, terms=TERMS, device=device)
            calls[name] = run(EagerBias(everything, case.layout).attend)
        elif name == "flex" and _flex_applies(case):
            calls[name] = run(_flex(lambda: bias.factors(case.layout)))
        elif name == "auto":
            calls[name] = run(by_backend("auto"))
        elif name in COMPUTING and _applies(name, qkv[:, :, 0].transpose(1, 2), bias.factors(case.layout)):
            calls[name] = run(by_backend(name))  # pyright: ignore[reportArgumentType]
    return calls


def _applies(name: str, query: Tensor, bias: BiasFactors) -> bool:
    """Whether a backend computes this itself: elsewhere it is `folded`, under another name."""
    return {"lines": lines_fit(query, bias), "triton": triton_misfit(query) is None}.get(name, True)


def _flex_applies(case: AttentionCase) -> bool:
    """FlexAttention trains on CUDA only, and here it gets the terms row and col only, on one layout."""
    on_cuda = case.layout.device.type == "cuda"
    return set(case.terms) <= set(DEFAULT_TERMS) and case.layout.batch_size is None and (on_cuda or not case.backward)


def _flex(factors: Callable[[], BiasFactors]) -> Attention:
    """FlexAttention, compiled, with the two scalars of each head as captured tensors."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = factors()
        assert bias.lines is not None
        layout, (by_row, by_column) = bias.layout, bias.lines
        row, column, placed = layout.rows.index, layout.columns.index, layout.spatial

        def score(logit: Tensor, _: Tensor, head: Tensor, one: Tensor, other: Tensor) -> Tensor:
            phi = torch.where(row[one] == row[other], by_row[head], 0.0)
            phi = phi + torch.where(column[one] == column[other], by_column[head], 0.0)
            return logit + torch.where(placed[one] & placed[other], phi, 0.0)

        return compiled(query.contiguous(), key.contiguous(), value.contiguous(), score_mod=score)

    return attention
