"""`save_pruned` and `load_pruned`: saves a model with pruned heads and loads it again.

The folder holds what `save_pretrained` writes, and a `head_plan.json`. Plain `from_pretrained` fails on it: it builds
every layer with the head counts of the configuration. `load_pruned` first prunes a model of the original shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.head_plan import HeadPlan
from sfa_adapters.heads.kinds import base_linear
from sfa_adapters.heads.prune import PRUNED, Pruned, find_targets, slice_heads
from sfa_adapters.heads.slicing import Edits
from sfa_adapters.tuner import note_head_counts
from sfa_adapters.vlm.parts import plain_model

__all__ = ["PLAN_NAME", "load_pruned", "pruned_of", "read_pruned", "save_pruned"]

Model = TypeVar("Model", bound=nn.Module)
PLAN_NAME, WEIGHTS_NAME, INDEX_NAME = "head_plan.json", "model.safetensors", "model.safetensors.index.json"
_VERSION = 1


def pruned_of(model: nn.Module) -> Pruned:
    """The record of what `prune_heads` did to a model or to parts of it.

    Raises:
        InjectionError: No heads were removed.
    """
    removed: dict[str, tuple[int, ...]] = {}
    heads: dict[str, int] = {}
    groups: dict[str, int] = {}
    how: dict[str, Any] = {}
    kinds: set[str] = set()
    biases: list[str] = []
    base = plain_model(model)
    for name, module in base.named_modules():
        pruned: Pruned | None = module.__dict__.get(PRUNED)
        if pruned is None:
            continue
        prefix = f"{name}." if name else ""
        removed |= {prefix + path: gone for path, gone in pruned.plan.removed.items()}
        heads |= {prefix + path: count for path, count in pruned.plan.num_heads.items()}
        groups |= {prefix + path: count for path, count in pruned.plan.num_kv_heads.items()}
        how |= pruned.plan.how
        kinds.add(pruned.compensation)
        biases += [prefix + path for path in pruned.biases]
    if not removed:
        raise InjectionError(f"{type(base).__name__} has lost no heads; call prune_heads(model, plan) first.")
    return Pruned(HeadPlan(removed, heads, groups, how), "+".join(sorted(kinds)), tuple(biases))


def save_pruned(model: nn.Module, folder: str | Path) -> Path:
    """Writes a pruned model: its weights, its configuration and `head_plan.json`, which comes last.

    Adapters are not written: save them as usual (`PeftModel.save_pretrained`, `save_sfa`) and load them onto the model
    that `load_pruned` returns.

    Args:
        model: A model of transformers, or any other module, after `prune_heads`; also inside a `PeftModel`.
        folder: Where to write.

    Returns:
        The folder.

    Raises:
        InjectionError: No heads of the model are pruned, or it has adapters merged into its weights.
        RecipeError: The folder holds a pruned model already.
    """
    pruned, base, folder = pruned_of(model), plain_model(model), Path(folder)
    if (folder / PLAN_NAME).exists():
        raise RecipeError(f"{folder} holds a pruned model already. Choose an empty folder.")
    short_names = _own_names(base)
    state = {name: tensor for key, tensor in base.state_dict().items() if (name := short_names(key)) is not None}
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(base, PreTrainedModel):
        # With the names of the modules, so that the file can be checked against the model without a conversion.
        base.save_pretrained(folder, state_dict=state, save_original_format=False)
    else:
        save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, folder / WEIGHTS_NAME)
    record = {
        "version": _VERSION,
        "model": type(base).__name__,
        "compensation": pruned.compensation,
        "biases": list(pruned.biases),
        "plan": json.loads(pruned.plan.to_json()),
    }
    (folder / PLAN_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


def load_pruned(base: Model, folder: str | Path) -> Model:
    """Prunes a model of the original shapes, and loads the weights that `save_pruned` wrote into it.

    Args:
        base: The model with all its heads, in the dtype and on the device to use; its weights do not matter. It is
            changed in place. SFA and LoRA in it are pruned with it: load an SFA adapter that was saved before its tower
            was pruned first, since afterwards its shapes do not fit.
        folder: Folder that `save_pruned` wrote.

    Returns:
        The same model, pruned.

    Raises:
        InjectionError: The plan does not fit the model. The model is as it was.
        RecipeError: The folder is incomplete, or its weights are not those of this model. The model is as it was.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # doctest: +SKIP
        >>> model = load_pruned(empty, folder)  # doctest: +SKIP
    """
    folder = Path(folder)
    pruned, kind = read_pruned(folder)
    inner = plain_model(base)
    if type(inner).__name__ != kind:
        raise RecipeError(f"{folder} holds a pruned {kind}, not a {type(inner).__name__}.")
    tensors = _read_tensors(folder)
    edits = Edits()
    for target in find_targets(base, pruned.plan):
        slice_heads(edits, target, pruned.plan)
        if target.path in pruned.biases:
            linear = base_linear(target.path, target.output)
            edits.put(linear, "bias", linear.weight.new_zeros(linear.out_features), linear.weight)
    short_names = _own_names(inner)
    _check_fits(inner, edits, tensors, folder, short_names)
    edits.commit()
    note_head_counts(inner)
    actual = {short_names(key): key for key in inner.state_dict()}
    # Not strict: tied weights are in the file once. Everything else was checked.
    inner.load_state_dict({actual[name]: tensor for name, tensor in tensors.items()}, strict=False)
    if isinstance(inner, PreTrainedModel):
        inner.tie_weights()
    inner.__dict__[PRUNED] = pruned
    return base


def _own_names(base: nn.Module) -> Callable[[str], str | None]:
    """A function from a key to its name in the model without adapters; None for tensors of adapters."""
    wrapped: dict[str, str] = {}  # SFA wraps no layer, so all of its names give None
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            if getattr(module, "merged", False):
                raise InjectionError(f"{name} has an adapter merged in. Unmerge it first (unmerge_adapter).")
            wrapped[f"{name}."] = f"{name}.base_layer."

    def base_name(key: str) -> str | None:
        outer = next((prefix for prefix in wrapped if key.startswith(prefix)), None)
        if outer is None:
            return key
        inside = wrapped[outer]
        return outer + key.removeprefix(inside) if key.startswith(inside) else None

    return base_name


def read_pruned(folder: Path) -> tuple[Pruned, str]:
    """Reads the record of the pruning from a folder of `save_pruned`, and the class name of its model.

    Raises:
        RecipeError: The folder is incomplete, or has another version.
    """
    path = folder / PLAN_NAME
    if not path.is_file():
        raise RecipeError(f"{folder} has no {PLAN_NAME}: it is no folder of save_pruned, or the save did not finish.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version, biases = record["version"], tuple(str(name) for name in record["biases"])
        plan, compensation, kind = json.dumps(record["plan"]), str(record["compensation"]), str(record["model"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(f"{path} cannot be read ({type(error).__name__}: {error}). Save the model anew.") from error
    if version != _VERSION:
        raise RecipeError(f"{path} has version {version!r}; this library reads {_VERSION}. Update it.")
    return Pruned(HeadPlan.from_json(plan), compensation, biases), kind


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of one file or of several; file names cannot point outside of the folder."""
    names = {WEIGHTS_NAME}
    index = folder / INDEX_NAME
    try:
        if index.is_file():
            names = {Path(str(name)).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
        tensors: dict[str, Tensor] = {}
        for name in sorted(names):
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"The weights in {folder} cannot be read: {error}. Copy or save them anew.") from error
    return tensors


def _check_fits(
    base: nn.Module, edits: Edits, tensors: dict[str, Tensor], folder: Path, short_name: Callable[[str], str | None]
) -> None:
    shapes = {key: tensor.shape for key, tensor in base.state_dict().items()}
    paths = {id(module): name for name, module in base.named_modules()}
    for (owner, name), parameter in edits.parameters.items():
        shapes[f"{paths[id(owner)]}.{name}"] = parameter.shape
    expected = {name: shape for key, shape in shapes.items() if (name := short_name(key)) is not None}
    unknown = sorted(tensors.keys() - expected.keys())
    # Keys that the model ties to others are not in the file.
    tied = {short_name(key) for key in getattr(base, "all_tied_weights_keys", None) or ()}
    missing = sorted(expected.keys() - tensors.keys() - tied)
    wrong = sorted(name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name])
    if unknown or missing or wrong:
        lines = [f"not in the model: {unknown[:3]}"] * bool(unknown) + [f"not in the file: {missing[:3]}"] * bool(
            missing
        )
        lines += [f"{n}: {list(tensors[n].shape)} in the file, {list(expected[n])} in the model" for n in wrong[:3]]
        raise RecipeError(f"The weights in {folder} are not those of this {type(base).__name__}. " + "; ".join(lines))
