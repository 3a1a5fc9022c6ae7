"""Loading of a host with pruned heads that a recipe names: a folder of `save_pruned` with the processor beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sfa_adapters.errors import RecipeError
from sfa_adapters.heads.pruned_files import load_pruned
from sfa_adapters.hosts.recipe import Recipe

__all__ = ["load_pruned_host"]


def load_pruned_host(recipe: Recipe, config: Any, device: Any) -> Any:
    """Builds a host with all its heads from its configuration, prunes it and loads its weights.

    Args:
        recipe: Its `model` is the folder.
        config: The configuration in it, which names the original head counts.
        device: Device for the whole model.

    Returns:
        The model, in eval mode and `recipe.dtype`.

    Raises:
        RecipeError: The plan is not `bf16`, or the folder is incomplete.
        InjectionError: The head plan does not fit the model.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig
    from transformers.initialization import no_init_weights

    if recipe.plan != "bf16":
        raise RecipeError(
            f"plan={recipe.plan} cannot load {recipe.model}, which lost attention heads: its layers have shapes of "
            "their own. Use plan=bf16."
        )
    # Every weight comes from the file; some are drawn all the same.
    with torch.random.fork_rng(), torch.device(device), no_init_weights():
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, recipe.dtype), attn_implementation="sdpa", trust_remote_code=False
        )
    load_pruned(model.eval(), recipe.model)
    if (Path(recipe.model) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(recipe.model)
    return model
