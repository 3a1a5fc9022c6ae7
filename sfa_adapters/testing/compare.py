"""Helpers of the contract checks: comparisons, gradients, and snapshots of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.choices import TERMS
from sfa_adapters.config import SFAConfig
from sfa_adapters.inject import inject_sfa
from sfa_adapters.testing.cases import Inputs, TowerCase
from sfa_adapters.tuner import injected_layers

__all__ = [
    "Snapshot",
    "assert_close",
    "assert_same_gradients",
    "difference",
    "fill",
    "freeze_base",
    "gradients",
    "injected",
    "loss_of",
    "read",
    "set_backend",
    "strong_config",
    "structural",
]

STRONG: dict[str, Any] = {"init_std": 0.7, "terms": list(TERMS)}  # so large that every term changes the attention


def strong_config(**options: Any) -> SFAConfig:
    """A configuration whose initial scalars change the attention clearly."""
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
    """The largest absolute difference."""
    return (first.double() - second.double()).abs().max().item()


def assert_close(first: Tensor, second: Tensor, tolerance: float = 1e-5, what: str = "outputs") -> None:
    """Checks that two tensors differ by at most `tolerance` times the largest entry (at least 1)."""
    assert first.shape == second.shape
    scale = max(1.0, second.abs().max().item())
    largest = difference(first, second)
    assert largest <= tolerance * scale, f"{what} differ by {largest:g}; the largest entry is {scale:g}"


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
    """Checks that the same parameters have gradients, which differ by at most `tolerance` times their largest entry."""
    assert set(first) == set(second)
    assert first, "no parameter got a gradient"
    for name in first:
        scale = max(second[name].abs().max().item(), 0.1)
        largest = difference(first[name], second[name])
        assert largest <= tolerance * scale, (
            f"gradient of {name} differs by {largest:g}; its largest entry is {scale:g}"
        )


def structural(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of SFA by name."""
    return {name: p for name, p in model.named_parameters() if ".sfa_" in name or name.startswith("sfa_")}


def freeze_base(model: nn.Module) -> None:
    """Leaves only SFA's parameters trainable."""
    scalars = structural(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in scalars)


def set_backend(model: nn.Module, backend: str) -> None:
    """Sets the backend of every adapter."""
    for _, _, layer in injected_layers(model):
        for config in layer.configs.values():
            config.backend = backend


def fill(model: nn.Module, value: float) -> None:
    """Sets every scalar of SFA to one value."""
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
        """Compares with the model as it is now."""
        now = Snapshot(model)
        assert list(now.tensors) == list(self.tensors)
        for name, tensor in self.tensors.items():
            assert torch.equal(now.tensors[name], tensor), name
        for attribute in ("requires_grad", "identities", "modules", "hooks", "attributes", "config"):
            assert getattr(now, attribute) == getattr(self, attribute), attribute
