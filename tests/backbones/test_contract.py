"""The contract suite over every installed tower; the last check is about one kind of tower only."""

import pytest
import torch

from sfa_adapters.errors import BiasNotAppliedError
from sfa_adapters.testing.test_backbones import (
    TestBiasOfFurtherTowers,
    TestInstalledTowers,
    test_every_registered_backbone_has_a_small_tower,
)
from tests.support import compare
from tests.support.towers import CASES, TowerCase, set_eager

__all__ = ["TestBiasOfFurtherTowers", "TestInstalledTowers", "test_every_registered_backbone_has_a_small_tower"]


@pytest.mark.parametrize("case", [case for case in CASES if not case.eager_takes_bias and case.grid is None], ids=str)
def test_attention_that_drops_the_bias_is_an_error_naming_the_layer(case: TowerCase):
    tower, inputs = compare.injected(case)
    biased = compare.read(case, tower, inputs)
    set_eager(case, tower)
    with pytest.raises(BiasNotAppliedError, match=r"blocks\.0\.attn.*'eager'.*position_bias"):
        case.hidden(tower, inputs)
    tower.set_attn_implementation("sdpa")  # pyright: ignore[reportCallIssue]
    assert torch.equal(compare.read(case, tower, inputs), biased)
