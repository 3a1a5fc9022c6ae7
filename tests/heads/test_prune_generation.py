"""Answers of hosts with pruned heads: those of the gated host with every cache, search, padding and adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.choices import TERMS
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.pruned_files import load_pruned, save_pruned
from sfa_adapters.observe import attention_modules
from tests.support.compare import assert_close, difference
from tests.support.hosts import HOSTS, IMAGE, HostCase, logits_of
from tests.support.pruning import gated, language_model, plan_for, text_inputs, text_plan, with_lora

BY_NAME = {host.name: host for host in HOSTS}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "beam search": {"num_beams": 3},
}


def answers(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    fixed: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    return {name: model.generate(**inputs, **fixed, **way) for name, way in WAYS.items()}


def left_padded(case: HostCase) -> dict[str, Any]:
    inputs = case.inputs()
    inputs["input_ids"][1, :1], inputs["attention_mask"][1, :1] = 0, 0
    if case.name == "qwen2_5_vl":  # older releases of transformers count images by the token in front of them
        inputs["input_ids"][:, 1] = IMAGE + 2
    return inputs


def host_plan(host: Any) -> HeadPlan:
    vision, language = list(attention_modules(host, "vision")), list(attention_modules(host, "language"))
    return plan_for(host, {vision[0]: (0, 3), vision[1]: (1,), language[0]: (0, 3), language[1]: (2, 3)})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_host_with_lora_and_sfa_answers_as_the_gated_one(name: str, attention: str) -> None:
    case = BY_NAME[name]
    host: Any = case.build()
    host.set_attn_implementation(attention)
    model = with_lora(host, ("q_proj", "v_proj", "o_proj"))
    torch.manual_seed(3)
    inject_sfa(model, SFAConfig(init_std=0.7, terms=list(TERMS)))
    model.eval()
    plan, inputs = host_plan(host), left_padded(case)
    before = logits_of(model, inputs)
    with gated(host, plan):
        logits, expected = logits_of(model, inputs), answers(model, inputs)
    assert difference(logits, before) > 0.05, "the pruned heads must matter"
    prune_heads(model, plan)
    assert_close(logits_of(model, inputs), logits, 1e-5)
    for way, answer in answers(model, inputs).items():
        assert torch.equal(answer, expected[way]), way


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_a_host_answers_the_same_after_save_and_load(name: str, tmp_path: Any) -> None:
    case = BY_NAME[name]
    host, inputs = case.build(), left_padded(case)
    plan = host_plan(host)
    with gated(host, plan):
        expected = answers(host, inputs)
    again = load_pruned(case.build(), save_pruned(prune_heads(host, plan), tmp_path / "pruned"))
    for way, answer in answers(again, inputs).items():
        assert torch.equal(answer, expected[way]), way


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_language_models_answer_with_every_cache_and_search(family: str) -> None:
    model = language_model(family, kv=2)
    plan, inputs = text_plan(model, 2), text_inputs()
    with gated(model, plan):
        expected = answers(model, inputs)
    prune_heads(model, plan)
    for way, answer in answers(model, inputs).items():
        assert torch.equal(answer, expected[way]), way
