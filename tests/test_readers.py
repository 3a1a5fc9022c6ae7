"""Readers against the whole softmax of an attention call, computed slowly in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfa_adapters.attention_call import AttentionCall, row_blocks
from sfa_adapters.errors import ObservationError
from sfa_adapters.observe import _stream
from sfa_adapters.readers import GroupMass, KeyMass, MeanPerKey, Reader, RowEntropy, RowProbabilities, TopKeys

B, H, Q, K, D = 2, 4, 7, 9, 8


def random_call(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, kv_heads: int = H) -> AttentionCall:
    """A call with a mask of one kind; where masks hide, one row of image 1 sees nothing."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(B, H, Q, D, generator=generator).to(dtype)
    key = torch.randn(B, kv_heads, K, D, generator=generator).to(dtype)
    visible = torch.rand(B, 1, Q, K, generator=generator) < 0.7
    visible[..., 0] = True
    visible[1, 0, 2] = False
    options: dict[str, Any] = {"scale": 0.3}
    if kind == "bool":
        options["mask"] = visible
    elif kind == "infinite":
        options["mask"] = torch.randn(B, 1, Q, K, generator=generator).masked_fill(~visible, -math.inf).to(dtype)
    elif kind == "minimum":
        options["mask"] = torch.zeros(B, 1, Q, K, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    elif kind == "row":
        options["mask"] = torch.randn(1, H, 1, K, generator=generator).to(dtype)
    elif kind == "causal":
        options["is_causal"] = True
    elif kind == "scores":
        scores = query.float() @ key.float().repeat_interleave(H // kv_heads, 1).mT * 0.3
        return AttentionCall("layer", scores=scores.masked_fill(~visible, torch.finfo(torch.float32).min))
    return AttentionCall("layer", query=query, key=key, **options)


def reference(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Softmax over visible keys in fp64 `[B, H, Q, K]` (zero in rows that see none), and which keys are visible."""
    if call.scores is not None:
        logits, seen = call.scores.double(), call.scores > torch.finfo(torch.float32).min
    else:
        assert call.query is not None
        assert call.key is not None
        key = call.key.double().repeat_interleave(call.num_heads // call.key.shape[1], 1)
        logits = call.query.double() @ key.mT * call.scale
        seen = torch.ones_like(logits, dtype=torch.bool)
        if call.is_causal:
            seen = seen.tril()
        if call.mask is not None and call.mask.dtype == torch.bool:
            seen = seen & call.mask
        elif call.mask is not None:
            seen = seen & (call.mask > torch.finfo(call.mask.dtype).min)
            logits = logits + call.mask.double()
    seen = seen.expand(logits.shape)
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return weights, seen


def entropy_of(weights: Tensor) -> Tensor:
    return -torch.where(weights > 0, weights * weights.clamp(min=1e-300).log(), 0.0).sum(-1)


def read(reader: Reader, call: AttentionCall, block_bytes: int = 600) -> Tensor:
    """With blocks of a row or two."""
    _stream([reader], call, block_bytes)
    (result,) = reader.results["layer"]
    return result


KINDS = ["none", "bool", "infinite", "minimum", "row", "causal", "scores"]


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_equals_the_dense_statistic(kind: str, kv_heads: int, dtype: torch.dtype) -> None:
    call = random_call(kind, dtype, kv_heads=kv_heads)
    weights, seen = reference(call)
    blind = ~seen.any(-1)
    close(read(RowProbabilities(), call), weights)
    entropy = entropy_of(weights).masked_fill(blind, math.nan)
    close(read(RowEntropy(), call), entropy)
    close(read(RowEntropy(heads="mean"), call), entropy.mean(1, keepdim=True))
    close(read(RowEntropy(normalize=True), call), entropy / seen.sum(-1).clamp(min=2).log())

    groups = torch.tensor([[0, 0, 1, 1, -1, 2, 2, 0, 1], [1, 0, 0, -1, -1, 2, 1, 0, 2]])
    member = torch.nn.functional.one_hot(groups + 1, 4)[..., 1:].double()[:, None]
    close(read(KeyMass(groups), call), weights @ member)
    query_groups = torch.tensor([1, 1, 0, 0, -1, 1, 0])
    of_query = torch.nn.functional.one_hot(query_groups + 1, 3)[:, 1:].double()
    close(read(GroupMass(query_groups, groups), call), (of_query / of_query.sum(0)).T @ weights @ member)

    close(read(MeanPerKey(), call), weights.mean(2))
    chosen = torch.tensor([[True, False, True, False, False, True, True], [False] * 6 + [True]])
    close(
        read(MeanPerKey(queries=chosen), call),
        torch.stack([weights[b][:, chosen[b]].mean(1) for b in range(B)]),
    )
    values, places = weights.mean(2).mean(1, keepdim=True).topk(3)
    top = read(TopKeys(3, heads="mean"), call)
    assert torch.equal(top[:, :, 0].long(), places)
    close(top[:, :, 1], values)


@pytest.mark.parametrize("kind", ["none", "bool", "causal", "scores"])
def test_entropy_over_some_keys_is_that_of_the_renormalised_row(kind: str) -> None:
    call = random_call(kind)
    weights, seen = reference(call)
    keys = torch.zeros(K, dtype=torch.bool)
    keys[[1, 2, 5]] = True
    some = weights * keys
    mass = some.sum(-1, keepdim=True)
    wanted = entropy_of(some / mass).masked_fill(mass[..., 0] == 0, math.nan)
    close(read(RowEntropy(keys=keys), call), wanted)
    counts = (seen & keys).sum(-1).clamp(min=2)
    close(read(RowEntropy(keys=keys, normalize=True), call), wanted / counts.log())


def test_keys_of_no_mass_at_all_still_have_an_entropy() -> None:
    """The softmax over all keys rounds them to zero; the one over themselves does not."""
    logits = torch.tensor([300.0, 0.0, 0.0, 1.0]).expand(1, 1, 1, 4)
    entropy = read(RowEntropy(keys=torch.tensor([False, True, True, True])), AttentionCall("layer", scores=logits))
    close(entropy, entropy_of(torch.tensor([0.0, 0.0, 1.0]).double().softmax(0)).reshape(1, 1, 1))


@settings(deadline=None, max_examples=60)
@given(
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    block=st.integers(1, 3000),
    seed=st.integers(0, 10_000),
    size=st.floats(0, 200),
)
def test_blocks_of_any_size_give_sound_statistics(queries: int, keys: int, block: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 2, n, 4, generator=generator) * math.sqrt(size) for n in (queries, keys))
    call = AttentionCall("layer", query=query, key=key, scale=0.5)
    entropy = read(RowEntropy(), call, block)
    assert entropy.shape == (1, 2, queries)
    assert entropy.min() >= -1e-4 * (1 + size)
    assert entropy.max() <= math.log(keys) + 1e-4 * (1 + size)
    mass = read(KeyMass(torch.arange(keys) % 2), call, block)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2, queries))
    torch.testing.assert_close(read(MeanPerKey(), call, block).sum(-1), torch.ones(1, 2))


def test_chosen_queries_are_found_behind_a_cache() -> None:
    weights, _ = reference(random_call("none"))
    call = AttentionCall("layer", past=100, **{n: getattr(random_call("none"), n) for n in ("query", "key", "scale")})
    close(read(RowProbabilities(queries=[101, 104, 3]), call), weights[:, :, [1, 4]])
    close(read(RowProbabilities(queries="last"), call), weights[:, :, -1:])
    close(read(RowProbabilities(queries="generated"), call), weights)
    mask = torch.zeros(B, 105, dtype=torch.bool)
    mask[0, 102] = mask[1, 104] = True  # it ends before the queries do
    close(read(RowProbabilities(queries=mask), call), weights[:, :, [2, 4]])
    close(read(MeanPerKey(queries=mask), call), torch.stack((weights[0][:, 2], weights[1][:, 4])))
    unread = RowEntropy(queries=[5])
    _stream([unread], call, 600)
    assert unread.results == {}


@pytest.mark.parametrize("keys", [5, 300])
def test_of_keys_with_equal_attention_the_first_are_the_top_ones(keys: int) -> None:
    scores = torch.zeros(1, 1, 2, keys)
    scores[..., 3] = 1.0
    top = read(TopKeys(4), AttentionCall("layer", scores=scores))
    assert top[0, 0, 0].tolist() == [3.0, 0.0, 1.0, 2.0]


def test_logits_carry_gradients() -> None:
    call = random_call("causal", torch.float64, kv_heads=2)
    assert call.query is not None
    assert call.key is not None
    query, key = call.query.requires_grad_(), call.key.requires_grad_()
    parts = [rows.probabilities for rows in row_blocks(call, block_bytes=600)]
    assert len(parts) > 1
    weights = torch.randn(B, H, Q, K, dtype=torch.float64)
    (torch.cat(parts, 2) * weights).sum().backward()
    grads = query.grad, key.grad
    query.grad = key.grad = None
    (reference(call)[0] * weights).sum().backward()
    for mine, wanted in zip(grads, (query.grad, key.grad), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    call = random_call("none")
    assert call.query is not None
    call.query[0, 1, 3, 2] = value
    with pytest.raises(ObservationError, match=r"layer: attention logits are NaN or infinite.*bfloat16"):
        read(RowEntropy(), call)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ObservationError, match="heads='sum'"):
        RowEntropy(heads="sum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ObservationError, match="queries='first'"):
        RowEntropy(queries="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ObservationError, match="must be integers"):
        KeyMass(torch.zeros(4))
    with pytest.raises(ObservationError, match="is -1"):
        GroupMass(torch.full((3,), -1), torch.zeros(4, dtype=torch.long))
