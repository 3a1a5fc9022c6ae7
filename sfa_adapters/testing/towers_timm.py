"""Small towers of timm: every kind of prefix, with and without q and k norms, rotary positions and relative bias."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers.config import set_reentrant_ckpt
from torch import Tensor, nn

from sfa_adapters.testing.cases import Inputs, TowerCase, images, lively

__all__ = ["TIMM_BEIT", "TIMM_EVA", "TIMM_VIT"]


def read_timm(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The output of `forward` is every token where the tower is built with `global_pool=""`; it calls images `x`."""
    return list(model(inputs["pixel_values"]))


def set_eager(tower: nn.Module) -> None:
    """Moves a tower of timm from fused to eager attention."""
    for module in tower.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010


def set_checkpointing(tower: nn.Module, reentrant: bool | None) -> None:
    """Switches gradient checkpointing on, or off for None."""
    model: Any = tower
    set_reentrant_ckpt(bool(reentrant))
    model.set_grad_checkpointing(reentrant is not None)


def _case(name: str, variant: str, prefix: int, patch: int = 16, qk_norm: bool = False, **options: Any) -> TowerCase:
    norms: dict[str, Any] = {"qk_norm": True} if qk_norm else {}  # some variants bring their own

    def build() -> nn.Module:
        return timm.create_model(
            variant, depth=3, embed_dim=32, num_heads=4, num_classes=0, global_pool="",
            img_size=(4 * patch, 6 * patch), dynamic_img_size=True, **norms,
        )  # fmt: skip

    def grids(inputs: Inputs) -> list[tuple[int, int]]:
        height, width = inputs["pixel_values"].shape[-2:]
        return [(height // patch, width // patch)]

    return TowerCase(
        name=name, backbone="timm_vit", build=lively(build), inputs=images(4 * patch, 6 * patch), hidden=read_timm,
        resized=images(5 * patch, 3 * patch), layers=3, heads=4, grid=(4, 6), prefix=prefix, grids=grids,
        eager=set_eager, checkpointing=set_checkpointing, lora_targets=("qkv",), library="timm",
        **{"compiles": "no", **options},
    )  # fmt: skip


TIMM_VIT = (
    _case("timm_cls", "vit_tiny_patch16_224", 1, compiles="every layer", encoder="blocks"),
    _case("timm_reg4", "vit_base_patch14_reg4_dinov2", 5, patch=14),
    _case("timm_siglip", "vit_base_patch16_siglip_224", 0),
    _case("timm_clip", "vit_base_patch16_clip_224", 1),
    _case("timm_qknorm", "vit_tiny_patch16_224", 1, qk_norm=True),
    _case("timm_internvit", "vit_intern300m_patch14_448", 1, patch=14),
)


def _further(
    backbone: str, name: str, variant: str, prefix: int, patch: int, model: Any = None, **case: Any
) -> TowerCase:
    """A tower with rotary positions or a relative bias.

    LayerScale starts at 1e-5 there, which would hide every effect.
    """
    sizes: dict[str, Any] = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 4,
        "img_size": (4 * patch, 6 * patch),
        **(model or {}),
    }
    scale: dict[str, Any] = {} if "init_values" in sizes else {"init_values": 1.0}

    def grids(inputs: Inputs) -> list[tuple[int, int]]:
        height, width = inputs["pixel_values"].shape[-2:]
        return [(height // patch, width // patch)]

    return TowerCase(
        name=name, backbone=backbone, inputs=images(4 * patch, 6 * patch), hidden=read_timm, layers=2, heads=4,
        build=lively(lambda: timm.create_model(variant, num_classes=0, global_pool="", **sizes, **scale)),
        grid=(4, 6), prefix=prefix, grids=grids, eager=set_eager, checkpointing=set_checkpointing, library="timm",
        lora_targets=("attn.proj",),  # of some the weight of qkv is read past the module
        **{"compiles": "no", "runs": "nightly", "reentrant": False, **case},
    )  # fmt: skip


def _eva(name: str, variant: str, prefix: int, patch: int, model: Any = None, **case: Any) -> TowerCase:
    sizes = {"dynamic_img_size": True, **(model or {})}
    return _further("timm_eva", name, variant, prefix, patch, sizes, resized=images(5 * patch, 3 * patch), **case)


TIMM_EVA = (
    _eva("timm_dinov3", "vit_small_patch16_dinov3", 5, 16, runs="bias"),
    _eva("timm_eva02", "eva02_tiny_patch14_224", 1, 14),
    _eva("timm_pe_core", "vit_pe_core_tiny_patch16_384", 1, 16),
    _eva("timm_pe_lang", "vit_pe_lang_large_patch14_448", 1, 14),
    _eva("timm_eva_giant", "eva_giant_patch14_224", 1, 14),
)
TIMM_BEIT = (
    _further("timm_beit", "timm_beit", "beit_base_patch16_224", 1, 16, runs="bias"),
    _further("timm_beit", "timm_beit_shared", "beit_base_patch16_224", 1, 16,
             {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
)  # fmt: skip
