"""Loads a model whose structural attention bias was baked into buffers. Needs torch, transformers and safetensors only.

`sfa export` writes this file beside the weights as `load_baked.py`:

    folder/
        load_baked.py          this file
        sfa_bias.json          which attention modules get a bias, for which grid of patches
        sfa_bias.safetensors   the bias: one matrix per layer, or tables that are expanded when it is loaded
        model/                 the whole model as `save_pretrained` writes it, and its processor

    from load_baked import load_baked      # with the folder on sys.path, or from inside it
    model = load_baked("folder")
    processor = AutoProcessor.from_pretrained("folder/model")

`AutoModel...from_pretrained("folder/model")` alone gives the fine-tuned weights WITHOUT the bias: no class of
transformers hands a mask of its own to each layer of its vision tower, so a few lines of code must. They are below:
each attention module gets its bias as a buffer, and a forward pre-hook adds it to the module's own mask argument.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

__all__ = ["BakedBiasError", "attach_bias", "detach_bias", "expand_tables", "load_baked"]

FORMAT = 1
BUFFER = "sfa_bias"
HOOKS = "_sfa_baked_hooks"
RECORD = "_sfa_baked"
# Attention implementations that add a mask to the scores. Others use it as a padding mask, or ignore it silently.
IMPLEMENTATIONS = ("eager", "sdpa")


class BakedBiasError(ValueError):
    """The bias does not fit the image size, the model, its attention implementation, or the file is newer."""


def load_baked(folder: str | Path, **options: Any) -> Any:
    """Loads the model in eval mode, with its bias.

    Args:
        folder: What `sfa export` wrote.
        options: For `from_pretrained`, e.g. `device_map="auto"` or `attn_implementation="eager"`. `dtype` is the one
            that was exported by default.

    Returns:
        The model, of its ordinary class.

    Raises:
        BakedBiasError: A file is missing, of a newer format, or does not fit the model.
    """
    folder = Path(folder)
    for name in ("sfa_bias.json", "sfa_bias.safetensors", "model/config.json"):
        if not (folder / name).is_file():
            raise BakedBiasError(f"{folder} has no {name}; it was not written by `sfa export`.")
    record = json.loads((folder / "sfa_bias.json").read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise BakedBiasError(f"{folder / 'sfa_bias.json'} has format {record.get('format')}; this file reads {FORMAT}.")
    model_class = getattr(transformers, record["model_class"], None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise BakedBiasError(
            f"transformers {transformers.__version__} has no model class {record['model_class']!r}; the model was "
            f"exported with transformers {record['versions']['transformers']}."
        )
    options = {"dtype": getattr(torch, record["dtype"]), **options}
    model: Any = model_class.from_pretrained(folder / "model", **options).eval()
    modules = dict(model.named_modules())
    for path, kind in [
        (record["tower"], record["tower_class"]),
        *((x["module"], x["class"]) for x in record["layers"]),
    ]:
        class_name = type(modules[path]).__name__ if path in modules else "nothing"
        if class_name != kind:
            raise BakedBiasError(
                f"{path or 'the model'} should be a {kind}, found {class_name}. The model was exported with "
                f"transformers {record['versions']['transformers']}; this is {transformers.__version__}."
            )
    with safe_open(folder / "sfa_bias.safetensors", framework="pt") as file:
        for number, layer in enumerate(record["layers"]):
            bias = _read_bias(file, number, record)
            attach_bias(modules[layer["module"]], bias, record["mask_argument"], layer["module"])
    tower: Any = modules[record["tower"]]
    tower.__dict__[RECORD] = record
    tower.register_forward_pre_hook(_check_grid, with_kwargs=True)
    return model


def _read_bias(file: Any, number: int, record: dict[str, Any]) -> Tensor:
    """The matrix of one layer, `[heads, tokens, tokens]`."""
    names = ("bias",) if record["form"] == "dense" else ("rows", "columns", "blocks")
    missing = [name for name in names if f"layer.{number}.{name}" not in file.keys()]  # noqa: SIM118 - no mapping
    if missing:
        raise BakedBiasError(f"sfa_bias.safetensors has no layer.{number}.{missing[0]}; the file is incomplete.")
    tensors = [file.get_tensor(f"layer.{number}.{name}") for name in names]
    if record["form"] != "dense":
        places = [file.get_tensor(name) for name in ("row_of_token", "column_of_token", "on_page")]
        tensors = [expand_tables(*tensors, *places)]
    bias = tensors[0].to(getattr(torch, record["dtype"]))
    tokens = record["grid"][0] * record["grid"][1] + record["prefix_tokens"]
    if tuple(bias.shape) != (record["heads"], tokens, tokens):
        raise BakedBiasError(
            f"The bias of layer {number} has shape {tuple(bias.shape)}; expected {record['heads']} heads and {tokens} "
            "tokens."
        )
    return bias


def expand_tables(
    rows: Tensor, columns: Tensor, blocks: Tensor, row_of_token: Tensor, column_of_token: Tensor, on_page: Tensor
) -> Tensor:
    """Expands the tables of a layer to its bias matrix.

    Args:
        rows: Bias between rows, logits, `[heads, R, R]`.
        columns: Bias between columns, logits, `[heads, C, C]`.
        blocks: Value of each token's block, `[adapters, heads, tokens]`; the bias of a pair is their product.
        row_of_token: `[tokens]`, int64.
        column_of_token: `[tokens]`, int64.
        on_page: False for CLS and registers, which get no bias, bool `[tokens]`.

    Returns:
        `[heads, tokens, tokens]`, logits.
    """
    bias = rows.index_select(1, row_of_token).index_select(2, row_of_token)
    bias += columns.index_select(1, column_of_token).index_select(2, column_of_token)
    bias *= on_page[:, None] & on_page
    for value in blocks:
        bias += value[:, :, None] * value[:, None, :]
    return bias


def attach_bias(attention: nn.Module, bias: Tensor, mask_argument: str, name: str) -> None:
    """Attaches a bias to an attention module, as a buffer that is not saved with the model.

    Args:
        attention: The module.
        bias: `[heads, tokens, tokens]`, logits.
        mask_argument: The argument of its forward that takes an additive mask.
        name: Its path, for errors.
    """
    like = next(attention.parameters())
    if like.device.type != "meta":  # offloaded: the bias stays where it is and follows its input at each forward
        bias = bias.to(like.device)
    attention.register_buffer(BUFFER, bias.unsqueeze(0), persistent=False)
    parameters = list(inspect.signature(type(attention).forward).parameters)
    # `self` is the first parameter. An argument that is taken through **kwargs has no position.
    position = parameters.index(mask_argument) - 1 if mask_argument in parameters else None
    attention.__dict__[RECORD] = (mask_argument, position, name)
    attention.__dict__[HOOKS] = attention.register_forward_pre_hook(_add_bias, with_kwargs=True)


def detach_bias(attention: nn.Module) -> None:
    """Removes the bias from an attention module."""
    attention.__dict__.pop(HOOKS).remove()
    attention.__dict__.pop(RECORD)
    delattr(attention, BUFFER)


def _add_bias(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention module: adds the bias to its mask argument."""
    argument, position, name = attention.__dict__[RECORD]
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa")
    if implementation not in IMPLEMENTATIONS:
        raise BakedBiasError(
            f"{name} runs on {implementation!r}, which takes no bias. Load with attn_implementation='sdpa', or call "
            "model.set_attn_implementation('sdpa')."
        )
    hidden: Any = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
    bias: Any = getattr(attention, BUFFER)
    if hidden.shape[-2] != bias.shape[-1]:
        raise BakedBiasError(f"{name} got {hidden.shape[-2]} tokens; its bias is baked for {bias.shape[-1]}.")
    bias = bias.to(device=hidden.device, dtype=hidden.dtype)
    if position is not None and len(args) > position:
        return (*args[:position], _merge(bias, args[position]), *args[position + 1 :]), kwargs
    return args, {**kwargs, argument: _merge(bias, kwargs.get(argument))}


def _merge(bias: Tensor, given: Tensor | None) -> Tensor:
    """The bias on top of the model's own mask, boolean (True = visible) or additive."""
    if given is None:
        return bias
    if given.dtype == torch.bool:
        return torch.where(given, bias, torch.finfo(bias.dtype).min)
    return bias + given.to(bias.dtype)


def _check_grid(tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the tower: checks the grid, because two different grids can have equally many tokens."""
    record = tower.__dict__[RECORD]
    pixels = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(pixels, Tensor):
        raise BakedBiasError(f"{record['tower_class']} was called without pixel_values, so its grid is not known.")
    height, width = pixels.shape[-2:]
    patch_height, patch_width = record["patch_size"]
    grid = [height // patch_height, width // patch_width]
    if grid != record["grid"]:
        rows, columns = record["grid"]
        raise BakedBiasError(
            f"An image of {height}x{width} px has {grid[0]}x{grid[1]} patches; the bias is baked for {rows}x{columns} "
            f"({rows * patch_height}x{columns * patch_width} px). Resize it, or export again for this size."
        )
