"""Fewer image tokens in an engine: the choice and the positions are those of FastV before the language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from sfa_adapters.errors import ServingError
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.reduction.fastv import FastVConfig, inject_fastv
from sfa_adapters.serving.image_tokens import (
    KEPT,
    TOKENS,
    before_tower,
    chooser,
    kept_features,
    kept_positions,
    token_rule,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int
    is_embed: Any = None


@dataclass(frozen=True)
class _Feature:
    mm_position: _Place
    data: dict[str, Any] = field(default_factory=dict)


def _feature(offset: int, kept: Tensor) -> _Feature:
    return _Feature(_Place(offset, int(kept.sum())), {KEPT: SimpleNamespace(data=kept)})


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    model, processor = build_host("qwen2_5_vl")
    return model, processor, _written(model, tmp_path_factory.mktemp("host"))


def _written(model: Any, folder: Path) -> Path:
    """The configuration alone, as a saved model has it."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def _page(model: Any, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Patches of a page with print in its left half, in bytes, and its grid."""
    side = model.config.vision_config.patch_size
    size = columns * side, rows * side
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for line in range(0, size[1], 12):
        draw.text((2, line), f"Words {line + seed} and numbers"[: size[0] // 14], fill="black")
    page = torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
    merge = model.config.vision_config.spatial_merge_size
    shape = (3, rows // merge, merge, side, columns // merge, merge, side)
    patches = page.reshape(shape).permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3, 1, side * side)
    frames = model.config.vision_config.temporal_patch_size
    return patches.expand(-1, -1, frames, -1).reshape(rows * columns, -1), torch.tensor([[1, rows, columns]])


def _normalised(patches: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1), torch.tensor(STD).view(3, 1)
    return ((patches.view(len(patches), 3, -1) / 255 - mean) / std).flatten(1)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_the_choice_and_the_positions_are_those_of_fastv(host: tuple[Any, Any, Path], share: float) -> None:
    model, folder = build_host("qwen2_5_vl")[0], host[2]
    merge = model.config.vision_config.spatial_merge_size
    patches, grid = _page(model, 4 * merge, 6 * merge)
    inputs = _prompt(model, grid, _normalised(patches))
    whole = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=grid, attention_mask=inputs["attention_mask"]
    )[0]
    config = FastVConfig(ratio=1 - share, selector="density", prune_at="input", image_mean=MEAN, image_std=STD)
    inject_fastv(model, config)
    seen: list[Tensor] = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(kwargs.get("position_ids", args[-1])), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)

    chosen = chooser(share, str(folder))
    for form in (patches, _normalised(patches)):  # in bytes, and as processors give them
        (kept,) = chosen.kept(form, grid, (MEAN, STD))
        assert int(kept.sum()) == config.budget(24)
        tokens = [1, 2, *[9] * int(kept.sum()), 3, 4, 5]
        positions, ahead = kept_positions(lambda _tokens, _features: (whole[:, 0], 0), tokens, [_feature(2, kept)])
        assert torch.equal(positions, seen[-1][:, 0])
        assert ahead == 24 - int(kept.sum())


def _prompt(model: Any, grid: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """Two tokens of text, an image of 24 tokens, three of text."""
    ids = torch.tensor([[1, 2, *[model.config.image_token_id] * 24, 3, 4, 5]])
    kinds = (ids == model.config.image_token_id).int()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": pixels,
        "image_grid_thw": grid,
    }


def test_each_image_keeps_its_share(host: tuple[Any, Any, Path]) -> None:
    model, _, folder = host
    merge = model.config.vision_config.spatial_merge_size
    pages = [_page(model, rows * merge, columns * merge, rows) for rows, columns in ((2, 6), (4, 4))]
    grids = torch.cat([grid for _, grid in pages])
    kept = chooser(0.5, str(folder)).kept(torch.cat([patches for patches, _ in pages]), grids, (MEAN, STD))
    assert [int(one.sum()) for one in kept] == [6, 8]
    assert kept[1].view(4, 4)[:, :2].sum() > kept[1].view(4, 4)[:, 2:].sum()  # the print is on the left
    alone = chooser(0.5, str(folder)).kept(*pages[1], (MEAN, STD))
    assert torch.equal(alone[0], kept[1])


@given(
    images=st.lists(st.tuples(st.integers(0, 4), st.lists(st.booleans(), min_size=1, max_size=9)), max_size=4),
    end=st.integers(0, 4),
)
def test_positions_of_several_images(images: list[tuple[int, list[bool]]], end: int) -> None:
    tokens: list[int] = []
    whole: list[int] = []
    stays: list[bool] = []
    features = []
    for text, kept in images:
        keep = torch.tensor([True, *kept])
        tokens += [7] * text
        whole += [7] * text
        stays += [True] * text + keep.tolist()
        features.append(_feature(len(tokens), keep))
        tokens += [9] * int(keep.sum())
        whole += [9] * len(keep)
    tokens, whole, stays = tokens + [7] * end, whole + [7] * end, stays + [True] * end
    given_tokens: list[Any] = []

    def counted(prompt: list[int], spread: list[Any]) -> tuple[Tensor, int]:
        given_tokens.extend((prompt, [(f.mm_position.offset, f.mm_position.length) for f in spread]))
        return torch.arange(len(prompt)).expand(3, -1), 5

    positions, ahead = kept_positions(counted, tokens, features[::-1])
    assert given_tokens[0] == whole
    assert all(whole[o : o + n] == [9] * n for o, n in given_tokens[1])
    assert positions[0].tolist() == [place for place, stay in enumerate(stays) if stay]
    assert ahead == 5 + len(whole) - len(tokens)


def test_what_does_not_belong_together(host: tuple[Any, Any, Path]) -> None:
    wrong = _Feature(_Place(0, 3), {KEPT: SimpleNamespace(data=torch.tensor([True, True, False]))})
    with pytest.raises(ServingError, match="the prompt has 3 tokens of an image, and 2 stay"):
        kept_positions(lambda tokens, _: (torch.zeros(3, len(tokens)), 0), [9, 9, 9], [wrong])
    with pytest.raises(ServingError, match="the images have 5 tokens, and 4 were chosen from"):
        kept_features([torch.zeros(2, 8), torch.zeros(3, 8)], [torch.ones(4)])
    model, _, folder = host
    patches, grid = _page(model, 4, 4)
    with pytest.raises(ServingError, match="15 patches are not those of the grids"):
        chooser(0.5, str(folder)).kept(patches[:15], grid, (MEAN, STD))
    with pytest.raises(ServingError, match="holds a video"):
        chooser(0.5, str(folder)).kept(torch.cat([patches, patches]), torch.tensor([[2, 4, 4]]), (MEAN, STD))
    with pytest.raises(ServingError, match="takes no videos"):
        chooser("blank", str(folder)).kept(torch.cat([patches, patches]), torch.tensor([[2, 4, 4]]), (MEAN, STD))


def test_features_of_the_tokens_that_stay() -> None:
    features = [torch.arange(6.0).view(3, 2), torch.arange(4.0).view(2, 2) + 10]
    kept = [torch.tensor([True, False, True]), torch.tensor([False, True])]
    chosen = kept_features(features, kept)
    assert torch.equal(chosen[0], features[0][[0, 2]])
    assert torch.equal(chosen[1], features[1][[1]])
    assert all(map(torch.equal, chosen, kept_features(features, torch.cat(kept))))


def test_the_share_and_the_tower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(TOKENS, raising=False)
    assert token_rule() is None
    monkeypatch.setenv(TOKENS, "0.25")
    assert token_rule() == 0.25
    assert not before_tower()
    for name in ("blank", "duplicates"):
        monkeypatch.setenv(TOKENS, name)
        assert token_rule() == name
        assert before_tower()
    for wrong in ("0", "1", "-1", "nan", "all", "Blank"):
        monkeypatch.setenv(TOKENS, wrong)
        with pytest.raises(ServingError, match="above 0 and below 1, or what is left out: blank or duplicates"):
            token_rule()
    with pytest.raises(ServingError, match="is not known"):
        chooser(0.5, str(_written(build_host("internvl")[0], tmp_path)))
