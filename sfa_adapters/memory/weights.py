"""`ParameterCounts`: the numbers of weights in each part of a host, counted on the meta device, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from sfa_adapters.config import SFAConfig
from sfa_adapters.hosts.placement import layer_classes, skeleton
from sfa_adapters.hosts.prepare import unread_prefixes
from sfa_adapters.hosts.quantization import kept_modules
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.spec import Part
from sfa_adapters.inject import describe
from sfa_adapters.vlm.records import vlm_spec

__all__ = ["ParameterCounts", "Weights", "count_parameters", "four_bit_bytes", "weights_of"]

FLOAT = 4
# bitsandbytes: one scale per 64 weights, in 8 bits, and one float32 scale per 256 of these; then two code books.
BLOCK, NESTED, CODES = 64, 256, 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights in the parts of a host.

    Attributes:
        parts: Of tower, projector and language model with its head and what is beside it.
        unread: Of the tower, after the layers that the host reads; they never train.
        unused: Beside the language model, where images never come; counted with it, and they never train.
        matrices: Rows and columns of every linear layer of the language model but its head.
        sfa: Structural scalars of all layers.
        largest_layer: Of the largest layer.
        outside: Of what is in no layer: embeddings, head, projector, norms.
    """

    parts: dict[Part, int]
    unread: int
    matrices: tuple[tuple[int, int], ...]
    sfa: int
    largest_layer: int
    outside: int
    unused: int = 0


@dataclass(frozen=True)
class Weights:
    """What the weights of one half of a host take up, in bytes.

    Attributes:
        stored: As they are kept.
        trained: How many of them train; a number, not bytes.
        casts: Copies that autocast makes of trained weights.
        unpacked: The largest 4-bit matrix, as it is unpacked for its product.
    """

    stored: int
    trained: int
    casts: int
    unpacked: int = 0


def count_parameters(recipe: Recipe, config: Any) -> ParameterCounts:
    """Builds a host on the meta device and counts its weights.

    Args:
        recipe: Its `family` and its SFA settings are used.
        config: The host's configuration.

    Raises:
        RecipeError: The configuration is of another family.
    """
    spec = vlm_spec(recipe.family)
    model = skeleton(config, spec)
    places = spec.places(model)
    parts: dict[Part, int] = {"vision": 0, "projector": 0, "llm": 0}
    unread, unused = 0, 0
    dead = unread_prefixes(model, places)
    for name, parameter in model.named_parameters():
        parts[places.part_of(name)] += parameter.numel()
        if places.is_unused(name):
            unused += parameter.numel()
        elif name.startswith(dead):
            unread += parameter.numel()
    kept = set(kept_modules(model, spec))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = tuple((m.out_features, m.in_features) for name, m in linear.items() if name not in kept)
    classes = layer_classes(model, spec)
    layers = [_count(module) for module in model.modules() if type(module).__name__ in classes]
    options: dict[str, Any] = {"terms": list(recipe.sfa_terms)}
    options["layers_to_transform"] = None if recipe.sfa_layers is None else list(recipe.sfa_layers)
    sfa = describe(model, SFAConfig(**options)).num_parameters if recipe.sfa else 0
    return ParameterCounts(parts, unread, matrices, sfa, max(layers), sum(parts.values()) - sum(layers), unused)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def four_bit_bytes(rows: int, columns: int) -> int:
    """Bytes of a matrix in NF4 with nested scales, as bitsandbytes keeps it."""
    numbers = rows * columns
    blocks = -(-numbers // BLOCK)
    return -(-numbers // 2) + blocks + FLOAT * -(-blocks // NESTED) + CODES


def weights_of(recipe: Recipe, counts: ParameterCounts) -> tuple[Weights, Weights]:
    """Bytes of tower with projector and SFA, and of the language model with its LoRA, as `prepare` leaves them.

    Args:
        recipe: What trains, and in which precision.
        counts: Of its host.
    """
    return _front(recipe, counts), _language_model(recipe, counts)


def _front(recipe: Recipe, counts: ParameterCounts) -> Weights:
    compute = FLOAT if recipe.dtype == "float32" else 2
    vision, projector = counts.parts["vision"], counts.parts["projector"]
    wide = FLOAT if not recipe.freeze_vision else compute
    stored = vision * wide + projector * (wide if recipe.freeze_projector else FLOAT) + counts.sfa * FLOAT
    trained = 0 if recipe.freeze_vision else vision - counts.unread
    trained += 0 if recipe.freeze_projector else projector
    casts = 2 * trained if compute != FLOAT else 0
    return Weights(stored, trained + counts.sfa, casts)


def _language_model(recipe: Recipe, counts: ParameterCounts) -> Weights:
    compute = FLOAT if recipe.dtype == "float32" else 2
    total = counts.parts["llm"]
    lora = recipe.lora_llm * sum(rows + columns for rows, columns in counts.matrices)
    trained = lora + (0 if recipe.freeze_llm else total - counts.unused)
    casts = 2 * trained if compute != FLOAT else 0
    if recipe.plan == "nf4":
        packed = sum(four_bit_bytes(*shape) for shape in counts.matrices)
        rest = total - sum(rows * columns for rows, columns in counts.matrices)
        largest = max(rows * columns for rows, columns in counts.matrices)
        return Weights(packed + rest * compute + lora * FLOAT, trained, casts, largest * compute)
    return Weights(total * (compute if recipe.freeze_llm else FLOAT) + lora * FLOAT, trained, casts)
