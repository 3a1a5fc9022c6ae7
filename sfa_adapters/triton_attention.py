"""`triton_attention`: flash attention for CUDA with phi computed in the kernel, and its form for packed sequences.

What other backends pay for phi on a GPU, extra channels or a matrix, is not there: the kernels take the places of
tokens and the scalars or tables of each head, see `sfa_adapters.triton_kernels`. Memory is linear in the tokens, and a
backward pass gives the same bits every time.

It has not run on a GPU yet, and `auto` takes it only where it was measured to be fastest.

Shape letters: B batch, H heads, N tokens, T tokens of a packed sequence, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sfa_adapters.bias import BiasFactors
from sfa_adapters.errors import InjectionError, LayoutError
from sfa_adapters.triton_launch import PhiInputs, has_triton, interpreting, launch_backward, launch_forward
from sfa_adapters.triton_places import Places, kinds_lie_apart, places_of_batch, places_of_segments

__all__ = ["triton_attention", "triton_misfit", "triton_varlen_attention"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 256


def triton_misfit(query: Tensor) -> str | None:
    """Why the kernels cannot compute attention of this query, in words, or None where they can.

    They can on a CUDA device of compute capability 8.0 or more with triton installed, and on any device under triton's
    interpreter (TRITON_INTERPRET=1); in fp32, fp16 and bf16, outside of `torch.compile`.

    Args:
        query: `[B, H, N, D]`.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces the folded backend instead"
    if type(query) not in (Tensor, torch.nn.Parameter):
        return f"a {type(query).__name__} is no plain tensor"  # fake, distributed, ...
    if query.dtype not in DTYPES:
        return f"{query.dtype} is none of fp32, fp16 and bf16"
    if query.shape[-1] > WIDEST or not query.numel():
        return f"its shape is {list(query.shape)}; heads may be up to {WIDEST} wide, and there must be tokens"
    if not has_triton():
        return "triton is not installed"
    if interpreting():
        return None
    if query.device.type != "cuda":
        return f"it is on the {query.device.type}, and the kernels run on CUDA"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or more"
    return None


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: BiasFactors, scale: float | None = None
) -> Tensor:
    """Attention with phi where `triton_misfit` has nothing against it.

    Arguments as in `sfa_adapters.attention.attend`; a query of which all keys are padding gets zeros.
    """
    layout = bias.layout
    places = places_of_batch(layout, len(query))
    if bias.lines is not None and kinds_lie_apart(layout):
        return _apply(query, key, value, PhiInputs(places, bias.lines.unsqueeze(0), None, None, None), scale)
    values = bias.block_value
    if layout.batch_size is not None:  # [A, B, H, N] to [A, H, B N]
        values = values.transpose(1, 2).flatten(-2)
    phi = PhiInputs(places, None, bias.row_table.flatten(1), bias.column_table.flatten(1), values)
    return _apply(query, key, value, phi, scale)


def triton_varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    biases: Sequence[BiasFactors],
    scale: float | None = None,
) -> Tensor:
    """Attention inside each segment of a packed sequence, under a bias of its own, in one launch.

    Args:
        query: `[T, H, D]`.
        key: `[T, H, D]`.
        value: `[T, H, D]`.
        cu_seqlens: Where segments begin and end, ascending from 0 to T. On a GPU reading it waits for the device, so
            rather pass numbers.
        biases: One for each segment, with a layout of its tokens. Segments may share one.
        scale: Factor on q.k; 1 / sqrt(D) by default.

    Returns:
        `[T, H, D]`.

    Raises:
        InjectionError: The kernels cannot compute this, see `triton_misfit`.
        LayoutError: A bias is not for its segment: other tokens, heads, or as many adapters with blocks as another.
    """
    states = [t.transpose(0, 1).unsqueeze(0) for t in (query, key, value)]  # [1, H, T, D]
    reason = triton_misfit(query)
    if reason is not None:
        raise InjectionError(f"The backend triton cannot be used: {reason}.")
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    layouts = [bias.layout for bias in biases]
    ends = [0, *accumulate(layout.num_tokens for layout in layouts)]
    if bounds != ends or ends[-1] != len(query) or any(layout.batch_size is not None for layout in layouts):
        raise LayoutError(
            f"Segments {bounds} of {len(query)} tokens need a layout each, of one image; theirs end at {ends}."
        )
    forms = {(bias.num_heads, len(bias.block_value)) for bias in biases}
    if len(forms) > 1 or next(iter(forms))[0] != query.shape[1]:
        raise LayoutError(
            f"The attention has {query.shape[1]} heads; its biases have (heads, adapters with blocks) {sorted(forms)}."
        )
    return _apply(states[0], states[1], states[2], _packed_phi(biases), scale)[0].transpose(0, 1)


def _packed_phi(biases: Sequence[BiasFactors]) -> PhiInputs:
    """Tables of segments behind one another; a bias of several segments is there once."""
    numbers: dict[int, int] = {}
    groups = [numbers.setdefault(id(bias), len(numbers)) for bias in biases]
    each = list({id(bias): bias for bias in biases}.values())
    places = places_of_segments([bias.layout for bias in biases], groups)
    lines = [bias.lines for bias in each if bias.lines is not None and kinds_lie_apart(bias.layout)]
    if len(lines) == len(each):
        return PhiInputs(places, torch.stack(lines), None, None, None)
    rows, columns = (
        torch.cat([table.flatten(1) for table in tables], dim=-1)
        for tables in ([bias.row_table for bias in each], [bias.column_table for bias in each])
    )
    return PhiInputs(places, None, rows, columns, torch.cat([bias.block_value for bias in biases], dim=-1))


def _apply(query: Tensor, key: Tensor, value: Tensor, phi: PhiInputs, scale: float | None) -> Tensor:
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    tables = (phi.lines, phi.row_table, phi.column_table, phi.blocks)
    return _Triton.apply(query, key, value, *tables, phi.places, scale)  # pyright: ignore[reportReturnType]


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lines: Tensor | None, row_table: Tensor | None,
        column_table: Tensor | None, blocks: Tensor | None, places: Places, scale: float,
    ) -> Tensor:  # fmt: skip
        tables = (lines, row_table, column_table, blocks)
        with torch.autocast(query.device.type, enabled=False):
            states = [_laid_out(tensor, query.dtype) for tensor in (query, key, value)]
            phi = PhiInputs(places, *(_flat(table) for table in tables))
            out, level = launch_forward(states[0], states[1], states[2], phi, scale)
        ctx.save_for_backward(query, key, value, out, level, *tables)
        ctx.places, ctx.scale = places, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, level, *tables = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            states = [_laid_out(tensor, query.dtype) for tensor in (query, key, value)]
            phi = PhiInputs(ctx.places, *(_flat(table) for table in tables))
            above = _laid_out(grad_outputs[0], query.dtype)
            gradients = launch_backward(
                (states[0], states[1], states[2], out), level, above, phi, ctx.scale, any(ctx.needs_input_grad[4:6])
            )
        typed = [
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, (query, key, value, *tables), strict=True)
        ]
        return *typed, None, None


def _laid_out(states: Tensor, dtype: torch.dtype) -> Tensor:
    """In one dtype, with the channels of a token side by side."""
    states = states.to(dtype)
    return states if states.stride(-1) == 1 else states.contiguous()


def _flat(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.detach().float().contiguous()
