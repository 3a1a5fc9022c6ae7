"""`prepare`: puts adapters into a loaded model, and sets what trains and in which precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sfa_adapters.adat import PatchPolicy, inject_adat
from sfa_adapters.compat import checkpoint_activations
from sfa_adapters.config import SFAConfig
from sfa_adapters.errors import RecipeError
from sfa_adapters.hosts.join_dtype import join_in_one_dtype
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.hosts.spec import Part, Places, VLMSpec
from sfa_adapters.inject import inject_sfa
from sfa_adapters.tower_search import find_tower
from sfa_adapters.vlm.records import vlm_spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["Host", "check_recipe", "prepare", "set_trainable", "unread_prefixes"]


@dataclass
class Host:
    """A vision-language model with its processor, prepared for training or for inference.

    Attributes:
        model: With adapters in it, `requires_grad` set, on its devices.
        processor: Its processor.
        spec: The record of its kind.
        recipe: What it was prepared for.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    spec: VLMSpec
    recipe: Recipe

    @cached_property
    def places(self) -> Places:
        """Where its parts are, by full module name."""
        return self.spec.places(self.model)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the tower."""
        return next(self.model.get_submodule(self.places.tower).parameters()).device

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forwards outside a Trainer: trained parts are float32 and the rest `recipe.dtype`."""
        dtype = getattr(torch, self.recipe.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


def prepare(model: Any, processor: Any, recipe: Recipe, train: bool = True) -> Host:
    """Does what follows loading: adapters, `requires_grad`, float32 for what trains, gradient checkpointing.

    Trained weights of tower, projector and language model become float32: a step of lr 2e-5 is smaller than half the
    gap between neighbouring bfloat16 numbers, so it would round away. Run forwards under autocast (`Trainer` with
    `bf16=True`, or `Host.autocast`).

    Args:
        model: A model of the recipe's family, in memory, without adapters.
        processor: Its processor.
        recipe: The recipe.
        train: As for `load_host`.

    Returns:
        The host; the model in it is the given one, changed in place.

    Raises:
        RecipeError: The model is of another family, or a setting does not fit it.
    """
    spec = vlm_spec(recipe.family)
    check_recipe(recipe)
    places = spec.places(model)
    with _seeded(recipe.seed):
        if recipe.lora_llm:
            _inject_lora(model, places, recipe)
        if recipe.sfa:
            inject_sfa(model, _sfa_config(recipe))
    if recipe.adat is not None:
        inject_adat(model, PatchPolicy(budget=float(recipe.adat)))
    if not train:
        model.requires_grad_(False)
    else:
        set_trainable(model, spec, recipe)
        _keep_masters(model, places, recipe)
        if spec.joins_in_own_dtype:
            join_in_one_dtype(model, places)
        if recipe.gradient_checkpointing:
            _checkpoint(model)
    model.train(train)
    return Host(model, processor, spec, recipe)


def _sfa_config(recipe: Recipe) -> SFAConfig:
    return SFAConfig(
        terms=list(recipe.sfa_terms),
        layers_to_transform=None if recipe.sfa_layers is None else list(recipe.sfa_layers),
        init=recipe.init,
        init_strength=recipe.init_strength,
        init_warmup_steps=recipe.init_warmup_steps,
    )


def check_recipe(recipe: Recipe) -> None:
    """Checks a recipe as far as no model is needed.

    Args:
        recipe: The recipe.

    Raises:
        RecipeError: A setting cannot be used with this family.
    """
    spec = vlm_spec(recipe.family)
    spec.require("train")
    reason = spec.refuses.get("adat")
    if reason is not None and recipe.adat is not None:
        raise RecipeError(f"adat={recipe.adat} cannot be used with family={recipe.family!r}: {reason}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """New weights are the same in every process; the global random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _inject_lora(model: nn.Module, places: Places, recipe: Recipe) -> None:
    """A LoRA on all projections of the language model; before SFA, so that it never sees the scalars."""
    language_model = model.get_submodule(places.language_model)
    leaves = sorted({name.rpartition(".")[2] for name, m in language_model.named_modules() if isinstance(m, nn.Linear)})
    # A full name: `q_proj` alone would be found in the tower, too.
    target = rf"{places.language_model.replace('.', '[.]')}[.].*[.]({'|'.join(leaves)})"
    rank = recipe.lora_llm
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=target), model)
    for name, parameter in model.named_parameters():
        if places.part_of(name) == "lora":
            parameter.data = parameter.data.float()


def set_trainable(model: nn.Module, spec: VLMSpec, recipe: Recipe) -> None:
    """Sets `requires_grad` of every parameter by the freeze settings; what the host never reads stays frozen.

    Args:
        model: The host's model, with its adapters.
        spec: Its record.
        recipe: The recipe; its `freeze_...`, `sfa` and `lora_llm` are used.

    Raises:
        RecipeError: A part that is to train is in 4-bit.
    """
    trains: dict[Part, bool] = {
        "sfa": recipe.sfa,
        "lora": recipe.lora_llm > 0,
        "vision": not recipe.freeze_vision,
        "projector": not recipe.freeze_projector,
        "llm": not recipe.freeze_llm,
    }
    places = spec.places(model)
    unread = unread_prefixes(model, places)
    for name, parameter in model.named_parameters():
        wanted = trains[places.part_of(name)] and not name.startswith(unread)
        if wanted and not parameter.is_floating_point():
            raise RecipeError(f"{name} is to train, but holds {parameter.dtype} (4-bit) values; freeze it.")
        parameter.requires_grad_(wanted)


def unread_prefixes(model: nn.Module, places: Places) -> tuple[str, ...]:
    """Prefixes of parameters that no gradient reaches: unread layers and what follows them, other towers."""
    located = find_tower(model)
    dead = [name.rpartition(".")[0] for name, _ in located.attentions[located.used_layers :]]
    children = (f"{places.tower}.{child}" for child in places.unread)
    return tuple(f"{name}." for name in (*dead, *children, *places.unused))


def _keep_masters(model: nn.Module, places: Places, recipe: Recipe) -> None:
    """Makes parts that train float32; a layer norm in bfloat16 after a trained part would refuse its outputs."""
    parts: set[Part] = set()
    if not recipe.freeze_vision:
        parts |= {"vision", "projector"}
    if not recipe.freeze_projector:
        parts |= {"projector"}
    if not recipe.freeze_llm:
        parts |= {"llm"}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and places.part_of(name) in parts:
            parameter.data = parameter.data.float()


def _checkpoint(model: Any) -> None:
    """Gradient checkpointing of tower and language model, for any mix of frozen and trained parts.

    Non-reentrant, so no input needs a gradient; `transformers` makes the outputs of embeddings require one all the
    same, which would keep the graph of a frozen tower and of everything before the first adapter.
    """
    checkpoint_activations(model, {"use_reentrant": False})
    model.disable_input_require_grads()
