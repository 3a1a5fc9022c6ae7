"""`AttentionKind`: where the heads of a class of attention modules are in its projections, as `prune_heads` needs it.

Before adding a record, read the forward of the class: it must take its head counts from the module or from the shapes
of its projections, never from the configuration. Classes without a record are refused, because a wrong guess would run
without an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sfa_adapters.errors import InjectionError
from sfa_adapters.moved import know_old_names

__all__ = [
    "AttentionKind",
    "HeadGeometry",
    "attention_kinds",
    "base_linear",
    "read_geometry",
    "register_attention_kind",
]

know_old_names(__name__)


@dataclass(frozen=True)
class AttentionKind:
    """The record of one kind of attention module.

    Attributes:
        classes: Patterns of `module.Class`, as in `fnmatch`.
        output: Name of the output projection.
        fused: Name of the joint projection of query, key and value (in this order); None if there are three.
        widths: Attributes of the module that hold the total width of all its heads.
    """

    classes: tuple[str, ...]
    output: str
    fused: str | None = None
    widths: tuple[str, ...] = ()


_KINDS: list[AttentionKind] = [
    AttentionKind(
        (
            "transformers.models.gemma3.*.Gemma3Attention",
            "transformers.models.llama.*.LlamaAttention",
            "transformers.models.mistral.*.MistralAttention",
            "transformers.models.qwen2.*.Qwen2Attention",
            "transformers.models.qwen2_5_vl.*.Qwen2_5_VLAttention",
            "transformers.models.qwen3.*.Qwen3Attention",
            "transformers.models.qwen3_vl.*.Qwen3VLTextAttention",
            "transformers.models.glm_ocr.*.GlmOcrTextAttention",
            "transformers.models.paddleocr_vl.*.PaddleOCRAttention",
        ),
        output="o_proj",
    ),
    AttentionKind(
        (
            "transformers.models.clip.*.CLIPAttention",
            "transformers.models.siglip.*.SiglipAttention",
            "transformers.models.paddleocr_vl.*.PaddleOCRVisionAttention",
        ),
        output="out_proj",
    ),
    AttentionKind(
        ("transformers.models.internvl.*.InternVLVisionAttention",), output="projection_layer", widths=("embed_dim",)
    ),
    AttentionKind(
        (
            "transformers.models.qwen2_5_vl.*.Qwen2_5_VLVisionAttention",
            "transformers.models.qwen3_vl.*.Qwen3VLVisionAttention",
            "transformers.models.glm_ocr.*.GlmOcrVisionAttention",
        ),
        output="proj",
        fused="qkv",
    ),
    AttentionKind(("timm.layers.attention.Attention",), output="proj", fused="qkv", widths=("attn_dim",)),
]


def attention_kinds() -> tuple[AttentionKind, ...]:
    """All registered kinds of attention modules."""
    return tuple(_KINDS)


def register_attention_kind(kind: AttentionKind) -> AttentionKind:
    """Registers a kind of attention module whose heads can be removed; call it in the file of the host or tower.

    Args:
        kind: The record.

    Returns:
        The same record.

    Raises:
        InjectionError: One of its classes has a record already.
    """
    taken = {pattern for known in _KINDS for pattern in known.classes}
    twice = next((pattern for pattern in kind.classes if pattern in taken), None)
    if twice is not None:
        raise InjectionError(f"There is a record of {twice} already.")
    _KINDS.append(kind)
    return kind


@dataclass(frozen=True)
class HeadGeometry:
    """The present heads of one attention module.

    Attributes:
        kind: Its record.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        head_dim: Channels of a head.
    """

    kind: AttentionKind
    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_geometry(path: str, module: nn.Module) -> HeadGeometry:
    """Reads the heads of an attention module from its projections.

    Args:
        path: Its path, for messages.
        module: The module.

    Returns:
        Its record and head counts.

    Raises:
        InjectionError: Its class is not known, its heads are not independent of each other, or a projection cannot be
            sliced.
    """
    name = f"{type(module).__module__}.{type(module).__name__}"
    kind = next((k for k in _KINDS if any(fnmatchcase(name, pattern) for pattern in k.classes)), None)
    if kind is None:
        known = ", ".join(pattern.rpartition(".")[2] for k in _KINDS for pattern in k.classes)
        raise InjectionError(
            f"{path} is a {name}, whose heads cannot be removed. Known are {known}; register_attention_kind adds one."
        )
    attention: Any = module
    size = int(attention.head_dim)
    output = base_linear(f"{path}.{kind.output}", getattr(module, kind.output))
    heads = output.in_features // size
    if kind.fused is None:
        keys = base_linear(f"{path}.k_proj", attention.k_proj).out_features // size
        rows = base_linear(f"{path}.q_proj", attention.q_proj).out_features
        base_linear(f"{path}.v_proj", attention.v_proj)
    else:
        keys = heads
        rows = base_linear(f"{path}.{kind.fused}", getattr(module, kind.fused)).out_features // 3
    if rows != heads * size:
        raise InjectionError(f"{path}: {rows} query channels are not {heads} heads of {size}.")
    for norm in ("q_norm", "k_norm", "norm"):
        weight = getattr(getattr(module, norm, None), "weight", None)
        if weight is not None and weight.numel() != size:
            raise InjectionError(
                f"{path}.{norm} normalises {weight.numel()} channels of all heads together, so that no head can go "
                "without changing the others."
            )
    return HeadGeometry(kind, heads, keys, size)


def base_linear(path: str, module: nn.Module) -> nn.Linear:
    """Returns a linear layer itself, or the one inside a LoRA wrapper, after checking that it can be sliced.

    Args:
        path: Its path, for messages.
        module: A linear layer, or one that PEFT wrapped for LoRA.

    Raises:
        InjectionError: It is quantised, not loaded, or wrapped by something that cannot be sliced.
    """
    if isinstance(module, BaseTunerLayer):
        if type(module) is not LoraLinear or len(module.lora_magnitude_vector) or module.lora_variant:
            raise InjectionError(
                f"{path} carries a {type(module).__name__} adapter that cannot be sliced; plain LoRA can. Merge it "
                "(merge_and_unload) or take it out before pruning."
            )
        module = module.get_base_layer()
    if not isinstance(module, nn.Linear):
        raise InjectionError(f"{path} is a {type(module).__name__}, not a linear layer: it cannot be sliced.")
    if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        raise InjectionError(
            f"{path} is quantised ({type(module).__name__}, {type(module.weight).__name__}): its blocks of values "
            "reach over heads. Prune the model in bf16, save it with save_pruned, and quantise what load_pruned gives."
        )
    if module.weight.is_meta:
        raise InjectionError(f"{path} has no values (meta device): load or initialise the model before pruning.")
    return module
