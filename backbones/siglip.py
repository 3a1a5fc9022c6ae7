"""SigLIP towers and the copies of SigLIP inside Idefics2, Idefics3 and SmolVLM: no prefix token, split q, k and v.

The attention-pooling head of SigLIP is a `torch.nn.MultiheadAttention` and stays as it is. Idefics-type towers pass a
real `[batch, 1, tokens, tokens]` mask for padded tiles; the bias is added to it.
"""

from typing import Any

from torch import Tensor, nn

from sfa_adapters import processor_statistics
from sfa_adapters.pixel_grids import config_grid, pixel_layouts
from sfa_adapters.registry import Backbone, Geometry, PatchSeam, register_backbone


def geometry(tower: nn.Module) -> Geometry:
    """The patch grid of the configuration, and no prefix tokens."""
    return Geometry(grid=config_grid(tower), prefix_tokens=0)


def positions(tower: nn.Module) -> Tensor:
    """The position embeddings of all patches."""
    model: Any = tower
    return model.embeddings.position_embedding.weight


def has_head(tower: nn.Module) -> bool:
    """Whether the tower has the attention-pooling head, which looks at every token."""
    model: Any = tower
    return bool(model.use_head)


def statistics(tower: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of its image processor, by channel."""
    return processor_statistics.HALF


SIGLIP = register_backbone(
    Backbone(
        name="siglip",
        # Before transformers 5.14 SiglipVisionModel held the tower as .vision_model; either is a tower.
        towers=(
            "transformers.models.siglip.*.SiglipVisionModel",
            "transformers.models.siglip.*.SiglipVisionTransformer",
        ),
        attentions=("transformers.models.siglip.*.SiglipAttention",),
        geometry=geometry,
        layouts=pixel_layouts,
        image_module="embeddings",
        patches=PatchSeam(
            images="embeddings",
            projection="embeddings.patch_embedding",
            positions=positions,
            tokens_in="encoder",
            tokens_out="encoder",
            pools=has_head,
            statistics=statistics,
        ),
        small_towers="sfa_adapters.testing.towers_transformers:SIGLIP",
    )
)

IDEFICS = register_backbone(
    Backbone(
        name="idefics",
        towers=tuple(
            f"transformers.models.{family}.*VisionTransformer" for family in ("idefics2", "idefics3", "smolvlm")
        ),
        attentions=tuple(
            f"transformers.models.{family}.*VisionAttention" for family in ("idefics2", "idefics3", "smolvlm")
        ),
        geometry=geometry,
        layouts=pixel_layouts,
        image_module="embeddings",
        # Of tiles that fill their picture. Padded ones come with a mask, which whoever exchanges tokens refuses.
        patches=PatchSeam(
            images="embeddings",
            projection="embeddings.patch_embedding",
            positions=positions,
            tokens_in="encoder",
            tokens_out="encoder",
            statistics=statistics,
        ),
        small_towers="sfa_adapters.testing.towers_transformers:IDEFICS",
    )
)
