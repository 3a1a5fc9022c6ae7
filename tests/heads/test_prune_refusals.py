"""Models and plans that cannot be pruned: a named error, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, get_peft_model

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.plan import HeadPlan
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.observe import attention_modules
from tests.support.compare import Snapshot
from tests.support.hosts import HOSTS
from tests.support.pruning import (
    BY_NAME,
    FIRST,
    LAYER,
    SECOND,
    language_model,
    plan_for,
    with_lora,
)


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


def _late_lora(model: Any) -> None:
    with_lora(model, ("layers.1.self_attn.v_proj",))


def _meta(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.to("meta")


def _nothing(model: Any) -> None: ...


def _again(model: Any) -> None:
    prune_heads(model, plan_for(model, {LAYER.format(1): (0,)}))


COUNTS: dict[str, int] = {FIRST: 4, SECOND: 4}
GOOD = HeadPlan({FIRST: (1,), SECOND: (0,)}, COUNTS, COUNTS)
REFUSED: dict[str, tuple[Callable[[Any], None], HeadPlan, dict[str, Any], type[Exception], str]] = {
    "4-bit": (_quantise, GOOD, {}, InjectionError, "quantised.*Prune the model in bf16"),
    "shared module": (_share, GOOD, {}, InjectionError, "are the same"),
    "tied weight": (_tie, GOOD, {}, InjectionError, "v_proj.weight are the same"),
    "dora": (_dora, GOOD, {}, InjectionError, "cannot be sliced"),
    "lora and residual": (_lora, GOOD, {"compensation": "residual"}, InjectionError, "v_proj carries LoRA"),
    "lora in one layer and residual": (
        _late_lora, GOOD, {"compensation": "residual"}, InjectionError, "1.self_attn.v_proj carries LoRA",
    ),
    "meta": (_meta, GOOD, {}, InjectionError, "no values"),
    "twice": (_again, GOOD, {}, InjectionError, "lost heads before"),
    "twice, another layer": (
        _again, HeadPlan({FIRST: (1,)}, {FIRST: 4}, {FIRST: 4}), {}, InjectionError, "lost heads before",
    ),
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


def test_heads_go_once_from_a_tower_and_its_host() -> None:
    case = next(host for host in HOSTS if host.name == "llava")
    model: Any = case.build()
    tower = model.model.vision_tower
    path = next(iter(attention_modules(model, "vision")))
    prune_heads(tower, plan_for(tower, {path.removeprefix("model.vision_tower."): (0,)}))
    for _ in range(2):
        snapshot = Snapshot(model)
        with pytest.raises(InjectionError, match="lost heads before"):
            prune_heads(model, plan_for(model, {path: (1,)}))
        snapshot.assert_unchanged(model)
        model = case.build()
        prune_heads(model, plan_for(model, {path: (0,)}))
    with pytest.raises(InjectionError, match="lost heads before"):
        prune_heads(model.model.vision_tower, plan_for(model.model.vision_tower, {path.split(".", 2)[2]: (1,)}))


def test_a_plan_that_names_a_module_by_two_paths() -> None:
    model = with_lora(language_model())
    two = {FIRST: 4, f"base_model.model.{FIRST}": 4}
    snapshot = Snapshot(model)
    with pytest.raises(InjectionError, match="are the same module"):
        prune_heads(model, HeadPlan({FIRST: (1,), f"base_model.model.{FIRST}": (2,)}, two, two))
    snapshot.assert_unchanged(model)
