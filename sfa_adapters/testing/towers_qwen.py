"""A small tower of Qwen2.5-VL: a flat sequence of patches of images of different sizes, cut into windows.

Its record gives the place of each token. Here the places are read back from the rotary embedding that the tower passes
to its attention, so that the two cannot be wrong in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from sfa_adapters.testing.cases import Grid, Inputs, Place, TowerCase, lively
from sfa_adapters.testing.towers_transformers import set_checkpointing, set_eager

__all__ = ["QWEN_VIT"]

SIZES = ((1, 6, 10), (1, 4, 4))


def flat_patches(seed: int, sizes: Iterable[tuple[int, int, int]] = SIZES) -> Inputs:
    """Images of 6x10 and 4x4 patches: ragged windows of 4x4, 4x2, 2x4 and 2x2."""
    sizes = list(sizes)
    tokens = sum(math.prod(size) for size in sizes)
    generator = torch.Generator().manual_seed(seed)
    return {"hidden_states": torch.randn(tokens, 3 * 2 * 14 * 14, generator=generator), "grid_thw": torch.tensor(sizes)}


def split_flat(inputs: Inputs) -> list[Inputs]:
    """Inputs of one image each."""
    lengths = inputs["grid_thw"].prod(-1).tolist()
    parts = inputs["hidden_states"].split(lengths)
    return [{"hidden_states": p, "grid_thw": g[None]} for p, g in zip(parts, inputs["grid_thw"], strict=True)]


def read_flat(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Features of each image."""
    return list(model(**inputs).last_hidden_state.split(inputs["grid_thw"].prod(-1).tolist()))


def grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of each frame of each image."""
    return [(rows, columns) for frames, rows, columns in inputs["grid_thw"].tolist() for _ in range(frames)]


def turn_sizes(inputs: Inputs) -> Inputs:
    """The same patches on grids with rows and columns exchanged."""
    return {**inputs, "grid_thw": inputs["grid_thw"][:, [0, 2, 1]]}


def places_from_rotary(inputs: Inputs, kwargs: Mapping[str, Any], largest: int = 32) -> list[Place]:
    """Reads each token's row and column back from the rotary embedding, without knowing the order of tokens.

    The first half of the channels turns by position * frequency: a quarter for the row, a quarter for the column.
    """
    cos, sin = kwargs["position_embeddings"]
    quarter = cos.shape[-1] // 4
    frequency = 10000.0 ** -(torch.arange(quarter).double() / quarter)
    angle = torch.arange(largest).double()[:, None] * frequency
    known = torch.cat((angle.cos(), angle.sin()), dim=-1)
    axes: list[list[float]] = []
    for axis in range(2):
        part = slice(axis * quarter, (axis + 1) * quarter)
        seen = torch.cat((cos[:, part], sin[:, part]), dim=-1).double()
        distance = torch.cdist(seen, known)
        assert distance.min(dim=1).values.max() < 1e-3, "the rotary embedding does not look as expected"
        axes.append(distance.argmin(dim=1).double().tolist())
    return list(zip(*axes, strict=True))


def build() -> nn.Module:
    """Three layers, the second of which attends to whole images."""
    config = Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        out_hidden_size=32,
        fullatt_block_indexes=[1],
        window_size=56,
    )
    return Qwen2_5_VisionTransformerPretrainedModel(config)


QWEN_VIT = (
    TowerCase(
        name="qwen2_5", backbone="qwen2_5_vit", build=lively(build), inputs=flat_patches, split=split_flat,
        hidden=read_flat, layers=3, heads=4, grid=None, grids=grids, places=places_from_rotary, turn=turn_sizes,
        resized=lambda seed: flat_patches(seed, [(1, 10, 6), (2, 2, 4)]), eager=set_eager, eager_takes_bias=False,
        checkpointing=set_checkpointing, lora_targets=("qkv",), library="transformers",
    ),
)  # fmt: skip
