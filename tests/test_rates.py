"""Learning rates of the structural scalars: parameter groups, their sum over a run, the largest scalars."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.optim import lr_scheduler
from transformers import get_cosine_schedule_with_warmup, get_scheduler

from sfa_adapters import SFAConfig, check_rates, inject_sfa, largest_scalars, sfa_parameter_groups
from sfa_adapters.errors import InjectionError, SFAWarning, TrainingError
from sfa_adapters.rate_check import NEEDED_LOGITS, bounded, check_learned, starting_strength, sum_of_rates
from sfa_adapters.rates import DEFAULT_SFA_LR
from tests.support import compare
from tests.support.towers import CASES

SIGLIP = next(case for case in CASES if case.backbone == "siglip")


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    return inject_sfa(SIGLIP.build(), SFAConfig(**options))


# -- parameter groups ------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_the_group_that_it_belongs_to() -> None:
    model = adapted()
    groups = {group["name"]: group for group in sfa_parameter_groups(model, lr=1e-4, weight_decay=0.3)}
    assert list(groups) == ["model", "model (no decay)", "sfa"]
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {"model": (1e-4, 0.3), "model (no decay)": (1e-4, 0.0), "sfa": (DEFAULT_SFA_LR, 0.0)}
    place = {id(p): name for name, group in groups.items() for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = "sfa" if ".sfa." in name else "model" if parameter.ndim > 1 else "model (no decay)"
        assert place.pop(id(parameter)) == expected, name
    assert not place
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_only_what_trains() -> None:
    model = get_peft_model(SIGLIP.build(), LoraConfig(target_modules=["q_proj"]))  # pyright: ignore[reportArgumentType]
    inject_sfa(model)
    groups = sfa_parameter_groups(model, 1e-4, sfa_lr=0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [("model", 1e-4), ("sfa", 0.5)]
    lora = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    assert len(groups[0]["params"]) == len(lora)
    torch.optim.AdamW(groups)
    frozen = adapted()
    compare.freeze_base(frozen)
    assert [group["name"] for group in sfa_parameter_groups(frozen, 1e-4)] == ["sfa"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": 0.0}, "lr=0.0 must be a number above 0"),
        ({"sfa_lr": -1}, "sfa_lr=-1 must be a number above 0"),
        ({"sfa_lr": float("nan")}, "sfa_lr=nan"),
        ({"lr": True}, "lr=True"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be a number of at least 0"),
    ],
)
def test_rates_that_cannot_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InjectionError, match=text):
        sfa_parameter_groups(adapted(), **{"lr": 1e-4, **options})


def test_models_that_have_nothing_to_train() -> None:
    with pytest.raises(InjectionError, match="has no SFA"):
        sfa_parameter_groups(SIGLIP.build(), 1e-4)
    model = adapted().requires_grad_(False)
    with pytest.raises(TrainingError, match="Nothing trains: every parameter of SiglipVisionModel is frozen"):
        sfa_parameter_groups(model, 1e-4)
    next(p for name, p in model.named_parameters() if ".sfa." not in name).requires_grad_(True)
    with pytest.raises(TrainingError, match="All 6 tensors of structural scalars are frozen"):
        sfa_parameter_groups(model, 1e-4)


# -- the sum of the rates --------------------------------------------------------------------------------------------

Build = Callable[[torch.optim.Optimizer], Any]
STEPS = 40


def sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10), lr_scheduler.CosineAnnealingLR(optimizer, 30)]
    return lr_scheduler.SequentialLR(optimizer, parts, [10])


SCHEDULES: dict[str, Build] = {
    "cosine": lambda o: get_cosine_schedule_with_warmup(o, 10, STEPS),
    "linear": lambda o: get_scheduler("linear", o, 4, STEPS),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.01, 0.01, 0.3], total_steps=STEPS),
    "sequential": sequential,
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("way", ["groups", "scheduler", "optimizer"])
def test_the_sum_is_that_of_a_real_run(name: str, way: str) -> None:
    """Against a loop that adds up the rate of the scalars at every step; nothing that is passed in changes."""
    groups, build = sfa_parameter_groups(adapted(), 1e-3, sfa_lr=0.02), SCHEDULES[name]
    optimizer = torch.optim.AdamW(groups)
    scheduler = build(optimizer)
    expected, total = copy.deepcopy(optimizer.state_dict()["param_groups"]), 0.0
    given: Any = {"groups": groups, "scheduler": scheduler, "optimizer": optimizer}[way]
    summed, peak, exact = sum_of_rates(given, STEPS, None if way == "scheduler" else build)
    if way != "optimizer":  # a second scheduler sets the rates of its own first step
        assert optimizer.state_dict()["param_groups"] == expected
    rates: list[float] = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        scheduler.step()
    total = math.fsum(rates)
    assert summed == pytest.approx(total, rel=1e-6)
    assert peak == pytest.approx(max(rates))
    assert exact


def test_schedules_that_nobody_knows_beforehand_count_as_constant() -> None:
    optimizer = torch.optim.AdamW(sfa_parameter_groups(adapted(), 1e-3, sfa_lr=0.01))
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer)
    assert sum_of_rates(plateau, 10) == (pytest.approx(0.1), 0.01, False)

    class Odd(lr_scheduler.LRScheduler):
        def get_lr(self) -> list[Any]:
            if self.last_epoch > 0:
                raise RuntimeError("needs the loss")
            return list(self.base_lrs)

    assert sum_of_rates(Odd(optimizer), 10) == (pytest.approx(0.1), 0.01, False)
    with pytest.warns(SFAWarning, match=r"add up to at most, taken as constant.* 0\.1 logits over 10 steps"):
        check_rates(plateau, 10)


@settings(max_examples=40, deadline=None)
@given(st.floats(1e-6, 1.0), st.integers(1, 500), st.floats(0.0, 4.0))
def test_the_advice_suffices(rate: float, steps: int, start: float) -> None:
    """A run that follows the advice, in the rate or in the steps, is not warned again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reach = check_rates(rate, steps, start=start)
    assert reach == pytest.approx(rate * steps + start)
    assert bool(caught) == (reach < NEEDED_LOGITS)
    if caught:
        text = str(caught[0].message)
        advised = float(text.split("Set sfa_lr=")[1].split(",")[0])
        longer = int(text.split("or train ")[1].split(" steps")[0].replace(",", ""))
        assert rate < advised
        assert steps < longer
        for again in (advised * steps + start, rate * longer + start):
            assert NEEDED_LOGITS * (1 - 1e-9) <= again < 1.25 * NEEDED_LOGITS + rate


def test_what_the_warning_says() -> None:
    """The former demo: 160 steps at 0.01, warm-up and cosine."""
    with pytest.warns(SFAWarning) as caught:
        reach = check_rates(0.01, 160, schedule=lambda o: get_cosine_schedule_with_warmup(o, 16, 160))
    assert reach == pytest.approx(0.8, abs=0.01)
    text = str(caught[0].message)
    assert "add up to 0.8 logits over 160 steps" in text
    assert "Set sfa_lr=0.038, or train 600 steps" in text


def test_the_start_counts() -> None:
    axial, grows = adapted(init="axial"), adapted(init="axial", init_strength=2.5, init_warmup_steps=9)
    assert starting_strength(axial) == 3.0
    assert starting_strength(grows) == 2.5
    assert starting_strength(adapted()) < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_rates(0.01, 10, start=axial) == pytest.approx(3.1)
    with pytest.warns(SFAWarning, match=r"scalars start at 2\.5"):
        check_rates(0.01, 10, start=grows)
    only = adapted(terms=["block"], init_std=0.0)
    compare.fill(only, -2.0)
    assert starting_strength(only) == 2.0


def test_questions_that_have_no_answer() -> None:
    for steps in (0, True, 2.5):
        with pytest.raises(InjectionError, match=f"steps={steps}"):
            check_rates(0.1, steps)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InjectionError, match=r"No parameter group is named 'sfa'; the names are \[None\]"):
        check_rates(torch.optim.AdamW([torch.zeros(1)]), 10)
    with pytest.warns(SFAWarning, match="add up to 0 logits over 10 steps.*Raise sfa_lr"):
        check_rates(0.0, 10)


def test_optimizers_whose_steps_are_about_their_rate() -> None:
    weights = [torch.zeros(1, requires_grad=True)]
    assert bounded(torch.optim.AdamW(weights))
    assert bounded(torch.optim.Adafactor(weights))
    assert not bounded(torch.optim.SGD(weights, lr=0.1))


# -- the largest scalars ---------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_the_largest_scalars_against_all_of_them(seed: int) -> None:
    """For blocks against all products of two scalars of a head."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(p.shape, generator=generator) for name, p in MODEL.named_parameters() if ".sfa." in name
    }
    with torch.no_grad():
        for name, parameter in MODEL.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    expected: dict[str, float] = {}
    for name, value in values.items():
        term = name.split(".sfa_")[1].split(".")[0]
        effect = torch.einsum("hi,hj->hij", value, value) if term == "block" else value
        expected[term] = max(expected.get(term, 0.0), effect.abs().max().item())
    assert largest_scalars(MODEL) == pytest.approx(expected)


MODEL = adapted()


def test_only_what_acts_counts() -> None:
    model = adapted(terms=["col", "row"])
    assert list(largest_scalars(model)) == ["row", "col"]
    inject_sfa(model, SFAConfig(init="axial", init_strength=7.0), "second")
    assert largest_scalars(model)["row"] == 7.0
    for module in model.modules():
        if type(module).__name__ == "SFALayer":
            module.set_adapter(["default"])
    assert largest_scalars(model)["row"] < 1
    with pytest.raises(InjectionError, match="has no SFA"):
        largest_scalars(SIGLIP.build())


def test_a_bias_that_hardly_acts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_learned({"row": 0.2, "dist": 1.0})
        check_learned({})
    with pytest.warns(SFAWarning, match=r"hardly acts: .* below 1 logit \(largest: row 0.2, block 0.99\)"):
        check_learned({"row": 0.2, "block": 0.99})


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "learns"), [(5e-5, False), (DEFAULT_SFA_LR, True)])
def test_at_the_default_rate_scalars_learn(rate: float, learns: bool) -> None:
    """A loop of one's own; a scalar does not get further than the sum of its rates."""
    model, inputs = adapted(), SIGLIP.inputs(0)
    compare.freeze_base(model)
    optimizer = torch.optim.AdamW(sfa_parameter_groups(model, 1e-4, sfa_lr=rate))
    before = {name: p.detach().clone() for name, p in compare.structural(model).items()}
    for _ in range(12):
        optimizer.zero_grad()
        compare.loss_of(SIGLIP.hidden(model, inputs)).backward()
        optimizer.step()
    moved = max(compare.difference(p, before[name]) for name, p in compare.structural(model).items())
    assert moved <= 1.2 * 12 * rate
    assert (moved > 0.5) == learns
