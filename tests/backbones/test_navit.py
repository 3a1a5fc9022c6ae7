"""Towers on one flat sequence: the order of their tokens against that of their image processors, and bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters import inject_sfa
from sfa_adapters.arrangement import ImageTokens, MergeGroups, TokenArrangement
from sfa_adapters.errors import LayoutError
from sfa_adapters.heads.page_layouts import layouts_of
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.towers_minicpm import MINICPM_VIT
from sfa_adapters.testing.towers_navit import NAVIT, NAVIT_RASTER, NAVIT_WINDOWS
from sfa_adapters.tower_input import TowerInput, watching_input
from sfa_adapters.tower_search import find_tower
from tests.support import compare

FAMILIES = (*NAVIT, *NAVIT_RASTER, *NAVIT_WINDOWS, *MINICPM_VIT)
CASES = {case.name: case for case in FAMILIES if isinstance(case, TowerCase)}


def arrangement_of(case: TowerCase, inputs: dict[str, Any], tower: Any = None) -> TokenArrangement:
    """What the record of a tower says about an input."""
    tower = case.build() if tower is None else tower
    seen: list[Any] = []

    def record(given: TowerInput) -> None:
        seen.append(given.arrangement())

    with watching_input(tower, find_tower(tower).backbone, "test", record), torch.no_grad():
        tower(**inputs)
    return seen[0]


# -- the order of the processor ---------------------------------------------------------------------------------------

# Image processor, the tower behind it, and the module that it stands in.
PROCESSORS = [
    ("qwen2_vl", "Qwen2VLImageProcessorPil", "qwen3_vl"),
    ("qwen2_vl", "Qwen2VLImageProcessorPil", "dots3_note"),
    ("qwen2_vl", "Qwen2VLImageProcessorPil", "lfm3_vl"),
    ("glm46v", "Glm46VImageProcessorPil", "glm4v"),
    ("glm46v", "Glm46VImageProcessorPil", "glm_ocr"),
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessorPil", "ernie4_5_vl_moe"),
    ("cosmos3_edge", "Cosmos3EdgeImageProcessorPil", "cosmos3_edge"),
    ("minimax_m3_vl", "MiniMaxM3VLImageProcessor", "minimax_m3_vl"),
    ("paddleocr_vl", "PaddleOCRVLImageProcessorPil", "paddleocr_vl"),
    ("hunyuan_vl", "HunYuanVLImageProcessorPil", "hunyuan_vl"),
    ("kimi_k25", "Kimi_K25ImageProcessor", "kimi_k25"),
    ("muse_glimmer", "MuseGlimmerImageProcessor", "muse_glimmer"),
    ("video_llama_3", "VideoLlama3ImageProcessorPil", "video_llama_3"),
]


@pytest.mark.parametrize(("model", "name", "tower"), PROCESSORS, ids=[f"{p[1]}-{p[2]}" for p in PROCESSORS])
def test_the_tower_takes_patches_in_the_order_of_its_processor(model: str, name: str, tower: str) -> None:
    """Each patch of the image has a grey of its own, which tells where the processor put it."""
    if tower not in CASES:
        pytest.skip(f"this version of transformers has no {tower}")
    place = f"transformers.models.{model}.image_processing_{'pil_' if name.endswith('Pil') else ''}{model}"
    processor = getattr(pytest.importorskip(place), name)()
    rows, columns, patch = 4, 6, processor.patch_size
    grey = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns)
    image = np.kron(grey, np.ones((patch, patch), np.uint8))[None].repeat(3, 0)
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
    given = processor(torch.from_numpy(image), return_tensors="pt", **options)
    grids = next(value for key, value in given.items() if key.endswith("grid_thw"))
    assert grids.tolist() == [[1, rows, columns]]
    order = given["pixel_values"].flatten(1).float().mean(-1).round().long().tolist()
    assert sorted(order) == list(range(rows * columns))

    case = CASES[tower]
    inputs = case.inputs(0)
    split = case.split(inputs)[0]  # one image of 4x6 patches
    if "merge_sizes" in split:
        split["merge_sizes"] = given["image_merge_sizes"]
    row, column = arrangement_of(case, split).images[0].places()
    if case.backbone == "navit_windows":  # the tower sorts by window what its processor listed row by row
        assert order == list(range(rows * columns))
    else:
        assert (row * columns + column).tolist() == order


# -- bad input --------------------------------------------------------------------------------------------------------

NAVITS = ("qwen3_vl", "hunyuan_vl", "qwen2_5_omni", "inkling2", "minicpmv4_6")
here = pytest.mark.parametrize("case", [CASES[name] for name in NAVITS if name in CASES], ids=str)


def sizes_of(inputs: dict[str, Any]) -> str:
    return next(name for name in inputs if name.endswith(("grid_thw", "target_sizes")))


@here
def test_bad_grids_are_named_before_the_tower_fails(case: TowerCase) -> None:
    tower, inputs = compare.injected(case)
    name, patches = sizes_of(inputs), next(iter(inputs))
    before = compare.read(case, tower, inputs)
    bad = {
        "at least one image": {patches: inputs[patches][..., :0] if case.name[:4] == "mini" else inputs[patches][:0],
                               name: inputs[name][:0]},
        r"got \d+ patches, but its": {name: inputs[name][:1]},
        r"it got \(2,\)": {name: inputs[name][:, 0]},
        "it got NoneType": {name: None},
    }  # fmt: skip
    for text, change in bad.items():
        with pytest.raises(LayoutError, match=text):
            tower(**{**inputs, **change})
    assert torch.equal(compare.read(case, tower, inputs), before)


@pytest.mark.parametrize("name", [name for name in ("qwen3_vl", "qwen2_5_omni", "minicpmv4_6") if name in CASES])
def test_a_grid_without_whole_merge_groups_is_named(name: str) -> None:
    """3x8 patches are as many as 4x6."""
    tower, inputs = compare.injected(CASES[name])
    sizes = sizes_of(inputs)
    odd = inputs[sizes].clone()
    odd[0, -2:] = torch.tensor([3, 8])
    with pytest.raises(LayoutError, match="3x8 patches has no whole 2x2 groups"):
        tower(**{**inputs, sizes: odd})


# -- positions that were given ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ("qwen2_vl", "minimax_m3_vl", "inkling2", "muse_glimmer") if n in CASES])
def test_positions_computed_ahead_give_the_same(name: str) -> None:
    """What a tower computes from the grids, some callers compute once for all forwards and pass along."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    case = CASES[name]
    tower, inputs = compare.injected(case)
    grids, module = inputs[sizes_of(inputs)], tower
    side = 1 if name == "muse_glimmer" else 2
    patches = grids * torch.tensor([1, 2, 2]) if name == "inkling2" else grids
    positions = get_vision_position_ids(patches, side, include_temporal=name == "minimax_m3_vl")
    ends = (patches.prod(-1) + case.prefix).cumsum(0)
    given: dict[str, Any] = {"position_ids": positions, "cu_seqlens": torch.nn.functional.pad(ends, (1, 0)).int()}
    if name == "muse_glimmer":
        index, bounds = get_vision_window_index(grids, 1, module.window_size, module.patch_size)  # pyright: ignore[reportArgumentType]
        given |= {"window_index": index, "cu_window_seqlens": bounds}
    plain, ahead = arrangement_of(case, inputs, tower), arrangement_of(case, {**inputs, **given}, tower)
    assert plain != ahead
    assert plain.lengths == ahead.lengths
    for one, other in zip(plain.images, ahead.images, strict=True):
        assert one.grid == other.grid
        assert torch.equal(torch.stack(one.places()).float(), torch.stack(other.places()).float())
    compare.assert_close(compare.read(case, tower, {**inputs, **given}), compare.read(case, tower, inputs))


def test_patches_that_are_left_out_keep_the_places_of_the_others() -> None:
    """The second merge group of the first image is dropped; `page_grids` says how large the whole page is."""
    from transformers.vision_utils import get_vision_position_ids

    case = CASES["qwen2_vl"]
    tower, inputs = compare.injected(case)
    keep = torch.ones(32, dtype=torch.bool)
    keep[4:8] = False
    given = {
        "hidden_states": inputs["hidden_states"][keep],
        "grid_thw": torch.tensor([[1, 4, 5], [1, 2, 4]]),  # only its products count
        "position_ids": get_vision_position_ids(inputs["grid_thw"], 2)[keep],
        "cu_seqlens": torch.tensor([0, 20, 28], dtype=torch.int32),
        "page_grids": inputs["grid_thw"][:, 1:],
    }
    first, second = arrangement_of(case, given, tower).images
    assert (first.grid, first.num_tokens, second.grid, second.num_tokens) == ((4, 6), 20, (2, 4), 8)
    row, column = first.places()
    whole = ImageTokens((4, 6), MergeGroups(2)).places()
    assert torch.equal(row, whole[0][keep[:24]].float())
    assert torch.equal(column, whole[1][keep[:24]].float())


# -- towers that merge midway, and class tokens -----------------------------------------------------------------------


@pytest.mark.skipif("minicpmv4_6" not in CASES, reason="this version of transformers has no MiniCPM-V 4.6")
def test_without_its_merger_all_layers_see_all_patches() -> None:
    case = CASES["minicpmv4_6"]
    inputs = case.inputs(0)
    merged = arrangement_of(case, inputs)
    assert merged.after_merge is not None
    assert [image.grid for image in merged.after_merge.images] == [(2, 3), (1, 2)]
    tower, whole = case.build(), {**inputs, "use_vit_merger": False}
    assert arrangement_of(case, whole, tower).after_merge is None
    inject_sfa(tower, compare.strong_config())
    assert tower(**whole).last_hidden_state.shape[1] == 32
    odd = {**whole, "target_sizes": torch.tensor([[3, 8], [2, 4]])}
    assert tower(**odd).last_hidden_state.shape[1] == 32, "nothing merges, so that sides may be odd"


@pytest.mark.skipif("minicpmv4_6" not in CASES, reason="this version of transformers has no MiniCPM-V 4.6")
def test_the_merger_of_minicpm_gets_no_bias() -> None:
    tower = inject_sfa(CASES["minicpmv4_6"].build())
    assert not any(name.startswith("vit_merger") for name in compare.structural(tower))
    names = [name for name, _ in find_tower(tower).attentions]
    assert names == [f"encoder.layers.{number}.self_attn" for number in range(3)]


def test_each_tower_is_of_one_record() -> None:
    """Patterns of one record must not fit the classes of another."""
    from sfa_adapters.registry import registered_backbones

    records = registered_backbones()
    for case in CASES.values():
        tower = case.build()
        assert [name for name, record in records.items() if record.is_tower(tower)] == [case.backbone]


@pytest.mark.skipif("minicpmv4_6" not in CASES, reason="this version of transformers has no MiniCPM-V 4.6")
def test_layouts_of_calls_are_refused_where_tokens_merge_midway() -> None:
    """A call of so and so many queries may stand in front of the merger or behind it."""
    tower, inputs = CASES["minicpmv4_6"].fresh()
    call: Any = SimpleNamespace(layer="encoder.layers.2.self_attn", segment=0, num_queries=6, num_keys=6, device="cpu")
    with layouts_of(find_tower(tower)) as layout_of:
        tower(**inputs)
        with pytest.raises(LayoutError, match="minicpm_vit tower makes one token of several"):
            layout_of(call)
