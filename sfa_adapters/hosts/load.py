"""`load_host`: loads the base model of a recipe, ready for training or for inference."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.metadata import pruned_folder
from sfa_adapters.hosts.placement import dispatch, placement, skeleton
from sfa_adapters.hosts.prepare import Host, check_recipe, prepare, set_trainable
from sfa_adapters.hosts.pruned import load_pruned_host
from sfa_adapters.hosts.quantization import check_loaded, keep_format, quantization
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.spec import HOSTS, HostSpec, Part, VLMSpec
from sfa_adapters.hosts.summary import module_table
from sfa_adapters.vlm.records import vlm_spec

__all__ = ["HOSTS", "Host", "HostSpec", "Part", "load_host", "module_table", "prepare", "read_config", "set_trainable"]


def load_host(recipe: Recipe, device: str | None = None, train: bool = True) -> Host:
    """Loads a host with the precision, devices, adapters and trainable parts of its recipe.

    Everything that can be checked before weights are read is checked first, on the meta device. A folder of
    `save_pruned` is loaded by `load_pruned`; the processor must have been saved beside it.

    Args:
        recipe: The recipe.
        device: Device for the whole host, both halves of a split included. By default the plan decides; without a GPU
            it is the CPU.
        train: Whether to prepare it for training. If not, it is in eval mode, nothing trains, nothing is checkpointed,
            and all weights but those of adapters have `recipe.dtype`.

    Returns:
        The model with its adapters, its processor, its record and the recipe.

    Raises:
        RecipeError: There is no such checkpoint, it is no host of this family, or the plan cannot be followed here.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    spec = vlm_spec(recipe.family)
    check_recipe(recipe)
    where: dict[str, Any] = {"revision": recipe.revision, "trust_remote_code": False}
    config = read_config(recipe)
    meta = skeleton(config, spec)
    device_map = placement(recipe, spec, meta, device)
    options: dict[str, Any] = {
        **where,
        "dtype": getattr(torch, recipe.dtype),
        "device_map": device_map,
        "attn_implementation": _attention(spec),
        "use_safetensors": True,
    }
    pruned = pruned_folder(recipe.model)
    if recipe.plan == "nf4" and not pruned:
        options["quantization_config"] = quantization(recipe, spec, meta)
    with warnings.catch_warnings():
        # A device map may name parameters, as LLaVA-OneVision's newline is one; accelerate looks for modules only.
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        try:
            if pruned:
                model = load_pruned_host(recipe, config, device_map.get("", "cpu"))
            else:
                model = AutoModelForImageTextToText.from_pretrained(recipe.model, **options)
            processor = AutoProcessor.from_pretrained(recipe.model, **where)
        except OSError as error:
            hint = ". Save the processor beside the pruned model (processor.save_pretrained)" if pruned else ""
            raise RecipeError(f"model={recipe.model!r} cannot be loaded: {error}{hint}") from error
    check_loaded(model, spec, recipe.plan)
    keep_format(model)
    if recipe.plan == "split":
        dispatch(model, device_map)
    return prepare(model, processor, recipe, train=train)


def _attention(spec: VLMSpec) -> str | dict[str, str]:
    """SDPA, but for parts that images never reach: a tower for audio may have no SDPA and keeps its default."""
    return "sdpa" if not spec.unused else {"": "sdpa", "text_config": "sdpa", "vision_config": "sdpa"}


def read_config(recipe: Recipe) -> Any:
    """The configuration of a recipe's checkpoint, by hub id or from a local folder.

    Args:
        recipe: Its `model`, `revision` and `family` are used.

    Returns:
        The configuration of transformers.

    Raises:
        RecipeError: There is none, or it is of another family.
    """
    from transformers import AutoConfig

    spec = vlm_spec(recipe.family)
    try:
        config = AutoConfig.from_pretrained(recipe.model, revision=recipe.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise RecipeError(
                f"model={recipe.model!r} brings code of its own, which is not run. Take the checkpoint that "
                "transformers loads itself; its name often ends in -HF or -hf."
            ) from error
        raise RecipeError(f"model={recipe.model!r} has no readable configuration: {error}") from error
    if config.model_type != spec.model_type:
        raise RecipeError(
            f"model={recipe.model!r} is a {config.model_type!r} checkpoint; family={recipe.family!r} needs "
            f"{spec.model_type!r}."
        )
    return config
