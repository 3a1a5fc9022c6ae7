"""Small towers of the kind of RADIO: images of one size in a batch, and images of different sizes packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.testing.cases import Grid, Inputs, images
from sfa_adapters.testing.members import Small, grids_of_patches, installed
from sfa_adapters.testing.towers_vit import COMMON, OPTIONS, PATCH

__all__ = ["RADIO"]


def packed(*sizes: Grid) -> Any:
    """Makes images of these sizes, in patches, cut and put behind one another."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        count = sum(rows * columns for rows, columns in sizes)
        return {
            "pixel_values": torch.randn(count, 3 * PATCH**2, generator=generator),
            "image_grid_hw": torch.tensor(sizes),
        }

    return make


def grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of patches of each image."""
    return [(rows, columns) for rows, columns in inputs["image_grid_hw"].tolist()]


def counts(inputs: Inputs) -> list[int]:
    """Patches of each image."""
    return [rows * columns for rows, columns in grids(inputs)]


def read_packed(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Features of the patches of each image."""
    features: Tensor = model(**inputs).features
    return list(features.flatten(0, -2).split(counts(inputs)))


def split(inputs: Inputs) -> list[Inputs]:
    """Inputs of one image each."""
    patches = inputs["pixel_values"].split(counts(inputs))
    return [
        {"pixel_values": p, "image_grid_hw": g[None]} for p, g in zip(patches, inputs["image_grid_hw"], strict=True)
    ]


def turn(inputs: Inputs) -> Inputs:
    """Exchanges rows and columns of the images and inside their patches."""
    turned: list[Tensor] = []
    for single in split(inputs):
        rows, columns = single["image_grid_hw"][0].tolist()
        patches = single["pixel_values"].view(rows, columns, 3, PATCH, PATCH)
        turned.append(patches.permute(1, 0, 2, 4, 3).reshape(rows * columns, -1))
    return {"pixel_values": torch.cat(turned), "image_grid_hw": inputs["image_grid_hw"].flip(-1)}


SMALL: dict[str, Any] = {
    "patch_dim": 3 * PATCH**2, "num_cls_tokens": 2, "num_registers": 1, "summary_idxs": [0], "max_img_size": 8 * PATCH,
}  # fmt: skip
RADIO = installed(
    "radio", {**OPTIONS, **SMALL}, {**COMMON, "prefix": 3, "eager_takes_bias": False, "encoder": "encoder"},
    (
        Small("radio.modeling_radio", "RadioModel", "RadioConfig", resized=images(42, 70),
              grids=grids_of_patches(PATCH)),
        Small("radio.modeling_radio", "RadioModel", "RadioConfig", name="radio_packed", inputs=packed((3, 5), (4, 2)),
              resized=packed((2, 4), (5, 3)), grids=grids, hidden=read_packed, split=split, turn=turn),
    ),
)  # fmt: skip
