"""CLIP vision towers: one CLS token in front, split q, k and v."""

from typing import Any

from torch import Tensor, nn

from sfa_adapters import processor_statistics
from sfa_adapters.pixel_grids import config_grid, pixel_layouts
from sfa_adapters.registry import Backbone, Geometry, PatchSeam, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """The patch grid of the configuration, and one prefix token (CLS)."""
    return Geometry(grid=config_grid(tower), prefix_tokens=1)


def positions(tower: nn.Module) -> Tensor:
    """The position embeddings of all patches; the first row belongs to CLS."""
    model: Any = tower
    return model.embeddings.position_embedding.weight[1:]


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of its image processor, by channel."""
    return processor_statistics.CLIP


CLIP = register_backbone(
    Backbone(
        name="clip",
        towers=("transformers.models.clip.*.CLIPVisionModel", "transformers.models.clip.*.CLIPVisionTransformer"),
        attentions=("transformers.models.clip.*.CLIPAttention",),
        geometry=geometry,
        layouts=pixel_layouts,
        image_module="embeddings",
        patches=PatchSeam(
            images="embeddings",
            projection="embeddings.patch_embedding",
            positions=positions,
            tokens_in="pre_layrnorm",
            tokens_out="encoder",
            statistics=statistics,
        ),
        small_towers="sfa_adapters.testing.towers_transformers:CLIP",
    )
)
