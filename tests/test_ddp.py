"""Distributed data parallel over two gloo processes: the gradients are those of one process with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.choices import TERMS
from tests.support.processes import run_two

# This module is imported by both processes, so it brings its own two small models and not the whole zoo.
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 14,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
IMAGE = 60


def build(kind: str) -> nn.Module:
    """A SigLIP tower, or a LLaVA-1.5 host whose last CLIP layer is never read; only SFA's scalars train."""
    torch.manual_seed(0)
    if kind == "tower":
        from transformers import SiglipVisionConfig, SiglipVisionModel

        model: nn.Module = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False))  # pyright: ignore[reportCallIssue]
    else:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        image_id: dict[str, Any] = {"image_token_id": IMAGE}
        vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT)
        config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, **image_id)
        model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return inject_sfa(model.train(), SFAConfig(init_std=0.5, terms=list(TERMS)))


def batch(kind: str, rows: slice) -> dict[str, Any]:
    """Some of four different images, with a prompt each for the host."""
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {"pixel_values": torch.randn(4, 3, 56, 56, generator=generator)[rows]}
    if kind == "host":
        text = torch.randint(3, 50, (4, 6), generator=generator)
        ids = torch.cat((text[:, :2], torch.full((4, 16), IMAGE), text[:, 2:]), dim=1)[rows]
        inputs |= {"input_ids": ids, "labels": ids}
    return inputs


def loss(kind: str, model: nn.Module, rows: slice) -> torch.Tensor:
    out = model(**batch(kind, rows))
    return out.loss if kind == "host" else (out.last_hidden_state.square() * torch.linspace(0, 1, 32)).mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    """One process: two steps of each kind on its half of the batch; without unused-parameter search."""
    grads = {}
    for kind in ("tower", "host"):
        model = DistributedDataParallel(build(kind))
        for _ in range(2):  # a parameter without a gradient is only noticed in the second step
            model.zero_grad(set_to_none=True)
            loss(kind, model, slice(2 * rank, 2 * rank + 2)).backward()
        grads[kind] = gradients(model)
    torch.save(grads, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def gradients_of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("ddp")
    run_two(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["tower", "host"])
def test_gradients_are_those_of_the_whole_batch(kind: str, gradients_of_two_processes: list[Any]):
    model = build(kind)
    loss(kind, model, slice(0, 4)).backward()
    expected = gradients(model)
    assert len(expected) == 4 * (3 if kind == "tower" else 2)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for grads in gradients_of_two_processes:
        assert set(grads[kind]) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(grads[kind][name], gradient, rtol=1e-4, atol=1e-7)
