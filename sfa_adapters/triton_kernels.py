"""Triton kernels: flash attention with phi computed in the kernel, forward and backward.

No matrix over pairs of tokens ever exists. A program keeps one tile of queries (or of keys), runs over the other side,
and writes phi of a pair of tiles from the places of their tokens:

* `LINES`, the terms row and col on pages whose rows, and columns, do not overlap: two comparisons and two selections
  for a pair, and nothing is looked up. The gradients of w_row and w_col are two sums per tile.
* else two tables: an entry is loaded for a pair from `[U, U]` and from `[V, V]`, which stay in the L1 cache. One-hot
  products with `tl.dot` would do the same on tensor cores, but cost U + V channels of work per pair, which is what
  `folded` costs, and round the tables to the dtype of the states. In the backward pass that price is paid once, in a
  kernel of its own (`kind_kernel`): sums over keys of one kind have no other form without atomics.

Nothing is added up by atomics: every program writes its own sums, so two runs give the same bits.

Scores are fp32 in units of log2, because the hardware has 2^x. Products take the dtype of the states and add up in
fp32. A token without a place has row and column -1, padding -2; a key that is not seen gets -inf. (Online softmax, and
recomputation in the backward pass: FlashAttention, arXiv 2205.14135.)

This module imports triton, so it is only imported by `sfa_adapters.triton_launch`, once compiled and once, under a
second name, for triton's interpreter. Both look the names `total` and `largest` up here: the functions of triton itself
cannot be interpreted once they are there to be compiled.

Names: M and N are tokens of a tile, the first those that the program keeps; `WIDTH` the head width, `CHANNELS` the
power of two above it. Arguments of all kernels:

* `states`: a tensor, and its steps from image to image, head to head and token to token; the last step is 1.
* `phi`: rows and columns of all places, int32 `[P]`; segments, int32 `[S, RECORD]`; lines, fp32 `[G, 2, H]`; row and
  column tables, fp32 `[H, entries]`; block values, fp32 `[A, H, P]`.
* `sizes`: tokens of the sequence, P, tokens of all images, H, row entries, column entries.
"""

import triton
import triton.language as tl

# The kernels are written in triton's own language, which a type checker takes for Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false
# ruff: noqa: ANN001, ANN201, ANN202

total, largest = tl.sum, tl.max

# What a segment is (`sfa_adapters.triton_places`): image, first token in the sequence, first token among the places,
# tokens, tokens before which all keys lie, group; and for tables where they begin and their sides, of rows and columns.
RECORD = tl.constexpr(10)


@triton.jit
def _segment(phi, sizes):
    """The segment of a program, its tokens, the tokens before which all keys lie, and its first token among all."""
    record = phi[2] + tl.program_id(2) * RECORD
    first = tl.load(record).to(tl.int64) * sizes[0] + tl.load(record + 1)
    return record, tl.load(record + 3), tl.load(record + 4), first


@triton.jit
def _pointers(states, record, head, numbers, CHANNELS: tl.constexpr):
    begin = tl.load(record).to(tl.int64) * states[1] + head.to(tl.int64) * states[2]
    tokens = (tl.load(record + 1) + numbers).to(tl.int64) * states[3]
    return states[0] + begin + tokens[:, None] + tl.arange(0, CHANNELS)[None, :]


@triton.jit
def _read(
    states, record, head, numbers, stop, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """States of some tokens, `[numbers, CHANNELS]`, zeros where there is none."""
    inside = (numbers < stop)[:, None] & (tl.arange(0, CHANNELS) < WIDTH)[None, :]
    tile = tl.load(_pointers(states, record, head, numbers, CHANNELS), mask=inside, other=0.0)
    if WIDEN:  # the interpreter has no products in bf16
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _write(states, record, head, numbers, stop, tile, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    inside = (numbers < stop)[:, None] & (tl.arange(0, CHANNELS) < WIDTH)[None, :]
    pointers = _pointers(states, record, head, numbers, CHANNELS)
    tl.store(pointers, tile.to(states[0].dtype.element_ty), mask=inside)


@triton.jit
def _places(phi, record, numbers, stop, NOWHERE: tl.constexpr):
    """Rows and columns of some tokens, their numbers among the places, whether they exist, and whether keys are seen.

    Off the page rows and columns are `NOWHERE`, which must differ for queries and keys: they are in no common row.
    """
    at, inside = tl.load(record + 2) + numbers, numbers < stop
    rows = tl.load(phi[0] + at, mask=inside, other=-2)
    columns = tl.load(phi[1] + at, mask=inside, other=-2)
    return tl.where(rows < 0, NOWHERE, rows), tl.where(columns < 0, NOWHERE, columns), at, inside, rows != -2


@triton.jit
def _down(side):
    return side[0][:, None], side[1][:, None], side[2][:, None], side[3][:, None], side[4][:, None]


@triton.jit
def _along(side):
    return side[0][None, :], side[1][None, :], side[2][None, :], side[3][None, :], side[4][None, :]


@triton.jit
def _scores(
    product, queries, keys, phi, sizes, record, head, scale, LINES: tl.constexpr, ADAPTERS: tl.constexpr
):  # fmt: skip
    """Scores of a pair of tiles in units of log2; one side comes as `[M, 1]`, the other as `[1, N]`."""
    if LINES:
        scalars = phi[3] + tl.load(record + 5) * 2 * sizes[3] + head
        of_row = tl.load(scalars) * 1.4426950408889634
        of_column = tl.load(scalars + sizes[3]) * 1.4426950408889634
        scores = product * scale + tl.where(queries[0] == keys[0], of_row, 0.0)
        scores += tl.where(queries[1] == keys[1], of_column, 0.0)
    else:
        placed = (queries[0] >= 0) & (keys[0] >= 0)
        rows = phi[4] + head.to(tl.int64) * sizes[4] + tl.load(record + 6)
        columns = phi[5] + head.to(tl.int64) * sizes[5] + tl.load(record + 8)
        bias = tl.load(rows + queries[0] * tl.load(record + 7) + keys[0], mask=placed, other=0.0)
        bias += tl.load(columns + queries[1] * tl.load(record + 9) + keys[1], mask=placed, other=0.0)
        for adapter in tl.static_range(ADAPTERS):
            values = phi[6] + (adapter * sizes[3] + head).to(tl.int64) * sizes[1]
            of_queries = tl.load(values + queries[2], mask=queries[3], other=0.0)
            bias += of_queries * tl.load(values + keys[2], mask=keys[3], other=0.0)
        scores = product * scale + bias * 1.4426950408889634
    return tl.where(keys[4], scores, float("-inf"))


@triton.jit
def _block_shares(change, side, phi, sizes, head, ADAPTERS: tl.constexpr, SLOTS: tl.constexpr):
    """What a pair of tiles adds to the gradients of block values of the tokens `[M]`, `[M, SLOTS]`; `side` is N."""
    slot = tl.arange(0, SLOTS)[None, :]
    shares = tl.full([change.shape[0], SLOTS], 0.0, tl.float32)
    for adapter in tl.static_range(ADAPTERS):
        values = phi[6] + (adapter * sizes[3] + head).to(tl.int64) * sizes[1]
        share = total(change * tl.load(values + side[2], mask=side[3], other=0.0)[None, :], 1)
        shares += tl.where(slot == adapter, share[:, None], 0.0)
    return shares


@triton.jit
def _write_blocks(sums, shares, number, inside, sizes, ADAPTERS: tl.constexpr, SLOTS: tl.constexpr):
    slot = tl.arange(0, SLOTS)[None, :]
    pointers = sums + slot.to(tl.int64) * sizes[3] * sizes[2] + number[:, None]
    tl.store(pointers, shares, mask=inside[:, None] & (slot < ADAPTERS))


@triton.jit
def forward_kernel(
    query, key, value, out, level, phi, sizes, scale,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LINES: tl.constexpr,
    ADAPTERS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of a tile of queries, and `level`, their log-sum-exp in units of log2, `[H, all tokens]`."""
    head = tl.program_id(1)
    record, length, key_stop, first = _segment(phi, sizes)
    if tl.program_id(0) * M >= length:
        return
    here = tl.program_id(0) * M + tl.arange(0, M)
    kept = _read(query, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    queries = _down(_places(phi, record, here, length, -1))
    highest = tl.full([M], float("-inf"), tl.float32)
    weight = tl.full([M], 0.0, tl.float32)
    result = tl.full([M, CHANNELS], 0.0, tl.float32)
    for start in range(0, key_stop, N):
        there = start + tl.arange(0, N)
        other = _read(key, record, head, there, key_stop, WIDTH, CHANNELS, WIDEN)
        keys = _along(_places(phi, record, there, key_stop, -3))
        product = tl.dot(kept, tl.trans(other), input_precision=PRECISION)
        scores = _scores(product, queries, keys, phi, sizes, record, head, scale, LINES, ADAPTERS)
        higher = tl.maximum(highest, largest(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet: -inf minus -inf is NaN
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(highest - safe)
        weight = weight * shrink + total(weights, 1)
        values = _read(value, record, head, there, key_stop, WIDTH, CHANNELS, WIDEN)
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None], input_precision=PRECISION)
        highest = higher
    blind = weight == 0.0  # a query that sees no key: zeros, and a level that makes all of its weights zero again
    weight = tl.where(blind, 1.0, weight)
    _write(out, record, head, here, length, result / weight[:, None], WIDTH, CHANNELS)
    levels = tl.where(blind, float("inf"), highest + tl.log2(weight))
    tl.store(level + head.to(tl.int64) * sizes[2] + first + here, levels, mask=here < length)


@triton.jit
def query_kernel(
    query, key, value, above, out, of_query, level, middle, line_sums, block_sums, phi, sizes, scale, factor,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LINES: tl.constexpr,
    ADAPTERS: tl.constexpr, SLOTS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries, and what it adds to those of w_row and w_col, or of its block values.

    It also writes `middle`, for each query the sum over keys of weight times its gradient, `[H, all tokens]`, which the
    other kernels of the backward pass read. `line_sums` is `[S, tiles, 2, H]`, `block_sums` `[A, H, all tokens]`.
    """
    head = tl.program_id(1)
    record, length, key_stop, first = _segment(phi, sizes)
    if tl.program_id(0) * M >= length:
        return
    here = tl.program_id(0) * M + tl.arange(0, M)
    number = head.to(tl.int64) * sizes[2] + first + here
    kept = _read(query, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    upper = _read(above, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    result = _read(out, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    mean = total(upper.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(middle + number, mean, mask=here < length)
    levels = tl.load(level + number, mask=here < length, other=float("inf"))
    queries = _down(_places(phi, record, here, length, -1))
    gradient = tl.full([M, CHANNELS], 0.0, tl.float32)
    of_row, of_column = tl.full([M], 0.0, tl.float32), tl.full([M], 0.0, tl.float32)
    shares = tl.full([M, SLOTS], 0.0, tl.float32)
    for start in range(0, key_stop, N):
        there = start + tl.arange(0, N)
        other = _read(key, record, head, there, key_stop, WIDTH, CHANNELS, WIDEN)
        side = _places(phi, record, there, key_stop, -3)
        keys = _along(side)
        product = tl.dot(kept, tl.trans(other), input_precision=PRECISION)
        scores = _scores(product, queries, keys, phi, sizes, record, head, scale, LINES, ADAPTERS)
        values = _read(value, record, head, there, key_stop, WIDTH, CHANNELS, WIDEN)
        change = tl.dot(upper, tl.trans(values), input_precision=PRECISION)
        change = tl.exp2(scores - levels[:, None]) * (change - mean[:, None])  # gradient of the logits
        gradient = tl.dot(change.to(other.dtype), other, gradient, input_precision=PRECISION)
        if LINES:
            of_row += total(tl.where(queries[0] == keys[0], change, 0.0), 1)
            of_column += total(tl.where(queries[1] == keys[1], change, 0.0), 1)
        if ADAPTERS > 0:
            shares += _block_shares(change, side, phi, sizes, head, ADAPTERS, SLOTS)
    _write(of_query, record, head, here, length, gradient * factor, WIDTH, CHANNELS)
    if LINES:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        sums = line_sums + tile.to(tl.int64) * 2 * sizes[3] + head
        tl.store(sums, total(of_row, 0))
        tl.store(sums + sizes[3], total(of_column, 0))
    if ADAPTERS > 0:
        _write_blocks(block_sums, shares, number, here < length, sizes, ADAPTERS, SLOTS)


@triton.jit
def key_kernel(
    query, key, value, above, of_key, of_value, level, middle, block_sums, phi, sizes, scale, factor,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, LINES: tl.constexpr,
    ADAPTERS: tl.constexpr, SLOTS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, and what queries add to those of the keys' block values."""
    head = tl.program_id(1)
    record, length, key_stop, first = _segment(phi, sizes)
    if tl.program_id(0) * M >= length:
        return
    here = tl.program_id(0) * M + tl.arange(0, M)
    number = head.to(tl.int64) * sizes[2] + first
    kept = _read(key, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    values = _read(value, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    keys = _down(_places(phi, record, here, key_stop, -3))
    key_sum = tl.full([M, CHANNELS], 0.0, tl.float32)
    value_sum = tl.full([M, CHANNELS], 0.0, tl.float32)
    shares = tl.full([M, SLOTS], 0.0, tl.float32)
    for start in range(0, length, N):
        there = start + tl.arange(0, N)
        inside = there < length
        other = _read(query, record, head, there, length, WIDTH, CHANNELS, WIDEN)
        side = _places(phi, record, there, length, -1)
        product = tl.dot(kept, tl.trans(other), input_precision=PRECISION)
        scores = _scores(product, _along(side), keys, phi, sizes, record, head, scale, LINES, ADAPTERS)
        levels = tl.load(level + number + there, mask=inside, other=float("inf"))
        weights = tl.exp2(scores - levels[None, :])
        upper = _read(above, record, head, there, length, WIDTH, CHANNELS, WIDEN)
        value_sum = tl.dot(weights.to(upper.dtype), upper, value_sum, input_precision=PRECISION)
        mean = tl.load(middle + number + there, mask=inside, other=0.0)
        change = weights * (tl.dot(values, tl.trans(upper), input_precision=PRECISION) - mean[None, :])
        key_sum = tl.dot(change.to(other.dtype), other, key_sum, input_precision=PRECISION)
        if ADAPTERS > 0:
            shares += _block_shares(change, side, phi, sizes, head, ADAPTERS, SLOTS)
    _write(of_key, record, head, here, length, key_sum * factor, WIDTH, CHANNELS)
    _write(of_value, record, head, here, length, value_sum, WIDTH, CHANNELS)
    if ADAPTERS > 0:
        _write_blocks(block_sums, shares, number + here, here < length, sizes, ADAPTERS, SLOTS)


@triton.jit
def kind_kernel(
    query, key, value, above, level, middle, kind_sums, phi, sizes, scale, first_head, kinds, first_kind,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ADAPTERS: tl.constexpr, KINDS: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For each query the sums of the gradient of its logits over the keys of each row kind, and of each column kind.

    `kind_sums` is `[all tokens, heads of the launch, 2, kinds]`; a launch writes `KINDS` of the last.
    """
    head = first_head + tl.program_id(1)
    record, length, key_stop, first = _segment(phi, sizes)
    if tl.program_id(0) * M >= length:
        return
    here = tl.program_id(0) * M + tl.arange(0, M)
    number = head.to(tl.int64) * sizes[2] + first + here
    kind = first_kind + tl.arange(0, KINDS)
    kept = _read(query, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    upper = _read(above, record, head, here, length, WIDTH, CHANNELS, WIDEN)
    mean = tl.load(middle + number, mask=here < length, other=0.0)
    levels = tl.load(level + number, mask=here < length, other=float("inf"))
    queries = _down(_places(phi, record, here, length, -1))
    of_rows = tl.full([M, KINDS], 0.0, tl.float32)
    of_columns = tl.full([M, KINDS], 0.0, tl.float32)
    for start in range(0, key_stop, N):
        there = start + tl.arange(0, N)
        other = _read(key, record, head, there, key_stop, WIDTH, CHANNELS, WIDEN)
        side = _places(phi, record, there, key_stop, -3)
        product = tl.dot(kept, tl.trans(other), input_precision=PRECISION)
        scores = _scores(product, queries, _along(side), phi, sizes, record, head, scale, False, ADAPTERS)
        values = _read(value, record, head, there, key_stop, WIDTH, CHANNELS, WIDEN)
        change = tl.dot(upper, tl.trans(values), input_precision=PRECISION)
        change = (tl.exp2(scores - levels[:, None]) * (change - mean[:, None])).to(other.dtype)
        rows = (side[0][:, None] == kind[None, :]).to(other.dtype)
        columns = (side[1][:, None] == kind[None, :]).to(other.dtype)
        of_rows = tl.dot(change, rows, of_rows, input_precision=PRECISION)
        of_columns = tl.dot(change, columns, of_columns, input_precision=PRECISION)
    place = (first + here).to(tl.int64)[:, None] * tl.num_programs(1) + tl.program_id(1)
    pointers = kind_sums + place * 2 * kinds + kind[None, :]
    tl.store(pointers, of_rows, mask=(here < length)[:, None])
    tl.store(pointers + kinds, of_columns, mask=(here < length)[:, None])
