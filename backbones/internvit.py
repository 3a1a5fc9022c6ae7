"""InternViT as transformers ships it (`InternVLVisionModel`): one CLS token, split q, k and v, no mask of its own."""

from torch import nn

from sfa_adapters.registry import Backbone, Geometry, config_grid, pixel_grid, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """Grid from the configuration, behind the CLS token."""
    return Geometry(grid=config_grid(tower), prefix_tokens=1)


INTERNVIT = register_backbone(
    Backbone(
        name="internvit",
        towers=("transformers.models.internvl.*.InternVLVisionModel",),
        attentions=("transformers.models.internvl.*.InternVLVisionAttention",),
        geometry=geometry,
        grid_of_input=pixel_grid,
    )
)
