"""Heads and mask argument of an attention module: read from it, its signature and its configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from sfa_adapters.attention_contract import choose_mask_argument, head_count
from sfa_adapters.errors import InjectionError, UnsupportedAttentionError


class Masked(nn.Module):
    def forward(self, states: Any, attn_mask: Any = None) -> Any: ...


class Handed(nn.Module):
    def forward(self, states: Any, **kwargs: Any) -> Any: ...


class Both(nn.Module):
    def forward(self, states: Any, cu_seqlens: Any, attention_mask: Any = None, **kwargs: Any) -> Any: ...


class Bare(nn.Module):
    def forward(self, states: Any) -> Any: ...


@pytest.mark.parametrize(
    ("kind", "declared", "segmented", "name", "reason"),
    [
        (Masked, None, False, "attn_mask", "has an argument of this name"),
        (Handed, None, False, "position_bias", "has no mask argument"),
        (Both, None, False, "attention_mask", "has an argument of this name"),
        (Both, None, True, "position_bias", "segment by segment"),
        (Both, "position_bias", False, "position_bias", "said by the record"),
        (Handed, "anything", False, "anything", "said by the record"),
    ],
)
def test_the_argument_is_read_from_the_signature(
    kind: type[nn.Module], declared: str | None, segmented: bool, name: str, reason: str
) -> None:
    choice = choose_mask_argument(kind(), declared, segmented)
    assert choice.name == name
    assert reason in choice.reason


@pytest.mark.parametrize(("declared", "text"), [(None, "Bare.forward takes no mask"), ("bias", "no argument 'bias'")])
def test_an_attention_without_an_argument_is_refused(declared: str | None, text: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match=text):
        choose_mask_argument(Bare(), declared)


@pytest.mark.parametrize("name", ["num_heads", "num_attention_heads", "n_heads"])
def test_heads_are_read_from_the_module_its_config_and_the_tower(name: str) -> None:
    alone, with_config, tower = Bare(), Bare(), Bare()
    setattr(alone, name, 3)
    with_config.config = SimpleNamespace(**{name: 4})  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    tower.config = SimpleNamespace(**{name: 5})  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    assert head_count(alone, tower) == 3
    assert head_count(with_config, tower) == 4
    assert head_count(Bare(), tower) == 5


@pytest.mark.parametrize("value", [0, True, "4"])
def test_a_module_with_no_number_of_heads_is_not_counted_by_its_config(value: Any) -> None:
    module = Bare()
    module.num_heads = value  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    module.config = SimpleNamespace(num_heads=4)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    with pytest.raises(InjectionError, match=r"blocks\.0 \(Bare\) has num_heads="):
        head_count(module, path="blocks.0")


def test_a_module_that_says_nothing_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(InjectionError, match=r"Bare does not say its number of heads.*num_attention_heads"):
        head_count(Bare())
