"""Launches the triton kernels: which tiles, which buffers, and the sums over what programs wrote.

Memory is linear in the tokens. Beyond the gradients themselves a backward pass needs two fp32 numbers per token and
head, two for each adapter with blocks, and for tables that learn twice the largest number of kinds, for as many heads
at a time as fit into `KIND_BYTES`.

The interpreter (TRITON_INTERPRET=1) runs the same kernels on numpy arrays, tile by tile: slow, for tests without a GPU.
Triton reads that variable where a kernel is defined, so there are two copies of the module of kernels, and a process
may use both.

Shape letters: B batch, H heads, N tokens of a row, D head width, P places, T tokens of all images, S segments, A active
adapters with blocks, G pairs of tables.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfa_adapters.triton_places import Places

__all__ = ["PhiInputs", "Tile", "has_triton", "interpreting", "launch_backward", "launch_forward", "tile_of"]

KERNELS = "sfa_adapters.triton_kernels"
# Of the sums over kinds that exist at a time; the reduction copies them once.
KIND_BYTES = 2**28
# Kinds of an axis in one launch: their accumulators, two of [tile, kinds], must fit into the registers.
MOST_KINDS = 128
# Under the interpreter: small, so that small inputs have several of them, and not square, so that a mix-up shows.
INTERPRETED_TILE = (32, 16)


@dataclass(frozen=True, eq=False)
class PhiInputs:
    """What phi is computed from: either `lines`, or both tables and the block values.

    Attributes:
        places: Where the tokens lie.
        lines: w_row and w_col of each group, fp32, `[G, 2, H]`, or None.
        row_table: Entries of all row tables behind one another, fp32, `[H, entries]`, or None.
        column_table: As `row_table`, of columns.
        blocks: Block value of each place, fp32, `[A, H, P]`, or None; A may be 0.
    """

    places: Places
    lines: Tensor | None
    row_table: Tensor | None
    column_table: Tensor | None
    blocks: Tensor | None

    @property
    def adapters(self) -> int:
        """A."""
        return 0 if self.blocks is None else len(self.blocks)


class Tile(NamedTuple):
    """Tokens that a program keeps, tokens of a step on the other side, and how many warps and stages it has."""

    kept: int
    step: int
    warps: int
    stages: int


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether triton interprets kernels (TRITON_INTERPRET=1), on any device."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _kernels(interpreted: bool) -> Any:
    """The module of kernels, or its copy for the interpreter; `interpreted` is what triton is set to now."""
    if not interpreted:
        return importlib.import_module(KERNELS)
    import triton.language as tl

    # A function of triton that was imported to be compiled cannot be interpreted, but what it stands on can.
    sum_of, larger_of = tl.standard._sum_combine, tl.standard._elementwise_max
    copy = _second_copy()
    for name, function in list(vars(copy).items()):
        if name.startswith("_") and hasattr(function, "rewrite"):
            # A call from a kernel would prepare the language again, and not clean up: most of the time, and a trace.
            copy.__dict__[name] = function.rewrite()
    copy.__dict__["range"] = lambda *ends: range(*(_number(end) for end in ends))
    copy.__dict__["total"] = lambda tile, axis: tl.reduce(tile, axis, sum_of)
    copy.__dict__["largest"] = lambda tile, axis: tl.reduce(tile, axis, larger_of)
    return copy


def _number(end: Any) -> int:
    """What triton 3.6 leaves to numpy, which from 2.4 on makes no number of an array with one."""
    return int(end.handle.data.item()) if hasattr(end, "handle") else end


def _second_copy() -> ModuleType:
    spec = importlib.util.find_spec(KERNELS)
    assert spec is not None
    assert spec.origin is not None
    second = importlib.util.spec_from_file_location(f"{KERNELS}_interpreted", spec.origin)
    assert second is not None
    assert second.loader is not None
    module = importlib.util.module_from_spec(second)
    second.loader.exec_module(module)
    return module


def tile_of(kernel: str, channels: int, dtype: torch.dtype, lines: bool) -> Tile:
    """Sizes for a kernel, chosen by what compiles for sm_80 and sm_90 with few spilled registers; not tuned on a GPU.

    Args:
        kernel: Its name.
        channels: Head width, a power of two.
        dtype: Of the states.
        lines: Whether phi is made of lines. Entries of tables take registers; in stages, also shared memory.
    """
    if dtype == torch.float32 and channels > 64:
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32 or channels > 128:
        return Tile(32, 32, 4, 1)
    warps = 4 if channels <= 64 else 8
    if not lines:
        return Tile(64, 32, 8 if kernel == "kind_kernel" else warps, 1)
    return Tile(128 if kernel == "forward_kernel" else 64, 64, warps, 2)


def _states(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor `[B, H, N, D]` as kernels take it."""
    return tensor, *tensor.stride()[:3]


def _like(states: Tensor) -> Tensor:
    """Room for `[B, H, N, D]` in the order in which towers go on: `[B, N, H, D]`."""
    return states.new_empty(states.transpose(1, 2).shape).transpose(1, 2)


class _Launch:
    """What all launches of one attention computation have in common."""

    def __init__(self, query: Tensor, phi: PhiInputs, scale: float) -> None:
        self.phi, self.query, self.scale = phi, query, scale
        batch, self.heads, tokens, self.width = query.shape
        self.all_tokens = batch * tokens
        places = phi.places
        # A kernel takes no None; what it does not read may be anything.
        spare = phi.row_table if phi.lines is None else phi.lines
        tables = [spare if t is None else t for t in (phi.lines, phi.row_table, phi.column_table, phi.blocks)]
        entries = [0 if t is None else t.shape[-1] for t in (phi.row_table, phi.column_table)]
        self.pointers = (places.row, places.column, places.segments, *tables)
        self.sizes = (tokens, len(places.row), self.all_tokens, self.heads, *entries)

    def tile(self, kernel: str) -> Tile:
        if interpreting():
            return Tile(*INTERPRETED_TILE, 1, 1)
        return tile_of(kernel, self.channels, self.query.dtype, self.phi.lines is not None)

    @property
    def channels(self) -> int:
        return max(16, _power_of_two(self.width))

    @property
    def slots(self) -> int:
        return _power_of_two(max(1, self.phi.adapters))

    def tiles(self, tile: Tile) -> int:
        return -(-self.phi.places.longest // tile.kept)

    def run(self, kernel: str, heads: int, *args: Any, **constants: Any) -> None:
        """Starts a program for each tile of the longest segment, head and segment."""
        interpreted, tile = interpreting(), self.tile(kernel)
        constants |= {
            "WIDTH": self.width,
            "CHANNELS": self.channels,
            "M": tile.kept,
            "N": tile.step,
            "ADAPTERS": self.phi.adapters,
            "WIDEN": interpreted and self.query.dtype == torch.bfloat16,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",  # of halves it is of no interest
        }
        grid = (self.tiles(tile), heads, len(self.phi.places.segments))
        with torch.cuda.device_of(self.query):
            getattr(_kernels(interpreted), kernel)[grid](
                *args, **constants, num_warps=tile.warps, num_stages=tile.stages
            )

    @property
    def log2_scale(self) -> float:
        """Factor on q.k for scores in units of log2."""
        return self.scale * 1.4426950408889634


def launch_forward(query: Tensor, key: Tensor, value: Tensor, phi: PhiInputs, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `[B, H, N, D]`, one dtype, last step 1.

    Returns:
        The output, `[B, H, N, D]`, and the log-sum-exp of each query in units of log2, fp32, `[H, T]`.
    """
    launch = _Launch(query, phi, scale)
    out, level = _like(query), query.new_empty(launch.heads, launch.all_tokens, dtype=torch.float32)
    states = [_states(tensor) for tensor in (query, key, value, out)]
    rest = (launch.pointers, launch.sizes, launch.log2_scale)
    launch.run("forward_kernel", launch.heads, *states, level, *rest, LINES=phi.lines is not None)
    return out, level


def launch_backward(
    states: tuple[Tensor, Tensor, Tensor, Tensor], level: Tensor, above: Tensor, phi: PhiInputs, scale: float,
    with_tables: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of q, k, v, and of lines, row table, column table and blocks, None where there is none.

    Args:
        states: Query, key, value and output, `[B, H, N, D]`.
        level: As `launch_forward` returned it.
        above: Gradient of the output, `[B, H, N, D]`, last step 1.
        phi: As in `launch_forward`.
        scale: As in `launch_forward`.
        with_tables: Whether a table needs a gradient; it is most of the work of the bias.
    """
    query, key, value, out = states
    launch, lines = _Launch(query, phi, scale), phi.lines is not None
    of_query, of_key, of_value = (_like(query) for _ in range(3))
    middle = torch.empty_like(level)
    first, second = (level.new_empty(phi.adapters, *level.shape) for _ in range(2))
    constants = {"LINES": lines, "SLOTS": launch.slots}
    rest = (launch.pointers, launch.sizes, launch.log2_scale)
    inputs = [_states(tensor) for tensor in (query, key, value, above)]
    tile = launch.tile("query_kernel")
    # Zeros, since segments that are shorter than the longest have fewer tiles.
    line_sums = level.new_zeros(len(phi.places.segments), launch.tiles(tile), 2, launch.heads)
    args = (*inputs, _states(out), _states(of_query), level, middle, line_sums, first, *rest, scale)
    launch.run("query_kernel", launch.heads, *args, **constants)
    args = (*inputs, _states(of_key), _states(of_value), level, middle, second, *rest, scale)
    launch.run("key_kernel", launch.heads, *args, **constants)
    of_tables = (None, None)
    if with_tables and not lines:
        of_tables = _table_gradients(launch, inputs, level, middle)
    of_lines = _line_gradients(line_sums.sum(1), phi.places) if lines else None
    of_blocks = None
    if phi.blocks is not None:
        of_blocks = (first + second).unflatten(-1, (-1, len(phi.places.row))).sum(-2)
    return of_query, of_key, of_value, of_lines, *of_tables, of_blocks


def _line_gradients(sums: Tensor, places: Places) -> Tensor:
    """Of each segment `[S, 2, H]` to each group `[G, 2, H]`."""
    if places.groups == 1:
        return sums.sum(0, keepdim=True)
    members: list[list[int]] = [[] for _ in range(places.groups)]
    for segment, run in enumerate(places.runs):
        members[run.group].append(segment)
    return torch.stack([sums[some].sum(0) for some in members])


def _table_gradients(
    launch: _Launch, inputs: list[tuple[Any, ...]], level: Tensor, middle: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the row and column tables, `[H, entries]` each."""
    phi, places = launch.phi, launch.phi.places
    assert phi.row_table is not None
    assert phi.column_table is not None
    some_kinds = max(16, min(MOST_KINDS, _power_of_two(places.most_kinds)))
    kinds = -(-places.most_kinds // some_kinds) * some_kinds
    totals = torch.zeros_like(phi.row_table), torch.zeros_like(phi.column_table)
    step = max(1, min(launch.heads, KIND_BYTES // (launch.all_tokens * 2 * kinds * 4)))
    for head in range(0, launch.heads, step):
        heads = min(step, launch.heads - head)
        sums = level.new_empty(launch.all_tokens, heads, 2, kinds)
        for kind in range(0, kinds, some_kinds):
            args = (level, middle, sums, launch.pointers, launch.sizes, launch.log2_scale, head, kinds, kind)
            launch.run("kind_kernel", heads, *inputs, *args, KINDS=some_kinds)
        _add_kind_sums(sums, places, tuple(total[head : head + heads] for total in totals))
    return totals


def _add_kind_sums(sums: Tensor, places: Places, totals: tuple[Tensor, ...]) -> None:
    """Adds sums of each query over keys of a kind, `[T, h, 2, kinds]`, to the tables `[h, entries]`."""
    sums = sums.unflatten(0, (-1, len(places.row))).sum(0)  # over the images that share places
    for run in places.runs:
        some = slice(*run.places)
        for axis, (kinds, (begin, side)) in enumerate(
            ((places.row, run.row_table), (places.column, run.column_table))
        ):  # fmt: skip
            index = kinds[some].long()
            one_hot = torch.nn.functional.one_hot(index.clamp(min=0), side).to(sums) * (index >= 0).unsqueeze(-1)
            part = torch.einsum("pu,phk->huk", one_hot, sums[some, :, axis, :side])
            totals[axis][:, begin : begin + side * side] += part.flatten(1)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
