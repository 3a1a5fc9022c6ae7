"""Activations that a training step keeps for its backward pass: counted on fake tensors, beside the prediction.

    OMP_NUM_THREADS=1 python benchmarks/memory_fake.py            # the four hosts of the recipes, in full size

The halves of a host run under `FakeTensorMode`, and what autograd saves is counted by storage. The language model gets
embeddings, since fake tensors have no values that could be ids. Halves that cannot run in this mode are named.
"""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.modeling_layers import GradientCheckpointingLayer

from sfa_adapters.hosts.load import HOSTS, Host, prepare
from sfa_adapters.hosts.placement import skeleton
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.activations import activations_of
from sfa_adapters.memory.shapes import Lengths, lengths_of
from sfa_adapters.pixel_grids import pair
from sfa_adapters.recipes.catalog import architecture, find_recipe

NAMES = ("llava_1_5_7b", "internvl3_5_8b", "qwen2_5_vl_7b", "llava_onevision_7b")


class Kept:
    """A tensor that autograd holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def main() -> None:
    """Prints a line for each half of each host, with checkpointing and without."""
    warnings.simplefilter("ignore")
    for name in NAMES:
        for checkpointing in (True, False):
            try:
                _compare(find_recipe(name).replace(gradient_checkpointing=checkpointing, plan="bf16"))
            except DataDependentOutputException as error:
                print(f"{name}, checkpointing {checkpointing}: cannot be built: {error}", flush=True)


def _compare(recipe: Recipe) -> None:
    config = architecture(recipe)
    lengths, kind = lengths_of(recipe, config), type(skeleton(config, HOSTS[recipe.family]))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        torch.set_default_dtype(torch.bfloat16)
        model: Any = kind(config)
        torch.set_default_dtype(torch.float32)
        host = prepare(model, None, recipe)
    predicted = activations_of(recipe, config, lengths, recipe.micro_batch)
    halves = {"tower": _tower(host, lengths, config), "language model": _language_model(host, lengths, config)}
    for (half, run), activations in zip(halves.items(), predicted, strict=True):
        wanted, began = activations.kept(recipe.gradient_checkpointing), time.process_time()
        line = f"{recipe.name}, checkpointing {recipe.gradient_checkpointing}, {half}: predicted {wanted / 1e9:.3f} GB"
        try:
            counted = _kept(host, run, mode)
            line += f", counted {counted / 1e9:.3f} GB ({wanted / counted - 1:+.1%})"
        except Exception as error:
            line += f", cannot run: {type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"{line}, {time.process_time() - began:.1f} s of CPU", flush=True)


def _flat(host: Host) -> bool:
    """Whether its tower works on one sequence of patches."""
    return host.spec.image_tokens is not None and host.spec.image_tokens.kind == "merged_groups"


def _tower(host: Host, lengths: Lengths, config: Any) -> Callable[[], object]:
    def run() -> object:
        core: Any = host.model.model
        if _flat(host):
            grid = torch.tensor([[1, 64, lengths.tower // 64]])
            return core.get_image_features(torch.empty(lengths.tower, 3 * 2 * 14 * 14), image_grid_thw=grid)
        side = pair(config.vision_config.image_size)[0]
        pixels = torch.empty(lengths.pixels // side**2, 3, side, side)
        if host.spec.image_tokens is not None and host.spec.image_tokens.kind == "packed_tiles":
            return core.get_image_features(pixels[None], image_sizes=[[3 * side, 3 * side]])
        return core.get_image_features(pixels)

    return run


def _language_model(host: Host, lengths: Lengths, config: Any) -> Callable[[], object]:
    def run() -> object:
        length = lengths.sequence
        embeddings = torch.empty(1, length, config.text_config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.ones(1, length, dtype=torch.long)
        three = _flat(host)
        more = {"position_ids": torch.zeros(3, 1, length, dtype=torch.long)} if three else {}
        return host.model(inputs_embeds=embeddings * 1, labels=labels, use_cache=False, **more).loss

    return run


def _kept(host: Host, run: Callable[[], object], mode: FakeTensorMode) -> int:
    """Bytes of all storages that the graph holds at the end of a forward, without those of the weights."""
    saved: weakref.WeakSet[Kept] = weakref.WeakSet()
    arguments: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Kept:
        box = Kept(tensor)
        saved.add(box)
        return box

    def see_arguments(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A checkpointed layer keeps its arguments in a closure, not as saved tensors.
        arguments.extend(weakref.ref(each) for each in (*args, *kwargs.values()) if isinstance(each, Tensor))

    layers = [module for module in host.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    on = host.recipe.gradient_checkpointing
    hooks = [layer.register_forward_pre_hook(see_arguments, with_kwargs=True) for layer in layers if on]
    try:
        with mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor), host.autocast():
            output = run()
        gc.collect()
        tensors = [box.tensor for box in saved] + [tensor for ref in arguments if (tensor := ref()) is not None]
        weights = {each.untyped_storage()._cdata for each in (*host.model.parameters(), *host.model.buffers())}
        storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}
        del output
        return sum(size for address, size in storages.items() if address not in weights)
    finally:
        for hook in hooks:
            hook.remove()


if __name__ == "__main__":
    main()
