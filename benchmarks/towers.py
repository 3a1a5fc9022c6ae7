"""Towers of full width with random weights and few layers, and the inputs of one page, for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TOWERS", "BenchmarkTower"]


@dataclass(frozen=True)
class BenchmarkTower:
    """A tower to be timed.

    Attributes:
        title: What it is, and its number of tokens.
        model: Builds it from a number of layers and the name of an attention implementation.
        inputs: Keyword arguments of its forward, from a batch size.
    """

    title: str
    model: Callable[[int, str], Any]
    inputs: Callable[[int], dict[str, torch.Tensor]]


def _internvit(layers: int, implementation: str) -> Any:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(num_hidden_layers=layers, attention_bias=True)
    config._attn_implementation = implementation
    return InternVLVisionModel(config)


def _siglip(layers: int, implementation: str) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=layers, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    config._attn_implementation = implementation
    return SiglipVisionModel(config)


def _qwen3_vl(layers: int, implementation: str) -> Any:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    config = Qwen3VLVisionConfig(depth=layers, deepstack_visual_indexes=[])
    config._attn_implementation = implementation
    return Qwen3VLVisionModel(config)


def _images(side: int) -> Callable[[int], dict[str, torch.Tensor]]:
    return lambda batch: {"pixel_values": torch.randn(batch, 3, side, side)}


def _patches(rows: int, columns: int) -> Callable[[int], dict[str, torch.Tensor]]:
    def inputs(batch: int) -> dict[str, torch.Tensor]:
        grid = torch.tensor([[1, rows, columns]] * batch)
        return {"hidden_states": torch.randn(batch * rows * columns, 3 * 2 * 16 * 16), "grid_thw": grid}

    return inputs


TOWERS: Mapping[str, BenchmarkTower] = {
    "internvit": BenchmarkTower("InternViT-300M-448, 1025 tokens, head width 64", _internvit, _images(448)),
    "siglip": BenchmarkTower("SigLIP-so400m-384, 729 tokens, head width 72", _siglip, _images(384)),
    "qwen3_vl": BenchmarkTower(
        "Qwen3-VL's tower, 1280 x 1152 px, 5760 tokens, head width 72", _qwen3_vl, _patches(80, 72)
    ),
    "qwen3_vl_large": BenchmarkTower(
        "Qwen3-VL's tower, 2048 x 1536 px, 12288 tokens, head width 72", _qwen3_vl, _patches(128, 96)
    ),
}  # fmt: skip
