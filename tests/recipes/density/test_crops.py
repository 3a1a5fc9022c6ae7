"""Crops for training: places move with the page, print of unfit size has no weight, effects keep places."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_adapters.recipes.density.batches import halvings
from sfa_adapters.recipes.density.crops import SIDE, cut, place
from sfa_adapters.recipes.density.degrade import EFFECTS_THAT_KEEP_PLACES as EFFECTS
from sfa_adapters.recipes.density.degrade import random_effects, recoloured


def _page():
    """A page with black word boxes of 100 x 20 px, and their boxes."""
    picture = np.full((800, 600, 3), 255, np.uint8)
    boxes = np.array([(x, y, x + 100, y + 20) for y in range(40, 760, 60) for x in (60, 240, 420)], dtype=np.float32)
    for left, top, right, bottom in boxes.astype(int):
        picture[top:bottom, left:right] = 0
    return picture, boxes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.4, 3.0))
def test_dark_cells_of_a_crop_are_those_of_its_truth(seed, scale):
    picture, boxes = _page()
    rng = np.random.default_rng(seed)
    crop = cut(halvings(picture), boxes, place(rng, picture.shape[:2], scale), outside=(255, 255, 255))
    ink = 1 - crop.picture.astype(float).mean(axis=2).reshape(16, 16, 16, 16).mean(axis=(1, 3)) / 255
    sure = crop.weight > 0.99
    assert (crop.density[sure & (ink > 0.9)] > 0.8).all()  # the blur takes a little at corners
    inner = sure & (ink < 0.001)
    assert np.quantile(crop.density[inner], 0.9) < 0.45 if inner.any() else True


def test_print_that_is_too_small_or_too_large_has_no_weight():
    picture, boxes = _page()
    levels = halvings(picture)
    for scale, seen in ((0.2, False), (0.5, True), (2.0, True), (6.0, False)):
        x, y = boxes[4, :2] + (50, 10)
        view = np.array([[scale, 0, SIDE / 2 - scale * x], [0, scale, SIDE / 2 - scale * y], [0, 0, 1.0]])
        crop = cut(levels, boxes, view)
        assert crop.density[8, 8] > 0.3
        assert (crop.weight[8, 8] == 1) == seen, scale
        assert crop.picture.shape == (SIDE, SIDE, 3)


def test_cells_without_text_always_count():
    picture, boxes = _page()
    crop = cut([picture], boxes, np.array([[6.0, 0, 0], [0, 6, 0], [0, 0, 1]]))  # the empty upper margin
    assert crop.density[:8].max() == 0
    assert crop.weight[:8].min() == 1


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_keeps_places(name):
    picture, _ = _page()
    changed = EFFECTS[name](picture, np.random.default_rng(0))
    assert changed.shape == picture.shape
    assert changed.dtype == np.uint8
    before, after = (p.astype(float).mean(axis=2).ravel() for p in (picture, changed))
    assert np.corrcoef(before, after)[0, 1] > 0.5


def test_two_colours_are_the_two_colours():
    picture = np.zeros((2, 2, 3), np.uint8)
    picture[0] = 255
    changed = recoloured(picture, (200, 0, 0), (255, 235, 60))
    assert changed[0, 0].tolist() == [255, 235, 60]
    assert changed[1, 0].tolist() == [200, 0, 0]


def test_random_effects_are_a_function_of_the_seed():
    picture, _ = _page()
    for seed in range(40):
        first, again = (random_effects(picture[:SIDE, :SIDE], np.random.default_rng(seed), seed % 2 == 0) for _ in "ab")
        assert first.shape == (SIDE, SIDE, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
