"""Small models, plans to prune them, and the reference: the unpruned model with zero gates on the pruned heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.plan import HeadPlan
from sfa_adapters.observe import attention_modules
from tests.support.hosts import HOSTS, TEXT
from tests.support.towers import CASES, lively

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
LAYER = "model.layers.{}.self_attn"
GONE = {4: ((1,), (0, 2, 3)), 2: ((0, 3), (0, 1)), 1: ((2,), (0, 1, 3))}  # by key/value heads; layers differ
FIRST, SECOND = LAYER.format(0), LAYER.format(1)
BY_NAME = {case.name: case for case in CASES}


def language_model(family: str = "llama", kv: int = 4, **options: Any) -> Any:
    config, model = FAMILIES[family]
    settings = {**TEXT, "num_key_value_heads": kv, "head_dim": 8, **options}
    return lively(lambda: model(config(**settings)))()


def host(name: str) -> tuple[Any, dict[str, Any]]:
    """A whole model of the small hosts, by name, and inputs for it."""
    case = next(host for host in HOSTS if host.name == name)
    return case.build(), case.inputs()


def size(model: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def text_inputs(padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def plan_for(model: nn.Module, gone: Mapping[str, tuple[int, ...]]) -> HeadPlan:
    geometries = {path: read_geometry(path, model.get_submodule(path)) for path in gone}
    return HeadPlan(
        gone, {p: g.num_heads for p, g in geometries.items()}, {p: g.num_kv_heads for p, g in geometries.items()}
    )


def text_plan(model: nn.Module, kv: int) -> HeadPlan:
    return plan_for(model, {LAYER.format(i): gone for i, gone in enumerate(GONE[kv])})


def greedy(model: Any, cache: str, inputs: dict[str, Any] | None = None) -> Tensor:
    given = inputs or text_inputs()
    return model.generate(**given, max_new_tokens=6, do_sample=False, cache_implementation=cache, eos_token_id=None)


@contextmanager
def gated(model: nn.Module, plan: HeadPlan) -> Iterator[None]:
    """The reference: the unpruned model, with the output of the pruned heads zeroed before the output projection."""
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


TOWERS = ["clip", "siglip", "internvit", "qwen2_5", "timm_cls", "timm_siglip", "timm_qknorm", "timm_internvit"]


def tower_plan(model: nn.Module) -> HeadPlan:
    paths = list(attention_modules(model, "vision"))
    return plan_for(model, {paths[0]: (2,), paths[1]: (0, 1, 3)})


def with_lora(model: Any, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
    return get_peft_model(model, config).eval()
