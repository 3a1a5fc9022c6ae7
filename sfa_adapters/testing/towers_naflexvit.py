"""Small NaFlexVits of timm: dense images and dictionaries of patches; every kind of position embedding and prefix."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from sfa_adapters.testing.cases import Grid, Inputs, TowerCase, images, lively
from sfa_adapters.testing.towers_grids import OTHER, SIZES, lengths, places_of, random
from sfa_adapters.testing.towers_timm import read_timm, set_checkpointing, set_eager

__all__ = ["NAFLEXVIT"]

SIDE = 4


def checkpoint_layers(tower: nn.Module, reentrant: bool | None) -> None:
    """As `set_checkpointing`, never reentrant: the layers get keyword arguments, which that kind does not take."""
    set_checkpointing(tower, None if reentrant is None else False)


def patch_rows(seed: int, sizes: tuple[Grid, ...] = SIZES) -> Inputs:
    """What timm's NaFlex collator gives: patches, row and column of each, and which are real; two tokens of padding."""
    length = max(lengths(sizes)) + 2
    coordinates = torch.stack([places_of(grid, length, 0) for grid in sizes])
    valid = torch.arange(length) < torch.tensor(lengths(sizes))[:, None]
    return {
        "patches": random(seed, len(sizes), length, 3 * SIDE**2) * valid[..., None],
        "patch_coord": coordinates,
        "patch_valid": valid,
    }


def grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of each image."""
    return [(int(rows), int(columns)) for rows, columns in inputs["patch_coord"].amax(1) + 1]


def dense_grids(inputs: Inputs) -> list[Grid]:
    """The same for dense images, which all have one size."""
    count, _, height, width = inputs["pixel_values"].shape
    return [(height // SIDE, width // SIDE)] * count


def read_rows(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All real tokens of each image, prefix included; the tower is built with `global_pool=""`."""
    states = model(dict(inputs))
    return [
        image[: image.shape[0] - len(valid) + int(valid.sum())]
        for image, valid in zip(states, inputs["patch_valid"], strict=True)
    ]


def _case(
    name: str, prefix: int, dense: bool = False, lora: str = "attn.qkv", reentrant: bool = True, **options: Any
) -> TowerCase:
    def build() -> nn.Module:
        settings = {"class_token": prefix % 2 == 1, "reg_tokens": prefix // 2 * 2, "global_pool": "", **options}
        return timm.create_model(
            "naflexvit_base_patch16_gap", patch_size=SIDE, depth=3, embed_dim=32, num_heads=4, num_classes=0,
            pos_embed_grid_size=(4, 4), fc_norm=False, **settings,
        )  # fmt: skip

    def real_tokens(inputs: Inputs) -> Tensor:
        return torch.cat((torch.ones(len(inputs["patch_valid"]), prefix, dtype=torch.bool), inputs["patch_valid"]), 1)

    rows: dict[str, Any] = {
        "inputs": patch_rows, "resized": lambda seed: patch_rows(seed, OTHER), "grids": grids, "hidden": read_rows,
        "turn": lambda inputs: {**inputs, "patch_coord": inputs["patch_coord"].flip(-1)}, "real_tokens": real_tokens,
        "padded_length": lambda inputs: prefix + inputs["patches"].shape[1],
    }  # fmt: skip
    whole: dict[str, Any] = {
        "inputs": images(4 * SIDE, 6 * SIDE), "resized": images(5 * SIDE, 3 * SIDE), "grids": dense_grids,
        "hidden": read_timm,
    }  # fmt: skip
    return TowerCase(
        name=name, backbone="naflexvit", build=lively(build), layers=3, heads=4, grid=None, prefix=prefix,
        eager=set_eager, checkpointing=checkpoint_layers, library="timm", compiles="no",
        runs="bias" if name == "naflexvit" else "nightly", lora_targets=(lora,), reentrant=reentrant,
        **(whole if dense else rows),
    )  # fmt: skip


NAFLEXVIT = (
    _case("naflexvit", 5),
    _case("naflexvit_dense", 5, dense=True),
    _case("naflexvit_key_mask", 0, use_key_only_attn_mask=True),
    _case("naflexvit_factorized", 1, pos_embed="factorized"),
    _case("naflexvit_rope", 4, pos_embed="none", rope_type="axial"),
    # Its attention reads the weight of qkv past the module, so that LoRA there would do nothing.
    _case("naflexvit_eva", 1, attn_type="eva", rope_type="axial", lora="attn.proj"),
    # Its trained rotations are shared by all layers: a graph outside of their checkpoints, which each would go through.
    _case("naflexvit_mixed_rope", 0, rope_type="mixed", reentrant=False),
)
