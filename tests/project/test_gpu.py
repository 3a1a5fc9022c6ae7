"""Checks that need a CUDA device: the flash kernel runs the folded bias and agrees with the dense matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import InternVLVisionConfig, InternVLVisionModel

from sfa_adapters import SFAConfig, StructuralBias, TokenLayout, attend, inject_sfa
from sfa_adapters.choices import TERMS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_folded_bias_runs_in_the_flash_kernel() -> None:
    """Flash takes no mask, so with the others switched off only the fold can run; it agrees with the matrix."""
    torch.manual_seed(0)
    layout = TokenLayout.regular(32, 32, 1, device="cuda")
    bias = StructuralBias(16, init_std=0.5, device="cuda", terms=TERMS)
    query, key, value = torch.randn(3, 2, 16, 1025, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
    exact = attend(query.float(), key.float(), value.float(), bias.factors(layout), backend="dense")
    expected = torch.autograd.grad(exact.square().mean(), list(bias.parameters()))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        folded = attend(query, key, value, bias.factors(layout), backend="folded")
        grads = torch.autograd.grad(folded.float().square().mean(), list(bias.parameters()))
    torch.testing.assert_close(folded.float(), exact, atol=2e-2, rtol=2e-2)
    for mine, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=0.05 * reference.abs().max().item(), rtol=0.1)


@pytest.mark.parametrize("backward", [False, True])
def test_encoder_on_cuda_equals_cpu(backward: bool) -> None:
    """A tower with SFA gives on CUDA in fp32 what it gives on a CPU."""
    torch.manual_seed(0)
    tower = InternVLVisionModel(InternVLVisionConfig(num_hidden_layers=2, hidden_size=128, num_attention_heads=4))
    model: Any = inject_sfa(tower, SFAConfig(init_std=0.5, terms=list(TERMS)))
    images = torch.randn(1, 3, 448, 448)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        with torch.set_grad_enabled(backward):
            hidden = model(images.to(device)).last_hidden_state
        if backward:
            hidden.square().mean().backward()
            results.append([p.grad.cpu() for p in tower.parameters() if p.grad is not None])
        else:
            results.append([hidden.cpu()])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)


def test_stale_cache_after_an_optimizer_step_on_cuda() -> None:
    """On CUDA the cached dense mask is keyed by version counters, which in-place updates bump."""
    torch.manual_seed(0)
    tower: Any = InternVLVisionModel(InternVLVisionConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=4))
    inject_sfa(tower.cuda(), SFAConfig(backend="dense", init_std=0.5, mask_cache_mb=1024, terms=list(TERMS)))
    images = torch.randn(1, 3, 448, 448, device="cuda")
    with torch.no_grad():
        before = tower(images).last_hidden_state
        for name, parameter in tower.named_parameters():
            if "sfa_" in name:
                parameter.add_(1.0)
        after = tower(images).last_hidden_state
    assert not torch.equal(before, after)
