"""`export_baked`: writes a model with its structural bias as buffers, to a folder that loads without this library.

The bias adds to attention scores, so it cannot be merged into weights. The folder has the whole model under its
ordinary names (tuned parts and LoRA merged), the bias of each layer, and one file of code that adds it to the mask
argument of the attention modules (`sfa_adapters.sharing.baked`, on torch and transformers alone).
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sfa_adapters.bias import BiasFactors, bias_factors
from sfa_adapters.compat import plain_model
from sfa_adapters.errors import InjectionError, RecipeError
from sfa_adapters.heads.metadata import pruned_metadata
from sfa_adapters.hooks import features_of
from sfa_adapters.layer import SFALayer
from sfa_adapters.layout import TokenLayout
from sfa_adapters.pixel_grids import pair
from sfa_adapters.sharing import baked
from sfa_adapters.sharing.baked_card import baked_card
from sfa_adapters.sharing.baked_check import difference_of
from sfa_adapters.sharing.folders import new_folder
from sfa_adapters.sharing.weights import floating_dtype, plain_state_dict
from sfa_adapters.tower_search import FoundTower, find_tower
from sfa_adapters.tuner import injected_layers

__all__ = ["BakedExport", "Form", "export_baked"]

Form = Literal["dense", "tables"]


@dataclass(frozen=True)
class BakedExport:
    """Sizes and exactness of an export.

    Attributes:
        folder: Its folder.
        form: `dense` matrices, or `tables`.
        layers: Attention layers with a bias.
        heads: Heads of each.
        tokens: Tokens of the grid that it is baked for, prefix included.
        image_size: Height and width of that grid in pixels.
        file_bytes: Size of the bias on disk.
        memory_bytes: Size of the bias once it is loaded; the matrices are expanded then in either form.
        difference: Largest difference of the features of a random image, adapted against baked.
    """

    folder: Path
    form: Form
    layers: int
    heads: int
    tokens: int
    image_size: tuple[int, int]
    file_bytes: int
    memory_bytes: int
    difference: float

    def __str__(self) -> str:
        height, width = self.image_size
        return (
            f"{self.layers} layers, {self.heads} heads, {self.tokens} tokens (images of {height}x{width} px): bias "
            f"{self.file_bytes / 1e6:.1f} MB on disk, {self.memory_bytes / 1e6:.1f} MB loaded "
            f"({self.memory_bytes / max(self.layers, 1) / 1e6:.1f} MB per layer); largest difference of features "
            f"{self.difference:.1e}"
        )


def export_baked(
    host: Any,
    folder: str | Path,
    *,
    form: Form = "dense",
    dtype: torch.dtype | None = None,
    processor: Any = None,
    base_model: str | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
) -> BakedExport:
    """Writes a model with SFA to a folder that needs torch and transformers only; the model stays as it is.

    Before anything is written, the tower's features of a random image are compared with and without the library.

    Args:
        host: A `Host`, or a model of transformers with SFA: a whole one or a bare tower.
        folder: The new folder; must not exist, or be empty. It is written under another name and renamed at the end.
        form: `dense` writes the matrices, `[heads, tokens, tokens]` per layer; `tables` writes the tables of rows,
            columns and blocks, some hundred times smaller, which are expanded when the model is loaded.
        dtype: Of the weights and of the matrices; that of the model by default. In 16 bits the tables stay fp32.
        processor: Written beside the model; that of the `Host` by default.
        base_model: Hub id of the base, for the card; that of the recipe by default.
        revision: Its revision.
        max_shard_size: As for `save_pretrained`.

    Returns:
        Sizes, and the difference of features.

    Raises:
        RecipeError: The tower, the weights or the folder cannot be used; says why.
        InjectionError: The model has no SFA, or it is switched off.
        BiasNotAppliedError: The baked tower gives other features than the adapted one.
    """
    if form not in get_args(Form):
        raise RecipeError(f"form={form!r} must be one of {', '.join(get_args(Form))}.")
    model = _unwrap(host if isinstance(host, nn.Module) else host.model)
    recipe = None if isinstance(host, nn.Module) else host.recipe
    processor = processor or (None if isinstance(host, nn.Module) else host.processor)
    if recipe is not None:
        base_model, revision = base_model or recipe.model, revision or recipe.revision
        dtype = dtype or getattr(torch, recipe.dtype)
    located, layers = _check(model)
    dtype = floating_dtype(model, dtype)
    grid, prefix = _grid(located)
    factors = [_factors(layer, grid, prefix) for _, _, layer in layers]
    patch = pair(located.tower.config.patch_size)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    record: dict[str, Any] = {
        "format": baked.FORMAT,
        "form": form,
        "model_class": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "tower": located.name,
        "tower_class": type(located.tower).__name__,
        "grid": list(grid),
        "patch_size": list(patch),
        "prefix_tokens": prefix,
        "heads": layers[0][2].num_heads,
        "mask_argument": located.backbone.argument_of(layers[0][1]).name,
        "layers": [{"module": name, "class": type(attention).__name__} for name, attention, _ in layers],
        "base_model": base_model,
        "base_revision": revision,
        "versions": {"transformers": transformers.__version__, "sfa_adapters": version("sfa-adapters")},
    }
    difference = difference_of(located, layers, factors, (grid[0] * patch[0], grid[1] * patch[1]))
    tensors = _tensors(factors, form, dtype)
    with new_folder(folder) as partial:
        inner = partial / "model"
        with _own_config(model) as config:
            model.save_pretrained(inner, state_dict=plain_state_dict(model, dtype), max_shard_size=max_shard_size)
            config.dtype = record["dtype"]  # `save_pretrained` took that of the model
            config.save_pretrained(inner)
        if processor is not None:
            processor.save_pretrained(inner)
        save_file(tensors, partial / "sfa_bias.safetensors", metadata={"format": "pt"})
        shutil.copyfile(baked.__file__, partial / "load_baked.py")
        (partial / "sfa_bias.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        tokens, heads = factors[0].layout.num_tokens, record["heads"]
        report = BakedExport(
            folder=Path(folder),
            form=form,
            layers=len(layers),
            heads=heads,
            tokens=tokens,
            image_size=(grid[0] * patch[0], grid[1] * patch[1]),
            file_bytes=(partial / "sfa_bias.safetensors").stat().st_size,
            memory_bytes=len(layers) * heads * tokens**2 * dtype.itemsize,
            difference=difference,
        )
        (partial / "README.md").write_text(baked_card(record, str(report)), encoding="utf-8")
    return report


@contextmanager
def _own_config(model: Any) -> Iterator[Any]:
    """Replaces the model's configuration by a copy, because `save_pretrained` changes it."""
    original = model.config
    model.config = copy.deepcopy(original)
    try:
        yield model.config
    finally:
        model.config = original


def _unwrap(model: Any) -> Any:
    """The model inside a `PeftModel`, whose layers PEFT has changed in place."""
    return plain_model(model)


def _check(model: nn.Module) -> tuple[FoundTower, list[tuple[str, nn.Module, SFALayer]]]:
    layers = injected_layers(model)
    if not layers:
        raise InjectionError(f"{type(model).__name__} has no SFA; there is nothing to bake. Use model.save_pretrained.")
    layers = [entry for entry in layers if entry[2].active]
    if not layers:
        raise InjectionError("No SFA adapter of the model is active; switch on the one to bake.")
    located = find_tower(model)
    where = located.name or type(model).__name__
    if pruned_metadata(model) is not None:
        raise RecipeError(
            f"{type(model).__name__} lost attention heads: from_pretrained could not load the folder, since its layers "
            "have shapes of their own. Use save_pruned, and save_sfa beside it."
        )
    features = features_of(model)
    for feature, title in (("dymu", "DyMU"), ("fastv", "FastV")):
        if feature in features:
            raise RecipeError(
                f"{title} (inject_{feature}) drops tokens by hooks of this library, so the exported model would run on "
                f"all of them and answer otherwise. Call eject_{feature}(model) first."
            )
    if "adat" in features:
        raise RecipeError(
            "Adaptive tokens choose their patches anew for each page, so there is no one bias to bake. Export a model "
            "without them (adat off, eject_adat), or share the adapter."
        )
    if located.backbone.joined != "batch" or located.backbone.geometry(located.tower).grid is None:
        raise RecipeError(
            f"{where} is a {located.backbone.name} tower: it takes pages of any size, so there is no one bias to bake. "
            "Share the adapter instead."
        )
    if located.backbone.wrap_attention is not None or not isinstance(model, PreTrainedModel):
        raise RecipeError(
            f"{type(model).__name__} is not a class of transformers whose attention takes a mask, so it cannot load "
            "without code of its own. Bake the -HF variant of the model, or share the adapter."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise RecipeError("model.add_adapter() was used: save_pretrained would write that adapter only. Inject it.")
    return located, layers


def _grid(located: FoundTower) -> tuple[tuple[int, int], int]:
    geometry = located.backbone.geometry(located.tower)
    assert geometry.grid is not None  # only segmented towers have none
    return geometry.grid, geometry.prefix_tokens


def _factors(layer: SFALayer, grid: tuple[int, int], prefix: int) -> BiasFactors:
    """The tables of all active adapters of a layer, on the CPU."""
    layout = TokenLayout.regular(*grid, prefix, layer.configs[layer.active[0]].block_map_tensor())
    with torch.no_grad():
        weights = [layer.weights(name) for name in layer.active]
        moved = [type(w)(*(None if t is None else t.detach().cpu() for t in vars(w).values())) for w in weights]
        return bias_factors(moved, layout, layer.num_heads)


def _tensors(factors: list[BiasFactors], form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    if form == "dense":
        return {f"layer.{n}.bias": bias.dense()[0].to(dtype).contiguous() for n, bias in enumerate(factors)}
    layout = factors[0].layout
    tensors = {
        "row_of_token": layout.rows.index,
        "column_of_token": layout.columns.index,
        "on_page": layout.spatial,
    }
    for number, bias in enumerate(factors):
        tensors[f"layer.{number}.rows"] = bias.row_table
        tensors[f"layer.{number}.columns"] = bias.column_table
        tensors[f"layer.{number}.blocks"] = bias.block_value
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
