"""`TowerCase`: defaults, helpers for inputs, and the errors for what is missing."""

from typing import Any

import pytest
import torch
from torch import nn

from sfa_adapters.errors import ContractError
from sfa_adapters.testing.cases import TowerCase, images, lively, read_hidden, split_batch, turn_images


def case(**options: Any) -> TowerCase:
    usual: dict[str, Any] = {
        "name": "mine", "backbone": "mine", "build": lambda: nn.Linear(2, 2), "inputs": images(8, 8),
        "layers": 1, "heads": 1, "grid": (2, 2),
    }  # fmt: skip
    return TowerCase(**{**usual, **options})


@pytest.mark.parametrize("options", [{"grid": None}, {"resized": images(8, 16)}], ids=["any size", "resized"])
def test_images_of_several_sizes_need_their_grids(options: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=r"'mine' takes images of several sizes: say in grids=\.\.\."):
        case(**options)
    assert case(**options, grids=lambda inputs: [(2, 4)]).grids_of({}) == [(2, 4)]


def test_one_grid_is_that_of_all_images() -> None:
    assert case().grids_of({}) == [(2, 2)]


def test_only_images_that_are_not_square_are_turned() -> None:
    def grids(inputs: dict[str, Any]) -> list[tuple[int, int]]:
        height, width = inputs["pixel_values"].shape[-2:]
        return [(height // 4, width // 4)]

    assert case().oblong() is None
    assert case(resized=images(16, 16), grids=grids).oblong() is None
    pair = case(resized=images(8, 16), grids=grids).oblong()
    assert pair is not None
    assert torch.equal(pair[0]["pixel_values"].mT, pair[1]["pixel_values"])
    turned = case(inputs=images(8, 16), grids=grids, turn=lambda inputs: {"turned": inputs}).oblong()
    assert turned is not None
    assert list(turned[1]) == ["turned"]


def test_helpers_for_inputs() -> None:
    inputs = images(8, 16, "x", flag=True)(3)
    assert torch.equal(inputs["x"], images(8, 16, "x")(3)["x"])
    assert not torch.equal(inputs["x"][0], inputs["x"][1])
    first, second = split_batch(inputs)
    assert torch.equal(torch.cat((first["x"], second["x"])), inputs["x"])
    assert first["flag"] is second["flag"] is True
    assert turn_images(inputs)["x"].shape == (2, 3, 16, 8)
    assert turn_images(inputs)["flag"] is True


def test_features_are_read_from_any_output() -> None:
    class Tower(nn.Module):
        def forward(self, x: Any) -> Any:
            return x

    states = torch.randn(2, 3, 4)
    assert [part.shape for part in read_hidden(Tower(), {"x": states})] == [(3, 4), (3, 4)]
    assert [part.shape for part in read_hidden(Tower(), {"x": states[0]})] == [(3, 4)]
    output = type("Output", (), {"last_hidden_state": states})()
    assert len(read_hidden(Tower(), {"x": output})) == 2


def test_a_lively_tower_is_the_same_each_time_and_in_eval_mode() -> None:
    make = lively(lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)))
    first, second = make(), make()
    assert not first.training
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    weight: Any = first[0].weight  # pyright: ignore[reportIndexIssue]
    assert 0.15 < weight.std() < 0.35
