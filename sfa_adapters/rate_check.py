"""Checks that the learning rates of a run add up to 3 logits, and that its scalars became large enough to matter.

Adam divides a gradient by its own size, so a scalar moves by at most about its learning rate per step, and in a whole
run by at most about the sum of the scheduled rates. On a 12x12 grid w_row = 0.8 raises the share of attention in a
token's row from 8% to 17%, 3 to 65%, 5 to 93% (where the content is indifferent).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from sfa_adapters.errors import InjectionError, SFAWarning
from sfa_adapters.rates import SFA_GROUP, largest_scalars, structural_layers

__all__ = ["NEEDED_LOGITS", "bounded", "check_learned", "check_rates", "starting_strength", "sum_of_rates"]

NEEDED_LOGITS = 3.0  # from here on a bias dominates where a head looks
IDLE_LOGITS = 1.0  # below this it has hardly any effect
# Optimizers whose step is about the learning rate, whatever the gradient, by a part of their class name.
_BOUNDED = ("adam", "lion", "adafactor", "lamb")

Rates = float | Sequence[Mapping[str, Any]] | Optimizer | LRScheduler


def check_rates(
    rates: Rates,
    steps: int,
    *,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    start: float | nn.Module = 0.0,
) -> float:
    """Estimates how large structural scalars can become in a run, and warns where that is too little.

        groups = sfa_parameter_groups(model, lr=1e-4)
        check_rates(groups, steps, schedule=lambda o: get_cosine_schedule_with_warmup(o, 100, steps), start=model)

    Args:
        rates: The learning rate of the scalars, the groups of `sfa_parameter_groups`, an optimizer with such groups, or
            its scheduler, which is not changed.
        steps: Optimizer steps of the run.
        schedule: Builds the scheduler for an optimizer, where `rates` is no scheduler; by default the rate is constant.
        start: Size of the largest scalar at the start, in logits, or the model to read it from.

    Returns:
        The sum of the rates over all steps plus the start, in logits: what Adam and its variants can reach. It is no
        bound for SGD, whose steps depend on the gradients.

    Raises:
        InjectionError: There is no group named `sfa`, `steps` is below 1, or the model has no SFA or none that is
            active.

    Warns:
        SFAWarning: It is less than 3 logits; names a rate and a number of steps that suffice.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InjectionError(f"steps={steps!r} must be a number of optimizer steps, at least 1.")
    begin = starting_strength(start) if isinstance(start, nn.Module) else float(start)
    total, peak, exact = sum_of_rates(rates, steps, schedule)
    reach = total + begin
    if reach < NEEDED_LOGITS:
        warnings.warn(_advice(total, peak, begin, steps, exact), SFAWarning, stacklevel=2)
    return reach


def starting_strength(model: nn.Module) -> float:
    """The largest |w| of row, column and distance that a run begins with, in logits.

    Where the axial start is still to grow (`AxialRamp`), the strength at its end counts: it comes on top of the rates.

    Raises:
        InjectionError: The model has no SFA, or no adapter is active.
    """
    sizes = largest_scalars(model)
    start = max((size for term, size in sizes.items() if term != "block"), default=math.sqrt(sizes.get("block", 0.0)))
    for layer in structural_layers(model):
        for config in (layer.configs[name] for name in layer.active):
            grows = config.init_warmup_done < config.init_warmup_steps
            if grows and any(config.strong_heads(layer.index, layer.num_heads).values()):
                start = max(start, config.init_strength)
    return start


def sum_of_rates(
    rates: Rates, steps: int, schedule: Callable[[Optimizer], LRScheduler] | None = None
) -> tuple[float, float, bool]:
    """The sum of the learning rates of the scalars over a run.

    Args:
        rates: As in `check_rates`.
        steps: As in `check_rates`.
        schedule: As in `check_rates`.

    Returns:
        The sum, the highest rate, and whether the schedule is known in advance; one that is not (it reacts to the loss)
        counts as constant.

    Raises:
        InjectionError: There is no group of scalars.
    """
    rates = getattr(rates, "scheduler", rates)  # accelerate wraps both kinds
    if isinstance(rates, LRScheduler):
        return _of_scheduler(rates, getattr(rates.optimizer, "optimizer", rates.optimizer).param_groups, steps)
    if isinstance(rates, int | float):
        groups: Any = [{"name": SFA_GROUP, "lr": float(rates)}]
    else:
        groups = getattr(rates, "param_groups", rates)
    number = _group_of_scalars(groups)
    rate = float(groups[number].get("initial_lr", groups[number]["lr"]))
    if schedule is None:
        return rate * steps, rate, True
    dummy = _dummy(groups)
    return _of_scheduler(schedule(dummy), dummy.param_groups, steps)


def _of_scheduler(scheduler: LRScheduler, groups: Sequence[Mapping[str, Any]], steps: int) -> tuple[float, float, bool]:
    number = _group_of_scalars(groups)
    if type(scheduler) is LambdaLR:  # what transformers makes
        base, share = scheduler.base_lrs[number], scheduler.lr_lambdas[number]
        each = [float(base * share(step)) for step in range(steps)]
        return math.fsum(each), max(each), True
    rate = float(groups[number].get("initial_lr", groups[number]["lr"]))
    if isinstance(scheduler, ReduceLROnPlateau):
        return rate * steps, rate, False
    try:
        each = _simulated(scheduler, groups, number, steps)
    except Exception:  # schedulers of other packages may need anything
        return rate * steps, rate, False
    return math.fsum(each), max(each), True


def _simulated(scheduler: LRScheduler, groups: Any, number: int, steps: int) -> list[float]:
    """The rates of one group, by running a copy of the scheduler over an optimizer without weights."""
    dummy = _dummy(groups)
    copied = copy.deepcopy(scheduler, {id(scheduler.optimizer): dummy})
    each: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the optimizer that does not step
        for _ in range(steps):
            each.append(float(dummy.param_groups[number]["lr"]))
            copied.step()
    return each


def _dummy(groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """An optimizer without weights, with the same values in its groups (schedulers store some of theirs there)."""
    numbers = [copy.deepcopy({key: group[key] for key in group if key != "params"}) for group in groups]
    return torch.optim.SGD([{**group, "params": [torch.zeros(1, requires_grad=True)]} for group in numbers], lr=1.0)


def _group_of_scalars(groups: Sequence[Mapping[str, Any]]) -> int:
    names = [group.get("name") for group in groups]
    if SFA_GROUP not in names:
        raise InjectionError(
            f"No parameter group is named {SFA_GROUP!r}; the names are {names}. Make the groups with "
            "sfa_parameter_groups(model, lr), or pass the learning rate of the scalars as a number."
        )
    return names.index(SFA_GROUP)


def bounded(optimizer: Any) -> bool:
    """Whether the step size of an optimizer is about its learning rate, whatever the gradient (Adam and others)."""
    kinds = type(getattr(optimizer, "optimizer", optimizer)).__mro__
    return any(part in kind.__name__.lower() for kind in kinds for part in _BOUNDED)


def _advice(total: float, peak: float, start: float, steps: int, exact: bool) -> str:
    most = "" if exact else " at most, taken as constant because the schedule reacts to the loss,"
    advice = "Raise sfa_lr"
    if total > 0:
        factor = (NEEDED_LOGITS - start) / total
        advice = f"Set sfa_lr={_rounded_up(peak * factor):g}, or train {math.ceil(steps * factor):,} steps at this rate"
    return (
        f"The learning rates of the structural scalars add up to{most} {total:.2g} logits over {steps:,} steps, and "
        f"the scalars start at {start:.2g}. Adam moves a scalar by about its rate per step, so none can become larger "
        f"than about {total + start:.2g}; a bias rules where a head looks from about {NEEDED_LOGITS:g} on. {advice}; "
        'or begin with SFAConfig(init="axial").'
    )


def _rounded_up(value: float) -> float:
    """Rounds up to two digits, so that the advised rate suffices."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(round(value / step, 6)) * step


def check_learned(sizes: Mapping[str, float]) -> None:
    """Warns at the end of a run if no scalar became large enough to have an effect.

    Args:
        sizes: From `largest_scalars`.

    Warns:
        SFAWarning: Every term is below 1 logit.
    """
    if sizes and max(sizes.values()) < IDLE_LOGITS:
        listed = ", ".join(f"{term} {size:.2g}" for term, size in sizes.items())
        warnings.warn(
            f"The bias hardly acts: after training every term stayed below {IDLE_LOGITS:g} logit (largest: {listed}). "
            'Raise sfa_lr, train longer, or begin with SFAConfig(init="axial"); what was measured with this model says '
            "little about the bias.",
            SFAWarning,
            stacklevel=2,
        )
