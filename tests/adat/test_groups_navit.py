"""`drop_blank_groups` and density of image tokens where patches come row by row, or in groups without windows."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfa_adapters import inject_sfa
from sfa_adapters.adat import GroupPolicy, drop_blank_groups
from sfa_adapters.arrangement import MergeGroups, Raster, Windows
from sfa_adapters.errors import InjectionError, PlanError, UnknownInterfaceError
from sfa_adapters.normalisation import image_statistics
from sfa_adapters.patch_groups import PatchGroups
from sfa_adapters.tower_search import find_tower
from tests.adat.test_groups import _Hidden
from tests.support.compare import assert_close, difference, strong_config
from tests.support.hosts import IMAGE
from tests.support.navit_hosts import BUILD

SIDE = 8  # px of a group, of 2x2 patches
DEFAULT = ("qwen3_vl", "paddleocr_vl")
every_navit = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.nightly) for name in BUILD]
)


def page(rows: int, columns: int, seed: int) -> Tensor:
    """White paper with noise on some of its groups, `[3, height, width]` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    marked = torch.rand(rows, columns, generator=generator) < 0.5
    marked[0, 0] = True
    noise = torch.rand(3, rows * SIDE, columns * SIDE, generator=generator)
    return torch.where(marked.repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1), noise, torch.ones(()))


PAGES = [page(3, 5, 0), page(4, 2, 1)]


def dark(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d((images.mean(1) < 0.99).float()[:, None], SIDE)[:, 0]


EXACT = GroupPolicy(threshold=0.1, margin=0, scorer=dark)
ALL = GroupPolicy(threshold=0.0, margin=9, scorer=dark)


def patches_of(image: Tensor, model: Any) -> Tensor:
    """Patches as the processor of a host lists them, one by one."""
    located = find_tower(model)
    statistics = image_statistics(located.backbone, located.tower)
    assert statistics is not None
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in statistics)
    image = (image - mean) / std
    rows, columns = image.shape[1] // 4, image.shape[2] // 4
    if located.backbone.name == "navit_raster":
        places = [(r, c) for r in range(rows) for c in range(columns)]
        return torch.stack([image[:, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] for r, c in places])
    places = [
        (2 * r + i, 2 * c + j) for r in range(rows // 2) for c in range(columns // 2) for i in (0, 1) for j in (0, 1)
    ]
    cut = [image[:, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] for r, c in places]
    return torch.stack([patch[:, None].expand(-1, 2, -1, -1).flatten() for patch in cut])


def batch_of(model: Any, pages: list[Tensor]) -> dict[str, Tensor]:
    rows = []
    for number, image in enumerate(pages):
        groups = image.shape[1] * image.shape[2] // SIDE**2
        rows.append([5, 6, IMAGE + 2, *[IMAGE] * groups, IMAGE + 3, *range(7, 12 + number)])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat([patches_of(image, model) for image in pages]),
        "image_grid_thw": torch.tensor([[1, p.shape[1] // 4, p.shape[2] // 4] for p in pages]),
    }


def logits_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, -1]


# -- the form of patches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [Raster(), MergeGroups(2)])
def test_a_page_is_put_together_and_a_strip_lists_the_kept_groups(order: Any) -> None:
    groups = PatchGroups(order, 2, 4)
    row, column = order.places(6, 10)
    image = PAGES[0]
    patches = torch.stack([image[:, r * 4 : r * 4 + 4, c * 4 : c * 4 + 4] for r, c in zip(row, column, strict=True)])
    assert torch.equal(groups.page(patches, (6, 10)), image)
    keep = torch.zeros(3, 5, dtype=torch.bool)
    keep[0, 4] = keep[2, 1] = True
    index, strip = groups.strip(keep)
    assert strip == (2, 4)
    assert torch.equal(groups.page(patches[index], strip), torch.cat((image[:, :8, 32:], image[:, 16:, 8:16]), 2))


# -- hosts ------------------------------------------------------------------------------------------------------------


@every_navit
def test_nothing_changes_where_no_group_is_blank(name: str) -> None:
    model: Any = inject_sfa(BUILD[name](), strong_config())
    batch = batch_of(model, PAGES)
    reduced = drop_blank_groups(model, batch, ALL)
    assert torch.equal(reduced["input_ids"], batch["input_ids"])
    assert_close(logits_of(model, reduced), logits_of(model, batch), 1e-5)
    shorter = drop_blank_groups(model, batch, EXACT)
    assert shorter["input_ids"].shape[1] < batch["input_ids"].shape[1]
    assert difference(logits_of(model, shorter), logits_of(model, batch)) > 1e-4


def short_and_masked(model: Any, batch: dict[str, Any], reduced: dict[str, Any], maps: list[Tensor]) -> tuple[Any, Any]:
    """Image features of the reduced batch, and of the whole pages with the dropped groups masked in every attention."""
    raster = find_tower(model).backbone.name == "navit_raster"
    hidden = [m.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten() for m in maps]
    hidden = torch.cat(hidden) if raster else torch.cat([m.flatten() for m in maps]).repeat_interleave(4)

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_bias": _Hidden(hidden)}

    with torch.no_grad():
        short = model.model.get_image_features(**_tower_part(reduced))
        for _, attention in find_tower(model).attentions:
            attention.register_forward_pre_hook(hide, with_kwargs=True)
        whole = model.model.get_image_features(**_tower_part(batch))
    return short, whole


@every_navit
def test_the_tower_computes_what_it_would_with_the_dropped_groups_masked(name: str) -> None:
    """Slow and plain: the whole page, with dropped patches taken out of every attention by a mask."""
    model: Any = BUILD[name]()
    batch = batch_of(model, PAGES)
    reduced = drop_blank_groups(model, batch, EXACT)
    maps = [dark(p[None])[0] > 0.1 for p in PAGES]
    kept = torch.cat([m.flatten() for m in maps])
    short, whole = short_and_masked(model, batch, reduced, maps)
    assert_close(torch.cat(list(short.pooler_output)), torch.cat(list(whole.pooler_output))[kept])
    deep = [getattr(seen, "deepstack_features", None) or () for seen in (short, whole)]
    assert len(deep[0]) == len(deep[1]) == (name == "qwen3_vl")
    for mine, theirs in zip(*deep, strict=True):
        mine, theirs = (x if torch.is_tensor(x) else torch.cat(list(x)) for x in (mine, theirs))  # 5.17: one tensor
        assert_close(mine, theirs[kept])


def _tower_part(batch: dict[str, Any]) -> dict[str, Any]:
    pages = {k: v for k, v in batch.items() if k == "pixel_values" or k.startswith("image_")}
    return {**pages, "return_dict": True}


@every_navit
def test_generate_goes_on_from_the_kept_positions(name: str) -> None:
    model: Any = BUILD[name]()
    batch = batch_of(model, PAGES[:1])
    single = drop_blank_groups(model, batch, EXACT)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["suppress_tokens"] = [IMAGE]  # random weights may answer with an image
    if name == "qwen3_vl" and "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        with pytest.raises(UnknownInterfaceError, match=r"does not take .* pip install 'transformers>=5\.18'"):
            drop_blank_groups(model, batch, EXACT, for_generate=True)
        return
    with torch.no_grad():
        words = model.generate(**drop_blank_groups(model, batch, EXACT, for_generate=True), **options)[0]
    if name == "qwen3_vl":
        assert words[:-4].tolist() == single["input_ids"][0].tolist()
    words = words[-4:]
    # Token by token without a cache, positions counted on by hand.
    ids, places = single["input_ids"], single["position_ids"]
    for word in words.tolist():
        step = {**single, "input_ids": ids, "position_ids": places, "attention_mask": torch.ones_like(ids)}
        step["mm_token_type_ids"] = (ids == IMAGE).int()
        logits = logits_of(model, step)
        logits[:, IMAGE] = float("-inf")
        assert int(logits.argmax()) == word
        ids = torch.cat((ids, torch.tensor([[word]])), 1)
        places = torch.cat((places, places[..., -1:] + 1), -1)


def test_videos_and_other_patches_are_refused() -> None:
    model: Any = BUILD["qwen3_vl"]()
    batch = batch_of(model, PAGES[:1])
    clip = {**batch, "image_grid_thw": torch.tensor([[2, 6, 5]])}
    with pytest.raises(PlanError, match=r"grids of 30 patches of still images, and pixel_values has 60"):
        drop_blank_groups(model, clip, EXACT)
    with pytest.raises(PlanError, match="drop_blank_groups takes no videos"):
        drop_blank_groups(model, {**batch, "pixel_values": batch["pixel_values"][:-4]}, EXACT)


def test_a_tower_whose_patches_are_not_known_is_refused() -> None:
    from sfa_adapters.testing.towers_navit import NAVIT

    case = next(case for case in NAVIT if case.name == "glm4v")
    tower = case.build()
    assert find_tower(tower).backbone.patch_groups_of(tower) is None
    with pytest.raises(InjectionError, match=r"for Qwen2-VL, .* takes whole pages only"):
        drop_blank_groups(tower, {}, EXACT)


def test_windows_are_no_order_in_which_patches_are_given() -> None:
    """Qwen2.5-VL's processor lists groups row by row; its tower sorts them."""
    from sfa_adapters.testing.towers_qwen import QWEN_VIT

    tower = QWEN_VIT[0].build()
    groups = find_tower(tower).backbone.patch_groups_of(tower)
    assert groups is not None
    assert not isinstance(groups.order, Windows)
