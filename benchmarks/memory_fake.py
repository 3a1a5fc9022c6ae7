"""Activations that a training step keeps for its backward pass: counted on fake tensors, beside the prediction.

    OMP_NUM_THREADS=1 python benchmarks/memory_fake.py            # the four hosts of the recipes, in full size
    OMP_NUM_THREADS=1 python benchmarks/memory_fake.py qwen3_vl_4b --all-logits

The halves of a host run under `FakeTensorMode`, and what autograd saves is counted by storage. Of the language model
the peak of a forward and a backward pass follows, without weights. It gets embeddings, since fake tensors have no
values that could be ids; for the same reason `logits_at_answers` is told where the answer is. Halves that cannot run in
this mode are named.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from sfa_adapters.answer_logits import logits_at_answers
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--all-logits", action="store_true", help="Not those of answer tokens alone.")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in args.names:
        for checkpointing in (True, False):
            try:
                recipe = find_recipe(name).replace(plan="bf16", answer_logits=not args.all_logits)
                _compare(recipe.replace(gradient_checkpointing=checkpointing))
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
    try:
        peak, wanted = _peak(host, halves["language model"], mode), predicted[1].peak(recipe.gradient_checkpointing)
        line = f"predicted {wanted / 1e9:.3f} GB, counted {peak / 1e9:.3f} GB ({wanted / peak - 1:+.1%})"
    except Exception as error:
        line = f"cannot run: {type(error).__name__}: {str(error).splitlines()[0]}"
    print(
        f"{recipe.name}, checkpointing {recipe.gradient_checkpointing}, peak of the language model: {line}", flush=True
    )


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
        with ExitStack() as stack:
            if host.recipe.answer_logits:
                # Fake labels have no values to find positions by.
                chosen = (torch.zeros(lengths.answer, dtype=torch.long),) * 2
                stack.enter_context(patch("sfa_adapters.answer_logits.answer_rows", lambda _: chosen))
                stack.enter_context(logits_at_answers(host.model))
            return host.model(inputs_embeds=embeddings * 1, labels=labels, use_cache=False, **more).loss

    return run


class Peak(TorchDispatchMode):
    """The most bytes that are in memory at once of what is made inside; views share their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[weakref.ref[Any], int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in given:
                reference = weakref.ref(storage, self._freed)
                if reference not in self.alive:
                    self.alive[reference] = storage.nbytes()
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return output

    def _freed(self, reference: weakref.ref[Any]) -> None:
        self.now -= self.alive.pop(reference, 0)


def _peak(host: Host, run: Callable[[], Any], mode: FakeTensorMode) -> int:
    """Bytes at the peak of a forward and a backward pass, without weights."""
    with mode, Peak() as peak, host.autocast():
        run().backward()
    return peak.peak


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
