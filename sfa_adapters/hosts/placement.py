"""Device plans: on which devices the parts of a host are placed; checked on the meta device before loading.

* `nf4`: language model in 4-bit NF4, tower and projector in 16-bit, one copy per process.
* `split`: tower and projector on GPU 0, language model on GPU 1, one process.
* `bf16`: everything on the device of the process.
* `fsdp2`: everything sharded over the processes by accelerate.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.quantization import four_bit_modules, some
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.spec import Places, VLMSpec

__all__ = [
    "accelerate_config",
    "check_covered",
    "dispatch",
    "layer_classes",
    "placement",
    "shard",
    "skeleton",
    "split_map",
]

logger = logging.getLogger(__name__)


def skeleton(config: Any, spec: VLMSpec) -> nn.Module:
    """The host on the meta device, without memory for weights, built from its configuration.

    Args:
        config: Its configuration.
        spec: Its record.

    Returns:
        The model.

    Raises:
        RecipeError: Its class or its parts are not those of the record.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    spec.places(model)
    return model


# -- where ------------------------------------------------------------------------------------------------------------


def placement(recipe: Recipe, spec: VLMSpec, model: nn.Module, device: str | None = None) -> dict[str, Any]:
    """The `device_map` of a recipe's plan, checked against the model.

    Args:
        recipe: The recipe.
        spec: The record of its host.
        model: The host, on the meta device.
        device: Device for everything, both halves of a split included; by default the GPUs of this process, or the CPU.

    Returns:
        Device by module name; "" stands for the whole model.

    Raises:
        RecipeError: The plan cannot be followed with these GPUs and processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    device_of_process = device or _own_device()
    if recipe.plan == "split":
        if processes > 1:
            raise RecipeError(
                f"plan=split is one process that uses two GPUs, but {processes} processes were started. Start one "
                "(python, not torchrun), or use plan=nf4: one copy per GPU."
            )
        device_map = split_map(spec.places(model), *_two_devices(device))
        check_covered(model, device_map)
        return device_map
    if recipe.plan == "fsdp2":
        if processes == 1 and device is None:
            raise RecipeError(
                "plan=fsdp2 shards a host over several processes, but there is one. Start it with: accelerate launch "
                f"--config_file {accelerate_config('fsdp2')} ..."
            )
        return {"": device or "cpu"}  # accelerate moves each process's shard to its device
    return {"": device_of_process}


def split_map(places: Places, first: Any, second: Any) -> dict[str, Any]:
    """Device map of a split: tower and projector on one device, language model and head on another.

    Args:
        places: Module names of the host's parts.
        first: Device of tower and projector.
        second: Device of language model and head.

    Returns:
        Device by module name; no module of it lies inside another one.
    """
    front = [place for place in places.projector if not place.startswith(f"{places.tower}.")]
    behind = (places.language_model, places.lm_head, *places.unused)
    return dict.fromkeys((places.tower, *front), first) | dict.fromkeys(behind, second)


def check_covered(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Checks that a device map gives every parameter and buffer one device.

    Args:
        model: The model, on any device.
        device_map: Device by module or parameter name; "" is the whole model.

    Raises:
        RecipeError: Some are in no entry, or in several; names them.
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    hits = {name: [e for e in device_map if not e or name == e or name.startswith(f"{e}.")] for name, _ in tensors}
    lost = sorted(name for name, entries in hits.items() if not entries)
    twice = sorted(name for name, entries in hits.items() if len(entries) > 1)
    empty = sorted(entry for entry in device_map if not any(entry in entries for entries in hits.values()))
    for names, problem in ((lost, "in no entry"), (twice, "in several entries"), (empty, "nowhere in the model")):
        if names:
            raise RecipeError(
                f"The device map does not fit {type(model).__name__}: {some(names)} {problem}; entries: "
                f"{', '.join(device_map)}."
            )


def dispatch(model: Any, device_map: Mapping[str, Any]) -> None:
    """Puts the hooks of accelerate on both halves of a split, also where they share a device.

    `from_pretrained` leaves the hooks out when a map names one device only; with them a rehearsal on a CPU or on one
    GPU takes the same path as a run on two.

    Args:
        model: The model, loaded.
        device_map: Its map.
    """
    from accelerate.hooks import attach_align_device_hook_on_blocks

    devices = set(device_map.values())
    if len(devices) > 1:
        return
    attach_align_device_hook_on_blocks(
        model,
        execution_device={**device_map, "": devices.pop()},
        offload=dict.fromkeys(device_map, False),
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
    )
    model.hf_device_map = dict(device_map)


def _own_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _two_devices(device: str | None) -> tuple[Any, Any]:
    if device is not None:
        return device, device
    count = torch.cuda.device_count()
    if count == 1:
        raise RecipeError(
            "plan=split needs two GPUs, and 1 is visible (CUDA_VISIBLE_DEVICES?). Use plan=nf4, which needs one, or "
            "put both halves on the one: load_host(recipe, device='cuda:0')."
        )
    if count == 0:
        logger.warning("No GPU is visible: plan=split is rehearsed with both halves on the CPU.")
        return "cpu", "cpu"
    return 0, 1


# -- sharded ----------------------------------------------------------------------------------------------------------


def accelerate_config(plan: Literal["ddp", "fsdp2"]) -> Path:
    """The configuration for `accelerate launch --config_file` that comes with this library, for two GPUs."""
    return Path(__file__).with_name(f"{plan}.yaml")


def shard(model: nn.Module, spec: VLMSpec, mesh: Any = None) -> nn.Module:
    """Shards a prepared host over the processes, in place, as accelerate does with `fsdp2.yaml`.

    Every layer of tower and language model is one unit, and all other modules together are another. The scalars of SFA
    are gathered with the layer that they belong to.

    Args:
        model: The model of a prepared host; all of its parameters that train must have one precision within a layer.
        spec: Its record.
        mesh: The device mesh; all processes by default.

    Returns:
        The same model.

    Raises:
        RecipeError: It has 4-bit weights, or no layer of these classes.
    """
    from torch.distributed.fsdp import fully_shard

    if four_bit_modules(model):
        raise RecipeError("4-bit weights cannot be sharded. Use plan=nf4 with torchrun: one 4-bit copy per GPU.")
    classes = layer_classes(model, spec)
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    if not layers:
        raise RecipeError(f"{type(model).__name__} has no layer of the classes {', '.join(sorted(classes))}.")
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh)
    return model


def layer_classes(model: Any, spec: VLMSpec) -> set[str]:
    """Names of the layer classes: those of the record and of `_no_split_modules`, as the language model may vary."""
    return set(spec.places(model).layer_classes) | set(getattr(model, "_no_split_modules", None) or ())
