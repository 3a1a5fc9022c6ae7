"""Saves and loads the trained tensors of a host, strictly.

`Trainer` restores nothing for native vision-language models: `save_pretrained` writes keys in the layout of the hub,
and `Trainer` loads them with `strict=False` into modules of other names. Here keys are the names of the parameters, and
an unexpected key, a missing key, another shape or another host is an error.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sfa_adapters.errors import RecipeError
from sfa_adapters.files import whole_folder
from sfa_adapters.inject import PEFT_PREFIX, WEIGHTS_NAME
from sfa_adapters.training.record import RECORD, check_host, read_record, record_of, saved_recipe
from sfa_adapters.tuner import injected_layers

if TYPE_CHECKING:
    from sfa_adapters.hosts.load import Host

__all__ = ["RECORD", "load_trained", "save_trained", "saved_recipe", "trained_tensors", "write_trained"]

ADAPTER = "default"
SFA_FILE, TUNED_FILE, LORA_FILE = WEIGHTS_NAME, "tuned.safetensors", f"lora/{WEIGHTS_NAME}"


def trained_tensors(host: Host) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters that a checkpoint holds: for each of its files, by key.

    All of SFA and LoRA, and those of the base model that train (`requires_grad`).

    Args:
        host: A prepared host.
    """
    files: dict[str, dict[str, nn.Parameter]] = {SFA_FILE: {}, TUNED_FILE: {}, LORA_FILE: {}}
    for name, parameter in host.model.named_parameters():
        part = host.places.part_of(name)
        if part == "sfa":
            files[SFA_FILE][PEFT_PREFIX + name.removesuffix(f".{ADAPTER}")] = parameter
        elif part == "lora":
            files[LORA_FILE][PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".")] = parameter
        elif parameter.requires_grad:
            files[TUNED_FILE][name] = parameter
    return {file: parameters for file, parameters in files.items() if parameters}


def save_trained(host: Host, folder: str | Path) -> Path:
    """Writes the trained tensors; on an error the folder stays as it was.

    Files: `adapter_config.json` and `adapter_model.safetensors` (SFA, as `save_sfa` writes them), `tuned.safetensors`
    (tensors of the base model that train), `lora/` (the LoRA of the language model, in the form of PEFT),
    `recipe.json`. Call it in every process: sharded tensors are gathered, and only the first process writes.

    Args:
        host: The host in training, or a trained one.
        folder: The folder to write; an existing one is replaced.

    Returns:
        The folder.

    Raises:
        TrainingError: The disk is full or cannot be written; the old folder is still there.
    """
    folder = Path(folder)
    if _is_first():
        with whole_folder(folder) as partial:
            write_trained(host, partial)
    else:
        _gathered(host)
    return folder


def write_trained(host: Host, folder: Path, write: bool = True) -> None:
    """Writes the files of `save_trained` into a folder, without the guarantee that it is whole.

    Args:
        host: The host.
        folder: The folder.
        write: Whether this process writes, or only takes part in gathering.
    """
    files = _gathered(host)
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if SFA_FILE in files:
        sfa: Any = copy.deepcopy(_sfa_config(host.model))
        sfa.inference_mode = True
        sfa.save_pretrained(str(folder))
    if LORA_FILE in files:
        lora = _lora_config(host.model)
        lora.inference_mode = True
        lora.save_pretrained(str(folder / "lora"))
    (folder / RECORD).write_text(json.dumps(record_of(host, files), indent=1) + "\n", encoding="utf-8")


def load_trained(host: Host, folder: str | Path, resume: bool = False) -> None:
    """Loads what `save_trained` wrote into a host that was prepared by the same recipe.

    Trained tensors of the base model keep the precision of the host: a host that is loaded for evaluation in bfloat16
    gets them rounded, one that trains must have that of the checkpoint.

    Args:
        host: The host; it stays as it is if anything does not fit.
        folder: A checkpoint or the result of a run.
        resume: Whether training goes on, which needs the same trainable tensors.

    Raises:
        RecipeError: The folder is not whole, or of another host, or a key, shape or dtype does not fit.
    """
    folder = Path(folder)
    record = read_record(folder)
    check_host(host, record, folder)
    listed: Mapping[str, Mapping[str, Any]] = record["tensors"]
    tensors_of_host = trained_tensors(host)
    if not resume:  # what the run trained, whether it trains here or not
        everything = dict(host.model.named_parameters())
        tensors_of_host[TUNED_FILE] = {key: everything[key] for key in listed.get(TUNED_FILE, ()) if key in everything}
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    for file in sorted({*tensors_of_host, *listed}):
        mine = tensors_of_host.get(file, {})
        _same_keys(folder / file, "the host", set(mine), set(listed.get(file, ())))
        tensors = _read(folder / file) if mine else {}
        _same_keys(folder / file, RECORD, set(mine), set(tensors))
        for key, parameter in mine.items():
            _check_tensor(folder / file, key, parameter, tensors[key])
            pairs.append((parameter, tensors[key]))
    with torch.no_grad():
        for parameter, tensor in pairs:
            data = parameter.data
            if isinstance(data, DTensor):
                tensor = distribute_tensor(tensor.to(data.device, data.dtype), data.device_mesh, data.placements)
            parameter.copy_(tensor)
    if SFA_FILE in tensors_of_host:
        _take_warmup(host.model, folder)


# -- writing ----------------------------------------------------------------------------------------------------------


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _gathered(host: Host) -> dict[str, dict[str, Tensor]]:
    files: dict[str, dict[str, Tensor]] = {}
    for file, parameters in trained_tensors(host).items():
        files[file] = {}
        for key, parameter in parameters.items():
            data = parameter.detach()
            whole = data.full_tensor() if isinstance(data, DTensor) else data
            files[file][key] = whole.cpu().contiguous()
    return files


def _sfa_config(model: nn.Module) -> Any:
    return next(layer.configs[ADAPTER] for _, _, layer in injected_layers(model) if ADAPTER in layer.configs)


def _lora_config(model: nn.Module) -> LoraConfig:
    """The configuration of the LoRA, with targets that are found in the whole model."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        config = configs.get(ADAPTER) if isinstance(configs, dict) else None
        if isinstance(config, LoraConfig):
            config = copy.deepcopy(config)
            config.target_modules = [name for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
            return config
    raise RecipeError(f"{type(model).__name__} has LoRA weights, and no configuration of a LoRA (`peft_config`).")


# -- loading ----------------------------------------------------------------------------------------------------------


def _take_warmup(model: nn.Module, folder: Path) -> None:
    """Takes over how far the ramp of the axial start has got; older checkpoints do not have it."""
    saved = folder / "adapter_config.json"
    done = json.loads(saved.read_text(encoding="utf-8")).get("init_warmup_done", 0) if saved.is_file() else 0
    for _, _, layer in injected_layers(model):
        if ADAPTER in layer.configs:
            layer.configs[ADAPTER].init_warmup_done = int(done)


def _same_keys(file: Path, where: str, expected: set[str], names: set[str]) -> None:
    missing, extra = sorted(expected - names), sorted(names - expected)
    if missing or extra:
        problems = [
            f"{len(missing)} missing, e.g. {missing[0]}" if missing else "",
            f"{len(extra)} too many" if extra else "",
        ]
        problems[1] += f", e.g. {extra[0]}" if extra else ""
        raise RecipeError(
            f"{file} does not fit {where}: {' and '.join(filter(None, problems))}. Load it with the recipe that it was "
            f"trained with ({RECORD})."
        )


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt"):
            pass
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{file} cannot be read: {error}.") from error


def _check_tensor(file: Path, key: str, parameter: nn.Parameter, tensor: Tensor) -> None:
    dtype_fits = tensor.dtype == parameter.dtype or (tensor.is_floating_point() and not parameter.requires_grad)
    if tuple(tensor.shape) != tuple(parameter.shape) or not (dtype_fits and parameter.is_floating_point()):
        raise RecipeError(
            f"{file}: {key} is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}, the host needs "
            f"{str(parameter.dtype).removeprefix('torch.')}{list(parameter.shape)}."
        )
