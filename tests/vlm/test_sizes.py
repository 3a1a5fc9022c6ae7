"""What a layer and a projector keep for the backward pass, byte for byte; and which layers are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_adapters import SFAConfig, inject_sfa
from sfa_adapters.hosts.recipe import Recipe
from sfa_adapters.memory.shapes import vision_widths
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.tower_search import find_tower
from sfa_adapters.vlm.records import vlm_spec
from sfa_adapters.vlm.sizes import Lengths, MemoryRules, Precision, read_layers

FAMILIES = ("internvl", "llava", "llava_onevision", "qwen2_5_vl")
TOKENS = 48

every_family = pytest.mark.parametrize("family", FAMILIES)
# Frozen parts are in the precision of the recipe, so autocast has nothing to cast there.
every_precision = pytest.mark.parametrize(
    ("trains", "mixed"), [(True, False), (True, True), (False, False)], ids=["trained", "autocast", "frozen"]
)


@cache
def _host(family: str) -> Any:
    return build_host(family)[0]


def _rules(family: str) -> MemoryRules:
    rules = vlm_spec(family).memory
    assert rules is not None
    return rules


def _precision(trains: bool, mixed: bool) -> Precision:
    return Precision(stream=4, compute=2 if mixed else 4, trains=trains, mixed=mixed)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def kept_by(module: nn.Module, call: Callable[[], Any], mixed: bool, inputs_too: bool = False) -> tuple[int, int]:
    """Bytes that autograd keeps of one forward of a module, without weights and output; and tokens of the output.

    Args:
        module: The module.
        call: Runs it, or the model that it is in.
        mixed: Under autocast to bfloat16. Copies of weights are left out.
        inputs_too: Whether the inputs count.
    """
    held: dict[int, Tensor] = {}
    weights = {tuple(weight.shape) for weight in module.parameters()}
    known = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    tokens: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not inputs_too:
            known.update(tensor.untyped_storage().data_ptr() for tensor in _tensors((*args, *kwargs.values())))
        saved.__enter__()

    def behind(_: nn.Module, args: Any, output: Any) -> None:
        saved.__exit__(None, None, None)
        (result,) = _tensors([output])
        tokens.append(result.shape[-2])
        known.add(result.untyped_storage().data_ptr())

    handles = module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(behind)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        call()
    for handle in handles:
        handle.remove()
    size = sum(
        tensor.untyped_storage().nbytes()
        for address, tensor in held.items()
        if address not in known
        and not (tensor.dtype == torch.bfloat16 and {tuple(tensor.shape), tuple(tensor.shape[::-1])} & weights)
    )
    return size, tokens[0]


def _states(*shape: int) -> Tensor:
    """Behind something that trains, as in a model."""
    return torch.randn(*shape, requires_grad=True) * 1.0


def _image(model: Any) -> dict[str, Tensor]:
    """One image of the tower's size, or of 4 x 8 patches, through which gradients flow."""
    vision = model.config.vision_config
    if not hasattr(vision, "image_size"):
        patches = 3 * vision.temporal_patch_size * vision.patch_size**2
        return {"hidden_states": _states(32, patches), "grid_thw": torch.tensor([[1, 4, 8]])}
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    return {"pixel_values": _states(1, 3, side, side)}


@every_family
@every_precision
def test_a_layer_of_the_tower(family: str, trains: bool, mixed: bool) -> None:
    model = _host(family).requires_grad_(trains)
    tower = find_tower(model)
    layer = model.get_submodule(tower.attentions[1][0].rpartition(".")[0])
    kept, tokens = kept_by(layer, lambda: tower.tower(**_image(model)), mixed)
    rules, part = _rules(family), _precision(trains, mixed)
    assert kept == tokens * rules.layer(rules.tower(model.config), part, model.config, False)


@pytest.mark.parametrize("family", FAMILIES[:3])
@every_precision
def test_a_layer_with_a_bias_folded_into_its_queries(family: str, trains: bool, mixed: bool) -> None:
    """The tables of the bias, one for all images, come on top."""
    model = build_host(family)[0].requires_grad_(trains)
    tower = find_tower(inject_sfa(model, SFAConfig(backend="folded")))
    layer = model.get_submodule(tower.attentions[1][0].rpartition(".")[0])
    kept, tokens = kept_by(layer, lambda: tower.tower(**_image(model)), mixed)
    sizes = vision_widths(Recipe(name="t", model="x", family=family), model.config)
    expected = tokens * _rules(family).layer(sizes, _precision(trains, mixed), model.config, True)
    rows_and_columns = sum(tower.backbone.geometry(tower.tower).grid or ())
    assert 0 < kept - expected < 6 * tokens * rows_and_columns


@every_family
@every_precision
def test_a_projector(family: str, trains: bool, mixed: bool) -> None:
    """With its input, where that is a copy (pixel shuffle) or is kept for its weights."""
    model = _host(family).requires_grad_(trains)
    (name, *_) = vlm_spec(family).places(model).projector
    projector, width = model.get_submodule(name), model.config.vision_config.hidden_size
    shape = {"internvl": (1, TOKENS, 4 * width), "qwen2_5_vl": (4 * TOKENS, width)}.get(family, (1, TOKENS, width))
    kept, tokens = kept_by(projector, lambda: projector(_states(*shape)), mixed, inputs_too=True)
    part = _precision(trains, mixed)
    assert tokens == TOKENS
    assert kept == tokens * _rules(family).projector(part, part, model.config)


@pytest.mark.parametrize(
    ("entry", "layers"), [(-1, 24), (-2, 23), ([-2, -5], 23), ((3, -1), 24), (3, 3), (0, 0), (40, 24), (None, 24)]
)
def test_layers_that_are_read(entry: Any, layers: int) -> None:
    config = SimpleNamespace() if entry is None else SimpleNamespace(vision_feature_layer=entry)
    assert read_layers(config, 24) == layers


def test_norms_and_products_in_bfloat16() -> None:
    """In a stream of bfloat16 a norm makes a float32 copy; a frozen part keeps no input of a product."""
    trained, frozen = (Precision(stream=2, compute=2, trains=trains, mixed=False) for trains in (True, False))
    assert trained.rms_norm(8, groups=3) == 4 * 8 + 4 * 3 + 2 * 8
    assert frozen.rms_norm(8) == 4 * 8 + 4
    assert _precision(True, False).rms_norm(8) == 4 + 4 * 8
    assert (trained.product_inputs(8, 3), frozen.product_inputs(8, 3)) == (16, 0)


def test_tokens_of_the_language_model_are_those_of_image_and_text() -> None:
    assert Lengths(pixels=9, tower=5, image=4, text=7).sequence == 11
