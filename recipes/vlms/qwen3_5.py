"""Qwen3.5: the tower of Qwen3-VL without deepstack, and a language model with linear attention."""

from __future__ import annotations

from typing import Any

from sfa_adapters.recipes.vlms.navit import NO_DENSITY, NO_GRID, NO_MERGING, lengths, patch_grid, pixel_options
from sfa_adapters.recipes.vlms.qwen3_vl import layer, mergers, tower
from sfa_adapters.vlm.records import register_vlm
from sfa_adapters.vlm.sizes import FLOAT, MemoryRules, Precision, Widths, adapted_layer
from sfa_adapters.vlm.spec import ImageRules, VLMSpec

__all__ = ["SPEC"]

CHUNK = 64  # tokens that linear attention takes at once


def _decoder(recipe: Any, config: Any, sizes: Widths, part: Precision, masked: int) -> tuple[int, ...]:
    by_kind = {
        "full_attention": _full(sizes, part, masked),
        "linear_attention": _linear(sizes, part, config),
    }
    adapted = adapted_layer(recipe, sizes, part)
    return tuple(by_kind[kind] + adapted for kind in config.text_config.layer_types)


def _norm(part: Precision, width: int) -> int:
    """Bytes per token that a norm keeps, with a weight around 1 in float32, beside its input."""
    copy = 0 if part.stream == FLOAT else FLOAT * width
    return copy + FLOAT + (FLOAT * width if part.trains else 0)


def _mlp(sizes: Widths, part: Precision) -> int:
    return 2 * _norm(part, sizes.width) + part.stream * sizes.width + 3 * part.compute * sizes.inner


def _full(sizes: Widths, part: Precision, masked: int) -> int:
    """As in Qwen3, with a gate on the output."""
    normed = sizes.attended + sizes.keys
    keys = sizes.attended if masked else sizes.keys
    kept = part.compute * (2 * sizes.attended + 2 * keys + masked) + FLOAT * sizes.heads
    kept += FLOAT * normed + 2 * FLOAT * sizes.heads + (FLOAT * normed if part.trains else 0)
    return kept + 2 * part.compute * sizes.attended + _mlp(sizes, part)  # the gate, and the output that it multiplies


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
            narrow_stream=True,
            decoder=_decoder,
        ),
        nano=_nano,
        refuses={
            "adat": NO_GRID,
            "text_density": NO_DENSITY,
            "dymu": NO_MERGING,
            "fastv": "three of four layers of its language model are linear attention, whose state would miss tokens "
            "that are gone. For fewer tokens use drop_blank_groups or a smaller max_pixels.",
            "heads": "its language model has linear attention, and gates inside the product that makes queries, which "
            "cannot be sliced by heads. Prune a host with plain attention, such as Qwen3-VL.",
        },
    )
)
