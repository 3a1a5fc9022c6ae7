"""`mask_argument.py`: a lazy mask reaches the attention module, and it is an error if it was not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_adapters import inject_sfa
from sfa_adapters.adat import inject_adat
from sfa_adapters.mask_argument import attach_to_attention, give_mask, given_mask, unused_mask
from sfa_adapters.packing import PackedMask
from sfa_adapters.tuner import injected_layers
from tests.adat.test_inject import mixed, patch_of
from tests.support.compare import read, strong_config
from tests.support.towers import CASES


class Attention(nn.Module):
    """Returns the mask that it got; uses it where `uses` is set."""

    uses = True
    others: tuple[Any, ...] = ()

    def forward(self, states: Tensor, attention_mask: Any = None, scale: float = 1.0, **kwargs: Any) -> Any:
        self.others = (scale, kwargs)
        mask = kwargs.get("position_bias", attention_mask)
        if self.uses and mask is not None:
            mask.tensor()
        return mask


def hooked(argument: str, mask: Any) -> tuple[Attention, list[Any]]:
    """An attention module that gets a mask of a feature, and what it was given and what was missed, call by call."""
    module, log = Attention(), []

    def pre(attention: nn.Module, args: Any, kwargs: Any) -> Any:
        log.append(given_mask(attention, "feature", args, kwargs))
        return give_mask(attention, "feature", mask, args, kwargs)

    def post(attention: nn.Module, args: Any, output: Any) -> None:
        log.append(unused_mask(attention, "feature"))

    attach_to_attention(module, "feature", None, argument, pre, post)
    return module, log


@pytest.mark.parametrize("argument", ["attention_mask", "position_bias"])
@pytest.mark.parametrize("call", ["nothing", "named", "positional"])
def test_a_mask_stands_where_the_module_takes_it(argument: str, call: str) -> None:
    mask, model_mask = PackedMask([2, 3]), torch.zeros(1)
    module, log = hooked(argument, mask)
    states = torch.zeros(1, 5, 4)
    positional = (model_mask,) if call == "positional" and argument == "attention_mask" else ()
    named = {argument: model_mask} if call == "named" else {}
    assert module(states, *positional, **named) is mask
    assert log == [model_mask if positional or named else None, None]


def test_all_other_arguments_of_the_call_stay() -> None:
    states, model_mask = torch.zeros(1, 5, 4), torch.zeros(1)
    for args, kwargs in (((model_mask, 0.5), {}), ((), {"scale": 0.5}), ((model_mask,), {"scale": 0.5})):
        mask = PackedMask([2, 3])
        module, _ = hooked("attention_mask", mask)
        assert module(states, *args, **kwargs, bounds=7) is mask
        assert module.others == (0.5, {"bounds": 7})


def test_a_mask_that_was_dropped_is_handed_back_once() -> None:
    mask = PackedMask([2, 3])
    module, log = hooked("attention_mask", mask)
    module.uses = False
    module(torch.zeros(1, 5, 4))
    assert log == [None, mask]
    assert unused_mask(module, "feature") is None


def test_without_a_mask_the_call_stays_as_it_is() -> None:
    module, log = hooked("attention_mask", None)
    assert module(torch.zeros(1, 5, 4)) is None
    assert log == [None, None]


def test_a_mask_of_a_forward_that_failed_is_not_missed_in_the_next_one() -> None:
    """ADAT gives a mask, the attention fails; then SFA's mask keeps the images apart, and ADAT gives none."""
    case = next(case for case in CASES if case.name == "siglip")
    tower, inputs = case.fresh()
    inject_sfa(tower, strong_config())
    inject_adat(tower, mixed(patch_of(tower)))
    for _, _, layer in injected_layers(tower):
        layer.set_adapter([])
    projection = next(module for name, module in tower.named_modules() if name.endswith("q_proj"))

    def fail(module: nn.Module, args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = projection.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        read(case, tower, inputs)
    handle.remove()
    for _, _, layer in injected_layers(tower):
        layer.set_adapter(["default"])
    assert read(case, tower, inputs).isfinite().all()
