"""`StandIn`: a module that takes the place of an attention module which has no argument for a mask.

For `Backbone.wrap_attention`. It shares the parameters and children of the original under their names, so that
state-dict keys do not change and LoRA finds its targets; `restore` gives the original back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["StandIn", "unwrap", "wrapping"]


class StandIn(nn.Module):
    """Shares everything of an attention module; a subclass writes the forward with a mask.

    Args:
        original: The attention module; it is kept, and `restore` gives it back.
    """

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a child: its parameters are this module's already
        for name, parameter in original._parameters.items():
            self.register_parameter(name, parameter)
        for name, child in original._modules.items():
            self.add_module(name, child)
        self.training = original.training

    def restore(self) -> nn.Module:
        """The original, with the parameters and modules that are here now (a later LoRA may have replaced some)."""
        original = self.__dict__["original"]
        for held, here in ((original._parameters, self._parameters), (original._modules, self._modules)):
            held.update({name: value for name, value in here.items() if name in held})
        original.training = self.training
        return original


def wrapping(stand_in: type[StandIn], *kinds: type[nn.Module] | str) -> Callable[[nn.Module], nn.Module]:
    """`Backbone.wrap_attention`: puts a stand-in in place of an attention module; other modules and stand-ins stay.

    Args:
        stand_in: Its class.
        *kinds: Classes that it stands in for, or their names.
    """

    def wrap(attention: nn.Module) -> nn.Module:
        names = {kind.__name__ for kind in type(attention).__mro__}
        wanted = any(kind in names if isinstance(kind, str) else isinstance(attention, kind) for kind in kinds)
        return stand_in(attention) if wanted else attention

    return wrap


def unwrap(attention: nn.Module) -> nn.Module:
    """`Backbone.unwrap_attention`: the original of a stand-in."""
    return attention.restore() if isinstance(attention, StandIn) else attention
