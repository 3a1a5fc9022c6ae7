"""LLaVA-NeXT: as LLaVA-1.5, with pages cut into tiles. Adapters and token reduction only; it has no recipe."""

from typing import Any

from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.spec import ImageTokens, VLMSpec

__all__ = ["SPEC"]


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts import llava_next

    return llava_next()


SPEC = register_vlm(
    VLMSpec(
        name="llava_next",
        title="LLaVA-NeXT",
        model_type="llava_next",
        model_class="LlavaNextForConditionalGeneration",
        classes=(
            "transformers.models.llava_next.*.LlavaNextForConditionalGeneration",
            "transformers.models.llava_next.*.LlavaNextModel",
        ),
        unread=("post_layernorm", "head"),
        projector=("model.multi_modal_projector", "model.image_newline"),
        image_tokens=ImageTokens(kind="packed_tiles", page_first=True),
        nano=_nano,
        refuses={"train": "there is no recipe for it yet. Inject adapters and use a Trainer of your own."},
    )
)
