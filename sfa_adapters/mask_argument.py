"""A lazy mask enters an attention module through its mask argument, and afterwards it is checked that it was used.

The one way in which SFA, ADAT and DyMU reach attention. A forward pre-hook gives the mask (`given_mask`, `give_mask`);
a forward hook asks whether it was used (`unused_mask`): an attention implementation that drops masks would make the
feature do nothing, in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sfa_adapters.hooks import attach, attachment_of
from sfa_adapters.mask import LazyMask

__all__ = ["attach_to_attention", "give_mask", "given_mask", "unused_mask"]


@dataclass(frozen=True)
class _MaskArgument:
    """The argument of a forward that takes the mask.

    Attributes:
        name: Its name.
        position: Its position; None where the module takes it through `**kwargs`.
    """

    name: str
    position: int | None


def attach_to_attention(
    attention: nn.Module, feature: str, state: Any, argument: str, pre: Callable[..., Any], post: Callable[..., Any]
) -> None:
    """Attaches the two hooks of a feature that gives masks to an attention module.

    Args:
        attention: The attention module.
        feature: Name of the feature.
        state: Its state.
        argument: Name of the argument of the module's forward that takes the mask.
        pre: Forward pre-hook, which calls `give_mask`.
        post: Forward hook, which calls `unused_mask`.
    """
    parameters = list(inspect.signature(type(attention).forward).parameters)
    # `self` is the first parameter.
    place = _MaskArgument(argument, parameters.index(argument) - 1 if argument in parameters else None)
    attach(attention, feature, state, place=place, pre=pre, post=post)


def given_mask(attention: nn.Module, feature: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The mask that a call of an attention module was given, or None."""
    place: _MaskArgument = attachment_of(attention, feature).place
    if place.position is not None and len(args) > place.position:
        return args[place.position]
    return kwargs.get(place.name)


def give_mask(
    attention: nn.Module, feature: str, mask: LazyMask | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a forward pre-hook of an attention module returns: its arguments with a mask where the mask stands.

    Args:
        attention: The attention module.
        feature: Name of the feature that gives the mask.
        mask: The mask, remembered for `unused_mask`; None leaves the call as it is.
        args: Arguments of the call.
        kwargs: Likewise.
    """
    attachment = attachment_of(attention, feature)
    attachment.mask, place = mask, attachment.place
    if mask is None:
        return None
    if place.position is not None and len(args) > place.position:
        return (*args[: place.position], mask, *args[place.position + 1 :]), kwargs
    return args, {**kwargs, place.name: mask}


def unused_mask(attention: nn.Module, feature: str) -> Any:
    """The mask of the call that ends now, if the attention ran without it: its implementation drops masks.

    Returns:
        The mask; None where it was used, or none was given.
    """
    attachment = attachment_of(attention, feature)
    mask, attachment.mask = attachment.mask, None
    return None if mask is None or mask.used else mask
