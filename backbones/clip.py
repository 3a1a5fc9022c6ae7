"""CLIP vision towers: one CLS token in front, split q, k and v."""

from torch import nn

from sfa_adapters.registry import Backbone, Geometry, config_grid, pixel_grid, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """Grid from the configuration, behind the CLS token."""
    return Geometry(grid=config_grid(tower), prefix_tokens=1)


CLIP = register_backbone(
    Backbone(
        name="clip",
        towers=("transformers.models.clip.*.CLIPVisionModel", "transformers.models.clip.*.CLIPVisionTransformer"),
        attentions=("transformers.models.clip.*.CLIPAttention",),
        geometry=geometry,
        grid_of_input=pixel_grid,
    )
)
