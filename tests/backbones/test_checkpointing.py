"""Gradient checkpointing beyond the contract suite: the first trained layer, adaptive tokens, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sfa_adapters import inject_sfa
from sfa_adapters.adat import inject_adat, latest_plans
from sfa_adapters.errors import LayoutError, TrainingError
from sfa_adapters.testing.contract_checkpointing import checkpoint_part, gradients_after
from sfa_adapters.testing.suite import reentrant_or_not
from sfa_adapters.tower_search import find_tower
from tests.adat.test_inject import mixed
from tests.support import compare
from tests.support.towers import CASES, TowerCase, set_checkpointing

KINDS = [case for case in CASES if case.encoder is not None and case.name != "internvit_remote"]


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


@pytest.mark.parametrize("case", KINDS, ids=str)
@reentrant_or_not
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
        assert case.encoder is not None
        checkpoint_part(tower.get_submodule(case.encoder), reentrant, monkeypatch)
    else:
        set_checkpointing(case, tower, reentrant)
    losses = [compare.loss_of(case.hidden(tower, inputs)) for inputs in pair]
    for result, reference in zip(gradients_after(losses, tower, (0, 1)), expected, strict=True):
        compare.assert_same_gradients(result, reference, tolerance=1e-6)
