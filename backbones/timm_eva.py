"""timm's `Eva` (EVA02, Perception Encoder, DINOv3) and `Beit`: prefix, positions and size as the model has them.

Eva rotates q and k, Beit adds a learned relative bias to the logits; the structural bias is added to the same logits.
A `TimmWrapperModel` of transformers (PerceptionLM) holds one of them, which is then the tower.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sfa_adapters.backbones.timm_vit import geometry, layouts, statistics
from sfa_adapters.errors import UnsupportedAttentionError
from sfa_adapters.registry import Backbone, register_backbone


def check(tower: nn.Module) -> None:
    """Refuses towers that drop patches in training: the place of a token is then not known.

    Raises:
        UnsupportedAttentionError: `patch_drop_rate` is not 0.
    """
    dropout: Any = getattr(tower, "patch_drop", None)
    if getattr(dropout, "prob", 0) > 0:
        raise UnsupportedAttentionError(
            f"{type(tower).__name__} drops patches in training (patch_drop_rate={dropout.prob:g}), so that the place "
            "of a token is not known. Build it with patch_drop_rate=0."
        )


TIMM_EVA = register_backbone(
    Backbone(
        name="timm_eva",
        towers=("timm.models.eva.Eva",),
        attentions=("timm.models.eva.EvaAttention", "timm.layers.attention.AttentionRope"),
        geometry=geometry,
        layouts=layouts,
        image_module="patch_embed",  # forward_features and forward_intermediates do not pass the model's forward
        check=check,
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_timm:TIMM_EVA",
    )
)

TIMM_BEIT = register_backbone(
    Backbone(
        name="timm_beit",
        towers=("timm.models.beit.Beit",),
        attentions=("timm.models.beit.Attention",),
        geometry=geometry,
        layouts=layouts,
        image_module="patch_embed",
        mask_argument="shared_rel_pos_bias",  # added to the logits beside the layer's own
        check=check,
        statistics=statistics,
        small_towers="sfa_adapters.testing.towers_timm:TIMM_BEIT",
    )
)
