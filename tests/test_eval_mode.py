"""`evaluating`: the mode of every module for a while, and nothing else."""

import pytest
import torch
from torch import nn

from sfa_adapters.eval_mode import evaluating


def test_every_module_has_its_mode_again_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2

    def stop() -> None:
        assert not any(module.training for module in model.modules())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        stop()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_nothing_is_recorded_for_backward() -> None:
    model = nn.Linear(2, 2)
    with evaluating(model):
        assert not model(torch.ones(1, 2)).requires_grad
    assert model(torch.ones(1, 2)).requires_grad


def test_a_model_in_eval_mode_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval()` of a module may do more than to set its mode: that of SFA forgets a mask."""
    model = nn.Linear(2, 2).eval()
    monkeypatch.setattr(model, "eval", lambda: pytest.fail("eval() was called"))
    with evaluating(model):
        assert not model.training
    assert not model.training
