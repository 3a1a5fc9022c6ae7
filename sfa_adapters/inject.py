"""`inject_sfa`, `eject_sfa`, `describe`, `save_sfa`, `load_sfa`: SFA on a tower or a whole vision-language model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sfa_adapters.all_towers import ALL_TOWERS, adapters_of_towers, folders_of_towers, names_of_towers
from sfa_adapters.attention_contract import MaskArgument
from sfa_adapters.beside_peft import cover_both
from sfa_adapters.bias import parameter_shapes
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import AdapterMismatchError, InjectionError
from sfa_adapters.layer import SFALayer
from sfa_adapters.peft_tuner import SFAModel
from sfa_adapters.saved import WEIGHTS_NAME, read_scalars, write_scalars
from sfa_adapters.signature import one_or_each
from sfa_adapters.state_fit import fit_scalars, watch_state_dicts
from sfa_adapters.state_keys import PEFT_PREFIX
from sfa_adapters.tower_search import FoundTower, find_tower
from sfa_adapters.tuner import (
    add_adapter,
    all_or_nothing,
    detach_all,
    injected_layers,
    plan_injection,
    prepare_tower,
    wrap_targets,
)

__all__ = [
    "PEFT_PREFIX",
    "WEIGHTS_NAME",
    "Description",
    "describe",
    "eject_sfa",
    "inject_sfa",
    "load_sfa",
    "save_sfa",
]

Model = TypeVar("Model", bound=nn.Module)


def inject_sfa(
    model: Model, config: SFAConfig | None = None, adapter_name: str = "default", *, tower: str | None = None
) -> Model:
    """Adds a structural attention bias to the vision tower of a model, in place.

    The new parameters train; `requires_grad` of the model's own parameters is not touched. The adapter becomes the
    active one.

    Args:
        model: A tower, or a vision-language model with one.
        config: Options; `SFAConfig()` by default. It is copied.
        adapter_name: Name of the adapter.
        tower: Path of the tower in the model, for hosts with several, e.g. "model.image_tower"; or "all" for each of
            them, under names such as "default_image_tower".

    Returns:
        The same model.

    Raises:
        NoMatchingBackboneError: No tower was found; lists the attention modules that were seen.
        InjectionError: An option does not fit, or the name is taken.
        UnsupportedAttentionError: The tower's attention cannot carry a bias.
        AdapterMismatchError: `config` was saved with an adapter of another tower.

    Example:
        >>> from transformers import SiglipVisionConfig, SiglipVisionModel
        >>> tower = SiglipVisionModel(SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, image_size=56, patch_size=14))
        >>> describe(inject_sfa(tower)).num_parameters
        152
    """
    check_model(model)
    if config is not None and not isinstance(config, SFAConfig):
        raise InjectionError(
            f"config={config!r:.80} is a {type(config).__name__}; pass an SFAConfig, e.g. SFAConfig(init_std=0.02). "
            "Adapters of other methods are PEFT's: get_peft_model(model, config)."
        )
    config = copy.deepcopy(config) if config is not None else SFAConfig()
    if tower == ALL_TOWERS:
        names = names_of_towers(model)
        if len(names) > 1:
            return _inject_each(model, config, adapter_name, names)
        tower = None
    config = _with_tower(config, tower)
    plan = plan_injection(model, config, adapter_name)
    with all_or_nothing(model, adapter_name):
        state = prepare_tower(plan)
        plan = wrap_targets(model, plan)
        config.tower = plan.signature()
        config.tower_path = plan.tower_path
        config.target_modules = [name for _, name, _ in plan.targets]
        for index, name, attention in plan.targets:
            layer = add_adapter(attention, index, name, plan, state, config, adapter_name)
            layer.set_adapter([adapter_name])
        watch_state_dicts(model)
        cover_both(model)
    return model


def _inject_each(model: Model, config: SFAConfig, adapter_name: str, names: dict[str, str]) -> Model:
    """`inject_sfa` for every tower, or for none if one of them fails."""
    if config.tower_path is not None:
        raise InjectionError(f"tower='all', but the config has tower_path={config.tower_path!r}; give one.")
    for path, short in names.items():  # a taken name must fail before anything could be removed
        plan_injection(model, _with_tower(copy.deepcopy(config), path), f"{adapter_name}_{short}")
    with ExitStack() as stack:
        for path, short in names.items():
            stack.enter_context(all_or_nothing(model, f"{adapter_name}_{short}"))
            inject_sfa(model, config, f"{adapter_name}_{short}", tower=path)
    return model


def check_model(model: Any) -> None:
    """Checks that an argument is a torch module.

    Raises:
        InjectionError: It is not, e.g. a model id.
    """
    if not isinstance(model, nn.Module):
        hint = (
            " Load it first, e.g. AutoModelForImageTextToText.from_pretrained(...)." if isinstance(model, str) else ""
        )
        raise InjectionError(f"model={model!r:.80} is a {type(model).__name__}, not a torch.nn.Module.{hint}")


def _with_tower(config: SFAConfig, tower: str | None) -> SFAConfig:
    if tower is not None:
        if config.tower_path not in (None, tower):
            raise InjectionError(f"tower={tower!r}, but the config has tower_path={config.tower_path!r}; give one.")
        config.tower_path = tower
    return config


def eject_sfa(model: nn.Module, adapter_name: str | None = None) -> nn.Module:
    """Removes SFA from a model, in place; after the last adapter the model is bit for bit what it was.

    Args:
        model: A model with SFA, by `inject_sfa` or as a `PeftModel`.
        adapter_name: Remove this adapter only; all by default.

    Returns:
        The model; for a `PeftModel` whose method is SFA, its base model once no adapter is left.

    Raises:
        InjectionError: The model has no SFA, or no adapter of that name.
    """
    check_model(model)
    layers = injected_layers(model)
    names = sorted({name for _, _, layer in layers for name in layer.configs})
    if not layers or (adapter_name is not None and adapter_name not in names):
        wanted = "no SFA adapter" if adapter_name is None else f"no SFA adapter named {adapter_name!r}"
        raise InjectionError(f"{type(model).__name__} has {wanted}; adapters: {names}.")
    if isinstance(model, PeftModel) and isinstance(model.base_model, SFAModel):
        if adapter_name is not None and len(names) > 1:
            model.delete_adapter(adapter_name)
            return model
        return model.unload()
    detach_all(model, adapter_name)
    return model


@dataclass(frozen=True)
class Description:
    """What SFA adds to a model, or would add; `print` shows it as a table.

    Attributes:
        backbone: Name of the registered backbone.
        tower: Path of the tower in the model.
        tower_class: Its class.
        num_layers: Attention layers with a bias.
        tower_layers: Attention layers of the tower.
        num_heads: Heads per layer; one number for each layer of the tower where they differ.
        num_parameters: Structural parameters of one adapter, over all layers.
        layer_parameters: The same for each layer of the tower; 0 where it has no bias.
        grid: Rows and columns of patches, None where any size goes.
        prefix_tokens: Leading tokens without a place.
        joined: How the images of a forward are put together, see `Backbone.joined`.
        mask_argument: The argument of the attention's forward that takes the bias.
        mask_reason: Why it is this one.
        adapters: Names of the adapters in the model; empty before injection.
        active: Names of those that are active.
    """

    backbone: str
    tower: str
    tower_class: str
    num_layers: int
    tower_layers: int
    num_heads: int | tuple[int, ...]
    num_parameters: int
    layer_parameters: tuple[int, ...]
    grid: tuple[int, int] | None
    prefix_tokens: int
    joined: str
    mask_argument: str
    mask_reason: str
    adapters: tuple[str, ...]
    active: tuple[str, ...]

    def __str__(self) -> str:
        grid = f"{self.grid[0]}x{self.grid[1]}" if self.grid else "any size"
        adapters = ", ".join(f"{name}{'' if name in self.active else ' (inactive)'}" for name in self.adapters)
        heads = f"{self.num_heads} heads each"
        if not isinstance(self.num_heads, int):
            heads = f"{_span(self.num_heads)} heads, {sum(self.num_heads)} together"
        rows = {
            "tower": f"{self.tower or '(the model)'}  {self.tower_class}",
            "backbone": f"{self.backbone}  (images: {self.joined})",
            "bias": f"through {self.mask_argument}: {self.mask_reason}",
            "layers": f"{self.num_layers} of {self.tower_layers}, {heads}",
            "grid": f"{grid} patches, {self.prefix_tokens} prefix tokens",
            "parameters": f"{self.num_parameters:,} ({_span([n for n in self.layer_parameters if n])} per layer)",
            "adapters": adapters or "none yet",
        }
        return "\n".join(f"{label:<11}{text}" for label, text in rows.items())


def _span(counts: Sequence[int]) -> str:
    """One number where all counts are equal, else the smallest and the largest."""
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def describe(model: nn.Module, config: SFAConfig | None = None, *, tower: str | None = None) -> Description:
    """Describes what SFA adds to a model; before injection, what `inject_sfa(model, config)` would add.

    Args:
        model: A tower, or a host.
        config: Before injection, the options.
        tower: Path of the tower in the model, for hosts with several; by default the one that carries SFA.

    Returns:
        The description.

    Raises:
        NoMatchingBackboneError: No tower was found.
        InjectionError: `config` does not fit the tower, or the model has several towers and `tower` names none.
    """
    check_model(model)
    config = _with_tower(copy.deepcopy(config) if config is not None else SFAConfig(), tower)
    path = find_tower(model, config.tower_path).name
    layers = [entry for entry in injected_layers(model) if not path or entry[0].startswith(f"{path}.")]
    counts: dict[int, int] = {}
    if layers:
        adapters = tuple(dict.fromkeys(name for _, _, layer in layers for name in layer.configs))
        active = tuple(dict.fromkeys(name for _, _, layer in layers for name in layer.active))
        name = (active or adapters or ("",))[0]
        plan = plan_injection(model, SFAConfig(tower_path=path), adapter_name="")
        for layer in (layer for _, _, layer in layers if name in layer.configs):
            counts[layer.index] = sum(p.numel() for p in layer.tensors(name).values())
    else:
        plan = plan_injection(model, config, adapter_name="")
        assert config.num_blocks is not None
        for index in plan.layers:
            shapes = parameter_shapes(plan.num_heads[index], config.num_blocks, config.terms)
            counts[index] = sum(torch.Size(shape).numel() for shape in shapes.values())
        adapters, active = (), ()
    heads = one_or_each(plan.num_heads)
    argument = _argument(plan.located)
    return Description(
        backbone=plan.located.backbone.name,
        tower=plan.located.name,
        tower_class=type(plan.located.tower).__name__,
        num_layers=len(counts),
        tower_layers=len(plan.located.attentions),
        num_heads=heads if isinstance(heads, int) else tuple(heads),
        num_parameters=sum(counts.values()),
        layer_parameters=tuple(counts.get(index, 0) for index in range(len(plan.located.attentions))),
        grid=plan.geometry.grid,
        prefix_tokens=plan.geometry.prefix_tokens,
        joined=plan.located.backbone.joined,
        mask_argument=argument.name,
        mask_reason=argument.reason,
        adapters=adapters,
        active=active,
    )


def _argument(located: FoundTower) -> MaskArgument:
    """Where the bias enters; a stand-in for the attention (`Backbone.wrap_attention`) is there from injection on."""
    attention = located.attentions[0][1]
    wrap = located.backbone.wrap_attention
    return located.backbone.argument_of(attention if wrap is None else wrap(attention))


def save_sfa(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> Path:
    """Writes one adapter as PEFT does (`adapter_config.json`, `adapter_model.safetensors`), for models without PEFT.

    `PeftModel.from_pretrained(base, folder)` and `load_sfa(base, folder)` both read it. With sharded parameters
    (`fully_shard`) call it in every process; the first one writes. Adapters that `inject_sfa(model, tower="all")` made
    are written together, each in a folder of its tower inside `folder`.

    Args:
        model: A model with SFA.
        folder: Where to write.
        adapter_name: Which adapter, as it was named at injection.

    Returns:
        The folder.

    Raises:
        InjectionError: The model has no SFA adapter of that name, or it has `modules_to_save`.
        WeightsError: The folder cannot be written, or the adapter has no values.
    """
    check_model(model)
    together = adapters_of_towers(model, adapter_name)
    for short, name in together.items():
        save_sfa(model, Path(folder) / short, name)
    if together:
        return Path(folder)
    unsaved = [
        layer.configs[adapter_name].modules_to_save
        for _, _, layer in injected_layers(model)
        if adapter_name in layer.configs
    ]
    if unsaved and unsaved[0]:
        raise InjectionError(
            f"The adapter {adapter_name!r} has modules_to_save={unsaved[0]}, which save_sfa does not write. Save with "
            "PEFT, which does: model.save_pretrained(folder)."
        )
    write_scalars(model, Path(folder), adapter_name)
    return Path(folder)


def load_sfa(model: Model, folder: str | Path, adapter_name: str = "default", config: SFAConfig | None = None) -> Model:
    """Injects an adapter that was saved by `save_sfa`, by PEFT, or with the whole model that it was injected into.

    Args:
        model: The base model, without an adapter of this name.
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`; or the folder of a model
            (`model.save_pretrained`, a checkpoint of a Trainer; also in shards), of a LoRA that was saved with SFA
            beside it, or one safetensors file; or a folder with one such folder for each tower.
        adapter_name: Name of the adapter in this model; where a file holds several adapters, also which one is read.
        config: The configuration, only for files that do not hold it.

    Returns:
        The same model.

    Raises:
        WeightsError: A file is missing or cannot be read, or its configuration is missing.
        AdapterMismatchError: The adapter belongs to another tower, has a newer format, or its tensors do not fit; or
            the folder holds a LoRA as well, which the model does not have yet.
        SFAError: As `inject_sfa`, e.g. no tower was found or the name is taken.
    """
    check_model(model)
    if towers := folders_of_towers(Path(folder)):
        with ExitStack() as stack:
            for part in towers:
                loaded = load_sfa(model, part, f"{adapter_name}_{part.name}")
                stack.enter_context(all_or_nothing(loaded, f"{adapter_name}_{part.name}"))
        return model
    saved = read_scalars(folder, adapter_name, config)
    others = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if saved.other_method is not None and all(isinstance(module, SFALayer) for module in others):
        raise AdapterMismatchError(
            f"{folder} also holds a {saved.other_method} adapter, which the model does not have. Load both: "
            "load_sfa(PeftModel.from_pretrained(model, folder), folder)."
        )
    plan_injection(model, saved.config, adapter_name)  # a taken name must fail before anything could be removed
    with all_or_nothing(model, adapter_name):
        inject_sfa(model, saved.config, adapter_name)
        fitted = fit_scalars(model, saved.tensors, adapter_name, saved.keys, saved.source)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in fitted.items():
                parameters[name].copy_(value)
    return model
