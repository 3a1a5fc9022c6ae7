"""Helpers of the tests: comparisons, snapshots of a model, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.compat import with_cache
from sfa_adapters.tuner import injected_layers
from tests.support.towers import Inputs, TowerCase

STRONG = {"init_std": 0.7}  # scalars of a size at which every term moves the attention


def strong_config(**options: Any) -> SFAConfig:
    return SFAConfig(**{**STRONG, **options})


def injected(case: TowerCase, **options: Any) -> tuple[nn.Module, Inputs]:
    """A tower with strong, reproducible SFA scalars."""
    tower, inputs = case.fresh()
    torch.manual_seed(3)
    return inject_sfa(tower, strong_config(**options)), inputs


def read(case: TowerCase, model: nn.Module, inputs: Inputs) -> Tensor:
    """Features of all images in one matrix, without gradients."""
    with torch.no_grad():
        return torch.cat(case.hidden(model, inputs))


def difference(first: Tensor, second: Tensor) -> float:
    return (first.double() - second.double()).abs().max().item()


def assert_close(first: Tensor, second: Tensor, tolerance: float = 1e-5, what: str = "outputs") -> None:
    """Within `tolerance` of the largest entry (or of 1)."""
    assert first.shape == second.shape
    scale = max(1.0, second.abs().max().item())
    found = difference(first, second)
    assert found <= tolerance * scale, f"{what} differ by {found:g}; the largest entry is {scale:g}"


def loss_of(hidden: Sequence[Tensor]) -> Tensor:
    """A scalar that weighs every feature differently, so that every gradient is exercised."""
    states = torch.cat(list(hidden)).float()
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(11))
    return (states * weights).mean() + (states.square() * weights.flip(0)).mean()


def gradients(case: TowerCase, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of all trainable parameters that get one."""
    model.zero_grad(set_to_none=True)
    loss_of(case.hidden(model, inputs)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Same parameters, and gradients within `tolerance` of the largest one of each parameter's own kind."""
    assert set(first) == set(second)
    assert first, "no parameter got a gradient"
    for name in first:
        scale = max(second[name].abs().max().item(), 0.1)
        found = difference(first[name], second[name])
        assert found <= tolerance * scale, f"gradient of {name} differs by {found:g}; its largest entry is {scale:g}"


def structural(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of SFA by name."""
    return {name: p for name, p in model.named_parameters() if ".sfa_" in name or name.startswith("sfa_")}


def freeze_base(model: nn.Module) -> None:
    """Leaves only SFA's parameters trainable."""
    ours = structural(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ours)


def set_backend(model: nn.Module, backend: str) -> None:
    for _, _, layer in injected_layers(model):
        for config in layer.configs.values():
            config.backend = backend


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in structural(model).values():
            parameter.fill_(value)


class Snapshot:
    """Everything about a model that an error or an ejection must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.identities = {name: id(p) for name, p in model.named_parameters()}
        self.modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
        self.hooks = {name: self._hooks(module) for name, module in model.named_modules()}
        self.attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
        self.config = str(getattr(model, "config", None))

    @staticmethod
    def _hooks(module: nn.Module) -> tuple[int, ...]:
        kinds = (module._forward_pre_hooks, module._forward_hooks, module._forward_pre_hooks_with_kwargs)
        return tuple(len(hooks) for hooks in kinds)

    def assert_unchanged(self, model: nn.Module) -> None:
        now = Snapshot(model)
        assert list(now.tensors) == list(self.tensors)
        for name, tensor in self.tensors.items():
            assert torch.equal(now.tensors[name], tensor), name
        for attribute in ("requires_grad", "identities", "modules", "hooks", "attributes", "config"):
            assert getattr(now, attribute) == getattr(self, attribute), attribute


def passing(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as an argument of a model or of its `generate`, under the name that this version of transformers has."""
    return with_cache(model, {}, cache)
