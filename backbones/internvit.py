"""InternViT as transformers ships it (`InternVLVisionModel`): one CLS token, split q, k and v, no mask of its own."""

from typing import Any

from torch import Tensor, nn

from sfa_adapters import processor_statistics
from sfa_adapters.errors import InjectionError
from sfa_adapters.pixel_grids import config_grid, pixel_layouts
from sfa_adapters.registry import Backbone, Geometry, PatchSeam, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """The patch grid of the configuration, and one prefix token (CLS)."""
    return Geometry(grid=config_grid(tower), prefix_tokens=1)


def positions(tower: nn.Module) -> Tensor:
    """The position embeddings of all patches; the first row belongs to CLS."""
    model: Any = tower
    return model.embeddings.position_embeddings[0, 1:]


def check_patches(tower: nn.Module) -> None:
    """Refuses settings under which adaptive tokens would differ from the tower's own.

    Raises:
        InjectionError: No absolute position embeddings to resample, or dropout of embedded patches.
    """
    model: Any = tower
    if model.embeddings.position_embeddings is None:
        raise InjectionError("This InternViT has no absolute position embeddings (use_absolute_position_embeddings).")
    if model.embeddings.dropout.p:
        raise InjectionError("hidden_dropout_prob drops embedded patches, which adaptive tokens would not pass; set 0.")


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of its image processor, by channel."""
    return processor_statistics.IMAGENET


INTERNVIT = register_backbone(
    Backbone(
        name="internvit",
        towers=("transformers.models.internvl.*.InternVLVisionModel",),
        attentions=("transformers.models.internvl.*.InternVLVisionAttention",),
        geometry=geometry,
        layouts=pixel_layouts,
        image_module="embeddings",
        patches=PatchSeam(
            images="embeddings",
            projection="embeddings.patch_embeddings.projection",
            positions=positions,
            tokens_in="encoder",
            tokens_out="encoder",
            check=check_patches,
            statistics=statistics,
        ),
        small_towers="sfa_adapters.testing.towers_transformers:INTERNVIT",
    )
)
