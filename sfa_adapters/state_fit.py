"""Maps saved scalars to the layers of a model in `load_state_dict`, and refuses files that leave some unloaded.

`load_state_dict(strict=False)`, which trainers and PEFT use, leaves a parameter as it is where its name is not in the
file. For a bias that was just initialised at random the model would run and silently give wrong results.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sfa_adapters.errors import AdapterMismatchError
from sfa_adapters.layer import SFALayer
from sfa_adapters.state_keys import ScalarKey, match_paths, record_keys, scalar_keys
from sfa_adapters.state_record import check_same_meaning, read_record
from sfa_adapters.tuner import LOAD_HOOK, detach_all, injected_layers

__all__ = ["fit_scalars", "sfa_configs", "watch_state_dicts"]


def watch_state_dicts(model: nn.Module) -> None:
    """Registers a hook that maps and checks the scalars in every later `load_state_dict`; `eject_sfa` removes it."""
    if LOAD_HOOK not in model.__dict__:
        model.__dict__[LOAD_HOOK] = model.register_load_state_dict_pre_hook(_before_loading).id


def fit_scalars(
    model: nn.Module, tensors: dict[str, Tensor], adapter_name: str, keys: dict[str, ScalarKey], source: str
) -> dict[str, Tensor]:
    """Renames the scalars of one adapter in a file to their parameter names in a model.

    Args:
        model: A model with that adapter.
        tensors: Tensors of a file.
        adapter_name: Name of the adapter in the model.
        keys: Which of the tensors are its scalars.
        source: The file, for errors.

    Returns:
        Tensors by parameter name in `model`.

    Raises:
        AdapterMismatchError: Layers, terms or shapes of the file are not those of the adapter.
    """
    layers = {name: layer for name, _, layer in injected_layers(model) if adapter_name in layer.configs}
    paths = match_paths(sorted({key.path for key in keys.values()}), sorted(layers), source)
    values = {(paths[key.path], key.attribute): tensors[name] for name, key in keys.items()}
    fitted: dict[str, Tensor] = {}
    for path, layer in layers.items():
        for attribute, parameter in layer.tensors(adapter_name).items():
            value, name = values.pop((path, attribute), None), parameter_name(path, attribute, adapter_name)
            if value is None or value.shape != parameter.shape:
                there = "nothing" if value is None else f"shape {tuple(value.shape)}"
                where = name.removesuffix(f".{adapter_name}")
                raise AdapterMismatchError(f"{source}: {where} needs {tuple(parameter.shape)}, found {there}.")
            fitted[name] = value
    if values:
        path, attribute = min(values)
        raise AdapterMismatchError(
            f"{source} holds {path}.{attribute}, a term that the adapter here does not have. "
            "Inject it with the terms that it was saved with (all four: SFAConfig.published())."
        )
    return fitted


def parameter_name(path: str, attribute: str, adapter_name: str) -> str:
    """Name of a scalar parameter in a model, from the path of its attention module, its term and its adapter."""
    return ".".join(filter(None, (path, "sfa", attribute, adapter_name)))


def _before_loading(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: Any,
    unexpected_keys: Any, error_msgs: Any,
) -> None:  # fmt: skip
    names = {name for _, _, layer in injected_layers(model) for name in layer.configs}
    # Keys that lie outside of this module belong to others.
    keys = scalar_keys(key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
    source = f"The state dict that is loaded into {type(model).__name__}"
    try:
        for record in record_keys(state_dict)[:1]:
            check_same_meaning(read_record(state_dict[record], source), sfa_configs(model), source)
        for adapter in sorted(names & {key.adapter for key in keys.values() if key.adapter is not None}):
            adapter_keys = {name: key for name, key in keys.items() if key.adapter == adapter}
            fitted = fit_scalars(
                model, {n: state_dict[prefix + n] for n in adapter_keys}, adapter, adapter_keys, source
            )
            for name in adapter_keys:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: value for name, value in fitted.items()})
    except AdapterMismatchError:
        _take_out_unloaded(model)
        raise


def sfa_configs(model: nn.Module) -> dict[str, Any]:
    """The configurations of a model's adapters, by name."""
    return {name: config for _, _, layer in injected_layers(model) for name, config in layer.configs.items()}


def _take_out_unloaded(model: nn.Module) -> None:
    """Removes adapters that were added to load a file which does not fit, so that the model is as it was before."""
    layers: list[SFALayer] = [layer for _, _, layer in injected_layers(model)]
    for name in sorted({name for layer in layers for name in layer.unloaded}):
        detach_all(model, name)
        configs = model.__dict__.get("peft_config")
        if isinstance(configs, dict):
            configs.pop(name, None)
            if not configs:
                del model.__dict__["peft_config"]
