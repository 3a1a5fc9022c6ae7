"""LoRA and SFA around pruned heads: sliced along, saved and loaded onto the pruned model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.choices import TERMS
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.pruned_files import load_pruned, save_pruned
from sfa_adapters.inject import load_sfa, save_sfa
from sfa_adapters.observe import attention_modules
from tests.support.compare import assert_close, difference
from tests.support.hosts import HOSTS, logits_of
from tests.support.pruning import (
    gated,
    language_model,
    plan_for,
    text_inputs,
    text_plan,
    with_lora,
)


@pytest.mark.parametrize("attached", [True, False], ids=["lora_before", "lora_after"])
def test_lora_is_sliced_saved_and_loaded_with_the_pruned_base(attached: bool, tmp_path: Any) -> None:
    base = language_model(kv=2)
    plan = text_plan(base, 2)
    if attached:
        model = with_lora(base)
        with gated(base, plan):
            expected = logits_of(model, text_inputs())
        prune_heads(model, plan)
        assert_close(logits_of(model, text_inputs()), expected, 1e-5)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if "lora_" in n
        }
    else:
        model = with_lora(prune_heads(base, plan))
    expected, plain = logits_of(model, text_inputs()), tmp_path / "base"
    save_pruned(model, plain)
    model.save_pretrained(tmp_path / "adapter")
    fresh = load_pruned(type(base)(base.config).eval(), plain)
    with model.disable_adapter():
        assert torch.equal(logits_of(fresh, text_inputs()), logits_of(model, text_inputs()))
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, text_inputs()), expected)
    merged = again.merge_and_unload()
    assert_close(logits_of(merged, text_inputs()), expected, 1e-5)


def test_a_second_adapter_fits_the_pruned_projections() -> None:
    model = with_lora(language_model(kv=2))
    prune_heads(model, text_plan(model.get_base_model(), 2))
    before = logits_of(model, text_inputs())
    torch.manual_seed(2)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model.add_adapter("late", LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert torch.equal(logits_of(model, text_inputs()), before)
    model.set_adapter("late")
    assert difference(logits_of(model, text_inputs()), before) > 1e-3
    for part in (part for layer in model.model.model.layers for part in layer.self_attn.modules()):
        if isinstance(part, nn.Linear):  # what print(model) says
            assert tuple(part.weight.shape) == (part.out_features, part.in_features)


def test_sfa_and_lora_on_a_host(tmp_path: Any) -> None:
    case = next(host for host in HOSTS if host.name == "llava_onevision")
    host, inputs = case.build(), case.inputs()
    model = with_lora(host)
    torch.manual_seed(3)
    inject_sfa(model, SFAConfig(init_std=0.7, terms=list(TERMS)))
    model.eval()
    save_sfa(host, tmp_path / "sfa")
    vision, language = list(attention_modules(host, "vision")), list(attention_modules(host, "language"))
    plan = plan_for(host, {vision[0]: (0, 3), language[1]: (2, 3)})
    with gated(host, plan):
        expected = logits_of(model, inputs)
    prune_heads(model, plan)
    assert_close(logits_of(model, inputs), expected, 1e-5)
    folder = save_pruned(model, tmp_path / "pruned")
    assert not [k for k in load_pruned(case.build(), folder).state_dict() if "sfa" in k or "lora" in k]
    # The adapter of the tower with all its heads is cut with the tower.
    again = load_pruned(load_sfa(case.build(), tmp_path / "sfa").eval(), folder)
    with torch.no_grad():  # disable_adapter would switch SFA off, too
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))


def test_sfa_of_a_tower_that_keeps_its_heads_is_saved_and_loaded_as_always(tmp_path: Any) -> None:
    case = next(host for host in HOSTS if host.name == "llava")
    torch.manual_seed(3)
    model, inputs = inject_sfa(case.build(), SFAConfig(init_std=0.7, terms=list(TERMS))), case.inputs()
    prune_heads(model, plan_for(model, {next(iter(attention_modules(model, "language"))): (0, 1)}))
    save_sfa(model, tmp_path / "sfa")
    again = load_pruned(case.build(), save_pruned(model, tmp_path / "pruned"))
    bare = logits_of(again, inputs)
    assert torch.equal(logits_of(load_sfa(again, tmp_path / "sfa").eval(), inputs), logits_of(model, inputs))
    assert difference(logits_of(again, inputs), bare) > 1e-3


def test_a_bias_of_lora_goes_with_its_rows() -> None:
    base = language_model("qwen2", kv=2)
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], lora_bias=True)
    model: Any = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    plan = text_plan(base, 2)
    with gated(base, plan):
        expected = logits_of(model, text_inputs())
    prune_heads(model, plan)
    assert_close(logits_of(model, text_inputs()), expected, 1e-5)
