"""Qwen3.5: the tower of Qwen3-VL without deepstack, and a language model with linear attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sfa_adapters.recipes.vlms.navit import NO_DENSITY, NO_GRID, NO_MERGING, lengths, patch_grid, pixel_options
from sfa_adapters.recipes.vlms.qwen3_vl import layer, mergers, tower
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, MemoryRules, Precision, Widths, text_layer
from sfa_adapters.vlm.spec import ImageRules, VLMSpec

__all__ = ["SPEC"]

CHUNK = 64  # tokens that linear attention takes at once


def _text_layers(sizes: Widths, part: Precision, config: Any, masked: int) -> tuple[int, ...]:
    by_kind = {
        "full_attention": _full(sizes, part, config, masked),
        "linear_attention": _linear(sizes, part, config),
    }
    return tuple(by_kind[kind] for kind in config.text_config.layer_types)


def _norm(part: Precision, width: int, groups: int = 1) -> int:
    """Bytes per token that a norm keeps, with a weight around 1 in float32, beside its input."""
    copy = 0 if part.stream == FLOAT else FLOAT * width
    return copy + FLOAT * groups + (FLOAT * width if part.trains else 0)


def _mlp(sizes: Widths, part: Precision) -> int:
    return 2 * _norm(part, sizes.width) + part.stream * sizes.width + 3 * part.compute * sizes.inner


def _full(sizes: Widths, part: Precision, config: Any, masked: int) -> int:
    """As in Qwen3, with a gate on the output; parts of queries and keys are not turned."""
    compute = part.compute
    plain = text_layer(replace(sizes, inner=0), part, config, masked) - 2 * part.rms_norm(sizes.width)
    normed = sizes.attended + sizes.keys
    kept = plain - part.stream * sizes.width + _mlp(sizes, part)
    kept += FLOAT * normed + 2 * FLOAT * sizes.heads + (FLOAT * normed if part.trains else 0)
    return kept + 2 * compute * sizes.attended  # the gate, and the output that it multiplies


def _linear(sizes: Widths, part: Precision, config: Any) -> int:
    """Gated DeltaNet as transformers computes it without the kernels of `fla`, in float32; with them it is less."""
    text, compute = config.text_config, part.compute
    heads = text.linear_num_value_heads
    keys, values = heads * text.linear_key_head_dim, heads * text.linear_value_head_dim
    mixed = 2 * text.linear_num_key_heads * text.linear_key_head_dim + values
    kept = _mlp(sizes, part) + 2 * compute * mixed  # what the convolution and its activation saw
    # Queries and keys: as they came, normalised, with decay, and keys times beta; what new keys read of the state.
    kept += FLOAT * 8 * keys
    # Values: as they came, corrected within a chunk, and by the state; the output, and the norm and the gate on it.
    kept += FLOAT * 7 * values + compute * values
    kept += FLOAT * 5 * heads * CHUNK  # matrices of a chunk
    return kept + FLOAT * keys * text.linear_value_head_dim // CHUNK  # its state


def _nano() -> tuple[Any, Any]:
    from sfa_adapters.recipes.nano.hosts_navit import qwen3_5

    return qwen3_5()


SPEC = register_vlm(
    VLMSpec(
        name="qwen3_5",
        title="Qwen3.5",
        model_type="qwen3_5",
        model_class="Qwen3_5ForConditionalGeneration",
        classes=(
            "transformers.models.qwen3_5.*.Qwen3_5ForConditionalGeneration",
            "transformers.models.qwen3_5.*.Qwen3_5Model",
        ),
        projector=("model.visual.merger",),  # a child of the tower
        images=ImageRules(setting="max_pixels", options=pixel_options),
        memory=MemoryRules(
            lengths=lengths,
            tower=tower,
            layer=layer,
            projector=mergers,
            fixed_grid=False,
            grid=patch_grid,
            text_layer=_text_layers,
        ),
        nano=_nano,
        refuses={
            "adat": NO_GRID,
            "text_density": NO_DENSITY,
            "dymu": NO_MERGING,
            "fastv": "three of four layers of its language model are linear attention, whose state would miss tokens "
            "that are gone. For fewer tokens use drop_blank_groups or a smaller max_pixels.",
            "heads": "its language model has linear attention, and gates inside the product that makes queries; neither "
            "can be sliced by heads. Prune a host with plain attention, such as Qwen3-VL.",
        },
    )
)
