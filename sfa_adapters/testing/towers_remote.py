"""Small towers of remote-code InternViT, built from `modeling_intern_vit.py`, which imitates that code."""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.testing.cases import TowerCase, images, lively
from sfa_adapters.testing.modeling_intern_vit import InternVisionConfig, InternVisionModel
from sfa_adapters.testing.towers_transformers import COMMON

__all__ = ["INTERNVIT_REMOTE"]


def set_checkpointing(tower: nn.Module, reentrant: bool | None) -> None:
    """Switches gradient checkpointing on, or off for None."""
    encoder: Any = tower.get_submodule("encoder")
    encoder.gradient_checkpointing = reentrant is not None
    encoder.checkpoint_options.use_reentrant = reentrant


REMOTE: dict[str, Any] = {
    **COMMON, "backbone": "internvit_remote", "prefix": 1, "library": "remote code", "lora_targets": ("qkv",),
    "eager_takes_bias": False, "checkpointing": set_checkpointing,
}  # fmt: skip

INTERNVIT_REMOTE = (
    TowerCase(
        **REMOTE, name="internvit_remote", resized=images(42, 70), encoder="encoder",
        build=lively(lambda: InternVisionModel(InternVisionConfig())),
    ),
    TowerCase(
        **REMOTE, name="internvit_remote_plain", compiles="no",
        build=lively(lambda: InternVisionModel(InternVisionConfig(qk_normalization=False, qkv_bias=True))),
    ),
)  # fmt: skip
