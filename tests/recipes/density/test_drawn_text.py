"""Drawn lines have their ink in their boxes; maps have no text that the edge labels or a scorer must find."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from sfa_adapters.recipes.density.drawn_text import draw_lines, letters_of
from sfa_adapters.recipes.density.map_scorers import canny_map, map_scorers
from sfa_adapters.recipes.density.negatives import draw_map

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"


@pytest.mark.parametrize("x_height", [3.0, 8.0, 30.0])
def test_ink_lies_in_the_boxes_of_words(x_height):
    picture, boxes = draw_lines(
        np.full((300, 400, 3), 255, np.uint8), np.random.default_rng(2), FONTS / "DejaVuSans.ttf", x_height, (0, 0, 0)
    )
    mask = np.zeros((300, 400), dtype=bool)
    for left, top, right, bottom in boxes.round().astype(int).clip(0):
        mask[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
    ink = picture.mean(axis=2) < 128
    assert ink.sum() > 100
    assert (ink & mask).sum() > 0.99 * ink.sum()


def test_scripts_of_a_font():
    letters = letters_of(FONTS / "DejaVuSans.ttf")
    assert any("a" in script for script in letters)
    assert any("ж" in script for script in letters)
    assert not any("漢" in script for script in letters)


def test_maps_are_functions_of_the_seed():
    first, again, other = (draw_map(np.random.default_rng(seed), 128) for seed in (1, 1, 2))
    assert first.shape == (128, 128, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("shape", [(64, 96, 3), (70, 33, 3)])
def test_all_scorers_give_a_map_of_the_same_cells(shape):
    picture = np.full(shape, 255, np.uint8)
    picture[20:30, 4:30:3] = 0
    maps = {name: scorer(picture) for name, scorer in map_scorers({"a": None, "b": "rendered"}).items()}
    assert {m.shape for m in maps.values()} == {(-(-shape[0] // 16), -(-shape[1] // 16))}
    assert all(0 <= m.min() <= m.max() <= 1 for m in maps.values())
    assert canny_map(np.full(shape, 255, np.uint8)).max() == 0
