"""Small towers of Llama 4 and of Llama 3.2 Vision (Mllama): tokens without a place behind or between patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.testing.cases import Grid, Inputs, Place, images
from sfa_adapters.testing.members import Small, installed
from sfa_adapters.testing.reference import regular_places
from sfa_adapters.testing.towers_vit import COMMON, OPTIONS, PATCH

__all__ = ["LLAMA4", "MLLAMA"]


def class_token_last(inputs: Inputs, call: Mapping[str, Any]) -> list[Place]:
    """Places of 4x4 patches, and a CLS token behind them."""
    return [*regular_places((4, 4), 0), None]


LLAMA4 = installed(
    "llama4", {**OPTIONS, "projector_output_dim": 32, "projector_input_dim": 32, "vision_output_dim": 32},
    {**COMMON, "prefix": 0, "eager_takes_bias": False, "reentrant": False},
    (
        Small("llama4.modeling_llama4", "Llama4VisionModel", "Llama4VisionConfig", {"intermediate_size": 128},
              places=class_token_last, inputs=images(56, 56)),
    ),
)  # fmt: skip


# -- tiles --

# Patches per side of a tile, tiles of a sequence, and tokens of a tile: CLS, four patches, three of padding.
SIDE, TILES, LENGTH = 2, 4, 8
SHAPES: dict[int, Grid] = {6: (2, 2), 2: (1, 2), 5: (2, 1)}  # by aspect ratio id


def tiled(first: int, second: int) -> Any:
    """Makes two images with these aspect ratio ids."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        used = [SHAPES[number][0] * SHAPES[number][1] for number in (first, second)]
        return {
            "pixel_values": torch.randn(2, 1, TILES, 3, SIDE * PATCH, SIDE * PATCH, generator=generator),
            "aspect_ratio_ids": torch.tensor([[first], [second]]),
            "aspect_ratio_mask": torch.tensor([[[int(tile < count) for tile in range(TILES)]] for count in used]),
        }

    return make


def tile_shapes(inputs: Inputs) -> list[Grid]:
    """Rows and columns of tiles of each image."""
    return [SHAPES[number] for number in inputs["aspect_ratio_ids"].flatten().tolist()]


def grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of patches of each image."""
    return [(rows * SIDE, columns * SIDE) for rows, columns in tile_shapes(inputs)]


def places(inputs: Inputs, call: Mapping[str, Any]) -> list[Place]:
    """Tile by tile: CLS, four patches where they lie on the whole image, and three tokens of padding."""
    found: list[Place] = []
    for rows, columns in tile_shapes(inputs):
        for tile in range(TILES):
            patches: list[Place] = [None] * SIDE**2
            if tile < rows * columns:
                top, left = SIDE * (tile // columns), SIDE * (tile % columns)
                patches = [(float(top + y), float(left + x)) for y in range(SIDE) for x in range(SIDE)]
            found += [None, *patches, *[None] * (LENGTH - 1 - SIDE**2)]
    return found


def used_tiles(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tokens of the used tiles of each image."""
    hidden = model(**inputs).last_hidden_state[:, 0]
    shapes = tile_shapes(inputs)
    return [states[: rows * columns].flatten(0, 1) for states, (rows, columns) in zip(hidden, shapes, strict=True)]


def turn_tiles(inputs: Inputs) -> Inputs:
    """Exchanges rows and columns of images of two tiles, and inside the tiles."""
    return {
        "pixel_values": inputs["pixel_values"].transpose(-1, -2).contiguous(),
        "aspect_ratio_ids": 7 - inputs["aspect_ratio_ids"],  # 2 is 1x2, 5 is 2x1
        "aspect_ratio_mask": inputs["aspect_ratio_mask"],
    }


MLLAMA = installed(
    "mllama",
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
     "image_size": SIDE * PATCH, "patch_size": PATCH, "intermediate_layers_indices": [0], "vision_output_dim": 64},
    {**COMMON, "prefix": 0, "layers": 3, "grid": None},
    (
        Small("mllama.modeling_mllama", "MllamaVisionModel", "MllamaVisionConfig", inputs=tiled(6, 2), grids=grids,
              resized=tiled(5, 2), places=places, tokens=lambda inputs: [TILES * LENGTH] * 2, hidden=used_tiles,
              turn=turn_tiles, checkpointing=None, compiles="no"),
    ),
)  # fmt: skip
