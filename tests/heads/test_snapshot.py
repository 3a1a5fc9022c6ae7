"""`unpruned` gives a pruned model its heads back for a while, to the last bit."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sfa_adapters import inject_sfa
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads import prune_receipt, take_probe
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.prune import find_targets, prune_heads, slice_heads
from sfa_adapters.heads.pruned_files import pruned_of
from sfa_adapters.heads.slicing import Edits
from sfa_adapters.heads.snapshot import numbers, unpruned
from sfa_adapters.observe import attention_modules
from sfa_adapters.tuner import injected_layers
from tests.support.compare import injected, read, strong_config
from tests.support.hosts import HOSTS, logits_of
from tests.support.pruning import (
    BY_NAME,
    FIRST,
    TOWERS,
    greedy,
    language_model,
    plan_for,
    text_inputs,
    text_plan,
    tower_plan,
    with_lora,
)

PLAIN = text_inputs(padded=False)


def host(name: str) -> tuple[Any, dict[str, Any]]:
    case = next(host for host in HOSTS if host.name == name)
    return case.build(), case.inputs()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that is not a tensor, and the identity of every parameter."""
    state: dict[str, Any] = {name: id(p) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        state |= {f"{name}.{k}": v for k, v in module.__dict__.items() if isinstance(v, int) and k[0] != "_"}
        state[f"{name}.names"] = module.__dict__.keys() - {"_dense"}
    towers = [config.tower for _, _, layer in injected_layers(model) for config in layer.configs.values()]
    return {**state, "towers": towers}


def check_way_back(model: Any, plan: HeadPlan, run: Any, inputs: Any, compensation: Any = "none") -> None:
    """Inside `unpruned` all is as before pruning to the last bit, and afterwards as after pruning."""
    probe, before, originals = take_probe(model, inputs), run(), state_of(model)
    prune_heads(model, plan, compensation, [inputs] if compensation == "bias" else None)
    after, state = run(), state_of(model)
    assert not torch.equal(before, after)
    for _ in range(2):
        with unpruned(probe, model):
            assert torch.equal(run(), before)
            assert state_of(model) == originals
            with pytest.raises(InjectionError, match="lost no heads"):
                pruned_of(model)
        assert torch.equal(run(), after)
        assert state_of(model) == state
        assert pruned_of(model).plan.count == plan.count


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("family", "kv"), [("llama", 4), ("llama", 2), ("mistral", 1), ("qwen2", 2), ("qwen3", 1)])
def test_a_language_model_and_back(family: str, kv: int, cache: str) -> None:
    model = language_model(family, kv)

    def run() -> Tensor:
        return torch.cat((logits_of(model, PLAIN).flatten(), greedy(model, cache).flatten()))

    check_way_back(model, text_plan(model, kv), run, PLAIN)


@pytest.mark.parametrize("compensation", ["absorb", "bias", "residual"])
def test_compensation_and_back(compensation: Any) -> None:
    model = language_model()
    check_way_back(model, text_plan(model, 4), lambda: logits_of(model, PLAIN), PLAIN, compensation)
    bias = model.get_submodule(FIRST).o_proj.bias  # where was none
    assert (bias is not None) == (compensation == "bias")


@pytest.mark.parametrize("with_sfa", [False, True], ids=["plain", "sfa"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_and_back(name: str, with_sfa: bool) -> None:
    case = BY_NAME[name]
    model, inputs = injected(case) if with_sfa else case.fresh()
    given = {"x": inputs["pixel_values"]} if case.library == "timm" else inputs
    check_way_back(model, tower_plan(model), lambda: read(case, model, inputs), given)


def test_a_host_with_lora_and_sfa_and_back() -> None:
    base, inputs = host("llava_onevision")
    model = with_lora(base)
    torch.manual_seed(3)
    inject_sfa(model, strong_config())
    model.eval()
    vision, language = list(attention_modules(base, "vision")), list(attention_modules(base, "language"))
    plan = plan_for(base, {vision[0]: (0, 3), language[1]: (2, 3)})
    check_way_back(model, plan, lambda: logits_of(model, inputs), inputs)


def test_an_error_inside_takes_the_heads_again() -> None:
    model = language_model(kv=2)
    probe = take_probe(model, PLAIN)
    prune_heads(model, text_plan(model, 2))
    after = logits_of(model, PLAIN)
    with pytest.raises(ZeroDivisionError), unpruned(probe, model):
        _ = 1 / 0
    assert torch.equal(logits_of(model, PLAIN), after)


@pytest.mark.parametrize("name", ["language", *TOWERS])
def test_every_number_that_pruning_sets_is_put_back(name: str) -> None:
    """A number that is set and not listed would stay; some are only read on rare paths."""
    if name == "language":
        model: Any = with_lora(language_model(kv=2))
        plan = text_plan(model.get_base_model(), 2)
    else:
        model = injected(BY_NAME[name])[0]
        plan = tower_plan(model)
    edits = Edits()
    for target in find_targets(model, plan):
        slice_heads(edits, target, plan)
    assert edits.values
    assert {number for _, number, _ in edits.values} <= numbers()


def test_old_weights_live_as_long_as_the_probe() -> None:
    model = language_model()
    old, kept = weakref.ref(model.get_submodule(FIRST).q_proj.weight), model.lm_head.weight
    probe = take_probe(model, PLAIN)
    prune_heads(model, text_plan(model, 4))
    with unpruned(probe, model):
        assert model.get_submodule(FIRST).q_proj.weight is old()
        assert model.lm_head.weight is kept, "only what pruning replaces is there twice"
    gc.collect()
    assert old() is not None
    del probe
    gc.collect()
    assert old() is None


def _adapt(model: Any) -> None:
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


def _cast(model: Any) -> None:
    model.to(torch.float64)


def _train(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)


CHANGED = {"adapted": (_adapt, "other modules"), "cast": (_cast, "float64"), "trained": (_train, "trained or loaded")}


@pytest.mark.parametrize("change", CHANGED)
def test_a_model_that_changed_since_is_refused_and_stays_pruned(change: str) -> None:
    change_it, words = CHANGED[change]
    model = language_model()
    probe = take_probe(model, PLAIN)
    prune_heads(model, text_plan(model, 4))
    change_it(model)
    after = logits_of(model, PLAIN)
    with pytest.raises(RecipeError, match=words):
        prune_receipt(probe, model)
    assert torch.equal(logits_of(model, PLAIN), after)
    assert prune_receipt(probe, model, rounds=0).speed is None
