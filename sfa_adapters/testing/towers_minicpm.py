"""Small towers of MiniCPM-V 4.6, 4.7 and MiniCPM-OCR, in which 2x2 patches merge behind the first layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.compat import has_vision_model
from sfa_adapters.testing.cases import Grid, Inputs, TowerCase, lively, or_no_tower
from sfa_adapters.testing.towers_transformers import set_checkpointing, set_eager

__all__ = ["MINICPM_VIT"]

PATCH = 4
LORA = tuple(f"layers.{number}.self_attn.q_proj" for number in range(3))
Sizes = tuple[tuple[int, int], ...]


def build(model: str, name: str) -> nn.Module:
    """Three layers and the merger's own."""
    parts = [import_module(f"transformers.models.{model}.{kind}_{model}") for kind in ("configuration", "modeling")]
    config = getattr(parts[0], f"{name}VisionConfig")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16,
        patch_size=PATCH, insert_layer_id=0,
    )  # fmt: skip
    return getattr(parts[1], f"{name}VisionModel")(config)


def patches(seed: int, sizes: Sizes = ((4, 6), (2, 4))) -> Inputs:
    """Patches of all images side by side, and rows and columns of each."""
    width = PATCH * sum(rows * columns for rows, columns in sizes)
    pixels = torch.randn(1, 3, PATCH, width, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "target_sizes": torch.tensor(sizes)}


def grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of each image in front of the merger."""
    return [(int(rows), int(columns)) for rows, columns in inputs["target_sizes"]]


def grids_of_call(inputs: Inputs, call: Mapping[str, Any]) -> list[Grid]:
    """The same, or half of it where the call comes behind the merger: it has a quarter of the tokens."""
    whole = grids(inputs)
    tokens, merged = sum(rows * columns for rows, columns in whole), int(call["cu_seqlens"][-1])
    return whole if merged == tokens else [(rows // 2, columns // 2) for rows, columns in whole]


def split(inputs: Inputs) -> list[Inputs]:
    """Inputs of one image each."""
    widths = [PATCH * rows * columns for rows, columns in grids(inputs)]
    parts = inputs["pixel_values"].split(widths, dim=-1)
    return [{"pixel_values": p, "target_sizes": s[None]} for p, s in zip(parts, inputs["target_sizes"], strict=True)]


def turn(inputs: Inputs) -> Inputs:
    """The same patches on grids with rows and columns exchanged."""
    return {**inputs, "target_sizes": inputs["target_sizes"].flip(-1)}


def hidden(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Features of each image, a quarter of its patches."""
    return list(model(**inputs).last_hidden_state[0].split([h * w // 4 for h, w in grids(inputs)]))


MINICPM_VIT = or_no_tower("minicpm_vit", [
    TowerCase(
        name=model, backbone="minicpm_vit", build=lively(partial(build, model, name)), inputs=patches, split=split,
        hidden=hidden, layers=3, heads=4, grid=None, grids=grids, grids_of_call=grids_of_call, turn=turn,
        resized=lambda seed: patches(seed, ((6, 4), (2, 6))), eager=set_eager, eager_takes_bias=False,
        checkpointing=set_checkpointing, lora_targets=LORA, library="transformers",
        runs="bias" if model == "minicpmv4_6" else "nightly",
    )
    for model, name in (
        ("minicpmv4_6", "MiniCPMV4_6"), ("minicpmv4_7", "MiniCPMV4_7"), ("minicpm_ocr", "MiniCPMOcr"),
    )
    if has_vision_model(model)
])  # fmt: skip
