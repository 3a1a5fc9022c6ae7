"""How the kept heads make up for the pruned ones, against slow references."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.observe import attention_modules
from tests.support.compare import assert_close, difference
from tests.support.hosts import HOSTS, IMAGE, logits_of
from tests.support.pruning import (
    BY_NAME,
    FIRST,
    LAYER,
    SECOND,
    language_model,
    plan_for,
    text_inputs,
    text_plan,
    tower_plan,
    with_lora,
)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20), kv=st.sampled_from([4, 2]), own_bias=st.booleans())
def test_bias_is_exact_when_removed_heads_are_constant(seed: int, kv: int, own_bias: bool) -> None:
    model = language_model("llama", kv, attention_bias=own_bias)
    generator = torch.Generator().manual_seed(seed)
    gone = (0, 1) if kv == 2 else tuple(sorted(torch.randperm(4, generator=generator)[:2].tolist()))
    plan = plan_for(model, {LAYER.format(0): gone})
    attention = model.model.layers[0].self_attn
    values = [h // (4 // kv) for h in gone]
    with torch.no_grad():  # the same value for every token
        attention.v_proj.bias = nn.Parameter(torch.zeros(8 * kv))
        for head in values:
            attention.v_proj.weight[8 * head : 8 * head + 8] = 0
            attention.v_proj.bias[8 * head : 8 * head + 8] = torch.randn(8, generator=generator)
    inputs = text_inputs(padded=False)  # rows of padding attend to nothing: there a head gives zero
    expected = logits_of(model, inputs)
    bare = logits_of(prune_heads(deepcopy(model), plan), inputs)
    other = torch.randint(3, 60, (3, 5), generator=generator)
    prune_heads(model, plan, "bias", [{"input_ids": other}])
    assert_close(logits_of(model, inputs), expected, 1e-5)
    assert difference(bare, expected) > 1e-3


def test_bias_takes_the_mean_over_tokens_that_are_no_padding() -> None:
    model = with_lora(language_model())
    path = LAYER.format(1)
    plan, inputs = plan_for(model.get_base_model(), {path: (1, 3)}), text_inputs()
    seen: list[Tensor] = []
    output = model.get_base_model().get_submodule(path).o_proj
    with torch.no_grad():
        handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**inputs)
        handle.remove()
        rows = [seen[0][b, t] for b in range(2) for t in range(9) if inputs["attention_mask"][b, t]]
        mean = torch.stack(rows).mean(0)
        mean[0:8], mean[16:24] = 0, 0
        expected = output(mean)  # with LoRA
    model.train()
    prune_heads(model, plan, "bias", [inputs])
    assert model.training
    assert_close(output.bias, expected, 1e-5)


def test_bias_of_a_disabled_adapter_is_that_of_the_base() -> None:
    plain, base = language_model(), language_model()
    plan = plan_for(plain, {FIRST: (1,)})
    prune_heads(plain, plan, "bias", [text_inputs()])
    model = with_lora(base)
    with model.disable_adapter():
        prune_heads(model, plan, "bias", [text_inputs()])
        assert torch.equal(logits_of(model, text_inputs()), logits_of(plain, text_inputs()))


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_absorb_is_exact_when_all_heads_are_equal(kv: int) -> None:
    model = language_model(kv=kv)
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight.copy_(projection.weight[:8].repeat(len(projection.weight) // 8, 1))
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, :8].repeat(1, 4))
    expected = logits_of(model, text_inputs())
    prune_heads(model, text_plan(model, kv), "absorb")
    assert_close(logits_of(model, text_inputs()), expected, 1e-5)


def test_absorb_scales_the_columns_that_stay_once_with_lora_and_never_query_or_key() -> None:
    base = language_model()
    model = with_lora(base)
    whole = deepcopy(model).merge_and_unload().model.layers[0].self_attn
    prune_heads(model, plan_for(base, {FIRST: (1,)}), "absorb")
    attention, columns = model.merge_and_unload().model.layers[0].self_attn, [*range(8), *range(16, 32)]
    assert_close(attention.o_proj.weight, whole.o_proj.weight[:, columns] * (4 / 3), 1e-5)
    assert_close(attention.q_proj.weight, whole.q_proj.weight[columns], 1e-6)
    assert_close(attention.k_proj.weight, whole.k_proj.weight[columns], 1e-6)


@pytest.mark.parametrize(("family", "kv"), [("llama", 4), ("qwen2", 4), ("qwen2", 2)])
def test_residual_is_the_slow_reference(family: str, kv: int) -> None:
    model = language_model(family, kv)
    attention = model.model.layers[0].self_attn
    gone, group = ((0, 3), 4 // kv)
    with torch.no_grad():  # head 0 is nearly head 1, so that something is clipped
        attention.o_proj.weight[:, :8] = 9 * attention.o_proj.weight[:, 8:16]
        attention.v_proj.weight[:8] = 1.1 * attention.v_proj.weight[8:16] if kv == 4 else attention.v_proj.weight[:8]
    before = deepcopy(attention).requires_grad_(False)
    prune_heads(model, plan_for(model, {FIRST: gone}), "residual")

    bias = before.v_proj.bias if before.v_proj.bias is not None else torch.zeros(8 * kv)
    value = [torch.cat((before.v_proj.weight, bias[:, None]), 1)[8 * g : 8 * g + 8] for g in range(kv)]
    out = [before.o_proj.weight[:, 8 * h : 8 * h + 8] for h in range(4)]
    whole = [torch.cat((value[h // group].flatten(), out[h].T.flatten())) for h in range(4)]
    add_v: dict[int, Any] = {}
    add_o: dict[int, Any] = {}
    for r in gone:
        cosine, k = max((float(torch.cosine_similarity(whole[r], whole[k], dim=0)), k) for k in (1, 2))
        beta = 0.1 * max(cosine, 0)
        add_o[k] = add_o.get(k, 0) + beta * out[r]
        if r // group != k // group:
            add_v[k // group] = add_v.get(k // group, 0) + beta * value[r // group]
    clip: Callable[[Any, Any], Any] = lambda add, had: add * min(1.0, float(0.1 * had.norm() / add.norm()))  # noqa: E731
    assert float(add_o[1].norm()) > 0.1 * float(out[1].norm())
    for place, head in enumerate((1, 2)):
        expected = out[head] + (clip(add_o[head], out[head]) if head in add_o else 0)
        assert_close(attention.o_proj.weight[:, 8 * place : 8 * place + 8], expected, 1e-6)
        g = head // group
        expected = value[g] + (clip(add_v[g], value[g]) if g in add_v else 0)
        assert_close(attention.v_proj.weight[8 * place : 8 * place + 8], expected[:, :-1], 1e-6)
        if before.v_proj.bias is not None:
            assert_close(attention.v_proj.bias[8 * place : 8 * place + 8], expected[:, -1], 1e-6)


@pytest.mark.parametrize("compensation", ["absorb", "bias", "residual"])
@pytest.mark.parametrize("name", ["siglip", "qwen2_5", "timm_cls"])
def test_compensation_in_towers_changes_the_output_only_of_what_it_says(name: str, compensation: Any) -> None:
    case = BY_NAME[name]
    model, inputs = case.fresh()
    plan = tower_plan(model)
    path = next(iter(plan.removed))
    before = model.get_submodule(path)
    kind = read_geometry(path, before).kind
    rows = deepcopy(getattr(before, kind.fused or "q_proj").weight)
    if case.library == "timm":
        inputs = {"x": inputs["pixel_values"]}
    bare = prune_heads(deepcopy(model), plan)
    prune_heads(model, plan, compensation, [inputs] if compensation == "bias" else None)
    with torch.no_grad():
        outputs = [model(**inputs), bare(**inputs)]
    outputs = [o if isinstance(o, Tensor) else o.last_hidden_state for o in outputs]
    assert difference(*outputs) > 1e-3
    kept = [c for head in plan.kept(path) for c in range(8 * head, 8 * head + 8)]
    assert torch.equal(getattr(model.get_submodule(path), kind.fused or "q_proj").weight[:24], rows[kept])


def test_the_mean_of_a_tower_is_over_all_patches() -> None:
    case = next(host for host in HOSTS if host.name == "llava")
    model, inputs = case.build(), case.inputs()
    # As many tokens as the tower has patches with its CLS token, and one of them padding.
    ids = torch.tensor([[5, *[IMAGE] * 16], [0, *[IMAGE] * 16]])
    batch = {**inputs, "input_ids": ids, "attention_mask": (ids != 0).long()}
    path = next(iter(attention_modules(model, "vision")))
    output: Any = model.get_submodule(path).out_proj
    seen: list[Tensor] = []
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_of(model, batch)
    handle.remove()
    assert seen[0].shape[:2] == batch["attention_mask"].shape
    expected = output.bias + output.weight[:, 8:16] @ seen[0].flatten(0, 1).mean(0)[8:16]
    prune_heads(model, plan_for(model, {path: (1,)}), "bias", [batch])
    assert_close(output.bias, expected.detach(), 1e-6)


def test_the_mean_weighs_tokens_and_not_batches() -> None:
    model, other = language_model(), language_model()
    plan = plan_for(model, {FIRST: (1,)})
    ids = text_inputs(padded=False)["input_ids"]
    prune_heads(model, plan, "bias", [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :3]}])
    padded = torch.cat((ids[:1], torch.cat((ids[1:, :3], torch.zeros(1, 6, dtype=torch.long)), 1)))
    prune_heads(other, plan, "bias", [{"input_ids": padded, "attention_mask": (padded != 0).long()}])
    assert_close(model.model.layers[0].self_attn.o_proj.bias, other.model.layers[0].self_attn.o_proj.bias, 1e-6)


def test_the_mean_is_measured_without_dropout() -> None:
    model, other = language_model(attention_dropout=0.5).train(), language_model()
    for one in (model, other):
        prune_heads(one, plan_for(one, {SECOND: (1,)}), "bias", [text_inputs()])
    assert torch.equal(model.model.layers[1].self_attn.o_proj.bias, other.model.layers[1].self_attn.o_proj.bias)
