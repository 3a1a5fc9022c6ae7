"""The contract of every tower, part four: checkpointing trains frozen towers, and each image keeps its layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfa_adapters import eject_sfa, inject_sfa
from sfa_adapters.adat import inject_adat, latest_plans
from sfa_adapters.errors import LayoutError, TrainingError
from sfa_adapters.registry import find_tower
from sfa_adapters.tuner import injected_layers
from tests.adat.test_inject import mixed
from tests.support import compare
from tests.support.towers import CASES, Inputs, TowerCase, every_tower, set_checkpointing

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
ORDERS = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "in reverse"])


def oblong(case: TowerCase) -> Inputs | None:
    """Inputs whose transposed images have as many tokens on another grid, if the tower takes some."""
    inputs = case.resized(0) if case.resized is not None else case.inputs(0)
    height, width = inputs["pixel_values"].shape[-2:] if "pixel_values" in inputs else (0, 1)
    return inputs if height != width else None


def transposed(inputs: Inputs) -> Inputs:
    """The same pixels with rows and columns exchanged; of a flat sequence, the same patches on other grids."""
    changes = {
        "pixel_values": lambda pixels: pixels.transpose(-1, -2).contiguous(),
        "patch_attention_mask": lambda mask: mask.transpose(-1, -2).contiguous(),
        "grid_thw": lambda sizes: sizes[:, [0, 2, 1]],
    }
    return {name: changes.get(name, lambda value: value)(value) for name, value in inputs.items()}


OBLONG = [case for case in CASES if oblong(case) is not None]
# One tower of each kind of attention module and image module, for what depends on the kind only.
KINDS = [case for case in OBLONG if case.name in ("clip", "siglip", "internvit", "internvit_remote", "timm_cls")]


def gradients_after(losses: list[Tensor], tower: nn.Module, order: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Gradients of each of two losses, whose backward passes run in an order."""
    results: list[dict[str, Tensor]] = [{}, {}]
    for number in order:
        tower.zero_grad(set_to_none=True)
        losses[number].backward()
        results[number] = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    return results


def check_two_forwards(
    case: TowerCase, tower: nn.Module, switch_on: Callable[[], None], order: tuple[int, int]
) -> None:
    """Two forwards of equal token count, then both backward passes: gradients as of each alone, not checkpointed."""
    first = oblong(case)
    assert first is not None
    pair = (first, transposed(first))
    set_checkpointing(case, tower.train(), None)
    expected = [compare.gradients(case, tower, inputs) for inputs in pair]
    name = next(iter(compare.structural(tower)))
    assert compare.difference(expected[0][name], expected[1][name]) > 1e-5, "the test could not tell the grids apart"
    switch_on()
    losses = [compare.loss_of(case.hidden(tower, inputs)) for inputs in pair]
    for result, reference in zip(gradients_after(losses, tower, order), expected, strict=True):
        compare.assert_same_gradients(result, reference, tolerance=1e-6)


@every_tower
@REENTRANT
def test_a_frozen_tower_trains_its_scalars(case: TowerCase, reentrant: bool):
    tower, inputs = compare.injected(case)
    compare.freeze_base(tower.train())
    set_checkpointing(case, tower, None)
    expected = compare.gradients(case, tower, inputs)
    set_checkpointing(case, tower, reentrant)
    result = compare.gradients(case, tower, inputs)
    assert set(result) == set(compare.structural(tower))
    compare.assert_same_gradients(result, expected, tolerance=1e-6)


@every_tower
def test_scalars_of_the_last_layer_alone_train_under_reentrant_checkpointing(case: TowerCase):
    tower, inputs = compare.injected(case, layers_to_transform=[-1])
    compare.freeze_base(tower.train())
    set_checkpointing(case, tower, None)
    expected = compare.gradients(case, tower, inputs)
    set_checkpointing(case, tower, reentrant=True)
    compare.assert_same_gradients(compare.gradients(case, tower, inputs), expected, tolerance=1e-6)


def test_a_graph_begins_no_sooner_than_it_must():
    """Of a frozen tower with scalars in its last layer only, nothing in front is kept for backward."""
    case = next(case for case in CASES if case.name == "siglip")
    tower, inputs = compare.injected(case, layers_to_transform=[-1])
    compare.freeze_base(tower.train())
    inputs_of_layers: list[bool] = []
    layers: Any = tower.get_submodule("encoder.layers")
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: inputs_of_layers.append(args[0].requires_grad))
    case.hidden(tower, inputs)
    assert inputs_of_layers == [False, False, False]
    compare.fill(tower, 0.1)
    for parameter in compare.structural(tower).values():
        parameter.requires_grad_(False)
    assert not torch.cat(case.hidden(tower, inputs)).requires_grad, "nothing trains, so there is no graph"


def test_remote_code_as_it_comes_trains_a_frozen_tower():
    """Its encoder checkpoints reentrantly by default."""
    case = next(case for case in CASES if case.name == "internvit_remote")
    tower: Any = inject_sfa(case.build().requires_grad_(False).train(), compare.strong_config())
    assert tower.encoder.gradient_checkpointing
    result = compare.gradients(case, tower, case.inputs(0))
    assert set(result) == set(compare.structural(tower))
    assert all(gradient.abs().max() > 0 for gradient in result.values())


@every_tower
def test_ejected_tower_under_reentrant_checkpointing_is_as_it_was(case: TowerCase):
    tower, inputs = case.fresh()
    set_checkpointing(case, tower.train(), reentrant=True)
    plain, snapshot = compare.gradients(case, tower, inputs), compare.Snapshot(tower)
    compare.gradients(case, inject_sfa(tower, compare.strong_config()), inputs)
    eject_sfa(tower)
    snapshot.assert_unchanged(tower)
    after = compare.gradients(case, tower, inputs)
    assert set(after) == set(plain)
    assert all(torch.equal(after[name], plain[name]) for name in plain)


@pytest.mark.parametrize("case", OBLONG, ids=str)
@REENTRANT
@ORDERS
def test_two_grids_of_one_token_count(case: TowerCase, reentrant: bool, order: tuple[int, int]):
    tower, _ = compare.injected(case)
    check_two_forwards(case, tower, lambda: set_checkpointing(case, tower, reentrant), order)


@pytest.mark.parametrize("case", OBLONG, ids=str)
@REENTRANT
def test_two_grids_of_one_token_count_in_a_frozen_tower(case: TowerCase, reentrant: bool):
    tower, _ = compare.injected(case)
    compare.freeze_base(tower)
    check_two_forwards(case, tower, lambda: set_checkpointing(case, tower, reentrant), (0, 1))


def checkpoint_part(part: Any, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints the forward of a module as a whole; its hooks stay outside."""
    inner = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        name = None if args else "inputs_embeds"
        states = kwargs.pop(name) if name else args[0]
        kinds: list[Any] = []

        def run(given: Tensor) -> Tensor:
            out = inner(**{name: given}, **kwargs) if name else inner(given, *args[1:], **kwargs)
            kinds.append(type(out))
            return out if isinstance(out, Tensor) else out[0]

        out = checkpoint(run, states, use_reentrant=reentrant)
        return out if issubclass(kinds[0], Tensor) else kinds[0](out)

    monkeypatch.setattr(part, "forward", forward)


@pytest.mark.parametrize("case", KINDS, ids=str)
@REENTRANT
@ORDERS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of layers in a reentrant encoder
@pytest.mark.parametrize("nested", [False, True], ids=["encoder", "encoder and layers"])
def test_the_whole_encoder_in_one_checkpoint(
    case: TowerCase, reentrant: bool, order: tuple[int, int], nested: bool, monkeypatch: pytest.MonkeyPatch
):
    tower, _ = compare.injected(case)

    def switch_on() -> None:
        checkpoint_part(tower.get_submodule("blocks" if case.family == "timm" else "encoder"), reentrant, monkeypatch)
        if nested:
            set_checkpointing(case, tower, reentrant)

    check_two_forwards(case, tower, switch_on, order)


@pytest.mark.parametrize("case", OBLONG, ids=str)
@REENTRANT
def test_a_checkpoint_that_begins_with_an_operation_of_the_user(
    case: TowerCase, reentrant: bool, monkeypatch: pytest.MonkeyPatch
):
    tower, _ = compare.injected(case)

    def switch_on() -> None:
        for name, _, _ in injected_layers(tower):
            layer: Any = tower.get_submodule(name.rpartition(".")[0])
            inner = layer.forward

            def forward(states: Tensor, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                return checkpoint(lambda x: inner(x * 1.0, *args, **kwargs), states, use_reentrant=reentrant)

            monkeypatch.setattr(layer, "forward", forward)

    check_two_forwards(case, tower, switch_on, (0, 1))


def embedded(tower: Any, seed: int, height: int, width: int) -> Tensor:
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return tower.embeddings(pixels, interpolate_pos_encoding=True)


def test_what_cannot_be_told_apart_is_an_error_and_never_another_layout():
    """The reentrant checkpoint saves a tensor that no module of the tower has seen."""
    tower: Any = compare.injected(next(case for case in CASES if case.name == "siglip"))[0]

    def loss(states: Tensor, reentrant: bool) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return tower.encoder(inputs_embeds=x * 1.0).last_hidden_state

        return checkpoint(run, states * 2, use_reentrant=reentrant).square().mean()  # pyright: ignore[reportOptionalMemberAccess]

    loss(embedded(tower, 0, 42, 70), reentrant=True).backward()  # the only shape so far
    first = loss(embedded(tower, 0, 42, 70), reentrant=True)
    second = loss(embedded(tower, 0, 42, 70), reentrant=False)
    loss(embedded(tower, 1, 70, 42), reentrant=True)
    with pytest.raises(LayoutError, match=r"layer 0 of the siglip tower again on 15 tokens.*use_reentrant=False"):
        first.backward()
    second.backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_that_would_train_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """The checkpoint is the user's, so nothing tells in front of the tower that a graph is needed."""
    case = next(case for case in CASES if case.name == "siglip")
    tower, inputs = compare.injected(case, layers_to_transform=[-1])
    compare.freeze_base(tower.train())
    layer: Any = tower.get_submodule("encoder.layers.2")
    inner = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *args, **_: checkpoint(inner, x, *args, use_reentrant=True))
    with pytest.raises(TrainingError, match=r"layers\.2\.self_attn .*scalars would not train.*use_reentrant=False"):
        case.hidden(tower, inputs)
    with torch.no_grad():
        case.hidden(tower, inputs)


@pytest.mark.parametrize("case", [case for case in KINDS if case.name != "internvit_remote"], ids=str)
@REENTRANT
@pytest.mark.parametrize("sfa", ["before", "after", "without"])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "encoder"])
def test_two_packings_of_one_token_count(
    case: TowerCase, reentrant: bool, sfa: str, whole: bool, monkeypatch: pytest.MonkeyPatch
):
    """Two batches of adaptive tokens, of which the second exchanges the images of the first."""
    tower = case.build()
    torch.manual_seed(3)
    if sfa == "before":
        inject_sfa(tower, compare.strong_config())
    projection: Any = tower.get_submodule(find_tower(tower).backbone.patches.projection)  # pyright: ignore[reportOptionalMemberAccess]
    inject_adat(tower, mixed(projection.kernel_size[0]))
    torch.manual_seed(3)
    if sfa == "after":
        inject_sfa(tower, compare.strong_config())
    first = case.inputs(0)
    pair = (first, {**first, "pixel_values": first["pixel_values"].flip(0)})
    expected = [compare.gradients(case, tower.train(), inputs) for inputs in pair]
    lengths = []
    for inputs in pair:
        case.hidden(tower, inputs)
        lengths.append([plan.num_tokens for plan in latest_plans(tower)])
    assert lengths[0] == lengths[1][::-1] != lengths[1]
    if whole:
        checkpoint_part(tower.get_submodule("blocks" if case.family == "timm" else "encoder"), reentrant, monkeypatch)
    else:
        set_checkpointing(case, tower, reentrant)
    losses = [compare.loss_of(case.hidden(tower, inputs)) for inputs in pair]
    for result, reference in zip(gradients_after(losses, tower, (0, 1)), expected, strict=True):
        compare.assert_same_gradients(result, reference, tolerance=1e-6)
