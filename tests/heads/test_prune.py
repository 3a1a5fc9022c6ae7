"""Pruned heads against heads whose output is zero, in real classes of transformers and timm."""

from __future__ import annotations

import inspect
from typing import Any, cast

import pytest
import torch
from timm.layers.attention import Attention

from sfa_adapters.compat import cache_of_output
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.observe import attention_modules
from tests.support.compare import assert_close, difference, injected, read
from tests.support.hosts import HOSTS, logits_of
from tests.support.pruning import (
    BY_NAME,
    FAMILIES,
    TOWERS,
    gated,
    greedy,
    language_model,
    plan_for,
    text_inputs,
    text_plan,
    tower_plan,
)
from tests.support.towers import TowerCase


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kv", [4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_language_model_is_the_zero_gated_one(family: str, kv: int, attention: str) -> None:
    model = language_model(family, kv)
    model.set_attn_implementation(attention)
    plan, before = text_plan(model, kv), logits_of(model, text_inputs())
    with gated(model, plan):
        expected = logits_of(model, text_inputs())
        tokens = {cache: greedy(model, cache) for cache in ("dynamic", "static")}
    assert difference(expected, before) > 0.05, "the pruned heads must matter"
    assert prune_heads(model, plan) is model
    assert_close(logits_of(model, text_inputs()), expected, 1e-5)
    for cache, answer in tokens.items():
        assert torch.equal(greedy(model, cache), answer), cache


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_weights_and_cache_fall_by_what_the_plan_says(kv: int) -> None:
    model = language_model("qwen2", kv)
    plan = text_plan(model, kv)
    count = sum(p.numel() for p in model.parameters())
    prune_heads(model, plan)
    lost, cache = 0, cache_of_output(model(**text_inputs(), use_cache=True))
    for number, path in enumerate(plan.removed):
        left, groups = len(plan.kept(path)), len(plan.kept_kv(path))
        attention = model.get_submodule(path)
        assert attention.q_proj.weight.shape == (8 * left, 32)
        assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (8 * groups, 32)
        assert attention.o_proj.weight.shape == (32, 8 * left)
        assert attention.o_proj.in_features == attention.q_proj.out_features == 8 * left
        assert attention.num_key_value_groups == left // groups
        assert cache.layers[number].keys.shape == cache.layers[number].values.shape == (2, groups, 9, 8)
        lost += (4 - left) * 8 * (32 + 1 + 32) + (kv - groups) * 8 * 2 * (32 + 1)  # qkv have a bias, o has none
    assert count - sum(p.numel() for p in model.parameters()) == lost
    assert model.config.num_attention_heads == 4


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_heads_of_tower_and_language_model_of_a_host_go_together(name: str) -> None:
    case = next(host for host in HOSTS if host.name == name)
    model, inputs = case.build(), case.inputs()
    vision, language = list(attention_modules(model, "vision")), list(attention_modules(model, "language"))
    gone = {vision[0]: (0,), vision[1]: (1, 2, 3), language[0]: (0, 1), language[1]: (1, 2)}
    plan = plan_for(model, gone)
    with gated(model, plan):
        expected, tokens = logits_of(model, inputs), greedy(model, "dynamic", inputs)
    prune_heads(model, plan)
    assert_close(logits_of(model, inputs), expected, 1e-5)
    assert torch.equal(greedy(model, "dynamic", inputs), tokens)
    for path in language:  # nothing of these classes counts on, but people print it
        attention: Any = model.get_submodule(path)
        assert attention.num_key_value_groups == len(plan.kept(path)) // len(plan.kept_kv(path))
        assert getattr(attention, "num_heads", 2) == len(plan.kept(path))
        assert getattr(attention, "num_key_value_heads", len(plan.kept_kv(path))) == len(plan.kept_kv(path))


@pytest.mark.parametrize("with_sfa", [False, True], ids=["plain", "sfa"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_pruned_tower_is_the_zero_gated_one(name: str, with_sfa: bool) -> None:
    case = BY_NAME[name]
    model, inputs = injected(case) if with_sfa else case.fresh()
    plan, before = tower_plan(model), read(case, model, inputs)
    with gated(model, plan):
        expected = read(case, model, inputs)
    assert difference(expected, before) > 0.05
    prune_heads(model, plan)
    assert_close(read(case, model, inputs), expected, 1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip", "internvit", "timm_cls"])
def test_a_pruned_tower_in_eager_attention(name: str) -> None:
    case: TowerCase = BY_NAME[name]
    model, inputs = case.fresh()
    if case.library == "timm":
        for module in attention_modules(model, "vision").values():
            module.fused_attn = False  # pyright: ignore[reportArgumentType]
    else:
        model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    plan = tower_plan(model)
    with gated(model, plan):
        expected = read(case, model, inputs)
    prune_heads(model, plan)
    assert_close(read(case, model, inputs), expected, 1e-5)


@pytest.mark.skipif(
    "gated" not in inspect.signature(Attention).parameters, reason="this timm has no gate in its attention"
)
def test_a_gate_of_every_channel_goes_with_its_head() -> None:
    case = BY_NAME["timm_cls"]
    model, inputs = case.fresh()
    torch.manual_seed(1)
    for block in cast(Any, model).blocks:
        block.attn = Attention(32, 4, qkv_bias=True, gated=True)
    plan = tower_plan(model)
    with gated(model, plan):
        expected = read(case, model, inputs)
    prune_heads(model, plan)
    assert_close(read(case, model, inputs), expected, 1e-5)


def test_gradients_are_those_of_the_gated_model() -> None:
    model = language_model(kv=2)
    plan, inputs = text_plan(model, 2), text_inputs()
    with gated(model, plan):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad[8:24].clone()  # heads 1 and 2 stay
    prune_heads(model, plan)
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, expected, 1e-5)
