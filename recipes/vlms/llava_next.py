"""LLaVA-NeXT: as LLaVA-1.5, with pages cut into tiles. Adapters and token reduction only: nobody wrote its recipe."""

from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.spec import ImageTokens, VLMSpec

__all__ = ["SPEC"]

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
        image_tokens=ImageTokens(kind="packed_tiles"),
        refuses={"train": "there is no recipe for it yet. Inject adapters and use a Trainer of your own."},
    )
)
