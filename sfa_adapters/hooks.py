"""Attaches the features of this library (SFA, ADAT, DyMU, FastV, ...) to the modules of a model, and lists them.

A feature attaches forward hooks, watchers of a method, and its state. All of it is stored under the name of the feature
in the module itself, so that

* detaching one feature never affects another, whatever the order in which they were attached;
* one feature learns of another through `features_of(model)`, not from its attributes;
* copies and pickles of a model are independent: hooks are functions that look their state up in the module that they
  are called with, and are removed by id, which stays valid in a copy where a handle does not.

No class and no forward is changed.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

__all__ = [
    "Attach",
    "Attachment",
    "attach",
    "attached_while",
    "attachment_of",
    "detach",
    "detach_all",
    "features_of",
    "state_of",
    "watch_method",
]

# Attribute of a module: its attachments by feature name.
ATTACHED = "_sfa_attached"
Hook = Callable[..., Any]
# (module, its method, arguments of the call by name) -> None
MethodWatcher = Callable[[nn.Module, Callable[..., Any], dict[str, Any]], None]
# As `attach`, without the name of the feature.
Attach = Callable[..., None]

_numbers = itertools.count()


@dataclass(eq=False)
class Attachment:
    """What one feature has attached to one module.

    Attributes:
        state: The state of the feature, the same object in all modules of a model (of a tower, for SFA).
        place: Data of this module for its hooks, such as the number of a layer.
        hook_ids: Ids of its forward hooks and pre-hooks.
        watchers: Its watchers of methods, by the name of the method.
        mask: The lazy mask that it passed to the module's call under way.
    """

    state: Any
    place: Any = None
    hook_ids: list[int] = field(default_factory=list)
    watchers: dict[str, MethodWatcher] = field(default_factory=dict)
    mask: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mask": None}


# -- attaching and detaching ------------------------------------------------------------------------------------------


def attach(
    module: nn.Module,
    feature: str,
    state: Any,
    *,
    place: Any = None,
    pre: Hook | None = None,
    post: Hook | None = None,
    prepend: bool = False,
    always_call: bool = False,
) -> None:
    """Attaches a feature to a module; may be called again to add hooks.

    Args:
        module: The module.
        feature: Name of the feature.
        state: The feature's state, for `state_of` and `features_of`.
        place: Data of this module for its hooks; None keeps what is stored.
        pre: Forward pre-hook, called with (module, args, kwargs).
        post: Forward hook, called with (module, args, output).
        prepend: Whether `post` runs before the forward hooks that are registered already.
        always_call: Whether `post` also runs after an error.
    """
    attachment = module.__dict__.setdefault(ATTACHED, {}).setdefault(feature, Attachment(state))
    attachment.state = state
    if place is not None:
        attachment.place = place
    if pre is not None:
        attachment.hook_ids.append(module.register_forward_pre_hook(pre, with_kwargs=True).id)
    if post is not None:
        handle = module.register_forward_hook(post, prepend=prepend, always_call=always_call)
        attachment.hook_ids.append(handle.id)


def detach(module: nn.Module, feature: str) -> bool:
    """Removes everything that a feature has attached to one module.

    Args:
        module: The module; its children are left alone.
        feature: Name of the feature.

    Returns:
        Whether there was anything to remove.
    """
    attachments: dict[str, Attachment] = module.__dict__.get(ATTACHED, {})
    attachment = attachments.pop(feature, None)
    if attachment is None:
        return False
    for number in attachment.hook_ids:
        for hooks in (
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
        ):
            hooks.pop(number, None)
    for name in attachment.watchers:
        method = module.__dict__.get(name)
        if isinstance(method, _WatchedMethod) and not any(name in other.watchers for other in attachments.values()):
            method.restore()
    if not attachments:
        del module.__dict__[ATTACHED]
    return True


def detach_all(model: nn.Module, feature: str) -> bool:
    """Calls `detach` for every module of a model; returns whether there was anything to remove."""
    return sum(detach(module, feature) for module in model.modules()) > 0


@contextmanager
def attached_while(feature: str) -> Iterator[Attach]:
    """Context in which a feature is attached. Several of one feature may be open at once; each removes only its own.

    Args:
        feature: Name of the feature, for `features_of`.

    Yields:
        `attach` without the name of the feature.
    """
    name, modules = f"{feature}#{next(_numbers)}", []

    def attach_here(module: nn.Module, state: Any, **options: Any) -> None:
        modules.append(module)
        attach(module, name, state, **options)

    try:
        yield attach_here
    finally:
        for module in modules:
            detach(module, name)


# -- looking up -------------------------------------------------------------------------------------------------------


def features_of(model: nn.Module) -> Mapping[str, Any]:
    """The features of this library that are attached to a model, or to a part of it, with their states.

    Args:
        model: Any module.

    Returns:
        The state of each feature by its name: "sfa", "adat", "dymu" and "fastv" from `inject_...` to `eject_...`,
        "scr", "observe" and "answer_logits" while such a context is open. Read-only. Where a model has several towers
        with SFA, the state is that of the first one.

    Example:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> from sfa_adapters import inject_sfa
        >>> tower = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=2, vision_use_head=False))
        >>> list(features_of(tower)), list(features_of(inject_sfa(tower)))
        ([], ['sfa'])
    """
    states: dict[str, Any] = {}
    for module in model.modules():
        attachments: dict[str, Attachment] = module.__dict__.get(ATTACHED, {})
        for name, attachment in attachments.items():
            states.setdefault(name.partition("#")[0], attachment.state)
    return MappingProxyType(states)


def state_of(module: nn.Module, feature: str) -> Any:
    """The state of a feature that is attached to this module itself, or None."""
    attachment = module.__dict__.get(ATTACHED, {}).get(feature)
    return None if attachment is None else attachment.state


def attachment_of(module: nn.Module, feature: str) -> Attachment:
    """What a feature has attached to this module itself, for the hooks of the feature."""
    return module.__dict__[ATTACHED][feature]


# -- methods that no module runs --------------------------------------------------------------------------------------


def watch_method(module: nn.Module, feature: str, name: str, watcher: MethodWatcher) -> None:
    """Calls a watcher before a method of one module, where there is no module call to hook.

    Args:
        module: The module; the feature is attached to it already.
        feature: Name of the feature.
        name: Name of the method. It is shadowed in this one object as long as it is watched.
        watcher: Called with the module, its method, and the arguments of the call by name.
    """
    attachment_of(module, feature).watchers[name] = watcher
    if not isinstance(module.__dict__.get(name), _WatchedMethod):
        module.__dict__[name] = _WatchedMethod(module, name)


class _WatchedMethod:
    """Shadows a method of one module: calls all watchers, then the method."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.before = module.__dict__.get(name)  # an instance attribute that was there already

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method: Any = getattr(type(self.module), self.name)
        given = dict(inspect.signature(method).bind(self.module, *args, **kwargs).arguments)
        attachments: dict[str, Attachment] = self.module.__dict__.get(ATTACHED, {})
        for attachment in list(attachments.values()):
            if self.name in attachment.watchers:
                attachment.watchers[self.name](self.module, method, dict(given))
        return method(self.module, *args, **kwargs) if self.before is None else self.before(*args, **kwargs)

    def restore(self) -> None:
        """Puts the original method back."""
        del self.module.__dict__[self.name]
        if self.before is not None:
            self.module.__dict__[self.name] = self.before
