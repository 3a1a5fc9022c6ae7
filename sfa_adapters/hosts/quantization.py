"""4-bit language models: which layers stay out of 4-bit, and a check after loading.

bitsandbytes packs the weights of linear layers two to a byte. They cannot train, but gradients go through them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.recipe import PlanName, Recipe
from sfa_adapters.hosts.spec import VLMSpec
from sfa_adapters.install import install_command

__all__ = ["check_loaded", "four_bit_modules", "keep_format", "kept_modules", "quantization", "some"]


def kept_modules(model: nn.Module, spec: VLMSpec) -> list[str]:
    """Full names of all linear layers that must stay out of 4-bit: tower, projector and head.

    Full, because current `transformers` compares such names from the start of a module's name or with its end: a bare
    `vision_tower` keeps nothing, and the tower is quantised all the same.

    Args:
        model: The host, on any device.
        spec: Its record.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    places = spec.places(model)
    kept = {places.lm_head, *filter(places.is_unused, linear)}
    return [name for name in linear if places.part_of(name) != "llm" or name in kept]


def quantization(recipe: Recipe, spec: VLMSpec, model: nn.Module) -> Any:
    """The `BitsAndBytesConfig` of plan `nf4`: NF4 with nested (double) quantisation of the scales.

    Args:
        recipe: `dtype` is what the 4-bit layers compute in.
        spec: The record of its host.
        model: The host, on the meta device.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils.import_utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise RecipeError(f"plan=nf4 needs bitsandbytes: {install_command('recipes')}. Or use plan=bf16.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, recipe.dtype),
        llm_int8_skip_modules=kept_modules(model, spec),
    )


def four_bit_modules(model: nn.Module) -> set[str]:
    """Names of the linear layers whose weights are in 4-bit."""
    # By the weights and not by the class, so that bitsandbytes need not be there.
    packed = [name for name, p in model.named_parameters(remove_duplicate=False) if hasattr(p, "quant_state")]
    return {name.removesuffix(".weight").removesuffix(".base_layer") for name in packed}


def keep_format(model: nn.Module) -> None:
    """Keeps 4-bit weights in the one format that can train, on a CPU.

    On some CPUs (AVX512-BF16) bitsandbytes repacks weights in the first forward without gradients. That fails for
    layers whose sizes are no multiples of 32 and 64, and leaves the others in a format for answers only.

    Args:
        model: The host, loaded.
    """
    for name in four_bit_modules(model):
        layer: Any = model.get_submodule(name)
        layer.support_avx512bf16_for_cpu = False


def check_loaded(model: nn.Module, spec: VLMSpec, plan: PlanName) -> None:
    """Checks which layers are in 4-bit: with `nf4` all of the language model but its head, otherwise none.

    Args:
        model: The host, loaded.
        spec: Its record.
        plan: The plan it was loaded with.

    Raises:
        RecipeError: Another layer is, or one is not; names them.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = linear - set(kept_modules(model, spec)) if plan == "nf4" else set()
    packed = four_bit_modules(model)
    if wrong := sorted(packed - wanted):
        raise RecipeError(f"plan={plan}: {len(wrong)} layers are in 4-bit and must not be: {some(wrong)}.")
    if missing := sorted(wanted - packed):
        raise RecipeError(
            f"plan={plan}: {len(missing)} layers of the language model are not in 4-bit: {some(missing)}."
        )


def some(names: Iterable[str], most: int = 5) -> str:
    """The first names of a long list, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
