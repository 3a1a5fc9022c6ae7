"""`lines_attention`: plain fused attention, corrected along the row and the column of each token.

With the terms `row` and `col` alone, phi is not zero only between tokens of one row or one column. Let s be the plain
logits and L their log-sum-exp, which fused kernels give beside their output O. With a = exp(w_row) - 1 and
b = exp(w_col) - 1, the factors exp(phi) - 1 of a row, of a column and of the token itself, the exact result is

    out = (O + a * sum over the row of p v + b * sum over the column of p v + a b * p v of the token itself) / Z
    Z   = 1 + a * sum over the row of p   + b * sum over the column of p   + a b * p of the token itself

where p = exp(s - L). The correction is rows + columns products per token instead of N: on a page of 72 x 80 tokens 3%
of the arithmetic of attention. The kernel stays the plain one, so memory is linear in the tokens.

The backward pass calls the kernel's own backward pass with the corrected output and L + log Z: it then computes exactly
what the plain part of the weights contributes, and the rest is again a correction along lines.

A negative scalar takes weight away after the kernel has added it up, which loses digits where nearly all of it lay on
one line: by a factor of at most exp(-w_row - w_col). `lines_fit` says whether this is small enough.

(Merging parts of a softmax by their log-sum-exp: FlashAttention, arXiv 2205.14135. The correction of plain attention
for a bias that lives on lines is this library's.)

Shape letters: B batch, H heads, h heads of a chunk, N tokens, R rows, C columns, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfa_adapters.bias import BiasFactors
from sfa_adapters.line_page import LineChunk, LinePage, line_groups, wide_dtype
from sfa_adapters.phi_tiles import key_order

__all__ = ["lines_attention", "lines_fit"]

# The largest -(w_row + w_col) by the dtype that is computed in: at worst about 8 bits are lost in float32.
LARGEST_LOSS = {torch.float64: 8.0, torch.float32: 5.5}


def lines_fit(query: Tensor, bias: BiasFactors) -> bool:
    """Whether `lines_attention` can compute this attention, and keeps enough digits.

    It can on a CPU, for a bias of the terms `row` and `col` on grids whose keys are all there, outside of
    `torch.compile`.

    Args:
        query: `[B, H, N, D]`.
        bias: The tables of phi.
    """
    if bias.lines is None or query.device.type != "cpu":
        return False
    if torch.compiler.is_compiling() or type(query) not in (Tensor, torch.nn.Parameter):  # fake, distributed, ...
        return False
    layout = bias.layout
    images = range(1 if layout.batch_size is None else layout.batch_size)
    if not all(key_order(layout, image).is_plain_grid for image in images):
        return False
    with torch.no_grad():
        loss = float(bias.lines.clamp(max=0.0).sum(0).neg().max())
    return loss <= LARGEST_LOSS[wide_dtype(query.dtype)]


def lines_attention(query: Tensor, key: Tensor, value: Tensor, bias: BiasFactors, scale: float | None = None) -> Tensor:
    """Attention with phi where `lines_fit` says yes; see the head of this file. Arguments as in `attend`."""
    assert bias.lines is not None
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    return _Lines.apply(query, key, value, bias.lines, bias, scale)  # pyright: ignore[reportReturnType]


class _Lines(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lines: Tensor, bias: BiasFactors, scale: float
    ) -> Tensor:
        outs, sums = [], []
        with torch.autocast("cpu", enabled=False):
            for images, order in line_groups(bias, len(query)):
                page = LinePage(order, lines, query.dtype)
                inputs = [states[images].to(page.dtype) for states in (query, key, value)]
                keys, values = (_take(states, order.index) for states in inputs[1:])
                out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    inputs[0], keys, values, 0.0, False, scale=scale
                )
                for chunk in page.chunks(*inputs):
                    _correct(page, chunk, out, log_sum, scale)
                outs.append(out.to(query.dtype))
                sums.append(log_sum)
        out, log_sum = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (outs, sums))
        ctx.save_for_backward(query, key, value, out, log_sum, lines)
        ctx.bias, ctx.scale = bias, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradient: Tensor = grad_outputs[0]
        query, key, value, out, log_sum, lines = ctx.saved_tensors
        scale = ctx.scale
        of_lines = torch.zeros_like(lines)
        totals: list[list[Tensor]] = [[], [], []]
        with torch.autocast("cpu", enabled=False):
            for images, order in line_groups(ctx.bias, len(query)):
                page = LinePage(order, lines, query.dtype)
                inputs = [states[images].to(page.dtype) for states in (query, key, value, gradient, out)]
                keys, values = (_take(states, order.index) for states in inputs[1:3])
                result = inputs.pop()
                sums = list(
                    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                        inputs[3], inputs[0], keys, values, result, log_sum[images], 0.0, False, scale=scale
                    )
                )
                if order.index is not None:  # of keys in their order: padding is not among them
                    sums[1:] = (
                        torch.zeros_like(states).index_copy_(2, order.index, part)
                        for states, part in zip(inputs[1:3], sums[1:], strict=True)
                    )
                middle = (inputs[3] * result).sum(-1, keepdim=True)
                for chunk in page.chunks(*inputs):
                    of_lines[:, chunk.heads] += _correct_backward(page, chunk, log_sum[images], middle, sums, scale).to(
                        of_lines
                    )
                for total, part in zip(totals, sums, strict=True):
                    total.append(part.to(query.dtype))
        return *(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in totals), of_lines, None, None


def _take(states: Tensor, index: Tensor | None) -> Tensor:
    return states if index is None else states[:, :, index]


def _exponentials(query: Tensor, key: Tensor, log_sum: Tensor, scale: float) -> Tensor:
    """exp(s - L) along lines, `[h, X, Y, Y]`, of queries and keys `[h, X, Y, D]` and L `[h, X, Y, 1]`."""
    products = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).unflatten(0, query.shape[:2])
    return products.mul_(scale).sub_(log_sum).exp_()


def _own(matrix: Tensor) -> Tensor:
    """Of each token with itself, `[h, X, Y]`."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """Products of `[h, X, Y, Z]` and `[h, X, Z, D]`."""
    return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def _per_head(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))


def _weighted(page: LinePage, chunk: LineChunk, log_sum: Tensor, scale: float, column: bool) -> Tensor:
    """What row, or column, adds to the weights of plain attention, before the division by Z: `[h, X, Y, Y]`."""
    states = chunk.by_column if column else chunk.by_row
    return _times_factor(_exponentials(states[0], states[1], log_sum, scale), page.factors[:, chunk.heads], column)


def _times_factor(part: Tensor, factors: Tensor, column: bool) -> Tensor:
    """Multiplies exponentials along lines, `[h, X, Y, Y]`, by a or b of each head, `[2, h]`, in place."""
    part.mul_(_per_head(factors[int(column)], part))
    if not column:  # a for the row, b for the column: a b is still missing where both meet
        own = _own(part)
        own.mul_(_per_head(1 + factors[1], own))
    return part


def _correct(page: LinePage, chunk: LineChunk, out: Tensor, log_sum: Tensor, scale: float) -> None:
    """Turns plain output and log-sum-exp of a chunk into those under phi, in place."""
    image, heads = chunk.image, chunk.heads
    of_page = page.placed(log_sum[image, heads].unsqueeze(-1))
    row = _weighted(page, chunk, of_page, scale, column=False)
    column = _weighted(page, chunk, of_page.transpose(1, 2), scale, column=True)
    total = (row.sum(-1, keepdim=True) + column.sum(-1, keepdim=True).transpose(1, 2)).add_(1)
    result = _times(row, chunk.by_row[2]).add_(_times(column, chunk.by_column[2]).transpose(1, 2))
    result.add_(page.placed(out[image, heads])).div_(total)
    page.write(out[image, heads], result)
    page.write(log_sum[image, heads].unsqueeze(-1), of_page + total.log())


def _correct_backward(
    page: LinePage, chunk: LineChunk, log_sum: Tensor, middle: Tensor, sums: list[Tensor], scale: float
) -> Tensor:
    """Adds what lines contribute to the gradients of q, k and v, and returns those of w_row and w_col, `[2, h]`.

    Args:
        page: The grid.
        chunk: With the gradient of the output as the fourth of its states.
        log_sum: L + log Z, `[B, H, N]`.
        middle: Sum over keys of weight times its gradient, `[B, H, N, 1]`.
        sums: Gradients of q, k and v, `[B, H, N, D]`; they grow.
        scale: Factor on q.k.
    """
    image, heads = chunk.image, chunk.heads
    totals = [torch.zeros_like(states) for states in chunk.by_row[:3]]
    of_page, centre = (page.placed(t) for t in (log_sum[image, heads].unsqueeze(-1), middle[image, heads]))
    both = page.weights[:, heads].prod(0)
    of_lines = []
    for number, states in enumerate((chunk.by_row, chunk.by_column)):
        query, key, value, above = states
        level, mean = (t.transpose(1, 2) if number else t for t in (of_page, centre))
        part = _exponentials(query, key, level, scale)
        change = _times(above, value.transpose(2, 3)).sub_(mean)  # gradient of the logits over the weight
        weight = _times_factor(part.clone(), page.factors[:, heads], column=bool(number))
        own = _own(part).mul(_own(change)).sum((1, 2))
        every = torch.einsum("hxyz,hxyz->h", part, change)
        of_lines.append(page.weights[number, heads] * (every - own) + both * own)
        change.mul_(weight)
        parts = (
            _times(change, key).mul_(scale),
            _times(change.transpose(2, 3), query).mul_(scale),
            _times(weight.transpose(2, 3), above),
        )
        for total, addend in zip(totals, parts, strict=True):
            total.add_(addend.transpose(1, 2) if number else addend)
    for total, addend in zip(sums, totals, strict=True):
        place = total[image, heads]
        page.write(place, page.placed(place) + addend)
    return torch.stack(of_lines)
