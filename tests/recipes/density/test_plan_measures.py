"""Words under fine patches: against counting every pixel."""

import numpy as np
import pytest
import torch

from sfa_adapters.adat import PatchPolicy
from sfa_adapters.recipes.density.plan_measures import LEVEL_SETS, PATCH, count_plan, grouped_mean


@pytest.mark.parametrize("name", LEVEL_SETS)
def test_the_share_is_what_counting_pixels_gives(name):
    levels, cell = LEVEL_SETS[name]
    rng = np.random.default_rng(3)
    words = rng.random((224, 224)) < 0.2
    plan = PatchPolicy(levels, cell=cell).plan(
        torch.from_numpy(rng.random((224 // cell, 224 // cell))).float(), (224, 224), PATCH
    )
    side = np.zeros((224, 224))
    for top, left, height, width in plan.boxes.numpy():
        side[round(top) : round(top + height), round(left) : round(left + width)] = height
    counts = count_plan("a", plan, words)
    assert counts.fine == pytest.approx((side[words] <= PATCH + 1e-9).mean())
    assert counts.side == pytest.approx(side[words].mean(), rel=1e-6)
    assert counts.tokens == plan.ratio


def test_a_mean_over_documents_resamples_documents():
    interval = grouped_mean(["a", "a", "b"], [0.0, 0.0, 0.9])
    assert interval.value == pytest.approx(0.3)
    assert interval.low == 0
    assert interval.high == pytest.approx(0.9)
