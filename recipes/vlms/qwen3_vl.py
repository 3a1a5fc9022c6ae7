"""Qwen3-VL: a tower that takes any size, whose first layers are read as well (deepstack), and Qwen3."""

from __future__ import annotations

from typing import Any

from sfa_adapters.recipes.vlms.navit import NO_DENSITY, NO_GRID, lengths, patch_grid, pixel_options, plain_layer
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, MemoryRules, Precision, Widths
from sfa_adapters.vlm.spec import ImageRules, VLMSpec

__all__ = ["SPEC", "mergers", "tower"]


def tower(config: Any) -> Widths:
    """Widths of the tower of Qwen3-VL and Qwen3.5."""
    vision = config.vision_config
    heads, width = vision.num_heads, vision.hidden_size
    return Widths(vision.depth, width, vision.intermediate_size, heads, width, width, width // heads)


def layer(sizes: Widths, part: Precision, config: Any, sfa: bool) -> int:
    """Bytes per token of a layer of the tower of Qwen3-VL and Qwen3.5."""
    return plain_layer(sizes, part, fused=True)


def mergers(part: Precision, tower: Precision, config: Any) -> int:
    """Bytes per image token of the merger, and of one more for each layer whose features are handed on."""
    vision = config.vision_config
    group = vision.spatial_merge_size**2
    count = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    wide = vision.hidden_size * group
    copies = 1 if part.compute == FLOAT else count  # layers before the last keep what a norm saw; autocast copies it
    kept = FLOAT * wide * copies + 2 * FLOAT * (group + count - 1)
    return kept + count * (part.product_inputs(wide, 1) + part.compute * wide * (1 + part.trains))


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_navit import qwen3_vl

    return qwen3_vl()


SPEC = register_vlm(
    VLMSpec(
        name="qwen3_vl",
        title="Qwen3-VL",
        model_type="qwen3_vl",
        model_class="Qwen3VLForConditionalGeneration",
        classes=(
            "transformers.models.qwen3_vl.*.Qwen3VLForConditionalGeneration",
            "transformers.models.qwen3_vl.*.Qwen3VLModel",
        ),
        projector=("model.visual.merger", "model.visual.deepstack_merger_list"),  # children of the tower
        images=ImageRules(setting="max_pixels", options=pixel_options),
        memory=MemoryRules(
            lengths=lengths,
            tower=tower,
            layer=layer,
            projector=mergers,
            fixed_grid=False,
            grid=patch_grid,
            narrow_stream=True,
        ),
        nano=_nano,
        refuses={
            "adat": NO_GRID,
            "text_density": NO_DENSITY,
            "dymu": "features of several layers of its tower go to the language model, and merged tokens would have to "
            "leave all of them. For fewer tokens use FastV, drop_blank_groups or a smaller max_pixels.",
        },
    )
)
