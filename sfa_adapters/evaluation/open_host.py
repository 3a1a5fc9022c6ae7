"""`open_host`: a host to ask, from whatever the user has: a model, the folder of a run, or a model and an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfa_adapters.errors import RecipeError
from sfa_adapters.inject import load_sfa
from sfa_adapters.training.checkpoints import RECORD, load_trained, saved_recipe
from sfa_adapters.training.hosts import HOSTS, Host, load_host
from sfa_adapters.training.recipe import Family, Recipe
from sfa_adapters.training.trainer import FINAL

__all__ = ["family_of", "find_run", "open_host"]

ADAPTER = "adapter_config.json"
OFF: dict[str, Any] = {"sfa": False, "lora_llm": 0, "adat": None}
OFF |= {"scr_entropy": 0.0, "scr_grounding": 0.0, "scr_stability": 0.0}


def find_run(folder: str | Path) -> Path | None:
    """The trained weights in a folder: its own, those of the finished run in it, or those of its newest checkpoint.

    Args:
        folder: A checkpoint, or the folder of a run.

    Returns:
        The folder with `recipe.json`, or None where there is none.
    """
    folder = Path(folder)
    numbered = [(int(p.name[11:]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    places = [folder, folder / FINAL, *(p for _, p in sorted(numbered, reverse=True))]
    return next((place for place in places if (place / RECORD).is_file()), None)


def family_of(model: str, revision: str | None = None) -> Family:
    """Which family of hosts a model belongs to; reads only its configuration.

    Raises:
        RecipeError: There is no such model, or it is of no family that is known.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{model} is no recipe, no folder of a run and no model that can be read: {str(error).splitlines()[0]}"
        ) from error
    for family, spec in HOSTS.items():
        if spec.model_type == kind:
            return family
    known = ", ".join(f"{spec.model_type} ({spec.model_class})" for spec in HOSTS.values())
    raise RecipeError(f"{model} is a {kind!r} model. Hosts that can be evaluated: {known}.")


def open_host(
    model: str | Path | Recipe, adapter: str | Path | None = None, device: str | None = None, **changes: Any
) -> Host:
    """Loads a host to ask it.

    Args:
        model: The folder of a run or a checkpoint; or a hub id, a local folder or a recipe of a host, which is taken as
            it is, without an adapter.
        adapter: The folder of a run or of an SFA adapter, to put into `model`.
        device: Where to; the GPU by default, a CPU without one.
        changes: Settings of the recipe that differ: `plan`, `prompt`, `max_tiles`, `data`, ...

    Returns:
        The host, in eval mode; nothing in it trains.

    Raises:
        RecipeError: There is no such model, or the folder holds no trained weights; or they are of another host.
    """
    run = None if isinstance(model, Recipe) else find_run(model)
    if run is not None and adapter is not None:
        raise RecipeError(f"{model} is the folder of a run already: leave out the adapter {adapter}.")
    if isinstance(model, Recipe):
        recipe = model.replace(**OFF)
    elif run is None:
        if Path(model).is_dir() and (Path(model) / ADAPTER).is_file():
            raise RecipeError(f"{model} is an adapter: give its model too (--model BASE --adapter {model}).")
        recipe = Recipe(name=Path(model).name, model=str(model), family=family_of(str(model)), **OFF)
    else:
        recipe = saved_recipe(run)
    if adapter is not None:
        run = find_run(adapter)
        if run is not None:  # the run says what was put in; the model is the user's
            recipe = saved_recipe(run).replace(model=recipe.model, revision=recipe.revision, family=recipe.family)
        elif not (Path(adapter) / ADAPTER).is_file():
            raise RecipeError(f"{adapter} has neither {RECORD} (a run) nor {ADAPTER} (an SFA adapter).")
    host = load_host(recipe.replace(**changes), device, train=False)
    host.model.requires_grad_(False)
    if run is not None:
        load_trained(host, run)
    elif adapter is not None:
        load_sfa(host.model, adapter)
    host.model.requires_grad_(False).eval()
    return host
