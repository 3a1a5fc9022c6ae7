"""The training step and the score that all studies share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfa_adapters.recipes.studies.training import NONE, Stepper, picture_scores


def test_weights_are_clipped_and_scalars_are_not() -> None:
    weight, scalar = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    groups: list[dict[str, Any]] = [
        {"params": [weight], "lr": 0.1},
        {"params": [scalar], "lr": 0.2, "name": "sfa"},
        {"params": [], "lr": 1.0},
    ]
    stepper = Stepper(groups, steps=10, warmup=2)
    norms: list[list[torch.Tensor | None]] = []
    stepper.optimizer.register_step_pre_hook(
        lambda *_: norms.append([None if p.grad is None else p.grad.norm() for p in (weight, scalar)])
    )
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in stepper.optimizer.param_groups])
        stepper.step(100 * (weight.sum() + scalar.sum()))
    assert [float(norm) for norm in norms[1] if norm is not None] == pytest.approx([1.0, 200.0])
    assert weight.grad is None
    assert [first for first, _ in rates[:3]] == pytest.approx([0.0, 0.05, 0.1])
    assert all(second == pytest.approx(2 * first) for first, second in rates)
    assert rates[-1][0] < 0.01


def test_a_score_is_the_share_of_right_answers_where_there_is_a_question() -> None:
    targets = torch.tensor([[[1, NONE], [2, 3]], [[NONE, NONE], [5, NONE]]])
    answers = torch.tensor([[[1, 9], [0, 3]], [[1, 1], [4, 4]]])
    assert picture_scores(answers, targets).tolist() == [2 / 3, 0.0]
    assert picture_scores(answers, targets).dtype == "float64"
