"""Small towers of transformers whose images have a grid each: packed (Pixtral) or padded (SigLIP 2, Gemma 4, ...).

Each case has images of two sizes. Where a tower takes places from its input, they are written here by hand, as its
image processor writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PixtralVisionConfig, PixtralVisionModel, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel
from transformers.models.kosmos2_5.configuration_kosmos2_5 import Kosmos2_5VisionConfig
from transformers.models.kosmos2_5.modeling_kosmos2_5 import Kosmos2_5VisionModel
from transformers.models.pix2struct.configuration_pix2struct import Pix2StructVisionConfig
from transformers.models.pix2struct.modeling_pix2struct import Pix2StructVisionModel

from sfa_adapters.testing.cases import Grid, Inputs, Place, TowerCase, lively, split_batch
from sfa_adapters.testing.towers_transformers import SMALL, set_checkpointing, set_eager

__all__ = ["FLAT_PATCHES", "GEMMA4", "PIXTRAL", "SIGLIP2_NAFLEX"]

# Two images of different size, then others of as many tokens with rows and columns exchanged.
SIZES: tuple[Grid, ...] = ((4, 6), (4, 2))
OTHER: tuple[Grid, ...] = ((6, 2), (2, 4))
COMMON: dict[str, Any] = {
    "layers": 3, "heads": 4, "grid": None, "library": "transformers", "checkpointing": set_checkpointing,
    "eager": set_eager, "lora_targets": ("q_proj",), "compiles": "no", "encoder": "encoder",
}  # fmt: skip


def random(seed: int, *shape: int) -> Tensor:
    """Normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- Pixtral: one sequence of all images --


def canvases(seed: int, sizes: Sequence[Grid] = SIZES, side: int = 4) -> Inputs:
    """Images on canvases of the largest height and width, and how much of it each fills."""
    height, width = (side * max(sizes_of) for sizes_of in zip(*sizes, strict=True))
    image_sizes = torch.tensor([[side * rows, side * columns] for rows, columns in sizes])
    return {"pixel_values": random(seed, len(sizes), 3, height, width), "image_sizes": image_sizes}


def canvas_grids(inputs: Inputs) -> list[Grid]:
    """Whole patches of each image."""
    return [(height // 4, width // 4) for height, width in inputs["image_sizes"].tolist()]


def turn_canvases(inputs: Inputs) -> Inputs:
    """Exchanges height and width of canvases and of their images."""
    turned = inputs["pixel_values"].transpose(-1, -2).contiguous()
    return {"pixel_values": turned, "image_sizes": inputs["image_sizes"].flip(-1)}


def read_packed(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Features of each image."""
    return list(model(**inputs).last_hidden_state[0].split([rows * columns for rows, columns in canvas_grids(inputs)]))


def places_from_rotary(inputs: Inputs, kwargs: Mapping[str, Any], largest: int = 16) -> list[Place]:
    """Reads rows and columns back from the rotary embedding: even frequencies turn by the row, odd by the column."""
    cos, sin = kwargs["position_embeddings"]
    frequency = 10000.0 ** -(torch.arange(cos.shape[-1] // 2).double() * 2 / cos.shape[-1])
    axes: list[list[float]] = []
    for axis, part in enumerate(torch.arange(cos.shape[-1] // 2).chunk(2)):
        angle = torch.arange(largest).double()[:, None] * frequency[axis::2]
        distance = torch.cdist(
            torch.cat((cos[:, part], sin[:, part]), -1).double(), torch.cat((angle.cos(), angle.sin()), -1)
        )
        assert distance.min(dim=1).values.max() < 1e-2, "the rotary embedding does not look as expected"
        axes.append(distance.argmin(dim=1).double().tolist())
    return list(zip(*axes, strict=True))


PIXTRAL = (
    TowerCase(
        **{**COMMON, "encoder": "transformer"}, name="pixtral", backbone="pixtral", inputs=canvases, runs="bias",
        build=lively(lambda: PixtralVisionModel(PixtralVisionConfig(**SMALL, image_size=32, patch_size=4))),
        grids=canvas_grids, turn=turn_canvases, hidden=read_packed, places=places_from_rotary,
        resized=lambda seed: canvases(seed, OTHER),
    ),
)  # fmt: skip


# -- padded rows --


def lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of each image."""
    return [rows * columns for rows, columns in grids]


def real_of(grids: Callable[[Inputs], list[Grid]], key: str) -> Callable[[Inputs], Tensor]:
    """Which tokens of the padded rows in `inputs[key]` are no padding, `[batch, tokens]`."""

    def real_tokens(inputs: Inputs) -> Tensor:
        return torch.arange(inputs[key].shape[1]) < torch.tensor(lengths(grids(inputs)))[:, None]

    return real_tokens


def padded_case(name: str, backbone: str, grids: Callable[[Inputs], list[Grid]], key: str, **options: Any) -> TowerCase:
    """A tower that takes padded rows of patches in `inputs[key]`."""

    def hidden(model: nn.Module, inputs: Inputs) -> list[Tensor]:
        states = model(**inputs).last_hidden_state
        return [image[:length] for image, length in zip(states, lengths(grids(inputs)), strict=True)]

    settings: dict[str, Any] = {
        **COMMON, "grids": grids, "hidden": hidden, "split": split_batch, "runs": "nightly",
        "padded_length": lambda inputs: inputs[key].shape[1], "real_tokens": real_of(grids, key),
    }  # fmt: skip
    return TowerCase(name=name, backbone=backbone, **{**settings, **options})


def shapes_and_mask(seed: int, sizes: Sequence[Grid] = SIZES) -> Inputs:
    """SigLIP 2: patches, their mask, and rows and columns of each image; two tokens of padding behind the largest."""
    length = max(lengths(sizes)) + 2
    mask = torch.arange(length) < torch.tensor(lengths(sizes))[:, None]
    patches = random(seed, len(sizes), length, 3 * 4 * 4)
    return {"pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": torch.tensor(sizes)}


SIGLIP2_NAFLEX = (
    padded_case(
        "siglip2_naflex", "siglip2_naflex", lambda inputs: [(r, c) for r, c in inputs["spatial_shapes"].tolist()],
        "pixel_values", runs="bias", inputs=shapes_and_mask, resized=lambda seed: shapes_and_mask(seed, OTHER),
        turn=lambda inputs: {**inputs, "spatial_shapes": inputs["spatial_shapes"].flip(-1)},
        build=lively(lambda: Siglip2VisionModel(Siglip2VisionConfig(**SMALL, patch_size=4, num_patches=16))),
    ),
)  # fmt: skip


def places_of(grid: Grid, length: int, padding: int) -> Tensor:
    """Row and column of each patch row by row, `[length, 2]`, and `padding` behind them."""
    rows, columns = grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat((places, torch.full((length - len(places), 2), padding)))


def column_first(seed: int, sizes: Sequence[Grid] = SIZES) -> Inputs:
    """Gemma 4: patches, and column and row of each; 28 tokens, which 2x2 pooling makes 7."""
    places = torch.stack([places_of(grid, 28, -1).flip(-1) for grid in sizes])
    return {"pixel_values": random(seed, len(sizes), 28, 3 * 4 * 4).sigmoid(), "pixel_position_ids": places}


def gemma_grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of each image."""
    return [(int(rows), int(columns)) for columns, rows in (inputs["pixel_position_ids"].amax(1) + 1)]


def read_soft_tokens(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Soft tokens of each image: means over 2x2 patches."""
    counts = [rows * columns // 4 for rows, columns in gemma_grids(inputs)]
    return list(model(**inputs).last_hidden_state.split(counts))


def gemma4(groups: int) -> Callable[[], nn.Module]:
    """With as many key heads as query heads, or fewer."""
    settings = {**SMALL, "num_key_value_heads": 4 // groups, "head_dim": 8}
    return lambda: Gemma4VisionModel(
        Gemma4VisionConfig(**settings, patch_size=4, pooling_kernel_size=2, position_embedding_size=32)
    )


GEMMA_CASE: dict[str, Any] = {
    "rounding": 8.0,
    "inputs": column_first, "hidden": read_soft_tokens, "resized": lambda seed: column_first(seed, OTHER),
    "turn": lambda inputs: {**inputs, "pixel_position_ids": inputs["pixel_position_ids"].flip(-1)},
    "lora_targets": ("q_proj.linear",),
}  # fmt: skip
GEMMA4 = (
    padded_case("gemma4", "gemma4", gemma_grids, "pixel_values", **GEMMA_CASE, build=lively(gemma4(1)), runs="bias"),
    padded_case("gemma4_grouped", "gemma4", gemma_grids, "pixel_values", **GEMMA_CASE, build=lively(gemma4(2))),
)


def flat_patches(seed: int, sizes: Sequence[Grid] = SIZES) -> Inputs:
    """Pix2Struct: row and column from 1 in front of each patch; padding is zero throughout."""
    length = max(lengths(sizes)) + 2
    patches = torch.cat(
        (torch.stack([places_of(grid, length, -1) for grid in sizes]) + 1.0, random(seed, len(sizes), length, 48)), -1
    )
    return {"flattened_patches": patches * (patches[..., :1] > 0)}


def flat_grids(inputs: Inputs) -> list[Grid]:
    """Rows and columns of each image."""
    return [(int(rows), int(columns)) for rows, columns in inputs["flattened_patches"][..., :2].amax(1)]


def turn_flat(inputs: Inputs) -> Inputs:
    """Exchanges row and column of each patch."""
    patches = inputs["flattened_patches"]
    return {"flattened_patches": torch.cat((patches[..., :2].flip(-1), patches[..., 2:]), -1)}


FLAT: dict[str, Any] = {
    "rounding": 2.0,
    "inputs": flat_patches, "resized": lambda seed: flat_patches(seed, OTHER), "turn": turn_flat,
    "lora_targets": ("attention.query",),
}  # fmt: skip
FLAT_PATCHES = (
    padded_case(
        "pix2struct", "flat_patches", flat_grids, "flattened_patches", **FLAT, runs="bias",
        build=lively(lambda: Pix2StructVisionModel(Pix2StructVisionConfig(
            hidden_size=32, patch_embed_hidden_size=48, d_ff=64, d_kv=8, num_hidden_layers=3, num_attention_heads=4,
            seq_len=64, initializer_range=0.02,
        ))),
    ),
    padded_case(
        "kosmos2_5", "flat_patches", flat_grids, "flattened_patches", **FLAT,
        build=lively(lambda: Kosmos2_5VisionModel(Kosmos2_5VisionConfig(
            **SMALL, patch_embed_hidden_size=48, head_dim=8, max_num_patches=64,
        ))),
    ),
)  # fmt: skip
