"""The vision towers of vLLM that the plug-in knows: what their forward is given, and a random image for each.

vLLM has towers of its own. They have the layers of those of transformers and see the same tokens in the same order,
but other names of arguments. Read in vLLM 0.32.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfa_adapters.errors import LayoutError
from sfa_adapters.serving.engine_tower import EngineTower
from sfa_adapters.serving.image_tokens import KEPT

__all__ = ["KNOWN", "TowerCall", "call_of"]

# Images [B, 3, height, width] of one size.
IMAGES = """
    intern_vit.InternVisionModel
    interns1_vit.InternS1VisionModel
    siglip.SiglipVisionTransformer
    clip.CLIPVisionTransformer
    idefics2_vision_model.Idefics2VisionTransformer
"""
# Patches of all images behind one another, with the grid of each.
PATCHES = """
    qwen2_vl.Qwen2VisionTransformer
    qwen2_5_vl.Qwen2_5_VisionTransformer
    qwen3_vl.Qwen3_VisionTransformer
    glm4_1v.Glm4vVisionTransformer
    glm_ocr.GlmOcrVisionTransformer
"""
# The same, with their positions beside them.
RASTER = """
    paddleocr_vl.SiglipVisionTransformer
"""
KNOWN = {
    name: kind
    for table, kind in ((IMAGES, "images"), (PATCHES, "patches"), (RASTER, "raster"))
    for name in table.split()
}


@dataclass(frozen=True)
class TowerCall:
    """How a tower of vLLM is called.

    Attributes:
        tower: The tower.
        kind: `images`, `patches` or `raster`.
    """

    tower: nn.Module
    kind: str

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.tower.parameters()).dtype

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: EngineTower) -> None:
        """Tells the state of a tower what its forward is called with.

        Raises:
            LayoutError: The arguments do not say how the tokens lie.
        """
        bound = inspect.signature(type(self.tower).forward).bind(self.tower, *args, **kwargs).arguments
        if self.kind == "images":
            images = bound.get("pixel_values")
            if not isinstance(images, Tensor) or images.ndim != 4:
                raise LayoutError(f"{type(self.tower).__name__} was called without images, so their grid is not known.")
            state.see_images(images.shape)
            return
        grids = bound.get("grid_thw", bound.get("image_grid_thw"))
        if grids is None:
            raise LayoutError(f"{type(self.tower).__name__} was called without the grids of its images.")
        kept = (bound.get("encoder_metadata") or {}).get(KEPT)  # where groups are left out before the tower
        state.see_grids(grids.tolist() if isinstance(grids, Tensor) else grids, kept)

    def random_image(self, state: EngineTower) -> dict[str, Any]:
        """Arguments of the forward for one image of noise, the same each time.

        A blank image would not do: without position embeddings its tokens are all alike, and no bias changes their
        mean.
        """
        parameter = next(self.tower.parameters())
        like = {"dtype": parameter.dtype, "device": parameter.device}
        generator = torch.Generator().manual_seed(0)
        located = state.adapter.located
        config: Any = located.tower.config
        if self.kind == "images":
            geometry = located.backbone.geometry(located.tower)
            assert geometry.grid is not None
            side = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
            pixels = torch.randn(1, 3, geometry.grid[0] * side, geometry.grid[1] * side, generator=generator)
            return {"pixel_values": pixels.to(**like)}
        merge = int(config.spatial_merge_size)
        rows, columns = 3 * merge, 5 * merge
        count = rows * columns
        if self.kind == "raster":
            pixels = torch.randn(1, count, 3, config.patch_size, config.patch_size, generator=generator)
            return {
                "pixel_values": pixels.to(**like),
                "image_grid_thw": [(1, rows, columns)],
                "position_ids": torch.arange(count, device=parameter.device),
                "interpolate_pos_encoding": True,
                "cu_seqlens": torch.tensor([0, count], dtype=torch.int32, device=parameter.device),
            }
        width = 3 * int(config.temporal_patch_size) * int(config.patch_size) ** 2
        return {"x": torch.randn(count, width, generator=generator).to(**like), "grid_thw": [[1, rows, columns]]}


def call_of(module: nn.Module) -> TowerCall | None:
    """How a module is called, if it is a tower that the plug-in knows."""
    name = f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"
    kind = KNOWN.get(name)
    return None if kind is None else TowerCall(module, kind)
