"""Groups left out before the tower of an engine: the same patches, windows, angles and bias as in transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from sfa_adapters import load_sfa
from sfa_adapters.adat import GroupPolicy, drop_blank_groups
from sfa_adapters.adat.patched_pages import PatchedPages
from sfa_adapters.arrangement import MergeGroups
from sfa_adapters.errors import ServingError
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.recipes.nano.hosts import build_host
from sfa_adapters.recipes.nano.served import write_served
from sfa_adapters.serving.adapter import read_adapter
from sfa_adapters.serving.engine_tower import EngineTower
from sfa_adapters.serving.image_tokens import chooser
from sfa_adapters.serving.kept_groups import arguments_of_kept, metadata_of_kept, written_page
from sfa_adapters.tower_search import find_tower
from tests.serving.test_engine_tower import as_engine

SIDE, PATCH = 2, 14
GROUPS = PatchGroups(MergeGroups(SIDE), SIDE, PATCH)


@cache
def _tower() -> Any:
    return find_tower(build_host("qwen2_5_vl")[0]).tower


def _prepared(grids: Tensor, window: int) -> dict[str, Any]:
    """What vLLM's tower prepares for whole images, from transformers' own functions; angles are numbers of patches."""
    unit = SIDE**2
    index, bounds = get_vision_window_index(grids, SIDE, window, PATCH)
    patches = (index[:, None] * unit + torch.arange(unit)).flatten()[:, None]
    return {
        "window_index": index,
        "reverse_indices": index.argsort(),
        "rotary_pos_emb_cos": patches,
        "rotary_pos_emb_sin": -patches,
        "cu_seqlens": F.pad(grids.prod(-1).cumsum(0), (1, 0)).int(),
        "cu_window_seqlens": torch.unique_consecutive(bounds).int(),
        "max_seqlen_full": torch.tensor(0),
        "max_seqlen_window": torch.tensor(0),
        "sequence_lengths_full": None,
    }


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    data=st.data(),
)
def test_windows_and_bounds_are_those_of_transformers(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    parts = []
    for rows, columns in sizes:
        part = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns).filter(any))
        parts.append(torch.tensor(part))
    kept = torch.cat(parts)
    tower = _tower()
    grids = [(1, rows * SIDE, columns * SIDE) for rows, columns in sizes]
    prepared = _prepared(torch.tensor(grids), tower.config.window_size)
    new = metadata_of_kept(prepared, kept, SIDE**2)
    expected = arguments_of_kept(GROUPS, grids, kept, tower)
    assert torch.equal(new["window_index"], expected["window_index"])
    assert torch.equal(new["window_index"][new["reverse_indices"]], torch.arange(int(kept.sum())))
    assert torch.equal(new["cu_seqlens"], expected["cu_seqlens"])
    assert torch.equal(new["cu_window_seqlens"], expected["cu_window_seqlens"])
    # The angles of a patch go where the patch goes.
    numbers = torch.arange(len(kept) * SIDE**2)[kept.repeat_interleave(SIDE**2)].view(-1, SIDE**2)
    assert torch.equal(new["rotary_pos_emb_cos"][:, 0], numbers[new["window_index"]].flatten())
    assert torch.equal(new["rotary_pos_emb_sin"], -new["rotary_pos_emb_cos"])
    assert int(new["max_seqlen_full"]) == max(int(part.sum()) for part in parts) * SIDE**2
    assert int(new["max_seqlen_window"]) == int(expected["cu_window_seqlens"].diff().max())


def _batch(model: Any, pages: list[Image.Image]) -> dict[str, Any]:
    """Inputs of a prompt with these pages, normalised as the tower's own processor does."""
    located = find_tower(model)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in image_statistics(located.backbone, located.tower) or ())
    patches, grids = [], []
    for page in pages:
        pixels = torch.tensor(list(page.tobytes())).view(page.height, page.width, 3).permute(2, 0, 1) / 255
        rows, columns = page.height // PATCH, page.width // PATCH
        shape = (3, rows // SIDE, SIDE, PATCH, columns // SIDE, SIDE, PATCH)
        cut = ((pixels - mean) / std).reshape(shape).permute(1, 4, 2, 5, 0, 3, 6)
        cut = cut.reshape(rows * columns, 3, 1, PATCH**2).expand(-1, -1, 2, -1)
        patches.append(cut.reshape(rows * columns, -1))
        grids.append((1, rows, columns))
    ids = [1]
    for _, rows, columns in grids:
        ids += [model.config.image_token_id] * (rows * columns // SIDE**2) + [2]
    tokens = torch.tensor([ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == model.config.image_token_id).int(),
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor(grids),
    }


def _half_written(width: int, height: int, blank: int) -> Image.Image:
    """Letters, below a white strip."""
    page = written_page(width, height)
    ImageDraw.Draw(page).rectangle((0, 0, width, blank), fill="white")
    return page


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_served("qwen2_5_vl", tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("rule", ["blank", "duplicates"])
def test_the_choice_and_the_features_are_those_of_drop_blank_groups(rule: Any, served: tuple[Path, Path]) -> None:
    from transformers import AutoModelForImageTextToText

    host, adapter = served
    plain: Any = AutoModelForImageTextToText.from_pretrained(host, dtype=torch.float32).eval()
    model: Any = load_sfa(AutoModelForImageTextToText.from_pretrained(host, dtype=torch.float32).eval(), adapter)
    pages = [_half_written(6 * 28, 5 * 28, 75), _half_written(4 * 28, 6 * 28, 100)]
    batch = _batch(model, pages)
    policy = GroupPolicy(scorer="density" if rule == "blank" else "duplicates")
    shorter = drop_blank_groups(model, batch, policy)
    located = find_tower(model)
    statistics = image_statistics(located.backbone, located.tower)
    assert statistics is not None
    kept = chooser(rule, str(host)).kept(batch["pixel_values"], batch["image_grid_thw"], statistics)
    assert 0 < sum(int(one.sum()) for one in kept) < 54
    flat = torch.cat(kept)
    assert torch.equal(batch["pixel_values"][flat.repeat_interleave(4)], shorter["pixel_values"])

    arguments = {k.removeprefix("image_"): v for k, v in shorter.items() if k.startswith("image_")}
    grids = [tuple(grid) for grid in batch["image_grid_thw"].tolist()]
    built = arguments_of_kept(GROUPS, grids, flat, located.tower)
    assert set(built) == {k for k in arguments if k != "page_grids"} | {"page_grids"}
    assert all(torch.equal(built[name], value) for name, value in arguments.items())

    state = EngineTower(read_adapter(adapter, host))
    tower = find_tower(plain).tower
    with torch.no_grad():
        expected = located.tower(shorter["pixel_values"], **arguments).last_hidden_state
        without = tower(shorter["pixel_values"], **{k: v for k, v in arguments.items() if k != "page_grids"})
        with as_engine(tower, state, seen=lambda: state.see_grids(grids, flat)):
            names = {k: v for k, v in arguments.items() if k != "page_grids"}
            got = tower(shorter["pixel_values"], **names).last_hidden_state
    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert (without.last_hidden_state - expected).norm() > 1e-4 * expected.norm()


def test_of_a_written_page_nothing_is_left_out(served: tuple[Path, Path]) -> None:
    model, _ = build_host("qwen2_5_vl")
    batch = _batch(model, [written_page(10 * 28, 7 * 28)])
    located = find_tower(model)
    statistics = image_statistics(located.backbone, located.tower)
    assert statistics is not None
    for rule in ("blank", "duplicates"):
        (kept,) = chooser(rule, str(served[0])).kept(batch["pixel_values"], batch["image_grid_thw"], statistics)
        assert bool(kept.all()), rule
    (white,) = PatchedPages(GROUPS, torch.tensor([[1, 4, 4]]), torch.ones(16, 3 * 2 * PATCH**2)).kept(
        GroupPolicy().keep, ((0.0,) * 3, (1.0,) * 3)
    )
    assert int(white.sum()) == 1  # which is why engines do not measure memory with white pages


def test_what_does_not_belong_together() -> None:
    prepared = _prepared(torch.tensor([[1, 4, 4]]), 56)
    with pytest.raises(ServingError, match="have 4 merge groups, and 3 were chosen from"):
        metadata_of_kept(prepared, torch.ones(3).bool(), 4)
    with pytest.raises(ServingError, match="FlashInfer"):
        metadata_of_kept({**prepared, "sequence_lengths_full": torch.ones(1)}, torch.ones(4).bool(), 4)
    with pytest.raises(ServingError, match="have 4 merge groups, and 5 were chosen from"):
        arguments_of_kept(GROUPS, [(1, 4, 4)], torch.ones(5).bool(), _tower())
