"""Expected speed-up from pruning heads, from counted bytes and operations: nothing is timed, no weights are needed.

Decoding one token reads every weight of the language model once, and the keys and values of all tokens so far; on a
memory-bound device the time is proportional to these bytes. Prefill is compute-bound, so its floating-point operations
count. Both are upper bounds of the speed-up: kernel launches, norms and softmax cost the same as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sfa_adapters.compat import flop_counter
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.timing import answer
from sfa_adapters.vlm.parts import plain_model

__all__ = ["can_answer", "decode_bytes", "expected_speedup", "flops_of"]


def expected_speedup(model: nn.Module, plan: HeadPlan, length: int = 0) -> float:
    """Largest speed-up of decoding that a head plan allows: bytes read before over bytes read after. Nothing is pruned.

    Args:
        model: The model with all its heads. Nothing runs, so it may be on the meta device.
        plan: The heads to prune.
        length: Tokens whose keys and values a step reads: prompt and answer so far, of all rows of a batch together.

    Returns:
        The ratio, e.g. 1.11 if a step reads 11% more before than after. Heads of a tower have no influence.

    Raises:
        InjectionError: The plan does not fit the model, or the model has no language model.
        RecipeError: The length is negative.

    Example:
        >>> from sfa_adapters.recipes.nano.models import load_nano
        >>> path = "model.language_model.layers.0.self_attn"
        >>> round(expected_speedup(load_nano().model, HeadPlan({path: (1,)}, {path: 4}, {path: 4})), 3)
        1.027
    """
    return decode_bytes(model, length) / decode_bytes(model, length, plan)


def decode_bytes(model: nn.Module, length: int = 0, plan: HeadPlan | None = None) -> int:
    """Bytes that decoding one token reads: weights of the language model, and its keys and values.

    The weights are those of all layers, the last norm and `lm_head`. The embedding table is left out, since one row of
    it is read, unless it is tied to `lm_head`; so are tower and projector. Every token of the cache counts in every
    layer (sliding windows read less).

    Args:
        model: The model, pruned or not; it may be on the meta device.
        length: Tokens in the cache, of all rows of a batch together.
        plan: Heads to count as pruned.

    Raises:
        InjectionError: The plan does not fit the model, or the model has no language model.
        RecipeError: The length is negative.
    """
    if length < 0:
        raise RecipeError(f"length={length} must be a number of tokens, 0 or more.")
    base = plain_model(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if not isinstance(base, PreTrainedModel) or head is None:
        raise InjectionError(f"{type(base).__name__} decodes no tokens: there is no language model with a head in it.")
    decoder, table = base.get_decoder(), {id(p) for p in base.get_input_embeddings().parameters()}
    weights = {id(p): p for p in decoder.parameters() if id(p) not in table}
    weights |= {id(p): p for p in head.parameters()}
    stays = _stays(model, base, decoder, plan) if plan is not None else {}
    total = sum((p.numel() * p.element_size() * stays.get(key, 1) for key, p in weights.items()), Fraction(0))
    if length:
        for module in decoder.modules():
            if hasattr(module, "layer_idx") and hasattr(module, "k_proj"):
                attention: Any = module
                channels = attention.k_proj.out_features + attention.v_proj.out_features
                share = stays.get(id(module), 1)
                total += length * channels * share * base.dtype.itemsize
    return int(total)


def flops_of(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Floating-point operations of the matrix products of one forward, or of the first token if the model generates.

    Counted by `torch.utils.flop_counter` during the forward, with `scaled_dot_product_attention` (also on a CPU). A
    causal mask does not reduce the count.
    """
    with torch.no_grad(), flop_counter() as counter:
        if can_answer(model):
            answer(model, inputs, 1)
        else:
            model(**inputs)
    return counter.get_total_flops()


def can_answer(model: nn.Module) -> bool:
    """Whether a model can generate; a bare tower, or a language model without a head, gives only hidden states."""
    base = plain_model(model)
    return isinstance(base, PreTrainedModel) and bool(base.can_generate())


def _stays(model: nn.Module, base: nn.Module, decoder: nn.Module, plan: HeadPlan) -> dict[int, Fraction]:
    """Kept share of the keys and values of each attention module, and of its parameters, by id."""
    modules = dict(model.named_modules()) | dict(base.named_modules())
    inside = {id(module) for module in decoder.modules()}
    stays: dict[int, Fraction] = {}
    for name, heads in plan.num_heads.items():
        attention: Any = modules.get(name)
        if attention is None:
            raise InjectionError(f"{type(base).__name__} has no module {name!r}, which the head plan names.")
        if id(attention) not in inside:
            continue
        groups = plan.num_kv_heads[name]
        wanted = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
        rows = {part: getattr(getattr(attention, part, None), "out_features", None) for part in wanted}
        width = getattr(attention, "head_dim", 0)
        if not width or rows != {part: count * width for part, count in wanted.items()}:
            raise InjectionError(
                f"{name} ({type(attention).__name__}) projects to {rows} channels in heads of {width}, but the plan is "
                f"for {heads} query and {groups} key/value heads: it was made for another model."
            )
        query, value = Fraction(len(plan.kept(name)), heads), Fraction(len(plan.kept_kv(name)), groups)
        shares = {"q_proj": query, "k_proj": value, "v_proj": value, "o_proj": query}
        stays[id(attention)] = value
        for path, parameter in attention.named_parameters():
            part = path.partition(".")[0]
            # The dimension of LoRA matrices and of the bias that is not one of heads keeps its size.
            apart = "lora_B" in path or path.endswith("bias") if part == "o_proj" else "lora_A" in path
            if part in shares and not apart:
                stays[id(parameter)] = shares[part]
    return stays
