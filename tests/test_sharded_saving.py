"""SFA under `fully_shard` over two gloo processes: what `save_sfa` writes is whole."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sfa_adapters import SFAConfig, inject_sfa, load_sfa, save_sfa
from sfa_adapters.choices import TERMS
from tests.support.processes import run_two

# This module is imported by both processes, so it brings its own small model.
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


def build() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**VISION)).eval()


def work(rank: int, folder: str) -> None:
    """Shards an injected tower, and saves its adapter."""
    model: Any = inject_sfa(build(), SFAConfig(init_std=0.5, terms=list(TERMS)))
    if rank == 0:
        torch.save([p.detach() for n, p in model.named_parameters() if "sfa_" in n], Path(folder) / "before.pt")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert all(isinstance(p, DTensor) for n, p in model.named_parameters() if "sfa_" in n)
    save_sfa(model, Path(folder) / "adapter")
    dist.barrier()


def test_a_sharded_adapter_is_saved_whole(tmp_path: Path):
    run_two(work, str(tmp_path))
    before = torch.load(tmp_path / "before.pt", weights_only=True)
    again = load_sfa(build(), tmp_path / "adapter")
    after = [p.detach() for n, p in again.named_parameters() if "sfa_" in n]
    assert len(after) == len(before) == 8
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
