"""`AxialRamp`: it adds to what the optimizer learns, ends at its exact strength, and its absence is warned of."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sfa_adapters import AxialRamp, SFAConfig, inject_sfa, load_sfa, save_sfa
from sfa_adapters.errors import InjectionError, SFAWarning, TrainingError
from sfa_adapters.tuner import injected_layers
from tests.support import compare
from tests.support.towers import CASES, set_checkpointing

SIGLIP = next(case for case in CASES if case.backbone == "siglip")
MISSED = r"AxialRamp\.step\(\) never ran"


def ramped(steps: int = 5, **options: Any) -> Any:
    torch.manual_seed(0)
    return inject_sfa(SIGLIP.build(), SFAConfig(init="axial", init_warmup_steps=steps, **options))


def rows(model: nn.Module) -> Tensor:
    """`w_row` of the first layer, `[4]`."""
    return injected_layers(model)[0][2].tensors("default")["sfa_row"]


def train(model: Any, steps: int, ramp: AxialRamp | None = None, accumulate: int = 1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        for _ in range(accumulate):
            compare.loss_of(SIGLIP.hidden(model, SIGLIP.inputs(0))).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ramp is not None:
            ramp.step()


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 50.0), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_it_comes_to_its_strength_exactly(steps: int, strength: float, dtype: torch.dtype, data: st.DataObject) -> None:
    """In any number of steps and precision, also when it is interrupted; other heads do not change."""
    config = SFAConfig(init="axial", init_strength=strength, init_warmup_steps=steps, keep_float32=False)
    model = inject_sfa(SIGLIP.build(), config).to(dtype)
    before = {name: p.clone() for name, p in compare.structural(model).items()}
    assert rows(model)[0] == 0
    pause = data.draw(st.integers(0, steps))
    ramp = AxialRamp(model)
    for _ in range(pause):
        ramp.step()
    assert ramp.done == pause
    assert rows(model)[0] == torch.tensor(strength * (pause / steps), dtype=torch.float64).to(dtype)
    ramp = AxialRamp(model, done=pause)
    for _ in range(steps - pause + 3):
        ramp.step()
    assert ramp.done == ramp.steps == steps
    target = torch.tensor(strength, dtype=dtype)
    for name, parameter in compare.structural(model).items():
        expected = before[name].clone()
        if "sfa_row" in name:
            expected[0] = target
        if "sfa_col" in name:
            expected[1] = target
        assert torch.equal(parameter, expected), name


def test_what_the_optimizer_learns_stays() -> None:
    """A constant gradient and SGD: the strength and the learned part add up."""
    model = ramped(4, init_strength=2.0)
    optimizer, ramp = torch.optim.SGD(model.parameters(), lr=0.5), AxialRamp(model)
    for number in range(6):
        rows(model).grad = torch.full((4,), -0.25)
        optimizer.step()
        ramp.step()
        assert rows(model)[0].item() == pytest.approx(0.125 * (number + 1) + 2.0 * min(1, (number + 1) / 4))
    assert ramp.done == 4


def test_a_model_without_warmup_has_nothing_to_ramp() -> None:
    model = inject_sfa(SIGLIP.build(), SFAConfig(init="axial"))
    before, ramp = rows(model).clone(), AxialRamp(model)
    ramp.step()
    assert (ramp.done, ramp.steps) == (0, 0)
    assert torch.equal(rows(model), before)
    with pytest.raises(InjectionError, match="has no SFA, so there is nothing to ramp"):
        AxialRamp(SIGLIP.build())
    with pytest.raises(InjectionError, match="done=-1"):
        AxialRamp(model, done=-1)


def test_only_active_adapters_grow() -> None:
    model = ramped(2)
    inject_sfa(model, SFAConfig(init="axial", init_warmup_steps=4, init_strength=8.0), "second")
    for _, _, layer in injected_layers(model):
        layer.set_adapter(["second"])
    ramp = AxialRamp(model)
    ramp.step()
    assert rows(model)[0] == 0
    assert injected_layers(model)[0][2].tensors("second")["sfa_row"][0] == 2.0


def test_flattened_scalars_are_refused() -> None:
    model = ramped()
    layer: Any = injected_layers(model)[0][2]
    layer.sfa_row["default"] = nn.Parameter(torch.zeros(2))
    with pytest.raises(TrainingError, match=r"have shape \(2,\) in place of \(4,\).*init_warmup_steps=0"):
        AxialRamp(model).step()


# -- progress is saved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["save_sfa", "peft", "beside lora", "state dict", "copy"])
def test_progress_goes_with_the_values(way: str, tmp_path: Path) -> None:
    """A ramp that was interrupted goes on, and one that came to its end does not begin again."""
    config = SFAConfig(init="axial", init_warmup_steps=4, init_strength=2.0)
    lora = LoraConfig(target_modules=["q_proj"])
    tower: Any = SIGLIP.build()
    if way == "peft":
        model: Any = get_peft_model(tower, config)  # pyright: ignore[reportArgumentType]
    else:
        model = inject_sfa(get_peft_model(tower, lora) if way == "beside lora" else tower, config)
    ramp = AxialRamp(model)
    for _ in range(3):
        ramp.step()
    base: Any = SIGLIP.build()
    if way == "save_sfa":
        again: Any = load_sfa(base, save_sfa(model, tmp_path))
    elif way == "peft":
        model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    elif way == "beside lora":
        model.save_pretrained(str(tmp_path))
        again = inject_sfa(get_peft_model(base, lora), config)
        again.load_adapter(str(tmp_path), "default", is_trainable=True)
    elif way == "state dict":
        again = inject_sfa(base, config)
        again.load_state_dict(model.state_dict())
    else:
        again = copy.deepcopy(model)
    ramp = AxialRamp(again)
    assert ramp.done == 3
    for _ in range(4):
        ramp.step()
    assert ramp.done == 4
    assert rows(again)[0] == 2.0
    ended = AxialRamp(again)
    ended.step()
    assert rows(again)[0] == 2.0


# -- a ramp that nobody steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_without_it_warns_once(reentrant: bool | None) -> None:
    """However often layers run: with gradients accumulated, and again under checkpointing."""
    model = ramped().train()
    set_checkpointing(SIGLIP, model, reentrant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, 2, accumulate=3)
    with pytest.warns(SFAWarning, match=rf"training has changed the scalars 2 times, but {MISSED}") as caught:
        train(model, 4)
    assert len(caught) == 1


@pytest.mark.parametrize("reentrant", [None, False])
def test_training_with_it_does_not_warn(reentrant: bool | None, tmp_path: Path) -> None:
    model = ramped().train()
    set_checkpointing(SIGLIP, model, reentrant)
    ramp = AxialRamp(model)
    train(model, 7, ramp, accumulate=2)
    assert ramp.done == 5
    assert rows(model)[0] > 2.5
    model.state_dict()
    save_sfa(model, tmp_path)


def test_forwards_alone_do_not_warn() -> None:
    model = ramped()
    for _ in range(5):
        SIGLIP.hidden(model, SIGLIP.inputs(0))
    model.state_dict()


def test_saving_without_it_warns(tmp_path: Path) -> None:
    with pytest.warns(SFAWarning, match=MISSED):
        save_sfa(ramped(), tmp_path / "a")
    model: Any = get_peft_model(SIGLIP.build(), SFAConfig(init="axial", init_warmup_steps=3))  # pyright: ignore[reportArgumentType]
    with pytest.warns(SFAWarning, match=MISSED):
        model.save_pretrained(str(tmp_path / "b"))
    SFAConfig(init="axial", init_warmup_steps=3).save_pretrained(str(tmp_path / "c"))  # belongs to no model yet


def test_a_state_dict_of_scalars_that_were_trained_without_it_warns() -> None:
    """What a stock Trainer saves."""
    model = ramped()
    train(model, 2)
    with pytest.warns(SFAWarning, match=rf"the scalars were trained, but {MISSED}"):
        model.state_dict()
    model.state_dict()  # once
