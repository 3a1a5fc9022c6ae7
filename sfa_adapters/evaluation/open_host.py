"""`open_host`: loads a host for evaluation, from a model, the folder of a run, or a model and an adapter.

Attention heads can be removed after loading, and a folder of `save_pruned` is a model like any other. The host is
evaluated as it is in memory; nothing is loaded again by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.compensation import Compensation, check_compensation
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.kinds import read_geometry
from sfa_adapters.heads.metadata import pruned_folder
from sfa_adapters.heads.prune import prune_heads
from sfa_adapters.heads.pruned_files import PLAN_NAME, pruned_of
from sfa_adapters.hosts.load import HOSTS, Host, load_host
from sfa_adapters.hosts.recipe import Family, Recipe
from sfa_adapters.inject import load_sfa
from sfa_adapters.training.checkpoints import RECORD, load_trained, saved_recipe
from sfa_adapters.training.train import FINAL
from sfa_adapters.vlm.parts import plain_model
from sfa_adapters.vlm.records import registered_vlms

__all__ = ["family_of", "find_run", "open_host", "read_head_plan"]

ADAPTER = "adapter_config.json"
OFF: dict[str, Any] = {"sfa": False, "lora_llm": 0, "adat": None}
OFF |= {"scr_entropy": 0.0, "scr_grounding": 0.0, "scr_stability": 0.0}


def find_run(folder: str | Path) -> Path | None:
    """Finds the trained weights in a folder: its own, else those of the finished run, else of the newest checkpoint.

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
    """The family of hosts that a model belongs to; reads only its configuration.

    Args:
        model: Hub id or folder of the model.
        revision: Its revision on the hub.

    Raises:
        RecipeError: There is no such model, its family is not known, or the record of the family refuses training.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False).model_type
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{model} is no recipe, no folder of a run and no model that can be read: {str(error).splitlines()[0]}"
        ) from error
    for family, spec in registered_vlms().items():
        if spec.model_type == kind:
            spec.require("train")
            return family
    known = ", ".join(f"{spec.model_type} ({spec.model_class})" for spec in HOSTS.values())
    raise RecipeError(f"{model} is a {kind!r} model. Hosts that can be evaluated: {known}.")


def read_head_plan(path: str | Path, compensation: str = "none") -> HeadPlan:
    """Reads the head plan of `sfa calibrate heads --rate`, and checks the compensation for the pruned heads.

    Args:
        path: The file, or the folder with `head_plan.json`.
        compensation: As in `prune_heads`; "bias" is refused, since there are no batches to measure means on.

    Returns:
        The head plan.

    Raises:
        RecipeError: There is no plan, it belongs to a model that was pruned already, or the compensation cannot be
            used.
    """
    if compensation == "bias":
        raise RecipeError(
            "compensation=bias measures means on prompts, and those that are evaluated must not be among them: remove "
            "the heads with prune_heads(model, plan, 'bias', batches), save_pruned, and evaluate that folder."
        )
    check_compensation(compensation, None)
    path = Path(path)
    path = path / PLAN_NAME if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"There is no head plan {path}; make one with: sfa calibrate heads --rate 0.2") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None  # from_json says what is wrong
    if isinstance(content, dict) and "plan" in content:
        raise RecipeError(f"{path} belongs to a model of save_pruned: evaluate its folder, without a head plan.")
    try:
        return HeadPlan.from_json(text)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def open_host(
    model: str | Path | Recipe,
    adapter: str | Path | None = None,
    device: str | None = None,
    *,
    head_plan: str | Path | HeadPlan | None = None,
    compensation: Compensation = "none",
    **changes: Any,
) -> Host:
    """Loads a host for evaluation.

    Args:
        model: The folder of a run or a checkpoint; or a hub id, a local folder (also of `save_pruned`) or a recipe,
            whose host is loaded without an adapter.
        adapter: The folder of a run or of an SFA adapter, to load into `model`.
        device: Device of the host; by default the GPU, or the CPU without one.
        head_plan: Attention heads to remove from the host in memory, after its adapters were loaded: a head plan, its
            file, or the folder of the file. A model that is named without a recipe is then loaded in 16 bits, not in 4.
        compensation: Compensation for the removed heads: "none", "absorb" or "residual".
        changes: Settings of the recipe that differ: `plan`, `prompt`, `max_tiles`, `data`, ...

    Returns:
        The host, in eval mode; nothing in it trains.

    Raises:
        RecipeError: There is no such model, the folder holds no trained weights or those of another host, or the head
            plan cannot be used.
        InjectionError: The head plan is of another model, or heads of a layer cannot be removed (e.g. 4-bit weights).
    """
    if head_plan is None and compensation != "none":
        raise RecipeError(f"compensation={compensation} is for pruned heads: give their head_plan, too.")
    if isinstance(head_plan, HeadPlan):
        check_compensation(compensation, None)
    elif head_plan is not None:
        head_plan = read_head_plan(head_plan, compensation)
    run = None if isinstance(model, Recipe) else find_run(model)
    if run is not None and adapter is not None:
        raise RecipeError(f"{model} is the folder of a run already: leave out the adapter {adapter}.")
    if isinstance(model, Recipe):
        recipe = model.replace(**OFF)
    elif run is None:
        if Path(model).is_dir() and (Path(model) / ADAPTER).is_file():
            raise RecipeError(f"{model} is an adapter: give its model too (--model BASE --adapter {model}).")
        # Heads cannot be cut out of 4-bit weights, which are the default.
        whole = head_plan is None and not pruned_folder(model)
        usual: dict[str, Any] = OFF if whole else OFF | {"plan": "bf16"}
        recipe = Recipe(name=Path(model).name, model=str(model), family=family_of(str(model)), **usual)
    else:
        recipe = saved_recipe(run)
    if adapter is not None:
        run = find_run(adapter)
        if run is not None:  # adapters as in the run, but the model that the user named
            recipe = saved_recipe(run).replace(model=recipe.model, revision=recipe.revision, family=recipe.family)
        elif not (Path(adapter) / ADAPTER).is_file():
            raise RecipeError(f"{adapter} has neither {RECORD} (a run) nor {ADAPTER} (an SFA adapter).")
    host = load_host(recipe.replace(**changes), device, train=False)
    host.model.requires_grad_(False)
    if run is not None:
        load_trained(host, run)
    elif adapter is not None:
        load_sfa(host.model, adapter)
    if head_plan is not None:
        _prune(host, head_plan, compensation)
    host.model.requires_grad_(False).eval()
    return host


def _prune(host: Host, plan: HeadPlan, compensation: Compensation) -> None:
    """Removes heads and checks that they are gone, so that an unpruned model is never scored as a pruned one."""
    prune_heads(host.model, plan, compensation)
    done, base = pruned_of(host.model), plain_model(host.model)  # an error where nothing went
    for path in done.plan.num_heads:
        left = read_geometry(path, base.get_submodule(path)).num_heads
        if left != len(done.plan.kept(path)) or done.plan.count != plan.count:
            raise InjectionError(
                f"{path} has {left} heads after pruning, not {len(done.plan.kept(path))}, and {done.plan.count} of "
                f"{plan.count} heads are pruned: the plan was not carried out."
            )
