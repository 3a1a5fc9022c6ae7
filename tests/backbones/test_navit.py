"""Towers on one flat sequence: the order of their tokens against that of their image processors, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sfa_adapters.arrangement import TokenArrangement
from sfa_adapters.registry import find_tower
from sfa_adapters.testing.cases import TowerCase
from sfa_adapters.testing.towers_minicpm import MINICPM_VIT
from sfa_adapters.testing.towers_navit import NAVIT, NAVIT_RASTER, NAVIT_WINDOWS
from sfa_adapters.tower_input import TowerInput, watching_input

CASES = {case.name: case for case in (*NAVIT, *NAVIT_RASTER, *NAVIT_WINDOWS, *MINICPM_VIT)}


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
