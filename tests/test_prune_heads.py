"""Pruned heads against heads whose output is zero, in real classes of transformers and timm; compensation; files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.plan import HeadPlan
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.pruned_files import load_pruned, save_pruned
from sfa_adapters.heads.receipt import prune_receipt, take_probe
from sfa_adapters.inject import load_sfa, save_sfa
from sfa_adapters.observe import attention_modules
from tests.hosts import HOSTS, TEXT, logits_of
from tests.support import Snapshot, assert_close, difference, injected, read
from tests.towers import CASES, TowerCase, lively

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
LAYER = "model.layers.{}.self_attn"
GONE = {4: ((1,), (0, 2, 3)), 2: ((0, 3), (0, 1)), 1: ((2,), (0, 1, 3))}  # by key/value heads; layers differ
BY_NAME = {case.name: case for case in CASES}


def language_model(family: str = "llama", kv: int = 4, **options: Any) -> Any:
    config, model = FAMILIES[family]
    settings = {**TEXT, "num_key_value_heads": kv, "head_dim": 8, **options}
    return lively(lambda: model(config(**settings)))()


def text_inputs(padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def plan_for(model: nn.Module, gone: Mapping[str, tuple[int, ...]]) -> HeadPlan:
    found = {path: read_geometry(path, model.get_submodule(path)) for path in gone}
    return HeadPlan(gone, {p: g.num_heads for p, g in found.items()}, {p: g.num_kv_heads for p, g in found.items()})


def text_plan(model: nn.Module, kv: int) -> HeadPlan:
    return plan_for(model, {LAYER.format(i): gone for i, gone in enumerate(GONE[kv])})


def greedy(model: Any, cache: str, inputs: dict[str, Any] | None = None) -> Tensor:
    given = inputs or text_inputs()
    return model.generate(**given, max_new_tokens=6, do_sample=False, cache_implementation=cache, eos_token_id=None)


@contextmanager
def gated(model: nn.Module, plan: HeadPlan) -> Iterator[None]:
    """The reference: the whole model, with zeros where the removed heads' output goes into the output projection."""
    handles = []
    for path, heads in plan.removed.items():
        module = model.get_submodule(path)
        geometry = read_geometry(path, module)

        def hook(_: nn.Module, args: Any, heads: Any = heads, size: int = geometry.head_dim) -> Any:
            states = args[0].clone()
            for head in heads:
                states[..., head * size : (head + 1) * size] = 0
            return (states, *args[1:])

        handles.append(getattr(module, geometry.kind.output).register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


# -- exact ------------------------------------------------------------------------------------------------------------


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
    assert difference(expected, before) > 0.05, "the heads that go must matter"
    assert prune_heads(model, plan) is model
    assert_close(logits_of(model, text_inputs()), expected, 1e-5)
    for cache, found in tokens.items():
        assert torch.equal(greedy(model, cache), found), cache


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_weights_and_cache_fall_by_what_the_plan_says(kv: int) -> None:
    model = language_model("qwen2", kv)
    plan = text_plan(model, kv)
    count = sum(p.numel() for p in model.parameters())
    prune_heads(model, plan)
    lost, cache = 0, model(**text_inputs(), use_cache=True).past_key_values
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


TOWERS = ["clip", "siglip", "internvit", "qwen2_5", "timm_cls", "timm_siglip", "timm_qknorm", "timm_internvit"]


def tower_plan(model: nn.Module) -> HeadPlan:
    paths = list(attention_modules(model, "vision"))
    return plan_for(model, {paths[0]: (2,), paths[1]: (0, 1, 3)})


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
    if case.family == "timm":
        for module in attention_modules(model, "vision").values():
            module.fused_attn = False  # pyright: ignore[reportArgumentType]
    else:
        model.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
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


# -- adapters and files -----------------------------------------------------------------------------------------------


def with_lora(model: Any, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(model, config).eval()


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


def test_sfa_and_lora_on_a_host(tmp_path: Any) -> None:
    case = next(host for host in HOSTS if host.name == "llava_onevision")
    host, inputs = case.build(), case.inputs()
    model = with_lora(host)
    torch.manual_seed(3)
    inject_sfa(model, SFAConfig(init_std=0.7))
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
    model, inputs = inject_sfa(case.build(), SFAConfig(init_std=0.7)), case.inputs()
    prune_heads(model, plan_for(model, {next(iter(attention_modules(model, "language"))): (0, 1)}))
    save_sfa(model, tmp_path / "sfa")
    again = load_pruned(case.build(), save_pruned(model, tmp_path / "pruned"))
    bare = logits_of(again, inputs)
    assert torch.equal(logits_of(load_sfa(again, tmp_path / "sfa").eval(), inputs), logits_of(model, inputs))
    assert difference(logits_of(again, inputs), bare) > 1e-3


@pytest.mark.parametrize("compensation", ["none", "absorb", "bias", "residual"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_pruned_model_comes_back_bit_for_bit(family: str, compensation: Any, tmp_path: Any) -> None:
    model = language_model(family, 2, tie_word_embeddings=family == "qwen3")
    batches = [text_inputs()] if compensation == "bias" else None
    prune_heads(model, text_plan(model, 2), compensation, batches)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(RuntimeError):  # as documented
        type(model).from_pretrained(tmp_path / "plain")
    folder = save_pruned(model, tmp_path / "pruned")
    again = load_pruned(type(model)(type(model.config).from_pretrained(folder)).eval(), folder)
    assert torch.equal(logits_of(again, text_inputs()), logits_of(model, text_inputs()))
    assert torch.equal(greedy(again, "static"), greedy(model, "dynamic"))
    save_pruned(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "head_plan.json").read_text() == (folder / "head_plan.json").read_text()


@pytest.mark.parametrize("name", ["timm_cls", "qwen2_5"])
def test_a_pruned_tower_comes_back(name: str, tmp_path: Any) -> None:
    case = BY_NAME[name]
    model, inputs = case.fresh()
    folder = save_pruned(prune_heads(model, tower_plan(model)), tmp_path / "tower")
    torch.manual_seed(99)
    assert torch.equal(read(case, load_pruned(case.build(), folder), inputs), read(case, model, inputs))


def test_bfloat16_stays(tmp_path: Any) -> None:
    model = language_model(kv=2).to(torch.bfloat16)
    prune_heads(model, text_plan(model, 2), "bias", [text_inputs()])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again = load_pruned(language_model(kv=2).to(torch.bfloat16), save_pruned(model, tmp_path / "pruned"))
    assert torch.equal(logits_of(again, text_inputs()), logits_of(model, text_inputs()))


def test_a_part_of_a_model_pruned_by_itself_is_saved_with_the_whole(tmp_path: Any) -> None:
    case = next(host for host in HOSTS if host.name == "llava")
    model: Any = case.build()
    tower = model.model.vision_tower
    prune_heads(tower, tower_plan(tower))
    folder = save_pruned(model, tmp_path / "host")
    assert torch.equal(logits_of(load_pruned(case.build(), folder), case.inputs()), logits_of(model, case.inputs()))


def test_sharded_files(tmp_path: Any) -> None:
    model = language_model(kv=2)
    folder = save_pruned(prune_heads(model, text_plan(model, 2)), tmp_path / "one")
    model.save_pretrained(folder, max_shard_size="20KB", save_original_format=False)
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = load_pruned(language_model(kv=2), folder)
    assert torch.equal(logits_of(again, text_inputs()), logits_of(model, text_inputs()))


def _break_plan(folder: Any, **change: Any) -> None:
    path = folder / "head_plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


BROKEN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no plan": (lambda folder: (folder / "head_plan.json").unlink(), "has no head_plan.json"),
    "no json": (lambda folder: (folder / "head_plan.json").write_text("{"), "cannot be read"),
    "no plan inside": (lambda folder: _break_plan(folder, plan={}), "no head plan"),
    "newer": (lambda folder: _break_plan(folder, version=2), "version 2"),
    "another class": (lambda folder: _break_plan(folder, model="Other"), "pruned Other"),
    "a bias that is not there": (lambda folder: _break_plan(folder, biases=[LAYER.format(0)]), "o_proj.bias"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
    "torn weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "cannot be read"),
    "weights of the unpruned": (
        lambda folder: language_model(kv=2).save_pretrained(folder, save_original_format=False),
        r"\[32, 32\] in the file",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_named_and_the_model_is_untouched(how: str, tmp_path: Any) -> None:
    break_it, words = BROKEN[how]
    model = language_model(kv=2)
    folder = save_pruned(prune_heads(model, text_plan(model, 2)), tmp_path / "pruned")
    break_it(folder)
    base = language_model(kv=2)
    snapshot = Snapshot(base)
    with pytest.raises(RecipeError, match=words):
        load_pruned(base, folder)
    snapshot.assert_unchanged(base)


def test_saving_what_was_not_pruned_or_twice_into_one_folder(tmp_path: Any) -> None:
    model = language_model()
    with pytest.raises(InjectionError, match="lost no heads"):
        save_pruned(model, tmp_path / "a")
    prune_heads(model, text_plan(model, 4))
    save_pruned(model, tmp_path / "a")
    with pytest.raises(RecipeError, match="already"):
        save_pruned(model, tmp_path / "a")
    lora = with_lora(model)
    lora.merge_adapter()
    with pytest.raises(InjectionError, match="Unmerge"):
        save_pruned(lora, tmp_path / "b")


# -- compensation -----------------------------------------------------------------------------------------------------


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


def test_absorb_is_exact_when_all_heads_are_equal() -> None:
    model = language_model()
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight.copy_(projection.weight[:8].repeat(4, 1))
            attention.o_proj.weight.copy_(attention.o_proj.weight[:, :8].repeat(1, 4))
    expected = logits_of(model, text_inputs())
    prune_heads(model, text_plan(model, 4), "absorb")
    assert_close(logits_of(model, text_inputs()), expected, 1e-5)


def test_absorb_scales_the_columns_that_stay_once_with_lora_and_never_query_or_key() -> None:
    base = language_model()
    model = with_lora(base)
    whole = deepcopy(model).merge_and_unload().model.layers[0].self_attn
    prune_heads(model, plan_for(base, {FIRST: (1,)}), "absorb")
    found, columns = model.merge_and_unload().model.layers[0].self_attn, [*range(8), *range(16, 32)]
    assert_close(found.o_proj.weight, whole.o_proj.weight[:, columns] * (4 / 3), 1e-5)
    assert_close(found.q_proj.weight, whole.q_proj.weight[columns], 1e-6)
    assert_close(found.k_proj.weight, whole.k_proj.weight[columns], 1e-6)


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
    if case.family == "timm":
        inputs = {"x": inputs["pixel_values"]}
    bare = prune_heads(deepcopy(model), plan)
    prune_heads(model, plan, compensation, [inputs] if compensation == "bias" else None)
    with torch.no_grad():
        outputs = [model(**inputs), bare(**inputs)]
    outputs = [o if isinstance(o, Tensor) else o.last_hidden_state for o in outputs]
    assert difference(*outputs) > 1e-3
    kept = [c for head in plan.kept(path) for c in range(8 * head, 8 * head + 8)]
    assert torch.equal(getattr(model.get_submodule(path), kind.fused or "q_proj").weight[:24], rows[kept])


# -- what cannot be ---------------------------------------------------------------------------------------------------


def _quantise(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj = Linear4bit(32, 32, bias=False)


def _share(model: Any) -> None:
    model.model.layers[1].self_attn = model.model.layers[0].self_attn


def _tie(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight


def _dora(model: Any) -> None:
    get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], use_dora=True))


def _lora(model: Any) -> None:
    with_lora(model, ("v_proj",))


def _meta(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.to("meta")


def _nothing(model: Any) -> None: ...


def _again(model: Any) -> None:
    prune_heads(model, plan_for(model, {LAYER.format(1): (0,)}))


FIRST, SECOND = LAYER.format(0), LAYER.format(1)
COUNTS: dict[str, int] = {FIRST: 4, SECOND: 4}
GOOD = HeadPlan({FIRST: (1,), SECOND: (0,)}, COUNTS, COUNTS)
REFUSED: dict[str, tuple[Callable[[Any], None], HeadPlan, dict[str, Any], type[Exception], str]] = {
    "4-bit": (_quantise, GOOD, {}, InjectionError, "quantised.*Prune the model in bf16"),
    "shared module": (_share, GOOD, {}, InjectionError, "are the same"),
    "tied weight": (_tie, GOOD, {}, InjectionError, "v_proj.weight are the same"),
    "dora": (_dora, GOOD, {}, InjectionError, "cannot be sliced"),
    "lora and residual": (_lora, GOOD, {"compensation": "residual"}, InjectionError, "v_proj carries LoRA"),
    "meta": (_meta, GOOD, {}, InjectionError, "no values"),
    "twice": (_again, GOOD, {}, InjectionError, "lost heads before"),
    "unknown path": (_nothing, HeadPlan({"a.b": (1,)}, {"a.b": 4}, {"a.b": 4}), {}, InjectionError, "no module 'a.b'"),
    "no attention": (
        _nothing, HeadPlan({"model": (1,)}, {"model": 4}, {"model": 4}), {}, InjectionError, "LlamaModel, whose heads",
    ),
    "another model": (
        _nothing, HeadPlan({FIRST: (1,)}, {FIRST: 8}, {FIRST: 8}), {}, InjectionError, "another model",
    ),
    "other groups": (
        _nothing, HeadPlan({FIRST: (0, 1)}, {FIRST: 4}, {FIRST: 2}), {}, InjectionError, "plan is for 4 and 2",
    ),
    "nothing to do": (
        _nothing, HeadPlan({FIRST: ()}, {FIRST: 4}, {FIRST: 4}), {}, RecipeError, "removes no head",
    ),
    "no such compensation": (_nothing, GOOD, {"compensation": "scale_qk"}, RecipeError, "must be one of"),
    "bias without batches": (_nothing, GOOD, {"compensation": "bias"}, RecipeError, "needs batches"),
    "batches for nothing": (_nothing, GOOD, {"batches": []}, RecipeError, "measures nothing"),
    "no batch": (_nothing, GOOD, {"compensation": "bias", "batches": []}, RecipeError, "never ran"),
    "a batch that fails": (
        _nothing, GOOD, {"compensation": "bias", "batches": [{"input_ids": None}]}, ValueError, "input_ids",
    ),
    "nan": (
        _nothing, GOOD, {"compensation": "bias", "batches": [{"inputs_embeds": torch.full((1, 3, 32), torch.nan)}]},
        RecipeError, "not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(case: str) -> None:
    prepare, plan, options, error, words = REFUSED[case]
    model = language_model()
    prepare(model)
    snapshot = None if case == "meta" else Snapshot(model)
    with pytest.raises(error, match=words):
        prune_heads(model, plan, **options)
    if snapshot is not None:
        snapshot.assert_unchanged(model)


@pytest.mark.parametrize(
    ("name", "words"),
    [("internvit_qknorm", "all heads together"), ("internvit_remote", "cannot be removed"), ("idefics3", "Known are")],
)
def test_towers_whose_heads_cannot_go(name: str, words: str) -> None:
    model = BY_NAME[name].build()
    path = next(iter(attention_modules(model, "vision")))
    snapshot = Snapshot(model)
    with pytest.raises(InjectionError, match=words):
        prune_heads(model, HeadPlan({path: (1,)}, {path: 4}, {path: 4}))
    snapshot.assert_unchanged(model)


# -- the receipt ------------------------------------------------------------------------------------------------------


def test_the_receipt_tells_what_went() -> None:
    model = language_model(kv=2)
    plan, inputs = text_plan(model, 2), text_inputs()
    before = logits_of(model, inputs)
    count = sum(p.numel() for p in model.parameters())
    probe = take_probe(model, inputs)
    prune_heads(model, plan, "absorb")
    receipt = prune_receipt(probe, model)
    assert receipt.parameters == (count, sum(p.numel() for p in model.parameters()))
    assert receipt.heads == {FIRST: (4, 2), SECOND: (4, 2)}
    assert receipt.kv_heads == {FIRST: (2, 2), SECOND: (2, 1)}
    assert receipt.cache_channels == (2 * 8 * 4, 2 * 8 * 3)
    change = (logits_of(model, inputs) - before).abs()
    assert receipt.largest_change == pytest.approx(float(change.max()))
    assert receipt.mean_change == pytest.approx(float(change.mean()))
    told = str(receipt)
    assert "4 of 8 gone" in told
    assert "key/value 2 -> 1" in told
    assert "absorb" in told


def test_a_receipt_for_nothing_is_an_error() -> None:
    model = language_model()
    probe = take_probe(model, text_inputs())
    with pytest.raises(InjectionError, match="lost no heads"):
        prune_receipt(probe, model)
    late = take_probe(prune_heads(model, text_plan(model, 4)), text_inputs())
    with pytest.raises(InjectionError, match="Nothing happened"):
        prune_receipt(late, model)


def test_heads_that_gave_nothing_are_reported_as_nothing() -> None:
    model = language_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] = 0
    probe = take_probe(model, text_inputs())
    prune_heads(model, plan_for(model, {FIRST: (1,)}))
    after = logits_of(model, text_inputs())
    if torch.equal(after, probe.output):
        with pytest.raises(InjectionError, match="Nothing happened"):
            prune_receipt(probe, model)
    else:
        assert prune_receipt(probe, model).largest_change < 1e-5
