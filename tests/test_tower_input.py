"""`tower_input.py` reports the images that enter a tower, whatever its kind and however it is called."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from sfa_adapters.forward_hooks import hidden_states_of
from sfa_adapters.hooks import detach_all, features_of
from sfa_adapters.tower_input import TowerInput, watch_input, watching_input
from sfa_adapters.tower_search import find_tower
from tests.support.compare import read
from tests.support.towers import CASES, TowerCase, every_tower

SIGLIP = next(case for case in CASES if case.name == "siglip")


@dataclass
class Seen:
    """A state that records what the watcher reports."""

    inputs: list[Any] = field(default_factory=list)

    def record_input(self, given: TowerInput) -> None:
        self.inputs.append((given.images, given.grid, given.arrangement()))


@every_tower
def test_the_arrangement_has_as_many_tokens_as_the_attention_gets(case: TowerCase) -> None:
    tower, inputs = case.fresh()
    vision, counts, seen = find_tower(tower), [], []
    attention: Any = vision.attentions[0][1]
    handle = attention.register_forward_pre_hook(
        lambda m, args, kwargs: counts.append(hidden_states_of(args, kwargs).shape[-2]), with_kwargs=True
    )
    with watching_input(vision.tower, vision.backbone, "test", seen.append, "state"):
        assert features_of(tower) == {"test": "state"}
        read(case, tower, inputs)
    read(case, tower, inputs)
    handle.remove()
    assert not features_of(tower)
    given: TowerInput = seen[0]
    arrangement = given.arrangement()
    assert arrangement is not None
    assert len(seen) * 2 == len(counts)
    assert arrangement.num_tokens == counts[0]
    assert torch.is_tensor(given.images)
    assert given.tower is vision.tower
    assert arrangement.joined == vision.backbone.joined
    assert given.grid == (arrangement.grid if arrangement.joined == "batch" else None)


def test_a_state_is_told_until_the_feature_is_detached_and_a_copy_has_its_own() -> None:
    case = SIGLIP
    tower, inputs = case.fresh()
    vision, seen = find_tower(tower), Seen()
    watch_input(vision.tower, vision.backbone, "test", seen)
    twin = copy.deepcopy(tower)
    read(case, tower, inputs)
    assert torch.equal(seen.inputs[0][0], inputs["pixel_values"])
    assert features_of(twin)["test"].inputs == []
    read(case, twin, inputs)
    assert len(seen.inputs) == len(features_of(twin)["test"].inputs) == 1
    detach_all(tower, "test")
    read(case, tower, inputs)
    assert len(seen.inputs) == 1


def test_images_and_other_arguments_are_found_by_place_or_by_name() -> None:
    vision = find_tower(SIGLIP.fresh()[0])
    calls: list[TowerInput] = []
    pixels = torch.zeros(1, 3, 56, 56)
    with watching_input(vision.tower, vision.backbone, "test", calls.append):
        embeddings: Any = vision.tower.get_submodule(vision.backbone.image_module)
        embeddings(pixels, False)
        embeddings(pixel_values=pixels, interpolate_pos_encoding=False)
    assert [call.images is pixels for call in calls] == [True, True]
    assert [call.argument("interpolate_pos_encoding", 1) for call in calls] == [False, False]
    assert calls[0].argument("other", 2) is None
