"""`expected_speedup`: the speedup that arithmetic predicts for pruned heads; nothing is timed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

from sfa_adapters.compat import cache_of_output
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.expected import decode_bytes, expected_speedup, flops_of
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.recipes import llava_1_5_7b, qwen2_5_vl_7b
from tests.support.pruning import (
    BY_NAME,
    FAMILIES,
    FIRST,
    host,
    language_model,
    size,
    text_inputs,
    text_plan,
    with_lora,
)

PLAIN = text_inputs(padded=False)


def uniform(layers: int, heads: int, groups: int, gone: tuple[int, ...]) -> HeadPlan:
    names = [f"model.language_model.layers.{i}.self_attn" for i in range(layers)]
    return HeadPlan(dict.fromkeys(names, gone), dict.fromkeys(names, heads), dict.fromkeys(names, groups))


def test_expected_of_llava_1_5_7b() -> None:
    """30% of the heads are worth 1.11x.

    One layer: q, k, v, o 4 * 4096^2 = 67.1 M, MLP 3 * 4096 * 11008 = 135.3 M, norms 8192; 32 layers 6,476.3 M, the last
    norm 4096 and lm_head 32064 * 4096 = 131.3 M: 6,607.6 M. 10 of 32 heads are 10/32 of q, k, v, o: 21.0 M a layer,
    671.1 M in all. 6607.6 / 5936.5 = 1.113.
    """
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(llava_1_5_7b.architecture())
    model.to(torch.bfloat16)
    plan = uniform(32, 32, 32, tuple(range(10)))
    assert decode_bytes(model) == 2 * 6_607_605_760
    assert decode_bytes(model, 0, plan) == 2 * (6_607_605_760 - 671_088_640)
    assert round(expected_speedup(model, plan), 2) == 1.11
    # The cache falls by 10/32 as a whole: 4096 tokens hold 2 * 32 * 4096 numbers each, 1,073.7 M.
    # (6607.6 + 1073.7) / (5936.5 + 738.2) = 1.151
    assert round(expected_speedup(model, plan, 4096), 2) == 1.15


def test_expected_of_qwen2_5_vl_7b() -> None:
    """30% of the heads are worth 1.03x: 8 of 28 go, two of each of the 4 groups, so keys and values stay.

    One layer: q and o 2 * 3584^2 = 25.7 M, k and v 2 * 3584 * 512 = 3.7 M, biases of q, k, v 4608, MLP
    3 * 3584 * 18944 = 203.7 M, norms 7168; 28 layers 6,525.6 M, the last norm 3584, lm_head 152064 * 3584 = 545.0 M:
    7,070.6 M. 8/28 of q, o and the bias of q are 7.3 M a layer, 205.5 M in all. 7070.6 / 6865.1 = 1.030.
    """
    with torch.device("meta"):
        model: Any = Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_7b.architecture())
    model.to(torch.bfloat16)
    plan = uniform(28, 28, 4, (0, 1, 7, 8, 14, 15, 21, 22))
    assert decode_bytes(model) == 2 * 7_070_619_136
    assert decode_bytes(model, 0, plan) == 2 * (7_070_619_136 - 205_549_568)
    assert round(expected_speedup(model, plan), 2) == 1.03
    # The cache stays, and makes the gain smaller: 4 * 2 * 128 * 28 numbers per token.
    assert decode_bytes(model, 1000, plan) - decode_bytes(model, 0, plan) == 2 * 1000 * 28 * 1024


@pytest.mark.parametrize("length", [0, 50])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_says_what_pruning_does(family: str, kv: int, lora: bool, length: int) -> None:
    base = language_model(family, kv, attention_bias=True) if family == "llama" else language_model(family, kv)
    model = with_lora(base) if lora else base
    plan = text_plan(base, kv)
    before, after = decode_bytes(model, length), decode_bytes(model, length, plan)
    assert expected_speedup(model, plan, length) == before / after
    prune_heads(model, plan)
    assert decode_bytes(model, length) == after < before


def test_decoding_reads_the_cache_and_not_the_embeddings_unless_tied() -> None:
    model = language_model(kv=2)
    assert decode_bytes(model) == size(model) - 64 * 32 * 4
    cache = cache_of_output(model(**PLAIN, use_cache=True))
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert decode_bytes(model, 18) - decode_bytes(model) == held
    tied = language_model("qwen3", tie_word_embeddings=True)
    assert decode_bytes(tied) == size(tied)
    whole_host, _ = host("llava")
    language = size(whole_host.model.language_model) + size(whole_host.lm_head)
    assert decode_bytes(whole_host) == language - 64 * 32 * 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_are_those_counted_by_hand(attention: str) -> None:
    """The first token of 2 rows of 9: a product of [m, k] and [k, n] is 2mkn operations; attention counts on a CPU."""
    model = language_model(kv=2)
    model.set_attn_implementation(attention)
    tokens, heads = 18, 4
    products = 2 * tokens * 32 * (32 + 16 + 16 + 32) + 3 * 2 * tokens * 32 * 64
    scores = 2 * (2 * 2 * heads * 9 * 9 * 8)
    head = 2 * 2 * 32 * 64  # logits of the last token only
    rotary = 2 * 2 * 4 * 9  # the oldest transformers takes positions times frequencies as a product of matrices
    assert flops_of(model, PLAIN) - (2 * (products + scores) + head) in (0, rotary)
    tower, inputs = BY_NAME["clip"].fresh()
    assert flops_of(tower, inputs) > 0


@pytest.mark.parametrize(
    ("gone", "groups", "path", "words"),
    [
        ((0,), 4, "model.layers.9.self_attn", "no module"),
        ((0, 1), 2, FIRST, "made for another model"),
        ((0,), 4, "model.layers.0.mlp", "made for another model"),
    ],
)
def test_a_plan_that_does_not_fit(gone: tuple[int, ...], groups: int, path: str, words: str) -> None:
    with pytest.raises(InjectionError, match=words):
        expected_speedup(language_model(), HeadPlan({path: gone}, {path: 4}, {path: groups}))


def test_what_decodes_nothing() -> None:
    for name in ("clip", "timm_cls"):
        with pytest.raises(InjectionError, match="decodes no tokens"):
            decode_bytes(BY_NAME[name].build())
    with pytest.raises(InjectionError, match="decodes no tokens"):
        decode_bytes(language_model().model)
    with pytest.raises(RecipeError, match="length=-1"):
        decode_bytes(language_model(), -1)
    assert math.isfinite(decode_bytes(language_model()))
