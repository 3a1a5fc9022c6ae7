"""What a bias needs to know of an attention module that nobody wrote for it: its heads, and the argument for a mask.

Both are read from the module, its signature and its configuration; nothing is written on it. A wrong guess does no
harm in silence: after each forward it is checked that the mask was used (`BiasNotAppliedError`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from sfa_adapters.errors import InjectionError, UnsupportedAttentionError

__all__ = ["MaskArgument", "choose_mask_argument", "head_count", "parameter_names"]

HEAD_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "attention_heads")
# The mask of the model stands in one of these; the bias is added to it.
MASK_NAMES = ("attention_mask", "attn_mask", "mask")
# transformers' fused attention adds this one to the logits (from 5.14 on), also where a module hands on no mask.
POSITION_BIAS = "position_bias"


@dataclass(frozen=True)
class MaskArgument:
    """The argument of an attention module's forward that takes the bias.

    Attributes:
        name: Its name.
        reason: Why it was chosen, for `describe`.
    """

    name: str
    reason: str


def head_count(attention: nn.Module, tower: nn.Module | None = None, path: str = "") -> int:
    """Attention heads of a module: its own attribute, else that of its configuration, else of the tower's.

    Args:
        attention: The attention module.
        tower: The tower around it.
        path: Its path, for the message.

    Raises:
        InjectionError: Nobody says it, or the module itself says something that is no number of heads; lists the names
            that were looked for.
    """
    holders: list[Any] = [attention, getattr(attention, "config", None)]
    if tower is not None:
        holders.append(getattr(tower, "config", None))
    for holder in holders:
        for name in HEAD_NAMES:
            count = getattr(holder, name, None)
            if isinstance(count, int) and not isinstance(count, bool) and count > 0:
                return count
            if holder is attention and count is not None:  # the configuration knows nothing of pruned heads
                raise InjectionError(f"{_named(attention, path)} has {name}={count!r}, which is no number of heads.")
    raise InjectionError(
        f"{_named(attention, path)} does not say its number of heads: neither it nor its config has one of "
        f"{', '.join(HEAD_NAMES)}. Give the module such an attribute where it is defined, or register a backbone with "
        "wrap_attention."
    )


def _named(module: nn.Module, path: str) -> str:
    kind = type(module).__name__
    return f"{path} ({kind})" if path else kind


def parameter_names(attention: nn.Module) -> tuple[list[str], bool]:
    """Names of the parameters of a module's forward without `self`, and whether it takes any keyword argument."""
    parameters = list(inspect.signature(type(attention).forward).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def choose_mask_argument(attention: nn.Module, declared: str | None = None, segmented: bool = False) -> MaskArgument:
    """Which argument of an attention module takes an additive mask.

    Args:
        attention: The module.
        declared: What the record of its tower says (`Backbone.mask_argument`); it is believed if the module takes it.
        segmented: Whether it computes attention segment by segment; such modules give each segment no mask of their
            own, so that a bias goes beside it.

    Raises:
        UnsupportedAttentionError: The module takes none.
    """
    names, any_keyword = parameter_names(attention)
    kind = type(attention).__name__
    if declared is not None:
        if declared in names or any_keyword:
            return MaskArgument(declared, "said by the record of the tower")
        raise UnsupportedAttentionError(
            f"{kind}.forward takes no argument {declared!r} (it has {names}), which the record of its tower names as "
            "its mask (Backbone.mask_argument). Name one that it has, or leave the choice to the signature."
        )
    by_name = next((name for name in MASK_NAMES if name in names), None)
    if by_name is not None and not segmented:
        return MaskArgument(by_name, f"{kind}.forward has an argument of this name")
    if POSITION_BIAS in names or any_keyword:
        why = "computes attention segment by segment" if segmented else "has no mask argument"
        return MaskArgument(POSITION_BIAS, f"{kind}.forward {why} and hands keyword arguments on to the attention")
    raise UnsupportedAttentionError(
        f"{kind}.forward takes no mask ({', '.join(MASK_NAMES)}) and no further keyword arguments (it has {names}), so "
        "a bias cannot enter it. Register a backbone with wrap_attention for it (docs/adding_a_backbone.md)."
    )
