"""Small towers of open_clip, with torch's attention and with its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from sfa_adapters.testing.cases import Inputs, TowerCase, images, lively
from sfa_adapters.testing.members import grids_of_patches

__all__ = ["OPEN_CLIP"]


class SlowMultihead(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, step by step.

    Args:
        attention: The module.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Self-attention, `[batch, tokens, width]`."""
        module = self.attention
        parts = F.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in parts)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return module.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def step_by_step(attention: nn.Module) -> nn.Module:
    """The module that the reference runs; torch's own leaves Python, where nothing can be added to its logits."""
    return SlowMultihead(attention) if isinstance(attention, nn.MultiheadAttention) else attention


def read_tokens(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tokens, as the tower gives them with `output_tokens`."""
    return list(model(**inputs)[1])


def set_checkpointing(tower: nn.Module, reentrant: bool | None) -> None:
    """Switches gradient checkpointing on, or off for None; open_clip knows only the kind without re-entrance."""
    model: Any = tower
    model.set_grad_checkpointing(reentrant is not None)


def _case(name: str, **options: Any) -> TowerCase:
    def build() -> nn.Module:
        return VisionTransformer(
            image_size=56, patch_size=14, width=32, layers=2, heads=4, mlp_ratio=2.0, output_dim=32, pool_type="none",
            output_tokens=True, **options,
        )  # fmt: skip

    return TowerCase(
        name=name, backbone="open_clip", build=lively(build), inputs=images(56, 56, name="x"), hidden=read_tokens,
        layers=2, heads=4, grid=(4, 4), prefix=1, grids=grids_of_patches(14, "x"), reentrant=False,
        checkpointing=None if options else set_checkpointing,  # that of its custom blocks fails in open_clip 3.3
        encoder="transformer", lora_targets=("c_fc",), library="open_clip", compiles="no", plain=step_by_step,
        runs="nightly" if options else "bias",
    )  # fmt: skip


OPEN_CLIP = (
    _case("open_clip"),
    _case("open_clip_qknorm", qk_norm=True),
    _case("open_clip_scaled", ls_init_value=1.0, scale_heads=True, scale_attn=True, scale_fc=True),
)
