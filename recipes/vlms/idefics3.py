"""Idefics3: tiles, tower and projector of SmolVLM. Granite-Docling-258M and SmolDocling are of this class."""

from __future__ import annotations

from typing import Any

from sfa_adapters.recipes.vlms.smolvlm import image_rules, image_tokens, memory_rules
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.spec import VLMSpec

__all__ = ["SPEC"]


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_tiles import idefics3

    return idefics3()


SPEC = register_vlm(
    VLMSpec(
        name="idefics3",
        title="Idefics3",
        model_type="idefics3",
        model_class="Idefics3ForConditionalGeneration",
        classes=(
            "transformers.models.idefics3.*.Idefics3ForConditionalGeneration",
            "transformers.models.idefics3.*.Idefics3Model",
        ),
        projector=("model.connector",),
        joins_in_own_dtype=True,
        images=image_rules,
        image_tokens=image_tokens,
        memory=memory_rules,
        nano=_nano,
        nano_settings={"max_tiles": 4},
    )
)
